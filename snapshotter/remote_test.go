package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	ours "github.com/cfs-fuse/cfs-fuse/mount"
)

// A node is a snapshotter and a registry.
type node struct {
	t    *testing.T
	dir  string
	opts Options
	s    *Snapshotter
	reg  *registrytest.Registry
	oci  map[string]*imagetest.OCI
}

func newNode(t *testing.T) *node {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts, and needs root")
	}
	dir, err := os.MkdirTemp("", "n")
	if err != nil {
		t.Fatal(err)
	}
	n := &node{t: t, dir: dir, opts: testOptions(t, dir), oci: map[string]*imagetest.OCI{}}
	if n.reg, err = registrytest.New(registrytest.Options{}); err != nil {
		t.Fatal(err)
	}
	n.opts.Mount.Source.ReadTimeout = 2 * time.Second
	n.start()
	t.Cleanup(func() {
		n.end()
		n.reg.Close()
		all, err := kmount.Mounts()
		if err != nil {
			t.Error(err)
		}
		for _, m := range all {
			if strings.HasPrefix(m.Mountpoint, dir+"/") {
				t.Errorf("left: %+v", m)
				kmount.Detach(m.Mountpoint)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return n
}

func (n *node) start() {
	n.t.Helper()
	var err error
	if n.s, err = New(n.opts, nil); err != nil {
		n.t.Fatal(err)
	}
}

// end removes all snapshots, as containerd's garbage collection does, and
// closes the snapshotter.
func (n *node) end() {
	n.t.Helper()
	for {
		var leaves []string
		parents := map[string]bool{}
		n.s.Walk(n.t.Context(), func(_ context.Context, i snapshots.Info) error {
			parents[i.Parent] = true
			leaves = append(leaves, i.Name)
			return nil
		})
		if len(leaves) == 0 {
			break
		}
		for _, name := range leaves {
			if !parents[name] {
				if err := n.s.Remove(context.Background(), name); err != nil {
					n.t.Fatal(err)
				}
			}
		}
	}
	if err := n.s.Cleanup(context.Background()); err != nil {
		n.t.Error(err)
	}
	if err := n.s.Close(); err != nil {
		n.t.Error(err)
	}
}

// push makes an image of layers.
func (n *node) push(name string, layers ...*imagetest.Blob) {
	n.t.Helper()
	o, err := imagetest.Image(layers...)
	if err != nil {
		n.t.Fatal(err)
	}
	for d, b := range o.Blobs {
		n.reg.Add(d, strings.NewReader(string(b)), int64(len(b)))
	}
	n.reg.AddManifest(name, "latest", o.Desc.MediaType, o.Raw)
	n.oci[name] = o
}

// pull prepares the layers of an image as containerd does, and returns how many
// were served, and the topmost snapshot.
func (n *node) pull(name string, layers ...*imagetest.Blob) (served int, top string) {
	n.t.Helper()
	ctx := n.t.Context()
	parent := ""
	var diffs []digest.Digest
	for i, l := range layers {
		diffs = append(diffs, l.DiffID)
		chain := identity.ChainID(diffs).String()
		labels := map[string]string{
			snapshots.LabelSnapshotRef: chain,
			refLabel:                   n.reg.Host() + "/" + name + ":latest",
			layerLabel:                 l.Desc.Digest.String(),
			manifestLabel:              n.oci[name].Desc.Digest.String(),
		}
		key := name + " extract " + chain
		mounts, err := n.s.Prepare(ctx, key, parent, snapshots.WithLabels(labels))
		switch {
		case errdefs.IsAlreadyExists(err):
			served++
			found := ""
			n.s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
				found = i.Name
				return nil
			}, `labels."containerd.io/snapshot.ref"==`+chain+`,parent=="`+parent+`"`)
			if found == "" {
				n.t.Fatalf("layer %d: the snapshot is said to exist, and is not found", i)
			}
			parent = found
		case err != nil:
			n.t.Fatalf("layer %d: %v", i, err)
		default:
			at := filepath.Join(n.dir, "extract")
			n.mounted(mounts, at, func() {
				if err := os.WriteFile(filepath.Join(at, "unpacked-"+name), []byte(name), 0o644); err != nil {
					n.t.Fatal(err)
				}
			})
			if err := n.s.Commit(ctx, name+" "+chain, key, snapshots.WithLabels(labels)); err != nil {
				n.t.Fatal(err)
			}
			parent = name + " " + chain
		}
	}
	return served, parent
}

// mounted does something with mounts that are made for it.
func (n *node) mounted(mounts []mount.Mount, at string, do func()) {
	n.t.Helper()
	if err := os.MkdirAll(at, 0o755); err != nil {
		n.t.Fatal(err)
	}
	if err := mount.All(mounts, at); err != nil {
		n.t.Fatalf("mount %+v: %v", mounts, err)
	}
	defer func() {
		if err := mount.UnmountAll(at, 0); err != nil {
			n.t.Error(err)
		}
	}()
	do()
}

func layer(t *testing.T, items ...imagetest.Item) *imagetest.Blob {
	t.Helper()
	tar, err := imagetest.Tar(items...)
	if err != nil {
		t.Fatal(err)
	}
	return imagetest.Must(imagetest.EStargz(tar, imagetest.Options{ChunkSize: 64 << 10}))
}

func (n *node) awaitSealed(name string) {
	n.t.Helper()
	for _, l := range n.s.trees.opened() {
		if err := l.WaitFor(n.t.Context(), ours.Sealed); err != nil {
			n.t.Fatalf("%s: %v", name, err)
		}
	}
}

func lowerdir(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "lowerdir="); ok {
			return dir
		}
	}
	t.Fatalf("no lowerdir in %+v", mounts)
	return ""
}

