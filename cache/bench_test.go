package cache

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// goTree returns the files of the Go toolchain that runs the test: some
// 15,000 files and 250 MB, each as one chunk.
var goTree = sync.OnceValues(func() ([]content, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, err
	}
	var all []content
	err = filepath.WalkDir(string(bytes.TrimSpace(out)), func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err != nil || len(data) == 0 {
			return err
		}
		d := image.Digest(sha256.Sum256(data))
		all = append(all, content{data, []toc.Chunk{{Size: int64(len(data)), Digest: d}}, d})
		return nil
	})
	return all, err
})

// BenchmarkFill fills an empty store with the Go tree, by one and by two
// goroutines, and unpacks the same files with tar, each on a filesystem that
// was made for it: ext4 looks for an inode a long time where many were
// deleted minutes ago, which would rule the figures.
func BenchmarkFill(b *testing.B) {
	files, err := goTree()
	if err != nil {
		b.Fatal(err)
	}
	x := imageOf(b, files...)
	run := func(name string, fill func(b *testing.B, dir string)) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				dir := newFilesystem(b, "ext4", 1024)
				b.StartTimer()
				fill(b, dir)
			}
			b.ReportMetric(float64(len(files)*b.N)/b.Elapsed().Seconds(), "files/s")
		})
	}
	for _, workers := range []int{1, 2} {
		run(map[int]string{1: "put", 2: "put-2"}[workers], func(b *testing.B, dir string) {
			s := open(b, dir, Options{})
			c := contentsOf(b, s, x)
			var next atomic.Int64
			var wg sync.WaitGroup
			for range workers {
				wg.Go(func() {
					for j := next.Add(1) - 1; j < int64(x.Chunks()); j = next.Add(1) - 1 {
						if err := c.Put(int(j), x.data(int(j))); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
			s.Close()
		})
	}
	archive := filepath.Join(b.TempDir(), "tar")
	if err := writeTar(archive, files); err != nil {
		b.Fatal(err)
	}
	run("tar", func(b *testing.B, dir string) {
		if out, err := exec.Command("tar", "-xf", archive, "-C", dir).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	})
}

// writeTar writes the files under the names the store would give them, so
// that tar makes as many folders.
func writeTar(path string, files []content) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	for _, c := range files {
		if err := w.WriteHeader(&tar.Header{Name: c.digest.Path(), Mode: 0o644, Size: int64(len(c.data))}); err != nil {
			return err
		}
		if _, err := w.Write(c.data); err != nil {
			return err
		}
	}
	if err := w.Close(); err != nil {
		return err
	}
	return f.Close()
}

// BenchmarkContents finds out what is local of an image of which everything
// is, and of one of which nothing is.
func BenchmarkContents(b *testing.B) {
	files, err := goTree()
	if err != nil {
		b.Fatal(err)
	}
	x := imageOf(b, files...)
	for _, whole := range []bool{true, false} {
		b.Run(map[bool]string{true: "whole", false: "absent"}[whole], func(b *testing.B) {
			s := open(b, b.TempDir(), Options{})
			if whole {
				putAll(b, contentsOf(b, s, x), x)
			}
			for b.Loop() {
				c, err := s.Contents(x.Index)
				if err != nil {
					b.Fatal(err)
				}
				c.Close()
			}
		})
	}
}

// BenchmarkReadAt reads 4 KiB of whole contents in turn: of few, whose
// descriptors stay open, and of many.
func BenchmarkReadAt(b *testing.B) {
	files, err := goTree()
	if err != nil {
		b.Fatal(err)
	}
	files = files[:2000]
	x := imageOf(b, files...)
	s := open(b, b.TempDir(), Options{})
	c := contentsOf(b, s, x)
	putAll(b, c, x)
	for name, n := range map[string]int{"few": idleFiles / 2, "many": x.Contents()} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			var turn atomic.Int64
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, 4096)
				for pb.Next() {
					if n, _ := c.ReadAt(int(turn.Add(1))%n, p, 0); n == 0 {
						b.Error("nothing read")
					}
				}
			})
		})
	}
}

// BenchmarkVerity asks for the names of all objects, as sealing does.
func BenchmarkVerity(b *testing.B) {
	files, err := goTree()
	if err != nil {
		b.Fatal(err)
	}
	x := imageOf(b, files...)
	s := open(b, b.TempDir(), Options{})
	c := contentsOf(b, s, x)
	putAll(b, c, x)
	for b.Loop() {
		for i := range x.Contents() {
			if _, err := c.Verity(i); err != nil {
				b.Fatal(err)
			}
		}
	}
	runtime.KeepAlive(c)
}
