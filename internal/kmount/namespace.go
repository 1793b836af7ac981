package kmount

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// InNamespace calls fn on a thread that has joined the mount namespace ns (an
// open /proc/PID/ns/mnt), with the namespace's root as its root, and the mounts
// that the namespace has. Paths that fn gives to the kernel are looked up there;
// goroutines that it starts are where the process is.
func InNamespace(ns *os.File, fn func(all []Info) error) error {
	done := make(chan error)
	go onThread(func() error {
		all, err := join(ns)
		if err != nil {
			return err
		}
		return fn(all)
	}, done)
	return <-done
}

// join moves the calling thread into a mount namespace and lists its mounts.
func join(ns *os.File) ([]Info, error) {
	// Before: there may be no /proc there, or another one.
	self, err := unix.Open("/proc/thread-self", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("join a mount namespace: /proc/thread-self: %w", err)
	}
	defer unix.Close(self)
	// setns(2) refuses a thread that shares its root and working folder.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return nil, fmt.Errorf("join a mount namespace: unshare: %w", err)
	}
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
		return nil, fmt.Errorf("join a mount namespace: %w", err)
	}
	fd, err := unix.Openat(self, "mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	f := os.NewFile(uintptr(fd), "mountinfo")
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMountinfo(data)
}

// Clone makes a mount of what is mounted at path below the mount or folder dir
// (path "" is dir itself), attached nowhere yet; with recursive, of what is
// mounted on that, too. The thread must be in the namespace that has it.
func Clone(dir *os.File, path string, recursive bool) (*os.File, error) {
	flags := unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH | unix.AT_NO_AUTOMOUNT | unix.AT_SYMLINK_NOFOLLOW
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	at := unix.AT_FDCWD
	if dir != nil {
		at, path = int(dir.Fd()), strings.TrimPrefix(path, "/")
	}
	fd, err := unix.OpenTree(at, path, uint(flags))
	if err != nil {
		return nil, fmt.Errorf("clone the mount of %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// AttachAt makes the mount m visible at path below the root of the mount on,
// which is attached somewhere already, whatever else is mounted there.
func AttachAt(m, on *os.File, path string) error {
	err := unix.MoveMount(int(m.Fd()), "", int(on.Fd()), strings.TrimPrefix(path, "/"), unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("attach mount at %s of another mount: %w", path, err)
	}
	return nil
}

// attributeNames are those of mountinfo that Attributes knows.
var attributeNames = map[string]int{
	"ro": unix.MOUNT_ATTR_RDONLY, "nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV,
	"noexec": unix.MOUNT_ATTR_NOEXEC, "nodiratime": unix.MOUNT_ATTR_NODIRATIME, "nosymfollow": unix.MOUNT_ATTR_NOSYMFOLLOW,
}

// Restrictions are the attributes of a mount that take something away
// (MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, …), or'ed.
func (i Info) Restrictions() (attrs int) {
	for word := range strings.SplitSeq(i.Attributes, ",") {
		attrs |= attributeNames[word]
	}
	return attrs
}

// SetShared makes the mount m the first of a new group of peers, or one that
// has none.
func SetShared(m *os.File, shared bool) error {
	set := unix.MountAttr{Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(int(m.Fd()), "", unix.AT_EMPTY_PATH, &set); err != nil {
		return fmt.Errorf("make a mount private: %w", err)
	}
	if !shared {
		return nil
	}
	set.Propagation = unix.MS_SHARED
	if err := unix.MountSetattr(int(m.Fd()), "", unix.AT_EMPTY_PATH, &set); err != nil {
		return fmt.Errorf("make a mount shared: %w", err)
	}
	return nil
}
