package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// An Elsewhere is a place besides the mount point from which what served before
// the swap was used, in this mount namespace or another one.
type Elsewhere struct {
	// PID is a process of the mount namespace, and Mountpoint a path in it; ""
	// for a process that has something open of what served before.
	PID        int    `json:"pid"`
	Mountpoint string `json:"mountpoint,omitempty"`
	// Swapped says that the kernel's mount is there now; else Note says why not.
	// What was not swapped keeps working, and keeps the process that serves it.
	Swapped bool   `json:"swapped"`
	Note    string `json:"note,omitempty"`

	mountID int // of an overlayfs that has the first mount as a lower
}

const (
	noteLower = "an overlayfs there has it as a lower, and keeps it as long as it is mounted"
	noteRoot  = "it is the root of its mount namespace (pivot_root), beneath which the kernel mounts nothing"
	noteCover = "something else is mounted over it"
)

// exchange puts the mount f in the place of old, the topmost at its mount
// point in the mount namespace of this thread, without an instant at which the
// place is bare: beneath it first, with what is mounted on old, then old is
// detached. What is open on old stays on it. With an error old is still there.
func exchange(f *os.File, old kmount.Info, all []kmount.Info) error {
	type child struct {
		path string
		tree *os.File
	}
	var children []child
	for _, c := range mountedOn(old, all) {
		tree, err := kmount.Clone(nil, c.Mountpoint, true)
		if err != nil {
			return err
		}
		defer tree.Close()
		children = append(children, child{strings.TrimPrefix(c.Mountpoint, old.Mountpoint), tree})
	}
	if err := kmount.AttachBeneath(f, old.Mountpoint); err != nil {
		return err
	}
	for _, c := range children {
		if err := kmount.AttachAt(c.tree, f, c.path); err != nil {
			return err
		}
	}
	return kmount.Detach(old.Mountpoint)
}

// mountedOn lists what can be seen of what is mounted on folders and files of a
// mount, those beneath others first.
func mountedOn(on kmount.Info, all []kmount.Info) (children []kmount.Info) {
	for _, c := range all {
		if c.Parent == on.ID && c.Mountpoint != on.Mountpoint {
			children = append(children, c)
		}
	}
	return slices.DeleteFunc(children, func(c kmount.Info) bool {
		return slices.ContainsFunc(children, func(over kmount.Info) bool {
			return strings.HasPrefix(c.Mountpoint, over.Mountpoint+"/")
		})
	})
}

// covered reports whether another mount is mounted over a mount.
func covered(i kmount.Info, all []kmount.Info) bool {
	return slices.ContainsFunc(all, func(over kmount.Info) bool { return over.Parent == i.ID && over.Mountpoint == i.Mountpoint })
}

// swapNamespaces swaps also what the mount namespaces of the given processes
// have of the first mount, once it is swapped itself. What came of it goes to
// the status; the error says what was not swapped.
func (m *Mount) swapNamespaces(pids []int) error {
	if len(pids) == 0 {
		return nil
	}
	var places []Elsewhere
	done := map[string]bool{}
	for _, pid := range pids {
		link := fmt.Sprintf("/proc/%d/ns/mnt", pid)
		id, err := os.Readlink(link)
		if err == nil && done[id] {
			continue
		}
		done[id] = true
		var found []Elsewhere
		if err == nil {
			found, err = m.swapIn(pid, link)
		}
		if err != nil {
			found = append(found, Elsewhere{PID: pid, Note: oneLine(err.Error())})
		}
		places = append(places, found...)
	}
	m.update(func(s *Status) {
		s.Elsewhere = slices.DeleteFunc(slices.Clone(s.Elsewhere), func(e Elsewhere) bool { return slices.Contains(pids, e.PID) && e.mountID == 0 })
		s.Elsewhere = append(s.Elsewhere, places...)
	})
	var failed []error
	for _, e := range places {
		m.log.Info("swap in another mount namespace", "pid", e.PID, "path", e.Mountpoint, "swapped", e.Swapped, "note", e.Note)
		if !e.Swapped {
			failed = append(failed, fmt.Errorf("process %d %s: %s", e.PID, e.Mountpoint, e.Note))
		}
	}
	return errors.Join(failed...)
}