func read(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	}
	return string(data)
}

// A container that was prepared while its image was lazy keeps that choice when
// the image is sealed, over a restart, and while it runs; a new one gets the
// kernel's mount.
func TestChoiceStays(t *testing.T) {
	n := newNode(t)
	low := layer(t, imagetest.Dir("etc/"), imagetest.File("etc/name", "low"), imagetest.Random("big", 200_000, 1), imagetest.File("gone", "x"))
	top := layer(t, imagetest.File("etc/name", "top"), imagetest.Whiteout("gone"))
	n.push("app", low, top)
	n.opts.Mount.NoFill = true
	if err := n.s.Close(); err != nil {
		t.Fatal(err)
	}
	n.start()
	served, parent := n.pull("app", low, top)
	if served != 2 {
		t.Fatalf("%d layers were served, want both", served)
	}
	ctx := t.Context()
	lazy, err := n.s.Prepare(ctx, "c1", parent)
	if err != nil {
		t.Fatal(err)
	}
	if got := lowerdir(t, lazy); strings.Count(got, "::") != 2 {
		t.Errorf("lowerdir of a lazy image: %s, want the hybrid's three", got)
	}
	at := filepath.Join(n.dir, "c1")
	n.mounted(lazy, at, func() {
		if got := read(t, at+"/etc/name"); got != "top" {
			t.Errorf("etc/name: %q", got)
		}
		if _, err := os.Stat(at + "/gone"); !os.IsNotExist(err) {
			t.Errorf("a file that a whiteout removes: %v", err)
		}
		if got := read(t, at+"/big"); got != string(imagetest.RandomBytes(200_000, 1)) {
			t.Error("big has wrong bytes")
		}
		if err := os.WriteFile(at+"/etc/name", []byte("own"), 0o644); err != nil {
			t.Error(err)
		}
		if err := os.Rename(at+"/etc", at+"/moved"); err != nil {
			t.Error(err)
		}
	})
	n.awaitSealed("app") // everything was read
	for range 2 {
		again, err := n.s.Mounts(ctx, "c1")
		if err != nil {
			t.Fatal(err)
		}
		if lowerdir(t, again) != lowerdir(t, lazy) {
			t.Errorf("Mounts gives %s, Prepare gave %s", lowerdir(t, again), lowerdir(t, lazy))
		}
		n.reg.SetFault(func(registrytest.Request) registrytest.Fault {
			return registrytest.Fault{Kind: registrytest.Status, Status: 503}
		})
		n.mounted(again, at, func() {
			if got := read(t, at+"/moved/name"); got != "own" {
				t.Errorf("moved/name: %q", got)
			}
			if got := read(t, at+"/big"); got != string(imagetest.RandomBytes(200_000, 1)) {
				t.Error("big has wrong bytes")
			}
		})
		// As after a reboot: no mount is left.
		if err := n.s.Close(); err != nil {
			t.Fatal(err)
		}
		folders, _ := filepath.Glob(filepath.Join(n.opts.Mount.Runtime, "images", "*"))
		for _, f := range folders {
			if err := ours.DetachLowers(f); err != nil {
				t.Error(err)
			}
		}
		n.start()
	}
	sealed, err := n.s.Prepare(ctx, "c2", parent)
	if err != nil {
		t.Fatal(err)
	}
	if got := lowerdir(t, sealed); strings.Count(got, "::") != 1 || !strings.Contains(got, "/sealed::") {
		t.Errorf("lowerdir of a sealed image: %s", got)
	}
	n.mounted(sealed, at, func() {
		if got := read(t, at+"/etc/name"); got != "top" {
			t.Errorf("etc/name: %q", got)
		}
	})
}

