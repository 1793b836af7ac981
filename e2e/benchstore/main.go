// Command benchstore measures a store of a million objects: how long it takes
// to open, to look one up, to count and to collect half of it, and what memory
// each takes, every figure in a process of its own. 'make bench-store' runs it;
// the first line of each figure says what was asked for.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

func main() {
	objects := flag.Int("objects", 1_000_000, "how many")
	dir := flag.String("dir", "", "`folder` to make the store below (default the temporary one)")
	keep := flag.Bool("keep", false, "leave the store there")
	mode := flag.String("mode", "", "what a child measures")
	flag.Parse()
	var err error
	if *mode != "" {
		err = child(*mode, *dir)
	} else {
		err = run(*dir, *objects, *keep)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchstore:", err)
		os.Exit(1)
	}
}

func run(dir string, objects int, keep bool) (err error) {
	if dir, err = os.MkdirTemp(dir, "benchstore"); err != nil {
		return err
	}
	defer func() {
		if !keep {
			err = errors.Join(err, os.RemoveAll(dir))
		}
	}()
	start := time.Now()
	for half := range 2 {
		if err := fill(dir, half, objects/2); err != nil {
			return err
		}
	}
	took := time.Since(start)
	fmt.Printf("%d objects stored in %.0f s, %.0f a second\n", objects, took.Seconds(), float64(objects)/took.Seconds())
	missed := 0
	for _, m := range []struct {
		mode, what string
		limit      time.Duration
		times      int
	}{
		{"open", "open the store", 100 * time.Millisecond, 5},
		{"lookup", "look up and read one object", 20 * time.Microsecond, 3},
		{"count", "count the store ('cache du')", 0, 1},
		{"gc", "collect half of it", time.Minute, 1},
	} {
		var times []time.Duration
		var memory int64
		for range m.times {
			t, rss, err := measure(m.mode, dir)
			if err != nil {
				return err
			}
			times = append(times, t)
			memory = max(memory, rss)
		}
		slices.Sort(times)
		t := times[len(times)/2]
		verdict := ""
		if m.limit > 0 {
			verdict = fmt.Sprintf(" (asked for: %v)", m.limit)
			if t > m.limit {
				missed++
				verdict += " MISSED"
			}
		}
		if memory > 64<<20 {
			missed++
			verdict += " MISSED: memory"
		}
		fmt.Printf("%-30s %10v, %3d MiB resident%s\n", m.what, t.Round(100*time.Nanosecond), memory>>20, verdict)
	}
	start = time.Now()
	for _, name := range []string{"contents", "objects"} {
		if out, err := exec.Command("rm", "-r", filepath.Join(dir, name)).CombinedOutput(); err != nil {
			return fmt.Errorf("rm: %w: %s", err, out)
		}
	}
	fmt.Printf("%-30s %10v\n", "beside it: rm -r of the rest", time.Since(start).Round(time.Millisecond))
	if missed > 0 {
		return fmt.Errorf("%d figures are not what was asked for", missed)
	}
	return nil
}

// measure runs a child and returns the time and the memory that it prints.
func measure(mode, dir string) (time.Duration, int64, error) {
	self, err := os.Executable()
	if err != nil {
		return 0, 0, err
	}
	cmd := exec.Command(self, "-mode", mode, "-dir", dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, 0, fmt.Errorf("%s: %w", mode, err)
	}
	var took time.Duration
	var memory int64
	_, err = fmt.Sscan(string(out), (*int64)(&took), &memory)
	return took, memory, err
}

// highWater returns the most memory that this process has had resident, in
// bytes (proc_pid_status(5), VmHWM; what getrusage(2) says includes the
// process that started this one).
func highWater() (n int64, err error) {
	text, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	_, err = fmt.Sscan(rest, &n)
	return n << 10, err
}

// contentOf is the i-th content of a half.
func contentOf(half, i int) []byte {
	b := make([]byte, 24)
	binary.LittleEndian.PutUint64(b, uint64(half))
	binary.LittleEndian.PutUint64(b[8:], uint64(i))
	return b
}

