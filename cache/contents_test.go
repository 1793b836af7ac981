package cache

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image"
)

var shapes = []string{
	"a*1",
	"a*4096",
	"a*4097",
	"a*100000",
	"0*1",
	"0*1000000",
	"a*4096 b*4096",
	"a*1 b*1 c*1 d*1 e*1 f*1 g*1 h*1 i*1",
	"a*4096 0*8192 b*100",
	"0*4096 0*4096",
	"0*70000 a*70000 0*70000",
	"a*300000 b*300000 c*1",
}

func TestPutInAnyOrder(t *testing.T) {
	var contents []content
	for _, words := range shapes {
		contents = append(contents, cut(words))
	}
	x := imageOf(t, contents...)
	var want []string
	for seed := range uint64(20) {
		s := open(t, t.TempDir(), Options{})
		c := contentsOf(t, s, x)
		if p := c.Progress(); p.FilesLocal != 0 || p.BytesLocal != 0 || p.Files != len(shapes) {
			t.Fatalf("progress of an empty store: %+v", p)
		}
		var bytes int64
		for _, j := range rand.New(rand.NewPCG(seed, 0)).Perm(x.Chunks()) {
			if !c.Missing(j) {
				t.Fatalf("chunk %d is not missing", j)
			}
			put(t, c, x, j)
			bytes += x.Chunk(j).Size
			if c.Missing(j) {
				t.Fatalf("chunk %d is missing", j)
			}
			if got := c.Progress().BytesLocal; got != bytes {
				t.Fatalf("%d bytes local, want %d", got, bytes)
			}
			ch := x.Chunk(j)
			got := make([]byte, ch.Size)
			if n, err := c.ReadAt(ch.Content, got, ch.FileOffset); err != nil || int64(n) != ch.Size {
				t.Fatalf("read chunk %d: %d, %v", j, n, err)
			}
		}
		wantWhole(t, s, c, x)
		names := list(t, s)
		if check(t, s) != 2*len(shapes) || len(names) != 2*len(shapes) {
			t.Fatalf("files: %q", names)
		}
		if want == nil {
			want = names
		}
		if !slices.Equal(names, want) {
			t.Fatalf("another order gave another store:\n%q\n%q", names, want)
		}
		s.Close()
	}
}

func TestReadAt(t *testing.T) {
	ct := cut("a*100 b*100 c*100 d*50")
	x := imageOf(t, ct, cut("z*10"))
	c := contentsOf(t, open(t, t.TempDir(), Options{}), x)
	i, _ := x.find(t, ct, 0)
	put(t, c, x, x.ContentChunk(i, 0), x.ContentChunk(i, 1), x.ContentChunk(i, 3))
	tests := []struct {
		off  int64
		size int
		want string // bytes read, and the error: "" or EOF or the absent chunk
	}{
		{0, 1, "1"},
		{0, 100, "100"},
		{0, 0, "0"},
		{50, 100, "100"},
		{0, 350, "200"},
		{150, 200, "50"},
		{199, 2, "1"},
		{200, 1, "0 absent 2"},
		{299, 10, "0 absent 2"},
		{300, 50, "50"},
		{300, 51, "50 EOF"},
		{349, 2, "1 EOF"},
		{350, 1, "0 EOF"},
		{1 << 40, 1, "0 EOF"},
		{-1, 1, "0 invalid"},
	}
	read := func(off int64, size int) string {
		p := make([]byte, size)
		n, err := c.ReadAt(i, p, off)
		if n > 0 && !bytes.Equal(p[:n], ct.data[off:off+int64(n)]) {
			return "wrong bytes"
		}
		got := fmt.Sprint(n)
		if absent, ok := errors.AsType[*AbsentError](err); ok {
			for k := range ct.chunks {
				if x.ContentChunk(i, k) == absent.Chunk {
					return got + fmt.Sprint(" absent ", k)
				}
			}
		}
		switch {
		case err == io.EOF:
			got += " EOF"
		case errors.Is(err, syscall.EINVAL):
			got += " invalid"
		case err != nil:
			got += " " + err.Error()
		}
		return got
	}
	for _, tt := range tests {
		if got := read(tt.off, tt.size); got != tt.want {
			t.Errorf("staged: ReadAt(%d bytes, %d) = %q, want %q", tt.size, tt.off, got, tt.want)
		}
	}
	if _, err := c.Verity(i); !errors.As(err, new(*AbsentError)) {
		t.Errorf("Verity of a staged content: %v", err)
	}
	if _, err := c.File(i); !errors.As(err, new(*AbsentError)) {
		t.Errorf("File of a staged content: %v", err)
	}

	put(t, c, x, x.ContentChunk(i, 2))
	for _, tt := range []struct {
		off  int64
		size int
		want string
	}{
		{0, 350, "350"}, {0, 1000, "350 EOF"}, {200, 1, "1"}, {349, 2, "1 EOF"}, {350, 5, "0 EOF"}, {-1, 1, "0 invalid"}, {0, 0, "0"},
	} {
		if got := read(tt.off, tt.size); got != tt.want {
			t.Errorf("whole: ReadAt(%d bytes, %d) = %q, want %q", tt.size, tt.off, got, tt.want)
		}
	}
	f, err := c.File(i)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := io.ReadAll(io.NewSectionReader(f, 0, 1000))
	if err != nil || !bytes.Equal(got, ct.data) {
		t.Fatalf("File: %d bytes, %v", len(got), err)
	}
}

