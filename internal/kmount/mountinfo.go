package kmount

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Info is one line of /proc/self/mountinfo (proc_pid_mountinfo(5)).
type Info struct {
	ID, Parent int
	Dev        string // "major:minor"
	Mountpoint string
	FSType     string // "overlay", "fuse.cfs-fuse", …
	Source     string
	Options    string // of the superblock
	Root       string // what of the filesystem is mounted: "/" for all of it
	Attributes string // of the mount: "ro,nosuid,relatime"
	Shared     bool   // what is mounted on it is seen by its peers
}

// Mounts lists the mounts of this process's mount namespace, in the order in
// which they were made.
func Mounts() ([]Info, error) {
	return mountsIn("/proc/self/mountinfo")
}

// MountsOf lists the mounts of a process's mount namespace that are at or below
// its root, with paths as it has them.
func MountsOf(pid int) ([]Info, error) {
	return mountsIn(fmt.Sprintf("/proc/%d/mountinfo", pid))
}

func mountsIn(path string) ([]Info, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	return parseMountinfo(data)
}

func parseMountinfo(data []byte) ([]Info, error) {
	var all []Info
	sc := bufio.NewScanner(bytes.NewReader(data))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		left, right, ok := strings.Cut(sc.Text(), " - ")
		// Fields may be empty: some programs mount with an empty source.
		l, r := strings.Split(left, " "), strings.Split(right, " ")
		if !ok || len(l) < 6 || len(r) < 3 {
			return nil, fmt.Errorf("list mounts: odd line in mountinfo: %q", sc.Text())
		}
		id, err1 := strconv.Atoi(l[0])
		parent, err2 := strconv.Atoi(l[1])
		if err1 != nil || err2 != nil {
			return nil, fmt.Errorf("list mounts: odd line in mountinfo: %q", sc.Text())
		}
		all = append(all, Info{
			ID: id, Parent: parent, Dev: l[2], Mountpoint: unescape(l[4]),
			FSType: unescape(r[0]), Source: unescape(r[1]), Options: unescape(r[2]),
			Root: unescape(l[3]), Attributes: l[5],
			Shared: slices.ContainsFunc(l[6:], func(s string) bool { return strings.HasPrefix(s, "shared:") }),
		})
	}
	return all, sc.Err()
}

// unescape undoes the octal escapes of space, tab, newline and backslash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// At returns the topmost mount whose mount point is path, and ErrNotMounted
// when there is none. It reads the mount table only, so that a mount whose
// server has died does not block it.
func At(path string) (Info, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return Info{}, err
	}
	all, err := Mounts()
	if err != nil {
		return Info{}, err
	}
	// The topmost of a stack is the one that no other mount at the same path
	// has as its parent.
	under := map[int]bool{}
	var here []Info
	for _, m := range all {
		if m.Mountpoint == abs {
			here = append(here, m)
			under[m.Parent] = true
		}
	}
	for _, m := range here {
		if !under[m.ID] {
			return m, nil
		}
	}
	return Info{}, fmt.Errorf("%s: %w", path, ErrNotMounted)
}
