package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// objectMode is the mode of every object: owner and true mode of a file are
// in the images that refer to it.
const objectMode = 0o644

// verityXattr holds the fs-verity SHA-256 digest of an object, 32 bytes, so
// that it need not be computed again where the kernel cannot be asked.
const verityXattr = "user.cfs-fuse.verity"

// A temp is a file that has no digest's name yet.
type temp struct {
	fd   int
	name string // in staging/, or empty: unnamed, gone with its descriptor
}

// temp makes an empty temporary file, open for reading and writing.
func (s *Store) temp() (temp, error) {
	t := temp{fd: -1}
	var err error
	if s.noTmpfile {
		var f *os.File
		if f, err = durable.Temp(filepath.Join(s.root, "staging"), objectMode); err == nil {
			t.name = filepath.Base(f.Name())
			t.fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0) // keeps the lock
			f.Close()
			if err != nil {
				unix.Unlinkat(s.stagingDir.fd, t.name, 0)
			}
		}
	} else {
		t.fd, err = openat(s.stagingDir.fd, ".", unix.O_TMPFILE|unix.O_RDWR)
	}
	if err == nil && s.chmod && t.name == "" {
		if err = unix.Fchmod(t.fd, objectMode); err != nil {
			s.discard(t)
		}
	}
	return t, err
}

// discard closes t and takes its temporary name away.
func (s *Store) discard(t temp) error {
	if t.name != "" {
		unix.Unlinkat(s.stagingDir.fd, t.name, 0)
	}
	return unix.Close(t.fd)
}

// link gives t the name path below the folder.
func (s *Store) link(t temp, folder int, path string) error {
	switch {
	case t.name != "":
		return unix.Linkat(s.stagingDir.fd, t.name, folder, path, 0)
	case s.linkEmpty:
		return unix.Linkat(t.fd, "", folder, path, unix.AT_EMPTY_PATH)
	}
	return unix.Linkat(unix.AT_FDCWD, procFD(t.fd), folder, path, unix.AT_SYMLINK_FOLLOW)
}

func procFD(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func openat(folder int, path string, flags int) (fd int, err error) {
	err = retry(func() error {
		fd, err = unix.Openat(folder, path, flags|unix.O_CLOEXEC, objectMode)
		return err
	})
	return fd, err
}

// storeSmall stores data, all of the content d, and gives it its names.
func (s *Store) storeSmall(d image.Digest, data []byte) error {
	t, err := s.temp()
	if err != nil {
		return err
	}
	defer func() { s.discard(t) }()
	if err := pwrite(t.fd, data, 0); err != nil {
		return err
	}
	h := hashes.Get().(*verity.Hash)
	defer hashes.Put(h)
	h.Reset()
	h.Write(data)
	return s.storeTemp(&t, d, image.Digest(h.Sum()), int64(len(data)))
}

// storeTemp makes the whole and checked temporary file t an object and gives it
// its names. It may replace t's descriptor.
func (s *Store) storeTemp(t *temp, content, object image.Digest, size int64) error {
	if !s.noVerity.Load() && t.name == "" {
		// Verity cannot be enabled on a file that is open for writing. (A
		// named temporary file would lose its lock; objectDigest enables later.)
		ro, err := openat(unix.AT_FDCWD, procFD(t.fd), unix.O_RDONLY)
		if err != nil {
			return err
		}
		s.setXattr(ro, object)
		err = unix.Close(t.fd)
		t.fd = ro
		if err != nil {
			return err
		}
		if err := s.enable(t.fd); err != nil {
			return err
		}
	} else {
		s.setXattr(t.fd, object)
	}
	return s.name(*t, content, object, size)
}

// hashes holds *verity.Hash for SHA-256: one is larger than most files.
var hashes = sync.Pool{New: func() any { return verity.New(verity.SHA256) }}

// setXattr notes the digest on the file. It is there for speed only, so that
// failing is no error.
func (s *Store) setXattr(fd int, object image.Digest) {
	if s.noXattr.Load() {
		return
	}
	if err := unix.Fsetxattr(fd, verityXattr, object[:], 0); errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		s.noXattr.Store(true)
	}
}

// enable enables fs-verity where the filesystem can, and asks no more once it
// said that it cannot. The file must be open nowhere for writing.
func (s *Store) enable(fd int) error {
	if s.noVerity.Load() {
		return nil
	}
	f, err := dupFile(fd, "object")
	if err != nil {
		return err
	}
	defer f.Close()
	err = verity.Enable(f)
	if _, no := errors.AsType[*verity.NotSupportedError](err); no {
		if !s.noVerity.Swap(true) {
			s.log.Info("objects are stored without fs-verity", "root", s.root, "error", err)
		}
		return nil
	}
	return err
}

func dupFile(fd int, name string) (*os.File, error) {
	dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(dup), name), nil
}

// name gives the whole and checked file t of size bytes its two names, the
// object's first. If another process was faster, its file is kept and this
// one's is not named. What has a name but not the size is replaced.
func (s *Store) name(t temp, content, object image.Digest, size int64) error {
	for try := 0; ; try++ {
		err := link(s.objectsDir.fd, object.Path(), size, func(path string) error {
			return s.link(t, s.objectsDir.fd, path)
		})
		own := err == nil
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		err = link(s.contentsDir.fd, content.Path(), size, func(path string) error {
			if own {
				return s.link(t, s.contentsDir.fd, path)
			}
			return unix.Linkat(s.objectsDir.fd, object.Path(), s.contentsDir.fd, path, 0)
		})
		if errors.Is(err, unix.ENOENT) && try < 3 {
			continue // somebody removed the object in between
		}
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
		return err
	}
}

