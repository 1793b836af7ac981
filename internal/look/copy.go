package look

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// CopyOptions say how files are copied out of a tree.
type CopyOptions struct {
	Recursive bool // folders too, with everything in them
	// Fetch, if not nil, brings an object near before it is read; several are
	// under way at once.
	Fetch func(ctx context.Context, object string) error
	// File, if not nil, opens an object that is a whole file, whose blocks
	// the copy then shares where the filesystem can.
	File func(object string) (*os.File, error)
	// Bytes, if not nil, hears of bytes as they are written.
	Bytes func(n int64)
	// Warn hears of what could not be kept of a file that was copied.
	Warn func(path string, err error)
}

// A Copied says what Copy did.
type Copied struct {
	Files int   `json:"files"` // and links, devices and folders
	Bytes int64 `json:"bytes"`
}

// fetchesAhead is how many objects are fetched at once in front of the copy.
const fetchesAhead = 16

// Copy copies a file of the tree, or with Recursive a folder and everything
// below it, to the name in the folder dir. Links stay links, also hard ones
// among what is copied; modes, times and extended attributes are kept, owners
// as root. A name that is there is replaced, a folder that is there is filled;
// nothing is ever followed: no symbolic link, of the image or of what is there
// already, leads a byte out of dir/name.
func (t *Tree) Copy(ctx context.Context, f File, dir, name string, o CopyOptions) (Copied, error) {
	if f.IsDir() && !o.Recursive {
		return Copied{}, fmt.Errorf("copy %s: it is a folder", f.Path)
	}
	if name == "" || name == "." || name == ".." || filepath.Base(name) != name {
		return Copied{}, fmt.Errorf("copy %s: %q is no name for it", f.Path, name)
	}
	return t.copyBy(ctx, f, dir, o, func(c *copier) error { return c.copy(int(c.root.Fd()), name, name, f) })
}

// CopyInto is Copy for what is in a folder, into the folder dir, which keeps its
// own attributes.
func (t *Tree) CopyInto(ctx context.Context, f File, dir string, o CopyOptions) (Copied, error) {
	return t.copyBy(ctx, f, dir, o, func(c *copier) error {
		all, err := t.Children(f)
		for _, child := range all {
			if err == nil {
				err = c.copy(int(c.root.Fd()), child.Name(), child.Name(), child)
			}
		}
		return err
	})
}

// copyBy has do copy f, or what is in it, while its bytes are fetched ahead.
func (t *Tree) copyBy(ctx context.Context, f File, dir string, o CopyOptions, do func(*copier) error) (Copied, error) {
	to, err := os.Open(dir)
	if err != nil {
		return Copied{}, err
	}
	defer to.Close()
	ctx, stop := context.WithCancel(ctx)
	c := &copier{t: t, o: o, ctx: ctx, root: to, links: map[uint64]string{}, folders: folders{}, isRoot: os.Geteuid() == 0}
	ahead := c.fetchAhead(f)
	err = do(c)
	stop()
	if ferr := ahead(); err == nil && !errors.Is(ferr, context.Canceled) {
		err = ferr
	}
	return c.done, err
}

type copier struct {
	t       *Tree
	o       CopyOptions
	ctx     context.Context
	root    *os.File          // where the copy is made
	links   map[uint64]string // by nid: the path below root of an inode with several names
	folders folders
	done    Copied
	isRoot  bool
}

// fetchAhead begins to fetch what will be copied, in the same order. The
// function it returns waits for the end.
func (c *copier) fetchAhead(f File) func() error {
	if c.o.Fetch == nil {
		return func() error { return nil }
	}
	done := make(chan error, 1)
	go func() {
		g, ctx := errgroup.WithContext(c.ctx)
		g.SetLimit(fetchesAhead)
		err := c.t.Walk(f, func(f File, _ int) error {
			object, err := c.t.Object(f)
			if err == nil && object != "" {
				g.Go(func() error { return c.o.Fetch(ctx, object) })
			}
			return errors.Join(err, ctx.Err())
		})
		if gerr := g.Wait(); gerr != nil {
			err = gerr
		}
		done <- err
	}()
	return func() error { return <-done }
}

// copy copies a file to the name in the folder dir, at path below the root of
// the copy.
func (c *copier) copy(dir int, name, path string, f File) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	if f.IsDir() {
		return c.folder(dir, name, path, f)
	}
	if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	if f.Nlink > 1 {
		if first, ok := c.links[f.NID]; ok {
			return c.link(first, dir, name, path)
		}
		c.links[f.NID] = path
	}
	c.done.Files++
	if f.IsRegular() {
		return c.regular(dir, name, path, f)
	}
	var err error
	if f.IsSymlink() {
		var target string
		if target, err = c.t.Target(f); err == nil {
			err = unix.Symlinkat(target, dir, name)
		}
	} else {
		err = unix.Mknodat(dir, name, f.Mode&^0o7777|0o600, int(f.Rdev))
		if err != nil && !c.isRoot {
			c.done.Files--
			delete(c.links, f.NID)
			c.warn(path, fmt.Errorf("a device is not copied without root: %w", err))
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	return c.attributes(dir, name, nil, path, f)
}

// folder copies a folder and what is in it.
func (c *copier) folder(dir int, name, path string, f File) error {
	if err := c.folders.enter(f); err != nil {
		return err
	}
	if err := unix.Mkdirat(dir, name, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make folder %s: %w", path, err)
	}
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open folder %s, which must not be a link: %w", path, err)
	}
	made := os.NewFile(uintptr(fd), path)
	defer made.Close()
	c.done.Files++
	all, err := c.t.Children(f)
	if err != nil {
		return err
	}
	for _, child := range all {
		if err := c.copy(fd, child.Name(), filepath.Join(path, child.Name()), child); err != nil {
			return err
		}
	}
	return c.attributes(dir, name, made, path, f)
}

