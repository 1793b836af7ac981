package mount

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// ours reports whether a mount is one that a process of this program serves,
// or has served: FUSE, or a hybrid.
func ours(i kmount.Info) bool { return i.FSType == fusefs.FSType || isHybridMount(i) }

// isDead reports whether the server of a mount that is ours has gone. Of FUSE
// the kernel knows: statfs(2) always asks the server, where stat(2) is
// answered from what the kernel remembers. A hybrid answers that by itself, so
// there the process that the mount's record names is asked for a connection;
// without a record nothing is known, and the mount counts as alive.
func isDead(i kmount.Info, path, runtimeDir string) bool {
	if isHybridMount(i) {
		return runtimeDir != "" && FilesOf(runtimeDir, path).abandoned()
	}
	err := unix.Statfs(path, new(unix.Statfs_t))
	return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED) // the latter if it went while it was asked
}

// sealedMount builds the kernel mount of the sealed image, with fs-verity as
// the options want it, and says what was obtained.
func (m *Mount) sealedMount(rec sealedRecord) (f *os.File, verity string, err error) {
	if err := m.checkDigest(rec); err != nil {
		return nil, "", err
	}
	defer func() {
		if err != nil {
			return
		}
		if err = kmount.Restrict(f, m.opts.Attributes); err != nil {
			f.Close()
		}
	}()
	path, objects := m.image.path(sealedName), m.store.Objects()
	reason := "--verity off"
	if m.opts.Verity != Off {
		if rec.Verity == verityComputed {
			reason = rec.Reason
		} else if f, err := m.enforcedMount(path, objects, rec.Composefs); err == nil {
			return f, verityEnforced, nil
		} else {
			reason = err.Error()
		}
		if m.opts.Verity == Require {
			return nil, "", hint.Wrap(fmt.Errorf("--verity require: fs-verity cannot be enforced: %s", reason),
				"put --root on a filesystem with fs-verity (ext4 made with -O verity, btrfs) on a kernel that has it, or use --verity try")
		}
	}
	f, err = kernelMount(path, objects, nil, m.view)
	return f, "not enforced (kernel: " + reason + ")", err
}

// enforcedMount is a kernelMount that enforces all digests, those of what is in
// an upper folder too.
func (m *Mount) enforcedMount(path, objects string, digest hexDigest) (*os.File, error) {
	if m.view.Upper != "" {
		if file, err := m.view.withoutDigest(); err != nil {
			return nil, err
		} else if file != "" {
			return nil, fmt.Errorf("%s has the image's bytes and not their digest, since its attributes were changed while none was enforced", file)
		}
	}
	return kernelMount(path, objects, digest[:], m.view)
}

// mountSealed mounts a sealed image by the kernel, with no FUSE at all. It
// returns false, and no error, when FUSE should serve instead.
func (m *Mount) mountSealed(rec sealedRecord) (bool, error) {
	f, verity, err := m.sealedMount(rec)
	if err == nil {
		defer f.Close()
		err = kmount.Attach(f, m.mountpoint)
	}
	if err != nil {
		if m.opts.Swap == Require {
			return false, err
		}
		return false, nil // conduct meets the same reason and keeps it
	}
	m.swapped(verity)
	return true, nil
}

// verityOf says what fs-verity does for a sealed mount that another process has
// made.
func verityOf(i kmount.Info) string {
	if slices.Contains(strings.Split(i.Options, ","), "verity=require") {
		return "enforced"
	}
	return "not enforced (the process that swapped has not said why)"
}

func (m *Mount) swapped(verity string) {
	m.update(func(s *Status) {
		s.State, s.Backend, s.BackendReason, s.Verity, s.Note = Swapped, "kernel", "", verity, ""
	})
}

// swap puts the kernel mount of the sealed image in the place of what serves
// now without an instant at which the mount point is bare: beneath it first,
// then that is detached. What is open on it stays on it.
func (m *Mount) swap() error {
	m.swapping.Lock()
	defer m.swapping.Unlock()
	if m.state() >= Swapped {
		return nil // by hand, or before the hand came
	}
	if m.view.Upper != "" {
		return errors.New(m.stays())
	}
	rec, ok := m.sealedRecord()
	if !ok {
		return fmt.Errorf("the sealed image is no longer whole")
	}
	f, verity, err := m.sealedMount(rec)
	if errors.Is(err, unix.EPERM) {
		return hint.Wrap(err, "the kernel's mount needs root; FUSE goes on serving")
	}
	if err != nil {
		return err
	}
	defer f.Close()
	all, err := kmount.Mounts()
	if err != nil {
		return err
	}
	at := slices.IndexFunc(all, func(i kmount.Info) bool { return i.ID == m.server.MountID() && i.Mountpoint == m.mountpoint })
	if at < 0 || covered(all[at], all) {
		return hint.Wrap(errors.New("something else is mounted over it"), "unmount it, and mount the image again")
	}
	keep := m.overlays()
	if err := exchange(f, all[at], all); err != nil {
		return hint.Wrap(err, "FUSE goes on serving; the swap needs Linux 6.5 and a mount point that is not the root of a mount namespace")
	}
	f.Close() // or who hears of the swap, and unmounts at once, meets a busy mount
	m.swapped(verity)
	m.update(func(s *Status) { s.Elsewhere = keep })
	return nil
}

// swapAlso swaps in the namespaces that the options name. What is not swapped
// there is in the status.
func (m *Mount) swapAlso() {
	m.swapping.Lock()
	defer m.swapping.Unlock()
	if err := m.swapNamespaces(m.opts.SwapNamespaces); err != nil {
		m.log.Warn("not swapped everywhere", "error", oneLine(err.Error()))
	}
}

const composefsPrefix = "composefs:"

// composefsSource returns the path of a composefs: source.
func composefsSource(source string) (string, bool) {
	return strings.CutPrefix(source, composefsPrefix)
}

// readahead is how far the kernel reads ahead through FUSE once everything is
// local, in KiB: as much as one request may ask for.
const readahead = "1024"

// readFurther has the kernel read further ahead than the 128 KiB that are its
// default: each request costs tens of microseconds whatever its size. Not
// before everything is local: a page fault would fetch as much.
func (m *Mount) readFurther() {
	info, err := kmount.At(m.mountpoint)
	if err != nil || info.ID != m.server.MountID() {
		return
	}
	if err := os.WriteFile("/sys/class/bdi/"+info.Dev+"/read_ahead_kb", []byte(readahead), 0); err != nil {
		m.log.Debug("the kernel reads ahead as far as it does by default", "error", err)
	}
}
