package e2e

import (
	"testing"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// 'cfs-fuse swap' swaps what was mounted with --swap never, when it is sealed,
// and 'cfs-fuse verify' finds nothing wrong before and after.
func TestSwapByHand(t *testing.T) {
	b := newBench(t)
	point := b.mount("oci:"+set.Layout(images.EStargz)+":"+images.Small, "--swap", "never")
	b.waitFor("sealed", point)
	b.must("verify", point)
	b.must("swap", point)
	isKernel(t, point)
	sameTree(t, set.Reference(images.Small), point, treediff.Options{})
	b.must("verify", point)
	b.must("umount", point)
	b.refused(3, nil, "swap", point)
}
