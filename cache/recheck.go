package cache

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// recheck reads every file that was written since the stamp and takes the
// names from those whose bytes are not what their names say: the machine went
// down before they were on disk. A folder that is older than the stamp got
// no name since, so it is not even listed. Staging files without a map are
// removed; staged chunks are checked when somebody wants them, as only an
// image's index knows their digests.
func (s *Store) recheck(since stamp) error {
	verdicts := make(map[uint64]bool) // inode number → its bytes are right
	objects, err := s.recheckNames(s.objectsDir, since, func(fd int, size int64, ino uint64, want image.Digest) bool {
		got, err := s.trueObjectDigest(fd, size)
		verdicts[ino] = err == nil && got == want
		return verdicts[ino]
	})
	if err != nil {
		return err
	}
	contents, err := s.recheckNames(s.contentsDir, since, func(fd int, size int64, ino uint64, want image.Digest) bool {
		if right, known := verdicts[ino]; known {
			return right // the other name of a file that was read above
		}
		_, got, err := hashFile(fd, size, false, true)
		return err == nil && got == want
	})
	if err != nil {
		return err
	}
	if n := objects + contents; n > 0 {
		s.log.Warn("removed files that were damaged when the machine went down", "root", s.root, "names", n)
	}
	return s.removeUnmapped()
}

// trueObjectDigest returns the fs-verity digest of a file's bytes: the kernel's
// if it checks them, else computed.
func (s *Store) trueObjectDigest(fd int, size int64) (image.Digest, error) {
	f, err := dupFile(fd, "object")
	if err != nil {
		return image.Digest{}, err
	}
	defer f.Close()
	if alg, sum, err := verity.Measure(f); err == nil && alg == verity.SHA256 {
		return image.Digest(sum), nil
	}
	d, _, err := hashFile(fd, size, true, false)
	return d, err
}

// recheckNames checks the files below a fan-out folder and returns how many
// names it took away.
func (s *Store) recheckNames(dir folder, since stamp, right func(fd int, size int64, ino uint64, want image.Digest) bool) (removed int, err error) {
	for b := range 256 {
		fan := fmt.Sprintf("%02x", b)
		var st unix.Stat_t
		err := unix.Fstatat(dir.fd, fan, &st, unix.AT_SYMLINK_NOFOLLOW)
		if errors.Is(err, unix.ENOENT) {
			continue
		}
		if err != nil {
			return removed, fmt.Errorf("check %s/%s: %w", dir.f.Name(), fan, err)
		}
		if since.durable(st.Mtim) {
			continue
		}
		entries, err := os.ReadDir(filepath.Join(dir.f.Name(), fan))
		if err != nil {
			return removed, err
		}
		for _, e := range entries {
			path := fan + "/" + e.Name()
			want, ok := parseHex(fan + e.Name())
			if !ok {
				continue // none of ours
			}
			bad, err := s.damaged(dir.fd, path, want, since, right)
			if err != nil {
				return removed, fmt.Errorf("check %s/%s: %w", dir.f.Name(), path, err)
			}
			if !bad {
				continue
			}
			if err := unix.Unlinkat(dir.fd, path, 0); err != nil {
				return removed, fmt.Errorf("remove %s/%s: %w", dir.f.Name(), path, err)
			}
			removed++
		}
	}
	return removed, nil
}

func (s *Store) damaged(dir int, path string, want image.Digest, since stamp, right func(int, int64, uint64, image.Digest) bool) (bool, error) {
	fd, err := openat(dir, path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK)
	if errors.Is(err, unix.ELOOP) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false, nil // none of ours
	}
	if since.durable(st.Mtim) {
		return false, nil
	}
	return !right(fd, st.Size, st.Ino, want), nil
}

// removeUnmapped removes staging files that have no map.
func (s *Store) removeUnmapped() error {
	dir := s.stagingDir.f.Name()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if !strings.HasPrefix(name, stagingPrefix) || strings.HasSuffix(name, mapSuffix) {
			continue
		}
		_, err := os.Lstat(filepath.Join(dir, name+mapSuffix))
		if errors.Is(err, os.ErrNotExist) {
			err = os.Remove(filepath.Join(dir, name))
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
