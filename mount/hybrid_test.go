package mount

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// requests returns what FUSE was asked since the last call, by operation.
type requestCounter struct {
	m    *Mount
	last map[string]int64
}

func (c *requestCounter) since() map[string]int64 {
	now := c.m.Status().FUSERequests
	diff := map[string]int64{}
	for op, n := range now {
		if n > c.last[op] {
			diff[op] = n - c.last[op]
		}
	}
	c.last = now
	return diff
}

// manyFiles is an image of n files of a few kilobytes, all different.
func manyFiles(t *testing.T, n int) string {
	t.Helper()
	var items []imagetest.Item
	for i := range n {
		items = append(items, imagetest.Random(fileName(i), 1000+37*i, uint64(i+1)))
	}
	return layout(t, items)
}

func fileName(i int) string { return fmt.Sprintf("d%d/f%03d", i%7, i) }

// readTree walks a tree and reads all of it, and returns the number of files.
func readTree(t *testing.T, mnt string) (files int) {
	t.Helper()
	err := filepath.WalkDir(mnt, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if _, err := d.Info(); err != nil {
			return err
		}
		files++
		_, err = os.ReadFile(path)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return files
}

func TestTryHybrid(t *testing.T) {
	dir := t.TempDir()
	if err := tryHybrid(dir); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Where the kernel cannot, auto says so in its words and takes FUSE; hybrid
// fails. Here the store is on as many layers of overlayfs as the kernel allows.
func TestNoHybrid(t *testing.T) {
	deep := overlayOn(t, overlayOn(t, t.TempDir()))
	source := twoLayers(t)
	m, mnt := start(t, source, Options{Root: filepath.Join(deep, "root"), Swap: Never})
	if s := m.Status(); s.Backend != string(FUSE) || !strings.Contains(s.BackendReason, "mount overlay: create") {
		t.Errorf("auto: %s because %q, want fuse and the kernel's words", s.Backend, s.BackendReason)
	}
	checkFiles(t, mnt)
	other := t.TempDir()
	if m, err := Start(t.Context(), source, other, Options{Root: filepath.Join(deep, "root2"), Backend: Hybrid}); err == nil {
		end(t, m, other)
		t.Error("--backend hybrid did not fail")
	} else if !strings.Contains(err.Error(), "mount overlay: create") {
		t.Error(err)
	}
}

// overlayOn mounts a writable overlayfs over the folder lower.
func overlayOn(t *testing.T, lower string) string {
	t.Helper()
	mnt, dir := t.TempDir(), t.TempDir()
	opts := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", lower, dir, dir)
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "upper"), 0o755), os.Mkdir(filepath.Join(dir, "work"), 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", mnt, "overlay", 0, opts); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return mnt
}

// What is whole costs no request at all; what is not costs requests for itself
// alone.
func TestHybridRequests(t *testing.T) {
	const n = 60
	source := manyFiles(t, n)
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Root: root, Backend: Hybrid, Swap: Never, NoFill: true})
	count := requestCounter{m: m}
	count.since()
	for i := range n / 2 {
		if _, err := os.ReadFile(filepath.Join(mnt, fileName(i))); err != nil {
			t.Fatal(err)
		}
	}
	if got := count.since(); got["read"] != n/2 {
		t.Errorf("a first pass over %d files: %v, want one read each", n/2, got)
	}
	end(t, m, mnt)

	m, mnt = start(t, source, Options{Root: root, Backend: Hybrid, Swap: Never, NoFill: true})
	count = requestCounter{m: m}
	count.since()
	for i := range n / 2 {
		if _, err := os.ReadFile(filepath.Join(mnt, fileName(i))); err != nil {
			t.Fatal(err)
		}
	}
	if got := count.since(); len(got) > 0 {
		t.Errorf("the half that is whole: %v, want nothing", got)
	}
	if got := readTree(t, mnt); got != n {
		t.Errorf("%d files, want %d", got, n)
	}
	// Each of the other half is looked up and read once; so are their folders.
	// Until the kernel knows that nobody wants OPEN and FLUSH, the reader and the
	// watch of opens may both send one.
	if got := count.since(); got["read"] != n/2 || got["lookup"] > 2*n/2 || got["open"] > 2 || got["flush"] > 2 || len(got) > 4 {
		t.Errorf("half of the image is not whole: %v, want %d reads and their lookups", got, n/2)
	}
	end(t, m, mnt)

	m, mnt = start(t, source, Options{Root: root, Backend: Hybrid, Swap: Never})
	waitFor(t, m, Sealed)
	count = requestCounter{m: m}
	count.since()
	for range 2 {
		if got := readTree(t, mnt); got != n {
			t.Errorf("%d files, want %d", got, n)
		}
	}
	if got := count.since(); len(got) > 0 {
		t.Errorf("everything is whole: %v, want nothing", got)
	}
}

