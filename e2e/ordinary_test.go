package e2e

import (
	"os"
	"path/filepath"
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
