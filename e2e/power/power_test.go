//go:build soakpower

package power

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/e2e/vm"
)

// The power of a machine that fills a store is cut at a random instant, 50
// times (CFS_FUSE_POWER_CUTS). At each start the store's check finds nothing,
// every byte that is there is right, and all that was synced is there.
func TestPowerCuts(t *testing.T) {
	cuts := 50
	if n, err := strconv.Atoi(os.Getenv("CFS_FUSE_POWER_CUTS")); err == nil {
		cuts = n
	}
	ctx := t.Context()
	cacheDir, err := images.DefaultCache()
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := vm.EnsureKernel(ctx, cacheDir, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	program, initrd, disk := filepath.Join(dir, "cache.test"), filepath.Join(dir, "initrd"), filepath.Join(dir, "disk")
	if err := vm.BuildStatic(ctx, program, "test", "github.com/cfs-fuse/cfs-fuse/cache"); err != nil {
		t.Fatal(err)
	}
	if err := kernel.WriteInitrd(ctx, initrd, []vm.File{{Guest: "/cache.test", Host: program}}); err != nil {
		t.Fatal(err)
	}
	if err := vm.MakeDisk(ctx, disk, 512<<20); err != nil {
		t.Fatal(err)
	}
	certain, most, full := 0, 0, 0
	for n := range cuts {
		boot, cancel := context.WithTimeout(ctx, 5*time.Minute)
		m, err := vm.Start(boot, vm.Config{
			Kernel: kernel, Initrd: initrd, Disk: disk, Console: filepath.Join(dir, "console"),
			Args: []string{"/cache.test", "-test.run=^TestPower$", "-test.timeout=0", "-power.dir=/disk/store", fmt.Sprintf("-power.certain=%d", certain)},
		})
		if err != nil {
			t.Fatal(err)
		}
		if err = m.Await(boot, "checked"); err == nil {
			time.Sleep(time.Duration(rand.IntN(4000)) * time.Millisecond)
		}
		m.Kill()
		cancel()
		if err != nil {
			t.Fatalf("after %d cuts, with %d contents certain: %v\n%s", n, certain, err, strings.Join(m.Lines(), "\n"))
		}
		for _, line := range m.Lines() {
			if s, ok := strings.CutPrefix(line, "synced "); ok {
				if certain, err = strconv.Atoi(s); err != nil {
					t.Fatal(err)
				}
				if certain == 0 {
					full++
				}
				most = max(most, certain)
			}
		}
		t.Logf("cut %d: %d contents are certain", n+1, certain)
	}
	t.Logf("%d cuts, %d stores filled, at most %d contents certain at a cut", cuts, full, most)
	if most == 0 {
		t.Error("nothing was ever certain")
	}
}
