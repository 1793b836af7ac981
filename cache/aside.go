package cache

import (
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// asideName is the folder that damaged files are moved to, for somebody to look
// at: what one file had for names is in its name there.
const asideName = "quarantine"

// setAside moves a damaged file, by one of its names, out of the way.
func (s *Store) setAside(dir folder, path, what string, d image.Digest) error {
	name := what + "-" + hexOf(d) + "-" + time.Now().UTC().Format("20060102T150405.000000000")
	err := unix.Renameat(dir.fd, path, s.rootDir.fd, filepath.Join(asideName, name))
	return ignoreAbsent(err)
}

// emptyAside removes what was moved aside and returns its size on disk.
func (s *Store) emptyAside() int64 {
	dir := filepath.Join(s.root, asideName)
	n, err := diskUsage(dir)
	entries, _ := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		return 0
	}
	for _, e := range entries {
		os.RemoveAll(filepath.Join(dir, e.Name()))
	}
	left, _ := diskUsage(dir)
	return max(0, n-left)
}

// damagedWhole looks at a whole content of which a read failed, and moves it
// aside if its bytes cannot be read or are not its own. It returns whether
// the content is gone.
func (s *Store) damagedWhole(w wholeFile, ct image.Content) bool {
	object, content, err := hashFile(w.fd, w.size, true, true)
	if err == nil && content == ct.Digest {
		return false
	}
	s.log.Warn("a file is damaged, is moved aside and will be fetched again", "content", ct.Digest.String(), "error", err)
	if noted, ok := notedDigest(w.fd); ok {
		object = noted
	}
	return s.discardWhole(w.fd, ct.Digest, object) == nil
}

// notedDigest returns the fs-verity digest of an open object without reading
// it: the kernel's, or the one noted on it.
func notedDigest(fd int) (d image.Digest, ok bool) {
	if f, err := dupFile(fd, "object"); err == nil {
		alg, sum, err := verity.Measure(f)
		f.Close()
		if err == nil && alg == verity.SHA256 {
			return image.Digest(sum), true
		}
	}
	n, err := unix.Fgetxattr(fd, verityXattr, d[:])
	return d, err == nil && n == len(d)
}

// discardWhole moves the damaged file fd aside by its content's name and takes
// its object's name away, if both are its own.
func (s *Store) discardWhole(fd int, content, object image.Digest) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	own := func(dir folder, d image.Digest) bool {
		var n unix.Stat_t
		return unix.Fstatat(dir.fd, d.Path(), &n, unix.AT_SYMLINK_NOFOLLOW) == nil && n.Ino == st.Ino && n.Dev == st.Dev
	}
	if own(s.contentsDir, content) {
		if err := s.setAside(s.contentsDir, content.Path(), "content", content); err != nil {
			return err
		}
	}
	if own(s.objectsDir, object) {
		return ignoreAbsent(unix.Unlinkat(s.objectsDir.fd, object.Path(), 0))
	}
	return nil
}