func TestBadArguments(t *testing.T) {
	ct := cut("a*100 0*100")
	x := imageOf(t, ct)
	s := open(t, t.TempDir(), Options{})
	c := contentsOf(t, s, x)
	_, a := x.find(t, ct, 0)
	_, zero := x.find(t, ct, 1)
	for _, tt := range []struct {
		name  string
		chunk int
		data  []byte
	}{
		{"too few", a, make([]byte, 99)},
		{"too many", a, make([]byte, 101)},
		{"nil for data", a, nil},
		{"too few zeros", zero, make([]byte, 99)},
		{"no bytes for zeros", zero, []byte{}},
		{"no such chunk", 2, make([]byte, 100)},
		{"negative chunk", -1, make([]byte, 100)},
	} {
		if err := c.Put(tt.chunk, tt.data); err == nil {
			t.Errorf("%s: no error", tt.name)
		}
	}
	if c.Missing(-1) || c.Missing(2) || c.Missing(64) || c.Whole(-1) || c.Whole(1) || c.Whole(64) {
		t.Error("numbers out of range")
	}
	for _, i := range []int{-1, 1, 64} {
		if _, err := c.ReadAt(i, make([]byte, 1), 0); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("ReadAt content %d: %v", i, err)
		}
		if _, err := c.File(i); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("File content %d: %v", i, err)
		}
	}
	if names := list(t, s); len(names) != 0 {
		t.Errorf("left: %q", names)
	}
	if err := c.Put(zero, make([]byte, 100)); err != nil {
		t.Error(err)
	}
}

func TestWrongContentDigest(t *testing.T) {
	for _, words := range []string{"a*100", "0*100", "a*100 b*100", "a*100 0*100 c*1"} {
		t.Run(words, func(t *testing.T) {
			ct := cut(words).lying()
			x := imageOf(t, ct)
			s := open(t, t.TempDir(), Options{})
			c := contentsOf(t, s, x)
			for range 2 { // the second time after the first was forgotten
				for k := range ct.chunks {
					_, j := x.find(t, ct, k)
					err := c.Put(j, x.data(j))
					if k < len(ct.chunks)-1 {
						if err != nil {
							t.Fatal(err)
						}
						continue
					}
					wrong, ok := errors.AsType[*DigestError](err)
					if !ok || wrong.Want != ct.digest || wrong.Got == ct.digest {
						t.Fatalf("Put of the last chunk: %v", err)
					}
				}
				if names := list(t, s); len(names) != 0 {
					t.Fatalf("left: %q", names)
				}
				for j := range x.Chunks() {
					if !c.Missing(j) {
						t.Fatalf("chunk %d is not missing", j)
					}
				}
				if p := c.Progress(); p.FilesLocal != 0 || p.BytesLocal != 0 {
					t.Fatalf("progress %+v", p)
				}
				if _, err := c.ReadAt(0, make([]byte, 1), 0); !errors.As(err, new(*AbsentError)) {
					t.Fatalf("read: %v", err)
				}
			}
		})
	}
}

