package composefs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A Store is a folder of objects; the package comment draws it. Its methods
// may be called from several goroutines, and other processes may fill the same
// folder at the same time.
type Store struct {
	dir      string
	alg      verity.Algorithm
	seen     sync.Map    // payloads that a call of Add has seen to
	noVerity atomic.Bool // the filesystem cannot do fs-verity
}

// OpenStore returns the store in the folder dir, which is made, with those
// above it, if it is not there. Its objects are named by their digests of alg.
func OpenStore(dir string, alg verity.Algorithm) (*Store, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("store of objects: %w", err)
	}
	return &Store{dir: dir, alg: alg}, nil
}

// Add puts the content of the regular file src into the store under its
// fs-verity digest, unless an object of that name and size is there. It
// shares the file's blocks where the filesystem can (FICLONE) and copies
// elsewhere, and moves src's offset. A nil error promises that the object is
// whole, and, where the filesystem has fs-verity, that the kernel measured the
// digest; it survives a power cut after Sync only.
func (s *Store) Add(src *os.File, digest []byte) error {
	name := payload(digest)
	if _, again := s.seen.LoadOrStore(name, struct{}{}); again {
		return nil
	}
	fi, err := src.Stat()
	if err != nil {
		return fmt.Errorf("object %s: %w", name, err)
	}
	path := filepath.Join(s.dir, name)
	if there, err := os.Lstat(path); err == nil && there.Mode().IsRegular() && there.Size() == fi.Size() {
		return nil
	}
	if err := s.write(path, src, fi.Size(), digest); err != nil {
		return fmt.Errorf("object %s: %w", name, err)
	}
	return nil
}

// write makes the object and gives it its name.
func (s *Store) write(path string, src *os.File, size int64, digest []byte) error {
	tmp, err := os.CreateTemp(s.dir, ".tmp*")
	if err != nil {
		return err
	}
	defer func() {
		if tmp != nil {
			os.Remove(tmp.Name())
		}
	}()
	err = fillFrom(tmp, src, size)
	if err == nil {
		err = tmp.Chmod(0o644)
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err == nil && !s.noVerity.Load() {
		err = s.seal(tmp.Name(), digest)
	}
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if errors.Is(err, os.ErrNotExist) { // the folder of the first two digits
		if err = os.Mkdir(filepath.Dir(path), 0o755); err == nil || errors.Is(err, os.ErrExist) {
			err = os.Rename(tmp.Name(), path)
		}
	}
	if err == nil {
		tmp = nil
	}
	return err
}

func fillFrom(dst, src *os.File, size int64) error {
	if unix.IoctlFileClone(int(dst.Fd()), int(src.Fd())) == nil {
		return nil
	}
	if _, err := src.Seek(0, io.SeekStart); err != nil {
		return err
	}
	n, err := io.Copy(dst, src)
	if err == nil && n != size {
		err = errChanged
	}
	return err
}

// seal enables fs-verity on the file at path, which nobody has open for
// writing any more, and holds the kernel's digest against the one it should
// have.
func (s *Store) seal(path string, digest []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = verity.EnableWith(f, s.alg)
	if _, unsupported := errors.AsType[*verity.NotSupportedError](err); unsupported {
		s.noVerity.Store(true)
		return nil
	}
	if err != nil {
		return err
	}
	alg, got, err := verity.Measure(f)
	if err != nil {
		return err
	}
	return verity.Compare(path, alg, digest, got)
}

// Sync makes every object that Add has seen to survive a power cut, by one
// syncfs(2).
func (s *Store) Sync() error {
	d, err := os.Open(s.dir)
	if err != nil {
		return fmt.Errorf("sync store of objects: %w", err)
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("sync store of objects %s: %w", s.dir, err)
	}
	return nil
}
