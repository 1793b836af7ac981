package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// Swaps under load: four processes use a mount while it goes from FUSE, or
// from a hybrid, to the kernel, three by path and one through what it holds open. No operation may
// fail or give something else, and FUSE's process leaves with the last file.
func TestSwapUnderLoad(t *testing.T) {
	swaps := 50
	if testing.Short() {
		swaps = 6
	}
	reference := set.Reference(images.Small)
	b := newBench(t)
	slow := newLink(t, registry.Addr, speed{mbit: 40, delay: 5 * time.Millisecond})
	// Complete either because the workers read everything, or because the
	// background fill gets there while they wait for some of it.
	sources := []struct {
		source, backend string
		flags           []string
	}{
		{"oci:" + set.Layout(images.EStargz) + ":" + images.Small, fuseBackend, []string{"--fill=false"}},
		{source(slow, images.Small, images.ZstdChunked), hybridBackend, nil},
		{source(slow, images.Small, images.ZstdChunked), fuseBackend, nil},
		{"oci:" + set.Layout(images.EStargz) + ":" + images.Small, hybridBackend, []string{"--fill=false"}},
	}
	ops := map[string]int{}
	for i := range swaps {
		from := sources[i%len(sources)]
		b.root = filepath.Join(b.dir, fmt.Sprintf("root%d", i))
		b.backend = from.backend
		point := b.mount(from.source, append([]string{"--swap", "require"}, from.flags...)...)
		var workers []*running
		for _, kind := range []string{loadWorker, loadWorker, loadWorker, holdWorker} {
			workers = append(workers, startWorker(t, kind, point, reference))
		}
		for _, w := range workers {
			if err := w.ready(); err != nil {
				t.Fatalf("swap %d: %v", i, err)
			}
		}
		// Not by 'wait': it gives the process a while to leave, and here it must stay.
		eventually(t, time.Minute, "swapped under load", func() bool { return b.status(point).State == "swapped" })
		time.Sleep(100 * time.Millisecond) // of use on the kernel's mount
		if all := mountOn(t, point); len(all) != 1 || all[0].fstype != "overlay" || !strings.HasSuffix(all[0].source, "/sealed.erofs") {
			t.Errorf("swap %d: mounted: %+v", i, all)
		}
		if pids := processesOf(t, point); len(pids) != 2 {
			t.Errorf("swap %d: processes %v while a worker holds files open on FUSE, want a server and its holder", i, pids)
		}
		for _, w := range workers {
			r, err := w.stop()
			if err != nil {
				t.Fatalf("swap %d: %v", i, err)
			}
			ops[w.kind] += r.Ops
			if r.Wrong > 0 {
				t.Errorf("swap %d: %s worker: %d of %d operations failed or were wrong: %q", i, w.kind, r.Wrong, r.Ops, r.Errors)
			}
		}
		noProcess(t, point)
		b.must("umount", point)
		if t.Failed() && i >= 2 {
			t.Fatalf("given up after %d swaps", i+1)
		}
	}
	t.Logf("%d swaps, operations %v", swaps, ops)
	if ops[loadWorker] < 1000*swaps || ops[holdWorker] < 100*swaps {
		t.Errorf("operations %v: too few to say anything", ops)
	}
}