func TestReopen(t *testing.T) {
	dir := t.TempDir()
	small, big, other := cut("s*10"), cut("a*5000 b*5000 c*5000"), cut("d*10 e*10")
	x := imageOf(t, small, big, other)
	s := open(t, dir, Options{})
	c := contentsOf(t, s, x)
	_, sj := x.find(t, small, 0)
	bi, bj := x.find(t, big, 1)
	put(t, c, x, sj, bj)
	s.Close()

	s = open(t, dir, Options{})
	c = contentsOf(t, s, x)
	if p := c.Progress(); p.FilesLocal != 1 || p.BytesLocal != 5010 {
		t.Fatalf("progress %+v", p)
	}
	if c.Missing(sj) || c.Missing(bj) || !c.Missing(x.ContentChunk(bi, 0)) {
		t.Fatal("what was local is missing")
	}
	p := make([]byte, 5000)
	if n, err := c.ReadAt(bi, p, 5000); n != 5000 || err != nil || p[0] != 'b' {
		t.Fatalf("read what was staged: %d, %v", n, err)
	}
	if n := putAll(t, c, x); n != 4 {
		t.Fatalf("%d chunks were missing, want 4", n)
	}
	wantWhole(t, s, c, x)
	if n := staged(t, s); len(n) != 0 {
		t.Fatalf("left in staging: %q", n)
	}
}

// TestTwoImages has two images that share contents in one store at once.
func TestTwoImages(t *testing.T) {
	shared := cut("a*5000 b*5000 c*5000")
	again := cut("a*2500 a*2500 b*5000 c*5000") // the same bytes, cut otherwise
	x, y, z := imageOf(t, shared, cut("x*1")), imageOf(t, shared, cut("y*1")), imageOf(t, again)
	if shared.digest != again.digest {
		t.Fatal("not the same content")
	}
	s := open(t, t.TempDir(), Options{})
	cx, cy, cz := contentsOf(t, s, x), contentsOf(t, s, y), contentsOf(t, s, z)
	xi, x0 := x.find(t, shared, 0)
	yi, y1 := y.find(t, shared, 1)
	put(t, cx, x, x0)
	put(t, cy, y, y1)
	if cy.Missing(y.ContentChunk(yi, 0)) {
		t.Error("a chunk that the other image staged is missing")
	}
	put(t, cz, z, 0, 2)
	for j := range z.Chunks() {
		if cz.Missing(j) != (j != 0 && j != 2) {
			t.Errorf("chunk %d of the other layout: missing %v", j, cz.Missing(j))
		}
	}
	putAll(t, cz, z)
	wantWhole(t, s, cz, z)
	// The others find it when they look.
	if _, err := cx.ReadAt(xi, make([]byte, 1), 14999); !errors.As(err, new(*AbsentError)) {
		t.Errorf("read of what cx does not know: %v", err)
	}
	put(t, cx, x, x.ContentChunk(xi, 2))
	put(t, cy, y, y.ContentChunk(yi, 2))
	putAll(t, cx, x)
	putAll(t, cy, y)
	wantWhole(t, s, cx, x)
	wantWhole(t, s, cy, y)
	cx.Close()
	cx = contentsOf(t, s, x)
	wantWhole(t, s, cx, x)
	if n := staged(t, s); len(n) != 0 {
		t.Errorf("left in staging: %q", n)
	}
}