// Of an image that FUSE alone serves there are views too, though overlayfs takes
// no single lower.
func TestViewOfFUSE(t *testing.T) {
	n := newNode(t)
	if err := n.s.Close(); err != nil {
		t.Fatal(err)
	}
	n.opts.Mount.Backend, n.opts.Mount.NoFill = ours.FUSE, true
	n.start()
	low := layer(t, imagetest.File("name", "low"))
	n.push("app", low)
	_, parent := n.pull("app", low)
	at := filepath.Join(n.dir, "at")
	for range 2 { // the second time it may be sealed
		mounts, err := n.s.View(t.Context(), "view", parent)
		if err != nil {
			t.Fatal(err)
		}
		n.mounted(mounts, at, func() {
			if got := read(t, at+"/name"); got != "low" {
				t.Errorf("name: %q", got)
			}
			if err := os.WriteFile(at+"/new", nil, 0o644); err == nil {
				t.Error("a view is written to")
			}
		})
		if err := n.s.Remove(t.Context(), "view"); err != nil {
			t.Fatal(err)
		}
		n.awaitSealed("app")
	}
}

// A snapshot that was made over another backend than the image has now, after a
// reboot with other options, is refused while that cannot be had, and is in no new
// one's way.
func TestOtherBackend(t *testing.T) {
	for before, now := range map[ours.Backend]ours.Backend{ours.FUSE: ours.Hybrid, ours.Hybrid: ours.FUSE} {
		n := newNode(t)
		low := layer(t, imagetest.File("name", "low"))
		n.push("app", low)
		n.opts.Mount.NoFill = true
		start := func(b ours.Backend) {
			if err := n.s.Close(); err != nil {
				t.Fatal(err)
			}
			folders, _ := filepath.Glob(filepath.Join(n.opts.Mount.Runtime, "images", "*"))
			for _, f := range folders {
				if err := ours.DetachLowers(f); err != nil {
					t.Error(err)
				}
			}
			n.opts.Mount.Backend = b
			n.start()
		}
		start(before)
		_, parent := n.pull("app", low)
		if _, err := n.s.Prepare(t.Context(), "old", parent); err != nil {
			t.Fatal(err)
		}
		start(now)
		if _, err := n.s.Prepare(t.Context(), "new", parent); err != nil {
			t.Fatal(err)
		}
		if m, err := n.s.Mounts(t.Context(), "old"); err == nil {
			t.Errorf("%s, made as %s: %+v, want an error", now, before, m)
		}
		for range 2 {
			mounts, err := n.s.Prepare(t.Context(), "newest", parent)
			if err != nil {
				t.Fatal(err)
			}
			at := filepath.Join(n.dir, "at")
			n.mounted(mounts, at, func() {
				if got := read(t, at+"/name"); got != "low" {
					t.Errorf("%s: name: %q", now, got)
				}
			})
			if err := n.s.Remove(t.Context(), "newest"); err != nil {
				t.Fatal(err)
			}
			n.awaitSealed("app")
		}
		if before == ours.Hybrid { // which needs FUSE no more
			if _, err := n.s.Mounts(t.Context(), "old"); err != nil {
				t.Error(err)
			}
		}
	}
}

