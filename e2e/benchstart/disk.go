package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Size of the filesystem that a run works in, and its number of inodes: an
// unpacked image and its blobs have a tenth of it.
const (
	diskBytes  = 8 << 30
	diskInodes = 256 << 10
)

// disk gives a run a new ext4 at b.work, in a file. On one that has just lost
// the tens of thousands of files of the run before, making files is several
// times slower: ext4 does not use a deleted inode again for a minute or five
// (recently_deleted in fs/ext4/ialloc.c) and looks at each one of them for each
// new file.
func (b *bench) disk(ctx context.Context) (end func() error, err error) {
	file := filepath.Join(b.dir, "disk")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(file, diskBytes); err != nil {
		return nil, err
	}
	// Nothing is left to the kernel to make later, during the measurement.
	_, err = output(ctx, "mkfs.ext4", "-q", "-F", "-N", strconv.Itoa(diskInodes), "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", file)
	if err == nil {
		err = os.MkdirAll(b.work, 0o755)
	}
	if err == nil {
		_, err = output(ctx, "mount", "-o", "loop,noatime", file, b.work)
	}
	if err != nil {
		return nil, fmt.Errorf("a filesystem to work in: %w", errors.Join(err, os.Remove(file)))
	}
	unix.Sync() // neither mkfs nor the run before leave anything to write
	return func() error { return errors.Join(unix.Unmount(b.work, 0), os.Remove(file)) }, nil
}
