package mount

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// users finds the processes that use the mount at a mount point: those whose
// root, working directory, program or open files are on it, also where it is
// bound elsewhere. Processes that may not be looked at are left out.
func users(mountpoint string) ([]User, error) {
	info, err := kmount.At(mountpoint)
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	all := []User{}
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		if how := usedBy(dir, info); how != "" {
			name, _ := os.ReadFile(dir + "/cmdline") // of a process that may have ended
			name = bytes.ReplaceAll(bytes.TrimRight(name, "\x00"), []byte{0}, []byte{' '})
			all = append(all, User{PID: pid, Command: string(name[:min(len(name), 200)]), How: how})
		}
	}
	return all, nil
}

// usedBy says how a process uses a filesystem, "" if it does not.
func usedBy(proc string, info kmount.Info) string {
	// Where the mount is in the process's own namespace. Device numbers of
	// files do not tell: overlayfs makes some up.
	ids := map[uint64]bool{}
	table, err := os.ReadFile(proc + "/mountinfo")
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(table) {
		if f := bytes.Fields(line); len(f) > 3 && string(f[2]) == info.Dev {
			if id, err := strconv.ParseUint(string(f[0]), 10, 64); err == nil {
				ids[id] = true
			}
		}
	}
	if len(ids) == 0 {
		return ""
	}
	on := func(link string) bool {
		// The magic links of proc(5) lead to the file itself; a server that
		// does not answer is not asked.
		var st unix.Statx_t
		err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &st)
		return err == nil && ids[st.Mnt_id]
	}
	for _, name := range []string{"root", "cwd", "exe"} {
		if on(proc + "/" + name) {
			return name
		}
	}
	fds, _ := filepath.Glob(proc + "/fd/*") // none of a process of somebody else
	for _, fd := range fds {
		if on(fd) {
			return "files"
		}
	}
	return ""
}
