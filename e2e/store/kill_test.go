package store

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// inFlight bounds what one killed process may have had on its way, received or
// asked for, and not stored: the fill's six ranges of up to 8 MiB, and as
// much again for demand.
const inFlight = 2 * 6 * 8 << 20

// Processes that fill and read four images at once are killed at a random
// instant, over and over. After each kill the store's check is clean and what
// is local is right; each read is right at any time or fails because the
// process is dead; and what was stored is not fetched again.
// 1,000 kills with CFS_FUSE_SOAK_KILLS=1000 (make soak-kill).
func TestKillSoak(t *testing.T) {
	kills := 12
	if n, err := strconv.Atoi(os.Getenv("CFS_FUSE_SOAK_KILLS")); err == nil {
		kills = n
	}
	b, r := newBench(t), serve(t)
	base := files("usr", 40, 200, 20_000)
	var images []built
	blobs := map[string]int64{}
	for i := range 4 {
		own := append(files("opt", uint64(41+i), 150, 30_000), file{name: "opt/large", size: 12<<20 + i, seed: uint64(2000 + i)}, file{name: "opt/cut", size: 3<<20 + i, seed: uint64(3000 + i)})
		img := push(t, r, fmt.Sprintf("k%d", i), 256<<10, base, own)
		images = append(images, img)
		maps.Copy(blobs, img.blobs)
	}
	var size int64 // of what has to be fetched once
	for _, n := range blobs {
		size += n
	}
	r.SetLink(registrytest.Link{BytesPerSecond: 60 << 20, Latency: time.Millisecond})
	points := make([]string, len(images))
	for i := range points {
		points[i] = b.point()
	}
	var reads, failed atomic.Int64
	fills := 0
	var fetched, allowed int64 // over all stores
	var killedIn time.Duration
	start := r.Counts().Bytes
	for k := 0; k < kills; {
		var wg sync.WaitGroup
		for i, img := range images {
			wg.Go(func() {
				if _, err := b.run(b.mountArgs(img.name, points[i], "--swap", "never")...); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		// Readers go on until their process is dead.
		var killed atomic.Bool
		for i, img := range images {
			wg.Go(func() {
				for n := 0; !killed.Load(); n++ {
					f := img.files[rand.IntN(len(img.files))]
					err := f.compare(points[i])
					reads.Add(1)
					switch {
					case err == nil:
					case errors.Is(err, unix.ENOTCONN), errors.Is(err, unix.ECONNABORTED), errors.Is(err, unix.EIO) && killed.Load():
						failed.Add(1)
						return
					case killed.Load() && errors.Is(err, unix.EINTR):
					default:
						t.Errorf("kill %d: %v", k, err)
						return
					}
				}
			})
		}
		pause := time.Duration(rand.IntN(400)) * time.Millisecond
		time.Sleep(pause)
		killedIn += pause
		killed.Store(true)
		// The holders first: nobody is to go on.
		var servers []int
		for _, pid := range b.processes() {
			if cmd, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err == nil && strings.Contains(string(cmd), "hold-session") {
				unix.Kill(pid, unix.SIGKILL)
			} else {
				servers = append(servers, pid)
			}
		}
		for _, pid := range servers {
			unix.Kill(pid, unix.SIGKILL)
			k++
			allowed += inFlight
		}
		wg.Wait()
		eventually(t, 10*time.Second, "the killed are gone", func() bool {
			left := b.processes()
			for _, pid := range left { // a holder that was being started
				unix.Kill(pid, unix.SIGKILL)
			}
			return len(left) == 0
		})
		out, err := b.run("cache", "check", "--root", b.root, "--read")
		if err != nil || !strings.Contains(out, ": 0 problems") {
			t.Fatalf("after %d kills: check: %s, %v", k, out, err)
		}
		for _, p := range points {
			if err := unix.Unmount(p, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
		}
		if b.local() < size*19/20 && k < kills {
			continue
		}
		// The store is nearly full: fill it, look at all, and begin another.
		for i, img := range images {
			b.must(b.mountArgs(img.name, points[i], "--swap", "never")...)
			b.waitFor("sealed", points[i])
			if err := readAll(points[i], img); err != nil {
				t.Error(err)
			}
			if err := b.unmount(points[i]); err != nil {
				t.Error(err)
			}
		}
		if left, err := os.ReadDir(filepath.Join(b.root, "staging")); err != nil || len(left) > 0 {
			t.Errorf("left in staging: %v, %v", left, err)
		}
		fills++
		os.RemoveAll(b.root)
	}
	fetched = r.Counts().Bytes - start
	once := int64(fills) * size
	t.Logf("%d kills, %d stores filled, %d reads right, %d cut off by a kill; %d MiB fetched for %d MiB of blobs: %.2f times, %d KiB a kill more",
		kills, fills, reads.Load()-failed.Load(), failed.Load(), fetched>>20, once>>20, float64(fetched)/float64(max(once, 1)), (fetched-once)>>10/int64(kills))
	if fetched > once+allowed {
		t.Errorf("%d bytes fetched twice, %d may have been in flight", fetched-once, allowed)
	}
}

// local is what the store has on disk of files.
func (b *bench) local() int64 {
	return sizeOf(filepath.Join(b.root, "contents")) + sizeOf(filepath.Join(b.root, "staging"))
}
