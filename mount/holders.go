package mount

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// holders lists the processes that have something open on the first mount's
// filesystem: a file, a mapping, their working folder, their program. Nothing is
// asked of any filesystem, so that one without a server blocks nobody.
func (m *Mount) holders() (all []Elsewhere) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil
	}
	for _, d := range dirs {
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil || pid == os.Getpid() {
			continue
		}
		var what []string
		for _, link := range [][2]string{{"cwd", "its working folder"}, {"root", "its root"}, {"exe", "its program"}} {
			if deviceOf(filepath.Join(d, link[0])) == m.firstDev {
				what = append(what, link[1])
			}
		}
		files := 0
		fds, _ := os.ReadDir(filepath.Join(d, "fd")) // it may have ended
		for _, fd := range fds {
			if deviceOf(filepath.Join(d, "fd", fd.Name())) == m.firstDev {
				files++
			}
		}
		if files > 0 {
			what = append(what, fmt.Sprintf("open files (%d)", files))
		}
		if n := m.mappings(filepath.Join(d, "maps")); n > 0 {
			what = append(what, fmt.Sprintf("mappings (%d)", n))
		}
		if len(what) > 0 {
			all = append(all, Elsewhere{PID: pid, Note: "on what served before the swap: " + strings.Join(what, ", ")})
		}
	}
	return all
}

// deviceOf returns the device of what a link of /proc leads to, as mountinfo
// writes it; "" if it cannot be told.
func deviceOf(link string) string {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, link, unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, 0, &st); err != nil {
		return ""
	}
	return fmt.Sprintf("%d:%d", st.Dev_major, st.Dev_minor)
}

// mappings counts the mappings of a process that are of files of the first
// mount's filesystem (proc_pid_maps(5): address perms offset dev inode path).
func (m *Mount) mappings(path string) (n int) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	var major, minor int
	if _, err := fmt.Sscanf(m.firstDev, "%d:%d", &major, &minor); err != nil {
		return 0
	}
	dev := []byte(fmt.Sprintf("%02x:%02x", major, minor))
	for line := range bytes.Lines(data) {
		if f := bytes.Fields(line); len(f) > 4 && bytes.Equal(f[3], dev) {
			n++
		}
	}
	return n
}
