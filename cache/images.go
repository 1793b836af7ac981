package cache

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
)

// What the store knows of the files in an image's folder, which package mount
// writes and draws.
const (
	ChunksName = "chunks"       // package image's index: which contents the image needs
	LazyName   = "lazy.erofs"   // open as long as somebody serves or mounts it
	SealedName = "sealed.erofs" // likewise
	RecordName = "sealed.json"  // says that the image is Sealed; goes before what it promises
)

// ProfilesName is the folder of the store in which package mount keeps the access
// profiles of repositories.
const ProfilesName = "profiles"

// Names in the store's folder that belong to leases and collection.
const (
	leasesName  = "leases" // leases/<manifest digest>: locked while the image is used, its mtime the last use
	pinsName    = "pins"   // pins/<manifest digest>: the image is kept
	collectName = "collect.lock"
)

// ImageDir returns the folder of the image with manifest digest d.
func (s *Store) ImageDir(d image.Digest) string {
	return filepath.Join(s.Images(), hex.EncodeToString(d[:]))
}

func (s *Store) leasePath(d image.Digest) string {
	return filepath.Join(s.root, leasesName, hex.EncodeToString(d[:]))
}

func (s *Store) pinPath(d image.Digest) string {
	return filepath.Join(s.root, pinsName, hex.EncodeToString(d[:]))
}

// A Lease keeps an image, and every content it needs, from being evicted. It
// is a shared flock(2) on the image's file in leases/, so it ends with the last
// process that has the descriptor, however that ends.
type Lease struct{ f *os.File }

// Lease takes a lease on the image with manifest digest d, whether or not the
// store has it yet; it waits while the image is being evicted. A nil error
// promises that nothing of the image that is there from now on is removed
// before Close. Where the store cannot be written to, and so nothing can
// be removed from it, the lease is an empty promise and no error.
func (s *Store) Lease(d image.Digest) (*Lease, error) {
	f, err := lockFile(s.leasePath(d), unix.LOCK_SH)
	switch {
	case err == nil:
		l := &Lease{f}
		l.touch()
		return l, nil
	case isFull(err) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES):
		// What is served is open, which eviction notices as well (inUse).
		s.log.Warn("no lease can be written", "image", d.String(), "error", err)
		return &Lease{}, nil
	}
	return nil, fmt.Errorf("lease image %s: %w", d, err)
}

// File returns the descriptor that holds the lease, for a process that is to
// hold it on: a copy of it, passed on or inherited, is the same lease. Nil if
// the store could not be written to.
func (l *Lease) File() *os.File { return l.f }

// Close notes the time as that of the last use and ends the lease, unless
// another process has a copy of its descriptor.
func (l *Lease) Close() error {
	if l == nil || l.f == nil {
		return nil
	}
	l.touch()
	f := l.f
	l.f = nil
	return f.Close()
}

func (l *Lease) touch() {
	now := time.Now()
	os.Chtimes(l.f.Name(), now, now) // only the order of eviction hangs on it
}

