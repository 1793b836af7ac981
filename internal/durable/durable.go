// Package durable writes files that a crash leaves either absent or whole:
// beside their name, synced, renamed, the folder synced. It keeps no state
// and knows nothing of what the files hold.
//
// A temporary file is called .tmp-<random> and is locked with flock(2) while
// its writer lives. So one that nobody has locked is litter of a crash, which
// Clean removes.
package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// TempPrefix starts the name of every temporary file.
const TempPrefix = ".tmp-"

// A File is being written beside the name it will get.
type File struct {
	*os.File
	path string
	done bool
}

// Create opens a new temporary file in the folder of path with permissions
// perm. Nothing is at path until Commit; Abort removes the temporary file.
func Create(path string, perm os.FileMode) (*File, error) {
	f, err := Temp(filepath.Dir(path), perm)
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", path, err)
	}
	return &File{File: f, path: path}, nil
}

// Temp makes a temporary file in the folder dir with permissions perm, which
// Clean spares until it is closed. The caller renames or removes it.
func Temp(dir string, perm os.FileMode) (*os.File, error) {
	for {
		f, err := os.CreateTemp(dir, TempPrefix+"*")
		if err != nil {
			return nil, err
		}
		lived, err := lock(f)
		if err == nil && lived {
			if err = f.Chmod(perm); err == nil {
				return f, nil
			}
		}
		f.Close()
		if err != nil {
			os.Remove(f.Name())
			return nil, err
		}
	}
}

// lock locks f and reports whether it still has a name: a Clean that runs
// between the making of a file and its locking takes it for litter. Where the
// filesystem has no locks Clean removes nothing, and none is needed.
func lock(f *os.File) (lived bool, err error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			return false, nil // a Clean holds it, to remove it
		}
		return true, nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	return st.Nlink > 0, nil
}

// Clean removes the temporary files in the folder dir whose writers are dead
// and returns how many there were. Temporary files in use stay.
func Clean(dir string) (removed int, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return 0, fmt.Errorf("clean: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return 0, fmt.Errorf("clean %s: %w", dir, err)
	}
	for _, name := range names {
		if !strings.HasPrefix(name, TempPrefix) {
			continue
		}
		fd, err := unix.Openat(int(d.Fd()), name, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // gone, or no file of ours
		}
		if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) == nil && unix.Unlinkat(int(d.Fd()), name, 0) == nil {
			removed++
		}
		unix.Close(fd)
	}
	return removed, nil
}

// Commit syncs the file, closes it and gives it its name, replacing what had
// it. A nil error promises that the file and its name survive a power cut.
func (f *File) Commit() error {
	if f.done {
		return fmt.Errorf("commit %s: %w", f.path, os.ErrClosed)
	}
	f.done = true
	err := f.Sync()
	if err == nil { // renamed while it is locked, so that no Clean comes between
		err = os.Rename(f.Name(), f.path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		return SyncDir(filepath.Dir(f.path))
	}
	return fmt.Errorf("write %s: %w", f.path, err)
}

// Abort removes the temporary file. After Commit it does nothing, so that it
// can be deferred.
func (f *File) Abort() {
	if f.done {
		return
	}
	f.done = true
	os.Remove(f.Name())
	f.Close()
}

// WriteFile writes data to path with permissions perm, as Create and Commit do.
func WriteFile(path string, data []byte, perm os.FileMode) error {
	f, err := Create(path, perm)
	if err != nil {
		return err
	}
	defer f.Abort()
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return f.Commit()
}

// SyncDir makes the names in the folder dir survive a power cut. Filesystems
// that cannot sync a folder (EINVAL) are taken to need no such call.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}
