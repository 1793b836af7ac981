package cache

import (
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
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
