// Package kmount makes, places and lists mounts with the kernel's own mount
// API (fsopen(2), fsconfig(2), fsmount(2), move_mount(2)), so that a mount is
// built and tried before anybody can see it and an error carries the kernel's
// own words. It decides nothing: what is mounted over what, and which kernel
// features are worth having, is its callers' business.
package kmount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// moveMountBeneath is MOVE_MOUNT_BENEATH of linux/mount.h (Linux 6.5).
const moveMountBeneath = 0x200

// A Param is one parameter of a filesystem, as fsconfig(2) takes them: a flag
// when Flag is set, else a string.
type Param struct {
	Key, Value string
	Flag       bool
}

// MaxString is how many bytes the value of a parameter may have (fsconfig(2)
// fails with EINVAL on more).
const MaxString = 255

// String returns a string parameter.
func String(key, value string) Param { return Param{Key: key, Value: value} }

// Flag returns a parameter without a value.
func Flag(key string) Param { return Param{Key: key, Flag: true} }

// An Error is a step of building a mount that the kernel refused.
type Error struct {
	FSType string // "erofs", "overlay", "fuse"
	Step   string // "fsopen", "set lowerdir+", "create", …
	Kernel string // what the kernel wrote about it, "" if nothing
	Err    error  // the errno
}

// Error names the filesystem, the step, the errno and the kernel's own words.
func (e *Error) Error() string {
	s := fmt.Sprintf("mount %s: %s: %v", e.FSType, e.Step, e.Err)
	if e.Kernel != "" {
		s += " (kernel: " + e.Kernel + ")"
	}
	return s
}

// Unwrap returns the errno.
func (e *Error) Unwrap() error { return e.Err }

// New builds a filesystem of the given type and returns its mount, attached
// nowhere yet: closing the file before Attach or AttachBeneath undoes it.
// attrs are MOUNT_ATTR_ flags (MOUNT_ATTR_RDONLY, …). Errors are *Error.
func New(fstype string, attrs int, params ...Param) (*os.File, error) {
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, &Error{FSType: fstype, Step: "fsopen", Err: err}
	}
	defer unix.Close(fd)
	fail := func(step string, err error) error {
		return &Error{FSType: fstype, Step: step, Kernel: messages(fd), Err: err}
	}
	for _, p := range params {
		if p.Flag {
			err = unix.FsconfigSetFlag(fd, p.Key)
		} else {
			err = unix.FsconfigSetString(fd, p.Key, p.Value)
		}
		if err != nil {
			return nil, fail("set "+p.Key, err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return nil, fail("create", err)
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return nil, fail("fsmount", err)
	}
	return os.NewFile(uintptr(mfd), fstype), nil
}

// messages reads what the kernel has written about a filesystem context
// (fsopen(2), "message retrieval interface"), joined into one line.
func messages(fd int) string {
	var all []string
	buf := make([]byte, 4096)
	for range 16 {
		n, err := unix.Read(fd, buf)
		if err != nil || n <= 0 {
			break
		}
		// Each message is a class letter, a space and the text.
		msg := strings.TrimSpace(string(buf[:n]))
		if len(msg) > 2 && msg[1] == ' ' {
			msg = msg[2:]
		}
		all = append(all, msg)
	}
	return strings.Join(all, "; ")
}

// Restrict sets attributes of the mount m (MOUNT_ATTR_NOSUID, …), which it
// keeps wherever it is attached. None is set by 0.
func Restrict(m *os.File, attrs int) error {
	if attrs == 0 {
		return nil
	}
	set := unix.MountAttr{Attr_set: uint64(attrs)}
	if err := unix.MountSetattr(int(m.Fd()), "", unix.AT_EMPTY_PATH, &set); err != nil {
		return fmt.Errorf("set attributes %#x of a mount: %w", attrs, err)
	}
	return nil
}

// Attach makes the mount m visible at the folder path, on top of whatever is
// mounted there.
func Attach(m *os.File, path string) error {
	if err := unix.MoveMount(int(m.Fd()), "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("attach mount at %s: %w", path, err)
	}
	return nil
}

// AttachBeneath puts the mount m beneath the topmost mount at path, where it
// is seen once that one is detached (MOVE_MOUNT_BENEATH, Linux 6.5).
func AttachBeneath(m *os.File, path string) error {
	err := unix.MoveMount(int(m.Fd()), "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH|moveMountBeneath)
	if err != nil {
		return fmt.Errorf("move mount beneath the one at %s: %w", path, err)
	}
	return nil
}

// Unmount takes the topmost mount off path, as umount(8) does; it fails with
// EBUSY while something uses it.
func Unmount(path string) error {
	if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

// Detach takes the topmost mount off path at once; what still uses it keeps
// it (MNT_DETACH, "lazy unmount").
func Detach(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("detach %s: %w", path, err)
	}
	return nil
}

// Path returns a path by which the kernel finds the root of the mount m, in
// this process, while m is open.
func Path(m *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", m.Fd()) }

// ErrNotMounted says that a path is not a mount point.
var ErrNotMounted = errors.New("not a mount point")