// swapIn swaps the first mount wherever the mount namespace that link leads to
// has it.
func (m *Mount) swapIn(pid int, link string) (places []Elsewhere, err error) {
	ns, err := os.Open(link)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	sealed, dev, err := m.openSealed()
	if err != nil {
		return nil, err
	}
	defer sealed.Close()
	var all []kmount.Info
	if err := kmount.InNamespace(ns, func(there []kmount.Info) error { all = there; return nil }); err != nil {
		return nil, err
	}
	for _, i := range all {
		e := Elsewhere{PID: pid, Mountpoint: i.Mountpoint, Swapped: true}
		switch {
		case i.Dev == m.firstDev:
			if err := swapAt(ns, sealed, i, all); err != nil {
				e.Swapped, e.Note = false, oneLine(err.Error())
			}
		case i.Dev != dev || i.Mountpoint == m.mountpoint && m.inOwnNamespace(link):
			continue // it has nothing to do with it, or is the mount itself
		}
		places = append(places, e)
	}
	if len(places) == 0 {
		return nil, errors.New("nothing of this mount is in its mount namespace")
	}
	return places, nil
}

func (m *Mount) inOwnNamespace(link string) bool {
	own, err1 := os.Readlink("/proc/self/ns/mnt")
	other, err2 := os.Readlink(link)
	return err1 == nil && err2 == nil && own == other
}

// openSealed opens the root of the kernel's mount at the mount point, and says
// what its device is.
func (m *Mount) openSealed() (*os.File, string, error) {
	info, err := kmount.At(m.mountpoint)
	if err == nil && !isSealedMount(info) {
		err = errors.New("something else is mounted over it")
	}
	if err != nil {
		return nil, "", fmt.Errorf("the kernel's mount at %s: %w", m.mountpoint, err)
	}
	f, err := os.OpenFile(m.mountpoint, unix.O_PATH|unix.O_DIRECTORY, 0)
	return f, info.Dev, err
}

// swapAt puts what the mount sealed has in the place of one mount of another
// namespace, with as few rights.
func swapAt(ns, sealed *os.File, i kmount.Info, all []kmount.Info) error {
	switch {
	case i.Mountpoint == "/":
		return errors.New(noteRoot)
	case covered(i, all):
		return errors.New(noteCover)
	}
	f, err := kmount.Clone(sealed, i.Root, false)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := kmount.SetShared(f, i.Shared); err != nil {
		return err
	}
	if err := kmount.Restrict(f, i.Restrictions()); err != nil {
		return err
	}
	return kmount.InNamespace(ns, func(now []kmount.Info) error {
		for _, same := range now {
			if same.ID == i.ID && same.Mountpoint == i.Mountpoint {
				return exchange(f, same, now)
			}
		}
		return errors.New("it is gone")
	})
}

// eachNamespace calls f with one process of each mount namespace and what it
// has mounted; of its own namespace that is this process.
func eachNamespace(f func(pid int, all []kmount.Info)) error {
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return err
	}
	seen := map[string]bool{own: true}
	pids := []int{os.Getpid()}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, d := range dirs {
		id, err := os.Readlink(d + "/ns/mnt")
		if err != nil || seen[id] {
			continue // it has ended, or is not ours to look at
		}
		seen[id] = true
		if pid, err := strconv.Atoi(filepath.Base(d)); err == nil {
			pids = append(pids, pid)
		}
	}
	for _, pid := range pids {
		if all, err := kmount.MountsOf(pid); err == nil {
			f(pid, all)
		}
	}
	return nil
}

// overlays finds each overlayfs that has the first mount as a lower, in all mount
// namespaces. After the swap their options would name the kernel's mount.
func (m *Mount) overlays() (places []Elsewhere) {
	if err := eachNamespace(func(pid int, all []kmount.Info) {
		for _, i := range all {
			if i.FSType == "overlay" && i.Dev != m.firstDev && hasLowerOn(i, all, m.firstDev) {
				places = append(places, Elsewhere{PID: pid, Mountpoint: i.Mountpoint, Note: noteLower, mountID: i.ID})
			}
		}
	}); err != nil {
		m.log.Debug("other mount namespaces cannot be looked at", "error", err)
	}
	return places
}