// What is committed from a container, an ordinary layer over remote ones, an
// image that is the lowest layers of another: each is whole.
func TestMixedAncestors(t *testing.T) {
	n := newNode(t)
	low := layer(t, imagetest.File("low", "low"), imagetest.File("both", "low"))
	mid := layer(t, imagetest.File("mid", "mid"), imagetest.File("both", "mid"))
	plain := imagetest.Must(imagetest.Gzip(imagetest.Must(imagetest.Tar(imagetest.File("unpacked-mixed", "mixed")))))
	n.push("app", low, mid)
	n.push("mixed", low, mid, plain)
	n.push("base", low)
	if served, _ := n.pull("app", low, mid); served != 2 {
		t.Fatalf("%d layers of app were served", served)
	}
	served, mixed := n.pull("mixed", low, mid, plain)
	if served != 2 { // those that are there
		t.Errorf("%d layers of mixed were served, want 2", served)
	}
	served, base := n.pull("base", low)
	if served != 1 {
		t.Errorf("%d layers of base were served", served)
	}
	ctx := t.Context()
	at := filepath.Join(n.dir, "at")
	check := func(key, parent string, want map[string]string) {
		t.Helper()
		mounts, err := n.s.View(ctx, key, parent)
		if err != nil {
			t.Fatal(err)
		}
		n.mounted(mounts, at, func() {
			for name, text := range want {
				got, err := os.ReadFile(filepath.Join(at, name))
				if text == "" && os.IsNotExist(err) {
					continue
				}
				if err != nil || string(got) != text {
					t.Errorf("%s: %s is %q, %v; want %q", key, name, got, err, text)
				}
			}
			if err := os.WriteFile(at+"/new", nil, 0o644); err == nil {
				t.Errorf("%s: a view can be written to", key)
			}
		})
	}
	check("v1", mixed, map[string]string{"low": "low", "mid": "mid", "both": "mid", "unpacked-mixed": "mixed"})
	check("v2", base, map[string]string{"low": "low", "mid": "", "both": "low"})
	mounts, err := n.s.Prepare(ctx, "c", mixed)
	if err != nil {
		t.Fatal(err)
	}
	n.mounted(mounts, at, func() {
		for _, err := range []error{
			os.Remove(at + "/low"), os.Chmod(at+"/mid", 0o600), os.WriteFile(at+"/own", []byte("own"), 0o644),
		} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	if usage, err := n.s.Usage(ctx, "c"); err != nil || usage.Inodes == 0 {
		t.Errorf("usage of a container: %+v, %v", usage, err)
	}
	if err := n.s.Commit(ctx, "committed", "c"); err != nil {
		t.Fatal(err)
	}
	check("v3", "committed", map[string]string{"low": "", "mid": "mid", "both": "mid", "own": "own", "unpacked-mixed": "mixed"})
}

// An image with a layer that cannot be served is containerd's to unpack, all of
// it.
func TestFallback(t *testing.T) {
	n := newNode(t)
	lazy := layer(t, imagetest.File("lazy", "lazy"))
	plain := imagetest.Must(imagetest.Gzip(imagetest.Must(imagetest.Tar(imagetest.File("plain", "plain")))))
	n.push("plain", lazy, plain)
	if served, _ := n.pull("plain", lazy, plain); served != 0 {
		t.Errorf("%d layers were served, want none", served)
	}
	// With wrong labels as well, and without.
	for name, labels := range map[string]map[string]string{
		"another layer":    {refLabel: n.reg.Host() + "/plain:latest", layerLabel: plain.Desc.Digest.String()},
		"no such image":    {refLabel: n.reg.Host() + "/none:latest", layerLabel: plain.Desc.Digest.String()},
		"no reference":     {refLabel: "::", layerLabel: plain.Desc.Digest.String()},
		"another manifest": {refLabel: n.reg.Host() + "/plain:latest", layerLabel: lazy.Desc.Digest.String(), manifestLabel: plain.Desc.Digest.String()},
		"no labels":        {},
	} {
		labels[snapshots.LabelSnapshotRef] = "target of " + name
		mounts, err := n.s.Prepare(t.Context(), name, "", snapshots.WithLabels(labels))
		if err != nil || len(mounts) != 1 || mounts[0].Type != "bind" {
			t.Errorf("%s: %+v, %v; want a folder to unpack into", name, mounts, err)
		}
	}
}
