package mount

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

func TestMountedOn(t *testing.T) {
	on := kmount.Info{ID: 10, Parent: 1, Mountpoint: "/m", Dev: "0:9"}
	all := []kmount.Info{
		{ID: 1, Mountpoint: "/", Dev: "8:1"}, on,
		{ID: 11, Parent: 10, Mountpoint: "/m/a/b"}, // hidden by the next
		{ID: 12, Parent: 10, Mountpoint: "/m/a"},
		{ID: 13, Parent: 12, Mountpoint: "/m/a/c"},
		{ID: 14, Parent: 10, Mountpoint: "/m/ab"},
	}
	var ids []int
	for _, c := range mountedOn(on, all) {
		ids = append(ids, c.ID)
	}
	if !slices.Equal(ids, []int{12, 14}) || covered(on, all) {
		t.Errorf("mounted on it: %v, covered %v; want 12 and 14, not covered", ids, covered(on, all))
	}
	if all = append(all, kmount.Info{ID: 15, Parent: 10, Mountpoint: "/m"}); !covered(on, all) || len(mountedOn(on, all)) != 2 {
		t.Error("what covers it is not seen, or taken for something on a folder")
	}
}

func TestHasLowerOn(t *testing.T) {
	all := []kmount.Info{
		{ID: 1, Mountpoint: "/", Dev: "8:1"}, {ID: 2, Parent: 1, Mountpoint: "/m", Dev: "0:9"},
		{ID: 3, Parent: 2, Mountpoint: "/m/x", Dev: "0:10"},
	}
	for options, want := range map[string]bool{
		"ro,lowerdir=/m": true, "rw,lowerdir=/a:/m/usr:/b,upperdir=/m/u": true, "ro,lowerdir+=/a,lowerdir+=/m": true, "ro,datadir+=/m/y": true,
		"ro,lowerdir=/mm": false, "ro,lowerdir=/m/x:/a": false, "rw,lowerdir=/a,upperdir=/m": false, "ro": false, "lowerdir=": false,
	} {
		if got := hasLowerOn(kmount.Info{Options: options}, all, "0:9"); got != want {
			t.Errorf("%s: %v, want %v", options, got, want)
		}
	}
	if pids, err := ParsePIDs("1,23"); err != nil || !slices.Equal(pids, []int{1, 23}) || formatPIDs(pids) != "1,23" {
		t.Errorf("ParsePIDs: %v, %v", pids, err)
	}
	for _, bad := range []string{"0", "-1", "1,", ",", "x"} {
		if _, err := ParsePIDs(bad); err == nil {
			t.Errorf("ParsePIDs(%q): no error", bad)
		}
	}
}

// A process that died after its swap, and before that in other places, leaves
// those to its successor.
func TestSettleSwapsAlso(t *testing.T) {
	eachBackend(t, func(t *testing.T, b Backend) {
		m, mnt := start(t, twoLayers(t), Options{Backend: b, Swap: Never})
		bind := t.TempDir()
		if err := unix.Mount(mnt, bind, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(bind, unix.MNT_DETACH)
		waitFor(t, m, Sealed)
		id := m.server.MountID()
		if err := m.swap(); err != nil {
			t.Fatal(err)
		}
		m.opts.SwapNamespaces = []int{os.Getpid()}
		for range 2 {
			if wanted, err := m.settle(id); wanted || err != nil {
				t.Errorf("settle: wanted %t, %v", wanted, err)
			}
			if info, err := kmount.At(bind); err != nil || !isSealedMount(info) {
				t.Errorf("%s: %+v, %v; want the sealed image", bind, info, err)
			}
		}
		if e := m.Status().Elsewhere; len(e) != 1 || e[0].Mountpoint != bind || !e[0].Swapped {
			t.Errorf("elsewhere: %+v", e)
		}
		if err := unix.Unmount(bind, 0); err != nil {
			t.Errorf("one unmount of %s: %v", bind, err)
		}
	})
}

// What is mounted on the first mount is on the kernel's afterwards, and other
// places of the same namespace are swapped when it is listed.
func TestSwapTakesAlong(t *testing.T) {
	eachBackend(t, func(t *testing.T, b Backend) {
		m, mnt := start(t, twoLayers(t), Options{Backend: b, Swap: Never})
		bind := t.TempDir()
		for _, to := range []struct{ from, at string }{{"/dev/null", mnt + "/etc/conf"}, {t.TempDir(), mnt + "/bin"}, {mnt + "/etc", bind}} {
			if err := unix.Mount(to.from, to.at, "", unix.MS_BIND, ""); err != nil {
				t.Fatal(err)
			}
			defer unix.Unmount(to.at, unix.MNT_DETACH)
		}
		if err := os.WriteFile(filepath.Join(mnt, "bin", "new"), []byte("on it"), 0o644); err != nil {
			t.Fatal(err)
		}
		held, err := os.Open(filepath.Join(bind, "conf"))
		if err != nil {
			t.Fatal(err)
		}
		defer held.Close()
		waitFor(t, m, Sealed)
		if err := m.swapNow([]int{os.Getpid()}); err != nil {
			t.Fatal(err)
		}
		for _, at := range []string{mnt, bind} {
			if info, err := kmount.At(at); err != nil || !isSealedMount(info) {
				t.Errorf("%s: %+v, %v", at, info, err)
			}
		}
		for path, want := range map[string]string{mnt + "/bin/new": "on it", mnt + "/etc/conf": "", bind + "/conf": "upper"} {
			if got, err := os.ReadFile(path); err != nil || string(got) != want {
				t.Errorf("%s = %q, %v; want %q", path, got, err, want)
			}
		}
		if e := m.Status().Elsewhere; len(e) != 1 || e[0].Mountpoint != bind || !e[0].Swapped {
			t.Errorf("elsewhere: %+v", e)
		}
		held.Close()
		select {
		case <-m.server.Done():
		case <-time.After(10 * time.Second):
			t.Error("FUSE is still there")
		}
		for _, at := range []string{mnt + "/etc/conf", mnt + "/bin", bind} {
			if err := unix.Unmount(at, 0); err != nil {
				t.Errorf("umount %s: %v", at, err)
			}
		}
	})
}
