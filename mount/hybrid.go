package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// A Backend says what serves a mount before it is swapped.
type Backend string

// The backends.
const (
	// AutoBackend is Hybrid where a trial shows that it works, else FUSE.
	AutoBackend Backend = "auto"
	// FUSE serves the whole tree.
	FUSE Backend = "fuse"
	// Hybrid is one overlayfs with three lowers: lazy.erofs, from which the
	// kernel answers everything about names and attributes; the store's whole
	// contents, which it opens from the disk; and FUSE, where it finds a file
	// that is not whole yet.
	Hybrid Backend = "hybrid"
)

// serveHybrid mounts the image as Hybrid says. With an error nothing is
// mounted.
func (m *Mount) serveHybrid(contents *lazyContents, o fusefs.Options) error {
	srv, data, err := fusefs.ServeObjects(contents, o)
	if err != nil {
		return err
	}
	over, err := hybridMount(m.reader, m.image.path(lazyName), m.store.ContentsDir(), data, m.view)
	data.Close() // overlayfs has its own reference
	if err == nil {
		defer over.Close()
		if m.view.Upper == "" { // else what it opens could be anything
			err = openFirst(over, m.reader)
		}
		if err == nil {
			err = kmount.Restrict(over, m.opts.Attributes)
		}
		if err == nil && m.view.Upper == "" { // inode numbers of a writable mount may be another filesystem's
			var werr error
			if m.opens, werr = m.watchOpens(over); werr != nil {
				m.log.Debug("the access profile will lack what the kernel reads by itself", "error", werr)
			}
		}
		if err == nil {
			err = kmount.Attach(over, m.mountpoint)
		}
		if err == nil {
			if err = srv.SeenAt(m.mountpoint); err != nil {
				err = errors.Join(err, kmount.Detach(m.mountpoint))
			}
		}
		if err != nil {
			over.Close()
		}
	}
	if err != nil {
		m.opens.Close()
		m.opens = nil
		<-srv.Done()
		return err
	}
	m.server = srv
	return nil
}

// hybridMount builds the overlayfs over an image, a folder of whole contents,
// and a FUSE mount of all, visible nowhere yet. Its source is the path of the
// image, by which it is recognised.
func hybridMount(r *erofs.Reader, imagePath, contents string, data *os.File, view shownView) (*os.File, error) {
	image, err := os.Open(imagePath)
	if err != nil {
		return nil, fmt.Errorf("mount the lazy image: %w", err)
	}
	defer image.Close()
	lower, err := view.erofs(kmount.Path(image), !r.Header().HasACL)
	if err != nil {
		return nil, err
	}
	defer lower.Close()
	o := overlay{
		source: imagePath[max(0, len(imagePath)-kmount.MaxString):], lower: lower,
		objects: []string{contents}, data: data,
	}
	view.apply(&o)
	m, err := o.mount()
	return m, view.withContext(err)
}

// openFirst opens the first file of the image that has its bytes elsewhere,
// which makes overlayfs look for them; it reads nothing, as that may need the
// source.
func openFirst(m *os.File, r *erofs.Reader) error {
	path, err := firstExternal(r)
	if err != nil || path == "" {
		return err
	}
	fd, err := unix.Openat(int(m.Fd()), path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("try the mount: open %s: %w", path, err)
	}
	return unix.Close(fd)
}

// tryHybrid finds out whether this kernel can do what Hybrid needs, on the
// filesystem of the folder dir: it mounts two files, reads one through FUSE,
// lets the other's object appear on the disk under the live mount, and reads
// that from there. The error has the kernel's own words.
func tryHybrid(dir string) (err error) {
	dir, err = os.MkdirTemp(dir, ".try-*")
	if err != nil {
		return fmt.Errorf("try the hybrid backend: %w", err)
	}
	defer os.RemoveAll(dir)
	// The same names, the same sizes, different bytes: what a read gives says
	// where it came from.
	const viaFUSE, onDisk = "by fuse", "by disk"
	remote := trialObjects{names: []string{image.Digest{0xaa}.Path(), image.Digest{0xbb}.Path()}, data: viaFUSE}
	root := &erofs.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2}
	for i, name := range []string{"early", "late"} {
		root.Children = append(root.Children, &erofs.Node{
			Name: name, Mode: unix.S_IFREG | 0o444, Nlink: 1, Size: uint64(len(viaFUSE)),
			Target: remote.names[i], Digest: bytes.Repeat([]byte{byte(i)}, len(image.Digest{})),
		})
	}
	imagePath, contents := filepath.Join(dir, "try.erofs"), filepath.Join(dir, "contents")
	if err := os.Mkdir(contents, 0o700); err != nil {
		return fmt.Errorf("try the hybrid backend: %w", err)
	}
	if err := erofs.WriteFile(imagePath, root, imageFormat); err != nil {
		return err
	}
	r, err := erofs.OpenFile(imagePath)
	if err != nil {
		return err
	}
	defer r.Close()
	srv, data, err := fusefs.ServeObjects(remote, fusefs.Options{})
	if err != nil {
		return err
	}
	defer func() { <-srv.Done() }()
	over, err := hybridMount(r, imagePath, contents, data, shownView{})
	data.Close()
	if err != nil {
		return err
	}
	defer over.Close()
	if err := readExactly(over, "early", viaFUSE); err != nil {
		return err
	}
	late := filepath.Join(contents, remote.names[1])
	if err := os.Mkdir(filepath.Dir(late), 0o700); err != nil {
		return fmt.Errorf("try the hybrid backend: %w", err)
	}
	if err := os.WriteFile(late, []byte(onDisk), 0o400); err != nil {
		return fmt.Errorf("try the hybrid backend: %w", err)
	}
	return readExactly(over, "late", onDisk)
}