// link makes a further name of what was copied to first.
func (c *copier) link(first string, dir int, name, path string) error {
	parent, err := unix.Openat2(int(c.root.Fd()), filepath.Dir(first), &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS,
	})
	if err == nil {
		defer unix.Close(parent)
		err = unix.Linkat(parent, filepath.Base(first), dir, name, 0)
	}
	if err != nil {
		return fmt.Errorf("link %s to %s: %w", path, first, err)
	}
	c.done.Files++
	return nil
}

func (c *copier) regular(dir int, name, path string, f File) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make %s: %w", path, err)
	}
	out := os.NewFile(uintptr(fd), path)
	if err = c.data(out, f); err == nil {
		err = c.attributes(dir, name, out, path, f)
	}
	if cerr := out.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("write %s: %w", path, cerr)
	}
	if err != nil {
		unix.Unlinkat(dir, name, 0) // half a file is none
	}
	return err
}

// data copies a file's bytes: by sharing blocks, or else without what is zero.
func (c *copier) data(out *os.File, f File) error {
	object, err := c.t.Object(f)
	if err != nil {
		return err
	}
	if object != "" && c.o.File != nil {
		if whole, err := c.o.File(object); err == nil {
			err := unix.IoctlFileClone(int(out.Fd()), int(whole.Fd()))
			whole.Close()
			if err == nil {
				c.count(f.Size)
				return nil
			}
		}
	}
	in, err := c.t.Open(c.ctx, f)
	if err != nil {
		return err
	}
	if err := out.Truncate(f.Size); err != nil {
		return fmt.Errorf("write %s: %w", out.Name(), err)
	}
	buf := make([]byte, min(1<<20, max(1, f.Size)))
	for off := int64(0); off < f.Size; {
		n, err := in.ReadAt(buf[:min(int64(len(buf)), f.Size-off)], off)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if n == 0 {
			return fmt.Errorf("read %s: %w", f.Path, io.ErrUnexpectedEOF)
		}
		if err := writeSparse(out, buf[:n], off); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		off += int64(n)
		c.count(int64(n))
	}
	return nil
}

func (c *copier) count(n int64) {
	c.done.Bytes += n
	if c.o.Bytes != nil {
		c.o.Bytes(n)
	}
}

var zeros [64 << 10]byte

// writeSparse writes p but for pieces that are all zero.
func writeSparse(out io.WriterAt, p []byte, off int64) error {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			if _, err := out.WriteAt(p[:n], off); err != nil {
				return err
			}
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

func (c *copier) warn(path string, err error) {
	if c.o.Warn != nil {
		c.o.Warn(path, err)
	}
}

// attributes gives a copy its owner, extended attributes, mode and time, in
// this order: a change of owner takes setuid bits and capabilities away. made
// is the open file, nil for what cannot be opened.
func (c *copier) attributes(dir int, name string, made *os.File, path string, f File) error {
	if c.isRoot {
		if err := unix.Fchownat(dir, name, int(f.UID), int(f.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return fmt.Errorf("change the owner of %s: %w", path, err)
		}
	}
	all, err := c.t.Xattrs(f)
	if err != nil {
		return err
	}
	for _, x := range all {
		if made != nil {
			err = unix.Fsetxattr(int(made.Fd()), x.Name, x.Value, 0)
		} else {
			err = unix.Lsetxattr(fmt.Sprintf("/proc/self/fd/%d/%s", dir, name), x.Name, x.Value, 0)
		}
		if err != nil {
			c.warn(path, fmt.Errorf("the attribute %s is not kept: %w", x.Name, err))
		}
	}
	if made != nil {
		mode := f.Mode & 0o7777
		if !c.isRoot {
			mode &^= unix.S_ISUID | unix.S_ISGID // they would be another's
		}
		err = unix.Fchmod(int(made.Fd()), mode)
	} else if !f.IsSymlink() {
		err = unix.Fchmodat(dir, name, f.Mode&0o7777, 0)
	}
	if err == nil || made == nil && f.IsSymlink() {
		when := unix.Timespec{Sec: f.MtimeSec, Nsec: int64(f.MtimeNsec)}
		err = unix.UtimesNanoAt(dir, name, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW)
	}
	if err != nil {
		return fmt.Errorf("set mode and time of %s: %w", path, err)
	}
	return nil
}
