package mount

import (
	"io/fs"
	"syscall"
)

// statIno returns the inode number of a stat(2) result.
func statIno(fi fs.FileInfo) uint64 { return fi.Sys().(*syscall.Stat_t).Ino }
