package mount

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// maxIDMaps is how many ranges the kernel takes (user_namespaces(7)).
const maxIDMaps = 340

// parseIDMap reads UIDS:GIDS, or UIDS alone when both are mapped the same. Each
// is a list of ranges IMAGE-HOST-COUNT, with commas between: COUNT IDs from
// IMAGE on are shown as those from HOST on. IDs in no range are shown as the
// overflow ID (65534).
func parseIDMap(s string) (uids, gids []syscall.SysProcIDMap, err error) {
	u, g, both := strings.Cut(s, ":")
	if uids, err = parseIDRanges(u); err != nil {
		return nil, nil, err
	}
	if !both {
		return uids, uids, nil
	}
	gids, err = parseIDRanges(g)
	return uids, gids, err
}

func parseIDRanges(s string) (all []syscall.SysProcIDMap, err error) {
	if strings.Count(s, ",") >= maxIDMaps {
		return nil, fmt.Errorf("more than %d ranges of IDs", maxIDMaps)
	}
	for one := range strings.SplitSeq(s, ",") {
		var n [3]uint64
		parts := strings.Split(one, "-")
		if len(parts) != len(n) {
			return nil, fmt.Errorf("range of IDs %.80q: want IMAGE-HOST-COUNT", one)
		}
		for i, p := range parts {
			if n[i], err = strconv.ParseUint(p, 10, 32); err != nil {
				return nil, fmt.Errorf("range of IDs %.80q: %w", one, err)
			}
		}
		const most = 1<<32 - 1 // the last ID is no ID
		if n[2] == 0 || n[0]+n[2] > most || n[1]+n[2] > most {
			return nil, fmt.Errorf("range of IDs %.80q: it is empty, or ends after %d", one, uint64(most-1))
		}
		next := syscall.SysProcIDMap{ContainerID: int(n[0]), HostID: int(n[1]), Size: int(n[2])}
		for _, r := range all {
			if overlaps(r.ContainerID, next.ContainerID, r.Size, next.Size) || overlaps(r.HostID, next.HostID, r.Size, next.Size) {
				return nil, fmt.Errorf("range of IDs %.80q: it overlaps %d-%d-%d", one, r.ContainerID, r.HostID, r.Size)
			}
		}
		all = append(all, next)
	}
	return all, nil
}

// overlaps reports whether two ranges, by their starts and sizes, do.
func overlaps(a, b, sizeA, sizeB int) bool { return a < b+sizeB && b < a+sizeA }

// CheckIDMap fails if s is neither a path nor a mapping as View.IDMap wants it.
// It looks at no file.
func CheckIDMap(s string) error {
	if isPath(s) || s == "" {
		return nil
	}
	_, _, err := parseIDMap(s)
	return err
}

func isPath(s string) bool { return strings.HasPrefix(s, "/") || strings.HasPrefix(s, ".") }

// openUserns opens the user namespace that spec names, or makes one that maps as
// spec says.
func openUserns(spec string) (*os.File, error) {
	if isPath(spec) {
		f, err := os.OpenFile(spec, os.O_RDONLY|unix.O_NOCTTY, 0)
		if err != nil {
			return nil, hint.Wrap(fmt.Errorf("user namespace: %w", err), "name the one of a process that lives (/proc/PID/ns/user)")
		}
		return f, nil
	}
	uids, gids, err := parseIDMap(spec)
	if err != nil {
		return nil, hint.Wrap(fmt.Errorf("map IDs: %w", err), "for instance 0-100000-65536:0-100000-65536")
	}
	f, err := newUserns(uids, gids)
	if err != nil {
		return nil, fmt.Errorf("user namespace that maps %s: %w", spec, err)
	}
	return f, nil
}

// newUserns makes a user namespace with the given mappings, which no process
// is in. One has to be made for it: it is traced, so that it stops before the
// first instruction of its program, and killed.
func newUserns(uids, gids []syscall.SysProcIDMap) (_ *os.File, err error) {
	runtime.LockOSThread() // the tracer is a thread, and so is the parent of Pdeathsig
	defer runtime.UnlockOSThread()
	child, err := os.StartProcess("/proc/self/exe", []string{"user namespace"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, UidMappings: uids, GidMappings: gids,
		Ptrace: true, Pdeathsig: syscall.SIGKILL,
	}})
	if err != nil {
		return nil, err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", child.Pid))
	killed := child.Kill()
	_, waited := child.Wait()
	if err = errors.Join(err, killed, waited); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// idmap maps the IDs that a mount, attached nowhere yet, shows by a user
// namespace.
func idmap(m, userns *os.File) error {
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
	if err := unix.MountSetattr(int(m.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fmt.Errorf("map the IDs of the image by %s: %w", userns.Name(), err)
	}
	return nil
}