// TestPoisonedLayout has an image that promises the digest of another
// image's content but other chunks: what it stages must not reach the other.
func TestPoisonedLayout(t *testing.T) {
	good := cut("a*4096 b*4096")
	evil := cut("e*4096 b*4096")
	evil.digest = good.digest
	s := open(t, t.TempDir(), Options{})
	gx, ex := imageOf(t, good), imageOf(t, evil)
	ce := contentsOf(t, s, ex)
	put(t, ce, ex, ex.ContentChunk(0, 0))
	cg := contentsOf(t, s, gx)
	if p := cg.Progress(); p.BytesLocal != 0 {
		t.Fatalf("the poison is believed: %+v", p)
	}
	putAll(t, cg, gx)
	wantWhole(t, s, cg, gx)
	if err := ce.Put(ex.ContentChunk(0, 1), ex.data(ex.ContentChunk(0, 1))); !errors.As(err, new(*DigestError)) {
		t.Fatalf("the poison is taken: %v", err)
	}
	check(t, s)
}

// TestTwoProcesses opens the store twice: locks belong to open files, so
// that two opens are to each other as two processes.
func TestTwoProcesses(t *testing.T) {
	dir := t.TempDir()
	ct := cut("a*5000 b*5000 0*5000 d*5000 e*5000")
	x := imageOf(t, ct, cut("s*10"))
	s1, s2 := open(t, dir, Options{}), open(t, dir, Options{})
	c1 := contentsOf(t, s1, x)
	i, _ := x.find(t, ct, 0)
	js := make([]int, 5)
	for k := range js {
		js[k] = x.ContentChunk(i, k)
	}
	put(t, c1, x, js[0], js[2])
	c2 := contentsOf(t, s2, x)
	if c2.Missing(js[0]) || c2.Missing(js[2]) {
		t.Fatal("the second process does not see what is staged")
	}
	put(t, c2, x, js[1]) // in a file of its own, with what was staged copied
	if c2.Missing(js[0]) || c2.Missing(js[2]) || !c1.Missing(js[1]) {
		t.Fatal("the processes mix up their files")
	}
	p := make([]byte, 15001)
	if n, err := c2.ReadAt(i, p, 0); n != 15000 || err != nil || !bytes.Equal(p[:n], ct.data[:15000]) {
		t.Fatalf("read across what was copied: %d, %v", n, err)
	}
	put(t, c1, x, js[1], js[3])
	put(t, c2, x, js[3], js[4])
	wantRead(t, c2, x, i)
	if !c2.Whole(i) || c1.Whole(i) {
		t.Fatalf("whole: %v in the first, %v in the second", c1.Whole(i), c2.Whole(i))
	}
	put(t, c1, x, js[4])
	putAll(t, c1, x)
	putAll(t, c2, x)
	wantWhole(t, s1, c1, x)
	wantWhole(t, s2, c2, x)
	if n := list(t, s1); len(n) != 4 {
		t.Fatalf("files: %q", n)
	}
}