// A file that was opened while its content was not whole is read through FUSE
// as long as the kernel remembers it, and from the disk after letGo.
func TestHybridLetsGo(t *testing.T) {
	m, mnt := start(t, twoLayers(t), Options{Backend: Hybrid, Swap: Never, NoFill: true})
	path := filepath.Join(mnt, "big")
	held, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	closed := filepath.Join(mnt, "big2")
	for _, p := range []string{path, closed} {
		if _, err := os.ReadFile(p); err != nil {
			t.Fatal(err)
		}
	}
	count := requestCounter{m: m}
	count.since()
	dropPages(t, path, closed)
	for _, p := range []string{path, closed} {
		if _, err := os.ReadFile(p); err != nil {
			t.Fatal(err)
		}
	}
	if got := count.since(); got["read"] < 2 {
		t.Errorf("before letGo: %v, want reads of both", got)
	}
	if err := m.letGo(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.ReadFile(closed); err != nil {
		t.Error(err)
	}
	if got := count.since(); len(got) > 0 {
		t.Errorf("a file that nobody has open, after letGo: %v, want nothing", got)
	}
	dropPages(t, path)
	got, err := io.ReadAll(held)
	if err != nil || !bytes.Equal(got, []byte(files()["big"])) {
		t.Errorf("the held file: %d bytes, %v", len(got), err)
	}
	if got := count.since(); got["read"] == 0 {
		t.Errorf("the held file: %v, want reads", got)
	}
	held.Close()
	if err := m.letGo(); err != nil {
		t.Fatal(err)
	}
	checkFiles(t, mnt)
	for _, p := range []string{path, closed} {
		dropPages(t, p)
		if _, err := os.ReadFile(p); err != nil {
			t.Error(err)
		}
	}
	if got := count.since(); got["read"] > 5 {
		t.Errorf("nothing is held: %v, want reads of the five other files only", got)
	}
}

// dropPages takes files out of the page cache.
func dropPages(t *testing.T, paths ...string) {
	t.Helper()
	for _, p := range paths {
		f, err := os.Open(p)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
			t.Error(err)
		}
		f.Close()
	}
}

// A lookup may meet a content that appears at that moment: many readers open
// every file of an image over and over, while it goes from empty to whole.
func TestHybridFillsUnderReaders(t *testing.T) {
	fills := 3
	if s := os.Getenv("CFS_FUSE_FILLS"); s != "" {
		if _, err := fmt.Sscan(s, &fills); err != nil {
			t.Fatal(err)
		}
	}
	const n, readers = 200, 8
	source := manyFiles(t, n)
	want := make([][]byte, n)
	for i := range want {
		want[i] = imagetest.RandomBytes(1000+37*i, uint64(i+1))
	}
	var operations, viaFUSE int64
	for range fills {
		m, mnt := start(t, source, Options{Backend: Hybrid, Swap: Never})
		stop := make(chan struct{})
		var done atomic.Int64
		var running sync.WaitGroup
		for r := range readers {
			running.Go(func() {
				for pass := 0; ; pass++ {
					for k := range n {
						select {
						case <-stop:
							return
						default:
						}
						i := (k*(2*r+1) + pass) % n
						path := filepath.Join(mnt, fileName(i))
						got, err := os.ReadFile(path)
						if err != nil || !bytes.Equal(got, want[i]) {
							t.Errorf("%s: %d bytes, %v; want %d", path, len(got), err, len(want[i]))
							return
						}
						if fi, err := os.Stat(path); err != nil || fi.Size() != int64(len(want[i])) {
							t.Errorf("%s: %v, %v", path, fi, err)
						}
						done.Add(1)
					}
				}
			})
		}
		waitFor(t, m, Sealed)
		close(stop)
		running.Wait()
		operations += done.Load()
		for n := range maps.Values(m.Status().FUSERequests) {
			viaFUSE += n
		}
		end(t, m, mnt)
	}
	t.Logf("%d fills: %d files read whole, %d requests to FUSE", fills, operations, viaFUSE)
}

// An error has the same errno on both backends, and the same line in the log.
func TestReadErrors(t *testing.T) {
	eachBackend(t, func(t *testing.T, b Backend) {
		source := twoLayers(t)
		m, mnt := start(t, source, Options{Backend: b, Swap: Never, NoFill: true})
		flip := func() {
			t.Helper()
			for _, l := range m.image.layers {
				path := filepath.Join(strings.TrimSuffix(strings.TrimPrefix(source, "oci:"), ":latest"), "blobs", "sha256", l.Digest.Encoded())
				data, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				for i := range data {
					data[i] ^= 0xff
				}
				if err := os.WriteFile(path, data, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
		flip()
		for _, name := range []string{"big", "same2"} {
			if _, err := os.ReadFile(filepath.Join(mnt, name)); !errors.Is(err, unix.EIO) {
				t.Errorf("%s, with a damaged source: %v, want EIO", name, err)
			}
		}
		for i := range m.image.index.Contents() {
			if got := m.pathOf(0, m.image.index.Content(i).Digest.Path()); got == "?" {
				t.Errorf("the path of content %d is not found", i)
			}
		}
		flip()
		checkFiles(t, mnt)
	})
}