// readExactly reads a small file below a mount that is visible nowhere.
func readExactly(m *os.File, path, want string) error {
	fd, err := unix.Openat(int(m.Fd()), path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("try the hybrid backend: open %s: %w", path, err)
	}
	defer unix.Close(fd)
	buf := make([]byte, len(want)+1)
	n, err := unix.Read(fd, buf)
	if err != nil {
		return fmt.Errorf("try the hybrid backend: read %s: %w", path, err)
	}
	if got := string(buf[:n]); got != want {
		return fmt.Errorf("try the hybrid backend: %s gives %q, want %q: this kernel does not look where it should", path, got, want)
	}
	return nil
}

// trialObjects are objects that all have the same bytes.
type trialObjects struct {
	names []string
	data  string
}

var _ fusefs.Objects = trialObjects{}

func (t trialObjects) Object(i int) (string, int64) { return t.names[i], int64(len(t.data)) }

func (t trialObjects) Find(name string) (int, bool) {
	for i, n := range t.names {
		if n == name {
			return i, true
		}
	}
	return 0, false
}

func (t trialObjects) ReadAt(_ context.Context, _ string, p []byte, off int64) (int, bool, error) {
	return copy(p, t.data[min(off, int64(len(t.data))):]), false, nil
}

// chooseBackend says whether the mount shall be a hybrid one, and in words
// why. The error is set when that was required and cannot be.
func (m *Mount) chooseBackend() (hybrid bool, why string, err error) {
	if m.opts.Backend == FUSE {
		return false, "--backend fuse", nil
	}
	if os.Geteuid() != 0 {
		err = errors.New("it needs root")
	} else {
		try := tryHybrid
		if m.opts.TryHybrid != nil {
			try = m.opts.TryHybrid
		}
		err = try(m.store.Images())
	}
	switch {
	case err == nil:
		return true, "tried, and the kernel can", nil
	case m.view.overlayOnly():
		return false, "", hint.Wrap(fmt.Errorf("--idmap and --upperdir need the hybrid backend: %w", err), "leave them out, or wait until the image is sealed")
	case m.opts.Backend == Hybrid:
		return false, "", hint.Wrap(fmt.Errorf("--backend hybrid: %w", err), "use --backend fuse, or auto")
	}
	return false, "not hybrid: " + oneLine(err.Error()), nil
}

// letGo has the kernel forget the files of a hybrid mount that nobody has
// open. A file that was opened while its content was not whole goes on being
// read through FUSE for as long as the kernel remembers it; the next open
// after this finds it on the disk. Reconfiguring a filesystem, even with what
// it has, drops its unused entries (reconfigure_super in the kernel's
// fs/super.c) and those of no other filesystem.
func (m *Mount) letGo() error {
	fd, err := unix.Open(m.mountpoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("let go of FUSE: %w", err)
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return fmt.Errorf("let go of FUSE: %w", err)
	}
	if int(st.Mnt_id) != m.server.MountID() {
		return errors.New("let go of FUSE: something else is mounted over it")
	}
	ctx, err := unix.Fspick(fd, "", unix.FSPICK_CLOEXEC|unix.FSPICK_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("let go of FUSE: fspick: %w", err)
	}
	defer unix.Close(ctx)
	access := "ro"
	if m.view.Upper != "" && !m.view.ReadOnly {
		access = "rw"
	}
	if err := unix.FsconfigSetFlag(ctx, access); err != nil {
		return fmt.Errorf("let go of FUSE: %w", err)
	}
	if err := unix.FsconfigReconfigure(ctx); err != nil {
		return fmt.Errorf("let go of FUSE: reconfigure: %w", err)
	}
	return nil
}

// isHybridMount reports whether a mount is a hybrid one of ours.
func isHybridMount(i kmount.Info) bool {
	return i.FSType == "overlay" && strings.HasSuffix(i.Source, "/"+lazyName)
}