func TestVanished(t *testing.T) {
	ct := cut("a*5000 b*5000")
	for _, tt := range []struct {
		name string
		do   func(path string) error
	}{
		{"removed", os.Remove},
		{"cut short", func(path string) error { return os.Truncate(path, 1) }},
		{"grown", func(path string) error { return os.Truncate(path, 10001) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			x := imageOf(t, ct)
			s := open(t, t.TempDir(), Options{})
			c := contentsOf(t, s, x)
			putAll(t, c, x)
			if err := tt.do(filepath.Join(s.ContentsDir(), ct.digest.Path())); err != nil {
				t.Fatal(err)
			}
			_, err := c.ReadAt(0, make([]byte, 10), 5000)
			absent, ok := errors.AsType[*AbsentError](err)
			if !ok || absent.Chunk != x.ContentChunk(0, 1) {
				t.Fatalf("read: %v", err)
			}
			if p := c.Progress(); c.Whole(0) || p.FilesLocal != 0 || p.BytesLocal != 0 || !c.Missing(0) || !c.Missing(1) {
				t.Fatalf("still local: %+v", p)
			}
			if n := putAll(t, c, x); n != 2 {
				t.Fatalf("%d chunks were missing", n)
			}
			wantWhole(t, s, c, x)
			check(t, s)
		})
	}
	t.Run("cut short while open", func(t *testing.T) {
		x := imageOf(t, ct)
		s := open(t, t.TempDir(), Options{})
		c := contentsOf(t, s, x)
		putAll(t, c, x)
		wantRead(t, c, x, 0)
		if err := os.Truncate(filepath.Join(s.ContentsDir(), ct.digest.Path()), 1); err != nil {
			t.Fatal(err)
		}
		if _, err := c.ReadAt(0, make([]byte, 10), 5000); !errors.As(err, new(*AbsentError)) {
			t.Fatalf("read: %v", err)
		}
		putAll(t, c, x)
		wantWhole(t, s, c, x)
	})
	t.Run("staging removed", func(t *testing.T) {
		x := imageOf(t, ct)
		s := open(t, t.TempDir(), Options{})
		c := contentsOf(t, s, x)
		put(t, c, x, x.ContentChunk(0, 0))
		s.Close()
		s = open(t, s.Root(), Options{})
		c = contentsOf(t, s, x)
		s.stages.closeAll() // as after an eviction
		s.stages.closed = false
		for _, n := range staged(t, s) {
			if err := os.Remove(filepath.Join(s.Root(), "staging", n)); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := c.ReadAt(0, make([]byte, 10), 0); !errors.As(err, new(*AbsentError)) {
			t.Fatalf("read: %v", err)
		}
		if p := c.Progress(); p.BytesLocal != 0 || !c.Missing(0) {
			t.Fatalf("still local: %+v", p)
		}
		putAll(t, c, x)
		wantWhole(t, s, c, x)
	})
	t.Run("object removed", func(t *testing.T) {
		x := imageOf(t, ct)
		s := open(t, t.TempDir(), Options{})
		c := contentsOf(t, s, x)
		putAll(t, c, x)
		if err := os.Remove(filepath.Join(s.Objects(), ct.fsVerity().Path())); err != nil {
			t.Fatal(err)
		}
		wantWhole(t, s, c, x) // Verity brings it back
	})
}

// TestConcurrent lets many goroutines put and read the same chunks in several
// images and two stores.
func TestConcurrent(t *testing.T) {
	var contents []content
	for i := range 30 {
		c := rune('a' + i%26)
		contents = append(contents,
			cut(fmt.Sprintf("%c*%d", c, 100+i)),
			cut(fmt.Sprintf("%c*3000 b*%d 0*2000 %c*1", c, 100+i, c)))
	}
	x := imageOf(t, contents...)
	dir := t.TempDir()
	var wg sync.WaitGroup
	var all []*Contents
	for n := range 2 {
		s := open(t, dir, Options{})
		for m := range 2 {
			c := contentsOf(t, s, x)
			all = append(all, c)
			for g := range 4 {
				wg.Go(func() {
					r := rand.New(rand.NewPCG(uint64(n), uint64(4*m+g/2))) // pairs go the same way
					for _, j := range r.Perm(x.Chunks()) {
						if c.Missing(j) {
							if err := c.Put(j, x.data(j)); err != nil {
								t.Error(err)
								return
							}
						}
						ch := x.Chunk(j)
						p := make([]byte, ch.Size)
						n, err := c.ReadAt(ch.Content, p, ch.FileOffset)
						want := x.by[x.Content(ch.Content).Digest].data[ch.FileOffset:][:n]
						if err != nil || n == 0 || !bytes.Equal(p[:n], want) {
							t.Errorf("read chunk %d: %d bytes, %v", j, n, err)
							return
						}
					}
				})
			}
		}
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for _, c := range all {
		putAll(t, c, x)
		wantWhole(t, c.s, c, x)
	}
	if n := list(t, all[0].s); len(n) != 2*x.Contents() {
		t.Fatalf("%d files for %d contents", len(n), x.Contents())
	}
	check(t, all[0].s)
}

// TestManyStaged has more staged contents than descriptors are kept for.
func TestManyStaged(t *testing.T) {
	var contents []content
	for i := range 3 * idleStages {
		contents = append(contents, cut(fmt.Sprintf("a*%d b*10 c*10", i+1)))
	}
	x := imageOf(t, contents...)
	s := open(t, t.TempDir(), Options{})
	c := contentsOf(t, s, x)
	for k := range 3 {
		for i := range x.Contents() {
			put(t, c, x, x.ContentChunk(i, k))
		}
		for i := range x.Contents() {
			p := make([]byte, 10)
			off := x.Chunk(x.ContentChunk(i, k)).FileOffset
			if n, err := c.ReadAt(i, p, off); err != nil && err != io.EOF || n == 0 {
				t.Fatalf("content %d at %d: %d, %v", i, off, n, err)
			}
		}
		if len(s.stages.open) > idleStages+1 {
			t.Fatalf("%d stages are open", len(s.stages.open))
		}
	}
	wantWhole(t, s, c, x)
	if len(s.files.open) > idleFiles {
		t.Fatalf("%d files are open", len(s.files.open))
	}
}

func TestClosed(t *testing.T) {
	x := imageOf(t, cut("a*10"), cut("b*10 c*10"))
	s := open(t, t.TempDir(), Options{})
	c := contentsOf(t, s, x)
	putAll(t, c, x)
	before := descriptors(t)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if after := descriptors(t); after > before-4 {
		t.Errorf("%d descriptors open before Close, %d after", before, after)
	}
	if err := c.Put(0, x.data(0)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Put: %v", err)
	}
	if _, err := c.ReadAt(0, make([]byte, 1), 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("ReadAt: %v", err)
	}
	if _, err := c.Verity(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Verity: %v", err)
	}
	if _, err := s.Contents(x.Index); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Contents: %v", err)
	}
	if err := s.Sync(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Sync: %v", err)
	}
	if c.Missing(0) || !c.Whole(0) {
		t.Error("what is known is forgotten")
	}
}

// TestDescriptors opens, uses and closes stores and counts descriptors.
func TestDescriptors(t *testing.T) {
	ct := cut("a*10 b*10 c*10")
	x := imageOf(t, ct, cut("d*5"), cut("e*5 f*5").lying())
	dir := t.TempDir()
	round := func() {
		s1, s2 := open(t, dir, Options{}), open(t, dir, Options{})
		c1, c2 := contentsOf(t, s1, x), contentsOf(t, s2, x)
		for j := range x.Chunks() {
			c1.Put(j, x.data(j))
			c2.Put(j, x.data(j))
		}
		for i := range x.Contents() {
			c1.ReadAt(i, make([]byte, 1), 0)
			c2.ReadAt(i, make([]byte, 1), 0)
		}
		s1.Close()
		s2.Close()
		if err := os.RemoveAll(filepath.Join(dir, "contents")); err != nil {
			t.Fatal(err)
		}
	}
	round()
	before := descriptors(t)
	for range 5 {
		round()
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func descriptors(t *testing.T) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func TestVerityFallbacks(t *testing.T) {
	ct := cut("a*10000")
	x := imageOf(t, ct)
	s := open(t, t.TempDir(), Options{})
	c := contentsOf(t, s, x)
	putAll(t, c, x)
	path := filepath.Join(s.ContentsDir(), ct.digest.Path())
	var b [64]byte
	n, err := syscall.Getxattr(path, verityXattr, b[:])
	if err != nil || image.Digest(b[:n]) != ct.fsVerity() {
		t.Fatalf("attribute: %x, %v", b[:n], err)
	}
	for _, value := range []string{"", "short", string(make([]byte, 33))} {
		if value == "" {
			err = syscall.Removexattr(path, verityXattr)
		} else {
			err = syscall.Setxattr(path, verityXattr, []byte(value), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
		wantWhole(t, s, c, x)
		if n, err = syscall.Getxattr(path, verityXattr, b[:]); err != nil || image.Digest(b[:n]) != ct.fsVerity() {
			t.Fatalf("attribute after %q: %x, %v", value, b[:n], err)
		}
	}
}