// lockFile opens the file at path, makes it if need be, and locks it. Who
// removes such a file holds its lock, so the lock counts only if the file
// still has its name. With LOCK_NB a lock that is taken is EWOULDBLOCK.
func lockFile(path string, how int) (*os.File, error) {
	for {
		fd, err := openat(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_CREAT|unix.O_NOFOLLOW)
		if errors.Is(err, unix.EROFS) { // it may be there all the same
			fd, err = openat(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_NOFOLLOW)
			if errors.Is(err, unix.ENOENT) {
				err = unix.EROFS
			}
		}
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		if err := retry(func() error { return unix.Flock(fd, how) }); err != nil {
			unix.Close(fd)
			return nil, &os.PathError{Op: "lock", Path: path, Err: err}
		}
		var f, n unix.Stat_t
		err = unix.Fstat(fd, &f)
		nerr := unix.Fstatat(unix.AT_FDCWD, path, &n, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && nerr == nil && f.Ino == n.Ino && f.Dev == n.Dev {
			return os.NewFile(uintptr(fd), path), nil
		}
		unix.Close(fd)
		if err != nil {
			return nil, err
		}
		if nerr != nil && !errors.Is(nerr, unix.ENOENT) {
			return nil, nerr
		}
	}
}

// steady keeps contents from being removed between a look at what is there and
// the use of what was seen, until the function it returns is called. Whoever
// collects looks at the list of images and removes under the same lock,
// exclusively, a piece at a time. So an image whose folder is there before the
// look is either seen by who collects, or sees that a content is gone.
func (s *Store) steady() (func(), error) {
	f, err := lockFile(filepath.Join(s.root, collectName), unix.LOCK_SH)
	if err != nil {
		if isFull(err) || errors.Is(err, unix.EROFS) || errors.Is(err, unix.EACCES) {
			return func() {}, nil // nothing is removed here either
		}
		return nil, err
	}
	return func() { f.Close() }, nil
}

// inUse reports whether somebody has the image: a process holds a lease, or any
// mount, of this or another namespace, attached or detached, of the kernel's or
// FUSE, has one of its EROFS images open.
//
// The kernel gives a write lease (fcntl(2), F_SETLEASE) on a file only while
// nobody else has it open, and an EROFS mount, a loop device and a mapping
// each keep the file open. So this is exact where mount tables are not: they
// lack detached mounts and namespaces without a process. Where a filesystem
// has no such leases the answer is yes.
func (s *Store) inUse(d image.Digest) (bool, error) {
	f, err := lockFile(s.leasePath(d), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return true, err
	}
	defer f.Close()
	return s.isOpen(d)
}

// isOpen is inUse for who holds the image's lock.
func (s *Store) isOpen(d image.Digest) (bool, error) {
	for _, name := range []string{LazyName, SealedName} {
		fd, err := openat(unix.AT_FDCWD, filepath.Join(s.ImageDir(d), name), unix.O_RDONLY|unix.O_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return true, err
		}
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_WRLCK)
		unix.Close(fd) // ends the lease too
		if err == nil {
			continue
		}
		if !errors.Is(err, unix.EAGAIN) {
			s.log.Warn("it cannot be told whether an image is mounted; it is kept", "image", d.String(), "error", err)
		}
		return true, nil
	}
	return false, nil
}

// Pin keeps the image with manifest digest d in the store until Unpin. A nil
// error promises that it stays pinned over a power cut.
func (s *Store) Pin(d image.Digest) error {
	if _, err := os.Lstat(s.ImageDir(d)); err != nil {
		return fmt.Errorf("pin image %s: %w", d, err)
	}
	f, err := os.OpenFile(s.pinPath(d), os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = errors.Join(f.Sync(), f.Close(), durable.SyncDir(filepath.Dir(s.pinPath(d))))
	}
	if err != nil {
		return fmt.Errorf("pin image %s: %w", d, err)
	}
	return nil
}

// Unpin ends what Pin began; an image that is not pinned is no error.
func (s *Store) Unpin(d image.Digest) error {
	if err := os.Remove(s.pinPath(d)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin image %s: %w", d, err)
	}
	return nil
}

// ImageDigests lists the images that have a folder in the store.
func (s *Store) ImageDigests() ([]image.Digest, error) {
	entries, err := os.ReadDir(s.Images())
	if err != nil {
		return nil, err
	}
	var all []image.Digest
	for _, e := range entries {
		if d, ok := parseHex(e.Name()); ok && e.IsDir() {
			all = append(all, d)
		}
	}
	return all, nil
}

// litterAge is how old what nobody locks must be before it counts as litter of
// a process that died.
const litterAge = time.Hour

// cleanImages removes folders of images that were never finished, or were on
// their way out, when their process died.
func (s *Store) cleanImages() error {
	entries, err := os.ReadDir(s.Images())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") {
			continue
		}
		fi, err := e.Info()
		if err == nil && time.Since(fi.ModTime()) > litterAge {
			err = os.RemoveAll(filepath.Join(s.Images(), e.Name()))
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// isFull reports whether an error is that of a filesystem or a quota that is
// used up.
func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }
