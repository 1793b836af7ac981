package mount

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// Map mounts the folder path, of the image or of another filesystem that knows
// idmapped mounts, a second time, with owners mapped by a user namespace, and
// returns where: in the folder of the Lowers, under name, until Close. What is
// mounted there already is taken for that.
func (l *Lowers) Map(path, name string, userns *os.File) (string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return "", errLowersClosed
	}
	name = "mapped-" + name
	if _, err := kmount.At(l.path(name)); err == nil {
		return l.path(name), nil
	}
	if err := l.makeFolder(name); err != nil {
		return "", err
	}
	fd, err := unix.OpenTree(unix.AT_FDCWD, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return "", fmt.Errorf("map the owners of %s: open_tree: %w", path, err)
	}
	m := os.NewFile(uintptr(fd), path)
	defer m.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(userns.Fd())}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return "", hint.Wrap(fmt.Errorf("map the owners of %s: %w", path, err),
			"its filesystem, or this kernel, has no idmapped mounts; start the snapshotter without --remap-ids")
	}
	return l.path(name), kmount.Attach(m, l.path(name))
}

// folders lists what Close has to take away.
func (l *Lowers) folders() []string {
	var names []string
	entries, _ := os.ReadDir(l.dir)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
