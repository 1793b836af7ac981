package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// Layers that have no table of contents, gzip as every registry has them, are read
// once, at the cost of a pull, and the image is then as any other: what umoci
// unpacks, also when its files were evicted and come by the layers' indexes.
func TestOrdinaryLayers(t *testing.T) {
	b, k := newBench(t), newLink(t, registry.Addr, wan)
	total, err := set.CompressedSize(images.Plain, images.Odd)
	if err != nil {
		t.Fatal(err)
	}
	reference := set.Reference(images.Odd)
	src := source(k, images.Odd, images.Plain)
	point := b.mount(src)
	sameTree(t, reference, point, treediff.Options{})
	b.waitFor("swapped", point)
	isKernel(t, point)
	sameTree(t, reference, point, treediff.Options{})
	if got := k.bytes(); float64(got) > 1.05*float64(total)+512<<10 {
		t.Errorf("%d bytes passed, the layers have %d", got, total)
	}
	b.must("umount", point)

	for _, dir := range []string{"objects", "contents/sha256"} {
		fans, err := filepath.Glob(filepath.Join(b.root, dir, "*"))
		if err != nil || len(fans) == 0 {
			t.Fatalf("%s: %d, %v", dir, len(fans), err)
		}
		for _, f := range fans {
			if err := os.RemoveAll(f); err != nil {
				t.Fatal(err)
			}
		}
	}
	point = b.mount(src, "--fill=false")
	sameTree(t, reference, point, treediff.Options{})
	b.must("umount", point)
	noProcess(t, point)
}

// An index that one machine has attached to the layers makes the unmodified
// image lazy on another, which proves it by the DiffIDs before the image is sealed.
func TestAttachedIndexes(t *testing.T) {
	maker := newBench(t)
	own, err := images.StartRegistry(t.Context(), images.RegistryOptions{Storage: filepath.Join(maker.dir, "storage"), Dir: maker.dir})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if out, err := exec.Command("skopeo", "copy", "--quiet", "--preserve-digests", "--dest-tls-verify=false",
		"oci:"+set.Layout(images.Plain)+":"+images.Odd, "docker://"+own.Addr+"/"+images.Odd+":"+images.Plain).CombinedOutput(); err != nil {
		t.Fatalf("skopeo: %v: %s", err, out)
	}
	writable := "docker://" + own.Addr + "/" + images.Odd + ":" + images.Plain
	k := newLink(t, own.Addr, wan)
	src := source(k, images.Odd, images.Plain)
	out := maker.must("index", "push", "--plain-http", "--root", maker.root, writable)
	if !strings.Contains(out, "attached as sha256:") {
		t.Errorf("index push said %q", out)
	}
	again := maker.must("index", "push", "--plain-http", "--root", maker.root, writable)
	if again != out {
		t.Errorf("index push said %q, then %q", out, again)
	}

	other := newBench(t)
	total, err := set.CompressedSize(images.Plain, images.Odd)
	if err != nil {
		t.Fatal(err)
	}
	before := k.bytes()
	point := other.mount(src, "--index", "require", "--fill=false")
	if s := other.status(point); s.BytesLocal > 0 || s.Files == 0 {
		t.Errorf("status of a mount by an index: %+v", s)
	}
	if got := k.bytes() - before; got > total/2 {
		t.Errorf("%d bytes passed before anything was read, the layers have %d", got, total)
	}
	sameTree(t, set.Reference(images.Odd), point, treediff.Options{})
	other.must("umount", point)
	noProcess(t, point)

	point = other.mount(src, "--index", "auto")
	other.waitFor("swapped", point)
	sameTree(t, set.Reference(images.Odd), point, treediff.Options{})
	other.must("umount", point)
	noProcess(t, point)

	third := newBench(t)
	third.refused(1, []string{"none is attached", "cfs-fuse index push"}, "mount", "--plain-http", "--root", third.root, "--index", "require",
		"oci:"+set.Layout(images.Plain)+":"+images.Odd, third.point())
}