// link calls do to make path, and makes the fan-out folder if it is missing.
// EEXIST means that path stands for a regular file of the right size.
func link(folder int, path string, size int64, do func(path string) error) error {
	for try := 0; ; try++ {
		err := do(path)
		switch {
		case err == nil || try == 3:
			return err
		case errors.Is(err, unix.ENOENT):
			merr := unix.Mkdirat(folder, path[:2], 0o700)
			if errors.Is(merr, unix.EEXIST) && try > 0 {
				return err
			}
			if merr != nil && !errors.Is(merr, unix.EEXIST) {
				return merr
			}
		case errors.Is(err, unix.EEXIST):
			ok, serr := hasSize(folder, path, size)
			if serr != nil {
				return serr
			}
			if ok {
				return err
			}
			if uerr := unix.Unlinkat(folder, path, 0); uerr != nil && !errors.Is(uerr, unix.ENOENT) {
				return uerr
			}
		default:
			return err
		}
	}
}

// hasSize reports whether path is a regular file of size bytes.
func hasSize(folder int, path string, size int64) (bool, error) {
	var st unix.Stat_t
	err := retry(func() error { return unix.Fstatat(folder, path, &st, unix.AT_SYMLINK_NOFOLLOW) })
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size == size, err
}

// A wholeFile is an open whole content.
type wholeFile struct {
	fd   int
	size int64
}

func (w wholeFile) close() { unix.Close(w.fd) }

// named reports whether the file still has both its names. One that has lost
// some, perhaps because it was found damaged, is looked up anew.
func (w wholeFile) named() bool {
	var st unix.Stat_t
	return unix.Fstat(w.fd, &st) == nil && st.Nlink >= 2
}

// openContent opens a whole content by its digest.
func (s *Store) openContent(d image.Digest) (wholeFile, error) {
	fd, err := openat(s.contentsDir.fd, d.Path(), unix.O_RDONLY|unix.O_NOFOLLOW)
	if err != nil {
		return wholeFile{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		unix.Close(fd)
		return wholeFile{}, err
	}
	return wholeFile{fd, st.Size}, nil
}

// objectDigest returns the fs-verity digest of an open whole content: the
// kernel's if it can be asked, else the noted one, else computed. It enables
// fs-verity on objects that were stored when the kernel could not do it.
func (s *Store) objectDigest(w wholeFile) (image.Digest, error) {
	var d image.Digest
	if !s.noVerity.Load() {
		f, err := dupFile(w.fd, "object")
		if err != nil {
			return d, err
		}
		defer f.Close()
		alg, sum, err := verity.Measure(f)
		if errors.Is(err, verity.ErrNotEnabled) {
			if err = s.enable(w.fd); err != nil {
				return d, err
			}
			alg, sum, err = verity.Measure(f)
		}
		if err == nil && alg == verity.SHA256 {
			return image.Digest(sum), nil
		}
		if _, no := errors.AsType[*verity.NotSupportedError](err); no {
			s.noVerity.Store(true)
		} else if err != nil && !errors.Is(err, verity.ErrNotEnabled) {
			return d, err
		}
	}
	if n, err := unix.Fgetxattr(w.fd, verityXattr, d[:]); err == nil && n == len(d) {
		return d, nil
	}
	sum, _, err := hashFile(w.fd, w.size, true, false)
	if err != nil {
		return d, err
	}
	s.setXattr(w.fd, sum)
	return sum, nil
}

// restoreObject gives a whole content the object's name again, which somebody
// removed.
func (s *Store) restoreObject(ct image.Content, object image.Digest) error {
	err := link(s.objectsDir.fd, object.Path(), ct.Size, func(path string) error {
		return unix.Linkat(s.contentsDir.fd, ct.Digest.Path(), s.objectsDir.fd, path, 0)
	})
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// hashBuffers holds the buffers that files are read through to hash them: a
// whole number of fs-verity blocks, small enough for a processor's cache.
var hashBuffers = sync.Pool{New: func() any { return new([64 * verity.BlockSize]byte) }}

// hashFile reads a file of size bytes once and returns its fs-verity digest
// and the SHA-256 digest of its content, those that are wanted. A file
// that is shorter is io.ErrUnexpectedEOF.
func hashFile(fd int, size int64, wantObject, wantContent bool) (object, content image.Digest, err error) {
	buf := hashBuffers.Get().(*[64 * verity.BlockSize]byte)
	defer hashBuffers.Put(buf)
	v := hashes.Get().(*verity.Hash)
	defer hashes.Put(v)
	v.Reset()
	h := sha256.New()
	for off := int64(0); off < size; {
		b := buf[:min(int64(len(buf)), size-off)]
		n, err := pread(fd, b, off)
		if err == nil && n < len(b) {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return object, content, err
		}
		if wantObject {
			v.Write(b)
		}
		if wantContent {
			h.Write(b)
		}
		off += int64(n)
	}
	if wantObject {
		object = image.Digest(v.Sum())
	}
	if wantContent {
		h.Sum(content[:0])
	}
	return object, content, nil
}

// pread fills p from offset off. It is short only at the end of the file.
func pread(fd int, p []byte, off int64) (n int, err error) {
	for n < len(p) {
		m, err := unix.Pread(fd, p[n:], off+int64(n))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return n, os.NewSyscallError("pread", err)
		}
		if m == 0 {
			break
		}
		n += m
	}
	return n, nil
}

// pwrite writes all of p at offset off.
func pwrite(fd int, p []byte, off int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(fd, p, off)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return os.NewSyscallError("pwrite", err)
		}
		if n == 0 {
			return fmt.Errorf("pwrite: %w", io.ErrShortWrite)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}
