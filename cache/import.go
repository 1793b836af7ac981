package cache

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// An Imported says what Import did.
type Imported struct {
	Files   int64 `json:"files"`        // with content that were looked at
	Added   int64 `json:"added"`        // contents that the store did not have
	Bytes   int64 `json:"bytes"`        // of those
	Cloned  int64 `json:"cloned_bytes"` // of those bytes, what shares its blocks with the source
	Skipped int64 `json:"skipped"`      // files that cannot be used: compressed ostree objects, metadata
	Wrong   int64 `json:"wrong"`        // objects whose bytes are not what they are called
}

// Import takes the files below dir into the store, by sharing their blocks
// where the filesystem can (FICLONE) and by copying elsewhere. If dir has a
// folder objects with objects fanned out by two hexadecimal digits, as a
// composefs-rs or an ostree repository has, only that is taken; else every
// regular file is, of a composefs object store or of an unpacked tree.
// Nothing but bytes is taken: no modes, owners, names or links. An object
// that is called by an fs-verity digest must have it, or it is not taken and
// report hears of it; report also hears of files that cannot be read, may
// be nil, and is called from several goroutines.
//
// A nil error promises that what was taken is durable. No image needs it yet:
// the next collection that wants room, or is asked to, removes what none needs
// by then.
func (s *Store) Import(ctx context.Context, dir string, report func(path string, err error)) (*Imported, error) {
	if report == nil {
		report = func(string, error) {}
	}
	m := &importer{s: s, report: report}
	root, repository := importRoot(dir)
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(2 * runtime.GOMAXPROCS(0))
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			if path == root {
				return err
			}
			report(path, err)
			return nil
		}
		if !e.Type().IsRegular() {
			return nil
		}
		if repository && !usable(path) {
			m.res.Skipped++
			return nil
		}
		g.Go(func() error { return m.take(path) })
		return nil
	})
	err = errors.Join(err, g.Wait())
	if err == nil {
		err = s.Sync()
	}
	res := m.res
	res.Files, res.Added, res.Bytes, res.Cloned, res.Wrong = m.files.Load(), m.added.Load(), m.bytes.Load(), m.cloned.Load(), m.wrong.Load()
	if err != nil {
		return &res, fmt.Errorf("import from %s: %w", dir, err)
	}
	return &res, nil
}

type importer struct {
	s      *Store
	report func(string, error)
	res    Imported // Skipped only, by the walk

	files, added, bytes, cloned, wrong atomic.Int64
}

// importRoot returns where in dir the files are.
func importRoot(dir string) (root string, repository bool) {
	objects := filepath.Join(dir, "objects")
	entries, err := os.ReadDir(objects)
	if err != nil {
		return dir, false
	}
	for _, e := range entries {
		if _, err := hex.DecodeString(e.Name()); err == nil && len(e.Name()) == 2 && e.IsDir() {
			return objects, true
		}
	}
	return dir, false
}

// usable reports whether an object of a repository is a file's content as it
// is: of ostree's kinds (ostree-repo(1)) only the bare ".file" is.
func usable(path string) bool {
	switch filepath.Ext(path) {
	case "", ".file":
		return true
	}
	return false
}

// take takes one file.
func (m *importer) take(path string) error {
	fd, err := openat(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK)
	if err != nil {
		m.report(path, err)
		return nil
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size == 0 {
		return nil // empty files are in the images themselves
	}
	m.files.Add(1)
	t, err := m.s.temp()
	if err != nil {
		return err
	}
	defer func() { m.s.discard(t) }()
	cloned := unix.IoctlFileClone(t.fd, fd) == nil
	if !cloned {
		object, content, err := hashFile(fd, st.Size, true, true)
		if err != nil {
			m.report(path, err)
			return nil
		}
		if !m.right(path, fd, st.Size, object) {
			return nil
		}
		have, err := hasSize(m.s.contentsDir.fd, content.Path(), st.Size)
		if have || err != nil {
			return err
		}
		if err := copyFile(t.fd, fd, st.Size); err != nil {
			return fmt.Errorf("copy %s: %w", path, err)
		}
	}
	// What is taken is hashed, not what was read before: the source may be
	// written to.
	var now unix.Stat_t
	if err := unix.Fstat(t.fd, &now); err != nil {
		return err
	}
	object, content, err := hashFile(t.fd, now.Size, true, true)
	if err != nil {
		return fmt.Errorf("read the copy of %s: %w", path, err)
	}
	if cloned && !m.right(path, t.fd, now.Size, object) {
		return nil
	}
	have, err := hasSize(m.s.contentsDir.fd, content.Path(), now.Size)
	if have || err != nil {
		return err
	}
	if err := m.s.meter.admit(now.Size); err != nil {
		return err
	}
	if err := m.s.storeTemp(&t, content, object, now.Size); err != nil {
		return fmt.Errorf("import %s: %w", path, err)
	}
	m.added.Add(1)
	m.bytes.Add(now.Size)
	if cloned {
		m.cloned.Add(now.Size)
	}
	return nil
}

// right compares an object with its name, if that is an fs-verity digest.
func (m *importer) right(path string, fd int, size int64, object image.Digest) bool {
	name := filepath.Base(filepath.Dir(path)) + filepath.Base(path)
	want, err := hex.DecodeString(name)
	if err != nil || len(filepath.Base(filepath.Dir(path))) != 2 {
		return true
	}
	var got []byte
	switch len(want) {
	case verity.SHA256.Size():
		got = object[:]
	case verity.SHA512.Size():
		f, err := dupFile(fd, path)
		if err == nil {
			got, err = verity.Digest(io.NewSectionReader(f, 0, size), verity.SHA512)
			f.Close()
		}
		if err != nil {
			m.report(path, err)
			return false
		}
	default:
		return true
	}
	if !bytes.Equal(got, want) {
		m.wrong.Add(1)
		m.report(path, fmt.Errorf("its fs-verity digest is %x, and not its name", got))
		return false
	}
	return true
}

// copyFile copies size bytes.
func copyFile(dst, src int, size int64) error {
	buf := hashBuffers.Get().(*[64 * verity.BlockSize]byte)
	defer hashBuffers.Put(buf)
	for off := int64(0); off < size; {
		n, err := pread(src, buf[:min(int64(len(buf)), size-off)], off)
		if err == nil && n == 0 {
			err = fmt.Errorf("it was cut short at byte %d", off)
		}
		if err == nil {
			err = pwrite(dst, buf[:n], off)
		}
		if err != nil {
			return err
		}
		off += int64(n)
	}
	return nil
}
