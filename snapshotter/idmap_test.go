package snapshotter

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

func TestMappedRoot(t *testing.T) {
	for label, want := range map[string]int{"": 0, "0:1000:10": 1000, "5:1:1,0:65536:65536": 65536, "1:2:3": -1, "0:1": -1, "0:x:1": -1, "0:-1:1": -1, "0:1:0": -1} {
		got, err := mappedRoot(label)
		if err != nil {
			got = -1
		}
		if got != want {
			t.Errorf("%q: %d, %v; want %d", label, got, err, want)
		}
	}
}

func FuzzMappedRoot(f *testing.F) {
	f.Add("0:1000:10,10:1:5")
	f.Fuzz(func(t *testing.T, label string) {
		if id, err := mappedRoot(label); id < 0 || err != nil && id != 0 {
			t.Errorf("%d, %v", id, err)
		}
	})
}

func ownerOf(t *testing.T, path string) int {
	t.Helper()
	fi, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return int(fi.Sys().(*syscall.Stat_t).Uid)
}

// A container in a user namespace sees the image's owners as its own, and
// nothing is copied for it: not from the image, nor from a layer over it.
func TestRemapIDs(t *testing.T) {
	n := newNode(t)
	if err := n.s.Close(); err != nil {
		t.Fatal(err)
	}
	n.opts.RemapIDs = true
	n.start()
	low := layer(t, imagetest.File("root", "root"), imagetest.File("user", "user", imagetest.Owner(7, 7)))
	n.push("app", low)
	_, parent := n.pull("app", low)
	ctx := t.Context()
	at := filepath.Join(n.dir, "at")
	mounts, err := n.s.Prepare(ctx, "plain", parent)
	if err != nil {
		t.Fatal(err)
	}
	n.mounted(mounts, at, func() {
		if err := os.WriteFile(at+"/committed", nil, 0o644); err != nil {
			t.Error(err)
		}
	})
	if err := n.s.Commit(ctx, "committed", "plain"); err != nil {
		t.Fatal(err)
	}
	labels := snapshots.WithLabels(map[string]string{
		snapshots.LabelSnapshotUIDMapping: "0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:100000:65536",
	})
	for key, on := range map[string]string{"c1": parent, "c2": "committed"} {
		mounts, err := n.s.Prepare(ctx, key, on, labels)
		if err != nil {
			t.Fatal(err)
		}
		again, err := n.s.Mounts(ctx, key)
		if err != nil || !slices.EqualFunc(mounts, again, func(a, b mount.Mount) bool { return slices.Equal(a.Options, b.Options) }) {
			t.Errorf("Mounts gives %+v, %v; Prepare gave %+v", again, err, mounts)
		}
		n.mounted(mounts, at, func() {
			for path, want := range map[string]int{"": 100000, "root": 100000, "user": 100007} {
				if got := ownerOf(t, filepath.Join(at, path)); got != want {
					t.Errorf("%s: %q belongs to %d, want %d", key, path, got, want)
				}
			}
			if on == "committed" && ownerOf(t, at+"/committed") != 100000 {
				t.Errorf("%s: what was committed belongs to %d", key, ownerOf(t, at+"/committed"))
			}
			if got := read(t, at+"/user"); got != "user" {
				t.Errorf("%s: user has %q", key, got)
			}
		})
		if usage, err := n.s.Usage(ctx, key); err != nil || usage.Inodes > 1 {
			t.Errorf("%s: its upper folder has %+v, %v", key, usage, err)
		}
	}
}