// fill makes an image of n contents and puts them all.
func fill(dir string, half, n int) error {
	s, err := cache.Open(dir, cache.Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	root := &image.Node{Mode: syscall.S_IFDIR | 0o755, Nlink: 2}
	by := make(map[image.Digest]int, n)
	for i := range n {
		data := contentOf(half, i)
		d := image.Digest(sha256.Sum256(data))
		by[d] = i
		root.Children = append(root.Children, &image.Node{
			Name: fmt.Sprintf("f%08d", i), Mode: syscall.S_IFREG | 0o644, Nlink: 1, Size: int64(len(data)), Content: d,
			Chunks: []toc.Chunk{{BlobOffset: int64(i * len(data)), BlobEnd: int64((i + 1) * len(data)), Size: int64(len(data)), Digest: d}},
		})
	}
	var b bytes.Buffer
	layers := []image.Layer{{Digest: image.Digest{byte(half + 1)}, Size: int64(n * 24), TOC: &toc.TOC{Compression: toc.None}}}
	if err := image.WriteIndex(&b, &image.Tree{Root: root, Names: n + 1, Dirs: 1, Files: n}, layers); err != nil {
		return err
	}
	folder := s.ImageDir(imageOf(half))
	if err := os.Mkdir(folder, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(folder, cache.ChunksName), b.Bytes(), 0o600); err != nil {
		return err
	}
	x, err := image.OpenIndex(b.Bytes())
	if err != nil {
		return err
	}
	c, err := s.Contents(x)
	if err != nil {
		return err
	}
	defer c.Close()
	var next atomic.Int64
	var wg sync.WaitGroup
	var failed atomic.Pointer[error]
	for range 2 {
		wg.Go(func() {
			for j := int(next.Add(1)) - 1; j < n; j = int(next.Add(1)) - 1 {
				if err := c.Put(j, contentOf(half, by[x.Chunk(j).Digest])); err != nil {
					failed.Store(&err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := failed.Load(); err != nil {
		return *err
	}
	return s.Sync()
}

func imageOf(half int) image.Digest { return image.Digest(sha256.Sum256([]byte{byte(half)})) }

func child(mode, dir string) error {
	start := time.Now()
	s, err := cache.Open(dir, cache.Options{})
	if err != nil {
		return err
	}
	defer s.Close()
	took := time.Since(start)
	switch mode {
	case "open":
	case "lookup":
		took, err = lookup(s)
	case "count":
		start = time.Now()
		_, err = s.Usage(context.Background())
		took = time.Since(start)
	case "gc":
		start = time.Now()
		var res *cache.Collected
		res, err = s.Collect(context.Background(), cache.CollectOptions{Remove: []image.Digest{imageOf(0)}})
		took = time.Since(start)
		if err == nil && (res.Contents == 0 || len(res.Removed) != 1) {
			err = fmt.Errorf("nothing was collected: %+v", res)
		}
	default:
		err = fmt.Errorf("mode %q", mode)
	}
	if err != nil {
		return err
	}
	memory, err := highWater()
	fmt.Println(int64(took), memory)
	return err
}

// lookup opens and reads random objects of one image by their digest, most of
// them not in any cache of ours, and returns what one takes.
func lookup(s *cache.Store) (time.Duration, error) {
	f, err := os.Open(filepath.Join(s.ImageDir(imageOf(1)), cache.ChunksName))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return 0, err
	}
	table, err := image.OpenDigests(f, fi.Size())
	if err != nil {
		return 0, err
	}
	const n = 100_000
	digests := make([]image.Digest, n)
	for i := range digests {
		c, err := table.Content(rand.IntN(table.Contents()))
		if err != nil {
			return 0, err
		}
		digests[i] = c.Digest
	}
	dir, err := unix.Open(s.ContentsDir(), unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(dir)
	buf := make([]byte, 4096)
	start := time.Now()
	for _, d := range digests {
		fd, err := unix.Openat(dir, d.Path(), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		if got, err := unix.Pread(fd, buf, 0); got != 24 {
			return 0, fmt.Errorf("read %d bytes: %w", got, err)
		}
		unix.Close(fd)
	}
	return time.Since(start) / n, nil
}
