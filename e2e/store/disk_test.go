package store

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A filesystem of 64 MiB fills while an image of 40 MB comes into it: no read
// fails, status says what is wrong, and when there is room again the image
// becomes whole by itself.
func TestDiskFills(t *testing.T) {
	for name, mkfs := range map[string][]string{
		"ext4": {"mkfs.ext4", "-q"},
	} {
		t.Run(name, func(t *testing.T) {
			b, r := newBench(t), serve(t)
			b.onFilesystem(64, mkfs...)
			img := push(t, r, "big", 0, append(files("usr", 9, 60, 400_000), file{name: "usr/large", size: 16 << 20, seed: 99}))
			ballast := filepath.Join(b.dir, "fs", "ballast")
			if err := os.WriteFile(ballast, make([]byte, 30<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			p := b.mount(img.name)
			for range 2 {
				if err := readAll(p, img); err != nil {
					t.Fatal(err)
				}
				forget(t, p, img)
			}
			eventually(t, 10*time.Second, "status says that the disk is full", func() bool {
				s := b.status(p)
				return s.State == "lazy" && strings.Contains(s.StoreNote+s.Note, "no space left")
			})
			s := b.status(p)
			if s.BytesLocal == 0 || s.BytesLocal >= s.Bytes {
				t.Errorf("status: %+v", s)
			}
			if out, err := b.run("status", p); err != nil || !strings.Contains(out, "make room on the filesystem") {
				t.Errorf("status for people: %s, %v", out, err)
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			b.waitFor("swapped", p)
			if err := readAll(p, img); err != nil {
				t.Fatal(err)
			}
			if out := b.must("cache", "check", "--root", b.root, "--read"); !strings.Contains(out, ": 0 problems") {
				t.Errorf("check: %s", out)
			}
			b.must("umount", p)
		})
	}
}

// A store that becomes read-only serves what it has, and what it has not from
// the registry, by memory.
func TestDiskReadOnly(t *testing.T) {
	b, r := newBench(t), serve(t)
	b.onFilesystem(64, "mkfs.ext4", "-q")
	img := push(t, r, "ro", 0, files("usr", 10, 40, 300_000))
	p := b.mount(img.name, "--fill=false")
	if err := img.files[0].compare(p); err != nil {
		t.Fatal(err)
	}
	fs := filepath.Join(b.dir, "fs")
	if err := unix.Mount("", fs, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if err := readAll(p, img); err != nil {
		t.Error(err)
	}
	if s := b.status(p); !strings.Contains(s.StoreNote, "read-only") {
		t.Errorf("status: %+v", s)
	}
	if err := unix.Mount("", fs, "", unix.MS_REMOUNT, ""); err != nil {
		t.Fatal(err)
	}
	b.must("umount", p)
}

// Under a budget of half of what four images have, four processes at a time
// mount, read, fill and unmount them: no read fails, every byte is right,
// and the store is never over its budget by more than 64 MiB. For an hour with
// CFS_FUSE_SOAK=1h (make soak-budget).
func TestBudgetSoak(t *testing.T) {
	limit := 10 * time.Second
	if long := os.Getenv("CFS_FUSE_SOAK"); long != "" {
		var err error
		if limit, err = time.ParseDuration(long); err != nil {
			t.Fatal(err)
		}
	}
	b, r := newBench(t), serve(t)
	base := files("usr", 20, 20, 200_000)
	var images []built
	var sum int64
	for i := range 8 {
		own := append(files("opt", uint64(21+i), 100, 100_000), file{name: "opt/large", size: 10 << 20, seed: uint64(1000 + i)})
		images = append(images, push(t, r, fmt.Sprintf("i%d", i), 1<<20, base, own))
		sum += 20 << 20
	}
	budget := sum / 2
	stop := time.Now().Add(limit)
	var wg sync.WaitGroup
	var mu sync.Mutex
	rounds, worst := 0, int64(0)
	for n := range 4 {
		p := b.point()
		wg.Go(func() {
			for round := 0; time.Now().Before(stop) && !t.Failed(); round++ {
				img := images[(n+round*3)%len(images)]
				if _, err := b.run(b.mountArgs(img.name, p, "--store-size", fmt.Sprint(budget))...); err != nil {
					t.Error(err)
					return
				}
				for i := range 3 {
					if err := readAll(p, img); err != nil {
						t.Errorf("round %d, pass %d: %v", round, i, err)
					}
				}
				if round%2 == 0 {
					b.run("wait", "--for", "sealed", "--timeout", "5s", p)
				}
				if err := b.unmount(p); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				rounds++
				mu.Unlock()
			}
		})
	}
	done := make(chan struct{})
	go func() {
		wg.Wait()
		close(done)
	}()
	for watching := true; watching; {
		select {
		case <-done:
			watching = false
		case <-time.After(50 * time.Millisecond):
		}
		worst = max(worst, sizeOf(b.root))
	}
	t.Logf("%d mounts in %v; images of %d MiB, budget %d MiB, at most %d MiB on disk", rounds, limit, sum>>20, budget>>20, worst>>20)
	if worst > budget+64<<20 {
		t.Errorf("%d bytes on disk, the budget is %d", worst, budget)
	}
	if rounds < 8 {
		t.Errorf("%d rounds say nothing", rounds)
	}
	if out := b.must("cache", "check", "--root", b.root, "--read"); !strings.Contains(out, ": 0 problems") {
		t.Errorf("check: %s", out)
	}
}

// sizeOf is what the files below a folder take on disk, each inode once.
func sizeOf(dir string) (n int64) {
	seen := map[uint64]bool{}
	filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil && !d.IsDir() && unix.Lstat(path, &st) == nil && !seen[st.Ino] {
			seen[st.Ino] = true
			n += st.Blocks * 512
		}
		return nil
	})
	return n
}

// forget makes the kernel forget the image's file data at a mount point, so
// that the next reads ask for it.
func forget(t testing.TB, point string, image built) {
	t.Helper()
	for _, f := range image.files {
		o, err := os.Open(filepath.Join(point, f.name))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fadvise(int(o.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Fatal(err)
		}
		o.Close()
	}
}