// hasLowerOn reports whether a lower of an overlayfs is on a device.
func hasLowerOn(over kmount.Info, all []kmount.Info, dev string) bool {
	for option := range strings.SplitSeq(over.Options, ",") {
		key, value, _ := strings.Cut(option, "=")
		if key != "lowerdir" && key != "lowerdir+" && key != "datadir+" {
			continue
		}
		for path := range strings.SplitSeq(value, ":") {
			var on kmount.Info
			for _, i := range all {
				at := strings.TrimSuffix(i.Mountpoint, "/")
				if (path == i.Mountpoint || strings.HasPrefix(path, at+"/")) && len(i.Mountpoint) >= len(on.Mountpoint) {
					on = i
				}
			}
			if path != "" && on.Dev == dev {
				return true
			}
		}
	}
	return false
}

// elsewhere brings the status's list of places up to date: what still has the
// first mount now is found, what was said before and is gone is left out.
func (m *Mount) elsewhere() (places []Elsewhere) {
	m.mu.Lock()
	before, state := m.status.Elsewhere, m.status.State
	m.mu.Unlock()
	if state < Swapped || !m.Serves() {
		return before
	}
	select {
	case <-m.server.Done():
		return before
	default:
	}
	tables := map[int][]kmount.Info{}
	var remain []Elsewhere
	if err := eachNamespace(func(pid int, all []kmount.Info) {
		tables[pid] = all
		for _, i := range all {
			if i.Dev != m.firstDev {
				continue
			}
			e := Elsewhere{PID: pid, Mountpoint: i.Mountpoint, Note: "bound there; 'cfs-fuse swap --swap-namespaces " + strconv.Itoa(pid) + " " + m.mountpoint + "' swaps it"}
			switch {
			case i.Mountpoint == "/":
				e.Note = noteRoot
			case covered(i, all):
				e.Note = noteCover
			}
			remain = append(remain, e)
		}
	}); err != nil {
		return before
	}
	for _, e := range before {
		if e.mountID != 0 && !slices.ContainsFunc(tables[e.PID], func(i kmount.Info) bool { return i.ID == e.mountID && i.FSType == "overlay" }) {
			if _, known := tables[e.PID]; known {
				continue
			}
		}
		places = append(places, e)
	}
	for _, e := range append(remain, m.holders()...) {
		if !slices.ContainsFunc(places, func(b Elsewhere) bool { return b.PID == e.PID && b.Mountpoint == e.Mountpoint }) {
			places = append(places, e)
		}
	}
	return places
}

// notSwapped makes an error of what other namespaces keep.
func notSwapped(err error) error {
	if err == nil {
		return nil
	}
	return hint.Wrap(fmt.Errorf("it is swapped at the mount point, and not everywhere: %w", err), "what was not swapped keeps working; 'cfs-fuse status' lists it")
}

// swapNow swaps, if that is not done yet, and then also in the mount namespaces
// of the given processes.
func (m *Mount) swapNow(pids []int) error {
	if err := m.swap(); err != nil {
		return err
	}
	m.swapping.Lock()
	defer m.swapping.Unlock()
	return notSwapped(m.swapNamespaces(pids))
}

// noteDev notes what the first mount's filesystem is, so that it is known again
// elsewhere.
func (m *Mount) noteDev() {
	if info, err := kmount.At(m.mountpoint); err == nil && info.ID == m.server.MountID() {
		m.firstDev = info.Dev
	}
}

// ParsePIDs reads numbers of processes with commas between; "" is none.
func ParsePIDs(s string) (pids []int, err error) {
	if s == "" {
		return nil, nil
	}
	for one := range strings.SplitSeq(s, ",") {
		pid, err := strconv.Atoi(one)
		if err != nil || pid < 1 {
			return nil, fmt.Errorf("%.20q is no process number", one)
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

func formatPIDs(pids []int) string {
	words := make([]string, len(pids))
	for i, pid := range pids {
		words[i] = strconv.Itoa(pid)
	}
	return strings.Join(words, ",")
}
