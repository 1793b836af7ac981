package image

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

func indexOf(t testing.TB, x *Tree, layers []Layer) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := WriteIndex(&b, x, layers); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// reseal gives b the checksum it should have.
func reseal(b []byte) {
	if n := len(b) - trailerSize; n >= 0 {
		sum := sha256.Sum256(b[:n])
		copy(b[n:], sum[:])
	}
}

// rebuild writes the index anew from what its methods say.
func rebuild(x *Index) []byte {
	var layers []Layer
	for _, l := range x.Layers() {
		layers = append(layers, Layer{l.Digest, l.Size, &toc.TOC{Compression: l.Compression, PrefetchEnd: l.PrefetchEnd}})
	}
	var contents []source
	for i := range x.Contents() {
		c := x.Content(i)
		contents = append(contents, source{node: &Node{Content: c.Digest, Size: c.Size, Chunks: make([]toc.Chunk, c.Chunks)}})
	}
	var chunks []Chunk
	for j := range x.Chunks() {
		chunks = append(chunks, x.Chunk(j))
	}
	var b bytes.Buffer
	w := bufio.NewWriter(&b)
	writeTables(w, layers, contents, chunks)
	w.Flush()
	sum := sha256.Sum256(b.Bytes())
	return append(b.Bytes(), sum[:]...)
}

// checkOpened checks what OpenIndex promises of every index.
func checkOpened(t testing.TB, x *Index) {
	t.Helper()
	seen := make([]bool, x.Chunks())
	for i := range x.Contents() {
		c := x.Content(i)
		if k, ok := x.Find(c.Digest); !ok || k != i {
			t.Fatalf("content %d is found at %d, %v", i, k, ok)
		}
		covered := int64(0)
		for k := range c.Chunks {
			j := x.ContentChunk(i, k)
			ch := x.Chunk(j)
			if seen[j] || ch.Content != i || ch.FileOffset != covered || ch.Size <= 0 {
				t.Fatalf("content %d has chunk %d: %+v", i, j, ch)
			}
			seen[j] = true
			covered += ch.Size
		}
		if covered != c.Size || c.Size <= 0 {
			t.Fatalf("content %d: %d bytes of %d covered", i, covered, c.Size)
		}
	}
	zeros := false
	var last Chunk
	for j := range x.Chunks() {
		c := x.Chunk(j)
		if !seen[j] || zeros && !c.Zero {
			t.Fatalf("chunk %d is out of place: %+v", j, c)
		}
		zeros = c.Zero
		if !c.Zero && (c.BlobOffset < 0 || c.BlobEnd <= c.BlobOffset || c.BlobEnd > x.Layers()[c.Layer].Size || c.Size > toc.MaxChunk) {
			t.Fatalf("chunk %d is %+v", j, c)
		}
		same := last.BlobOffset == c.BlobOffset && last.BlobEnd == c.BlobEnd
		if !c.Zero && last.Layer == c.Layer && !same && last.BlobEnd > c.BlobOffset {
			t.Fatalf("chunks %+v and %+v overlap", last, c)
		}
		last = c
	}
	if _, ok := x.Find(Digest{}); ok {
		t.Fatal("the zero digest is found")
	}
}

// checkIndex writes and opens the index of a tree and looks for every file in
// it.
func checkIndex(t testing.TB, x *Tree, layers []Layer) {
	t.Helper()
	b := indexOf(t, x, layers)
	if !bytes.Equal(b, indexOf(t, x, layers)) {
		t.Fatal("two files for one tree")
	}
	idx, err := OpenIndex(b)
	if err != nil {
		t.Fatal(err)
	}
	checkOpened(t, idx)
	if !bytes.Equal(rebuild(idx), b) {
		t.Fatal("the index says something else than was written")
	}
	for i, l := range layers {
		want := IndexLayer{l.Digest, l.Size, l.TOC.Compression, l.TOC.PrefetchEnd}
		if idx.Layers()[i] != want {
			t.Fatalf("layer %d is %+v, want %+v", i, idx.Layers()[i], want)
		}
	}
	used := map[int]bool{}
	var walk func(n *Node)
	walk = func(n *Node) {
		for _, c := range n.Children {
			walk(c)
		}
		if !n.IsReg() || n.Size == 0 {
			return
		}
		i, ok := idx.Find(n.Content)
		if !ok {
			t.Fatalf("%q is not in the index", n.Name)
		}
		used[i] = true
		if c := idx.Content(i); c.Size != n.Size || c.Digest != n.Content {
			t.Fatalf("%q is content %+v", n.Name, c)
		}
		first := idx.Chunk(idx.ContentChunk(i, 0))
		if first.Layer > n.Layer {
			t.Fatalf("%q of layer %d comes from layer %d", n.Name, n.Layer, first.Layer)
		}
		if first.Layer == n.Layer && first.BlobOffset == n.Chunks[0].BlobOffset {
			for k, want := range n.Chunks {
				if got := idx.Chunk(idx.ContentChunk(i, k)); got.Chunk != want {
					t.Fatalf("%q: chunk %d is %+v, want %+v", n.Name, k, got, want)
				}
			}
		}
	}
	walk(x.Root)
	if len(used) != idx.Contents() {
		t.Fatalf("%d contents, the tree has %d", idx.Contents(), len(used))
	}
}

// chunkyTree has files of many chunks, holes, shared spans and shared chunks.
func chunkyTree(t testing.TB) (*Tree, []Layer) {
	t.Helper()
	chunk := func(off, end, inner, file, size int64, d byte) toc.Chunk {
		return toc.Chunk{BlobOffset: off, BlobEnd: end, InnerOffset: inner, FileOffset: file, Size: size, Digest: Digest{d}}
	}
	hole := func(file, size int64) toc.Chunk { return toc.Chunk{FileOffset: file, Size: size, Zero: true} }
	file := func(name string, d byte, chunks ...toc.Chunk) toc.Entry {
		e := toc.Entry{Name: name, Type: toc.Reg, Digest: Digest{d}, Chunks: chunks}
		for _, c := range chunks {
			e.Size += c.Size
		}
		return e
	}
	x, layers, err := mergeEntries(t,
		[]toc.Entry{
			file("backwards", 9, chunk(300, 400, 0, 0, 10, 1), chunk(100, 200, 0, 10, 10, 2), chunk(200, 300, 0, 20, 1<<30, 3)),
			file("shared a", 8, chunk(500, 600, 20, 0, 10, 4)),
			file("shared b", 7, chunk(500, 600, 0, 0, 20, 5)),
			file("once stored a", 6, chunk(700, 800, 0, 0, 20, 6), chunk(800, 900, 0, 20, 5, 7)),
			file("once stored b", 5, chunk(700, 800, 0, 0, 20, 6), chunk(700, 800, 0, 20, 20, 6)),
			file("hole", 4, hole(0, 1<<40), chunk(900, 950, 0, 1<<40, 3, 8), hole(1<<40+3, 4)),
			file("all hole", 3, hole(0, 7)),
			file("hidden", 2, chunk(1000, 1001, 0, 0, 1, 9)),
		},
		[]toc.Entry{
			file("again", 8, chunk(1, 2, 0, 0, 10, 4)), // layer 0 has it
			file("hidden", 1, chunk(2, 3, 0, 0, 1, 10)),
		})
	if err != nil {
		t.Fatal(err)
	}
	return x, layers
}

func TestIndex(t *testing.T) {
	x, layers := chunkyTree(t)
	checkIndex(t, x, layers)
	idx, err := OpenIndex(indexOf(t, x, layers))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for j := range idx.Chunks() {
		c := idx.Chunk(j)
		got = append(got, fmt.Sprintf("%d:%d+%d>%d", c.Layer, c.BlobOffset, c.InnerOffset, idx.Content(c.Content).Digest[0]))
	}
	want := "0:100+0>9 0:200+0>9 0:300+0>9 0:500+0>7 0:500+20>8 0:700+0>5 0:700+0>5 0:700+0>6 0:800+0>6 0:900+0>4 1:2+0>1 0:0+0>3 0:0+0>4 0:0+0>4"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("got  %s\nwant %s", s, want)
	}
	if n := testing.AllocsPerRun(10, func() {
		i, _ := idx.Find(Digest{9})
		_ = idx.Chunk(idx.ContentChunk(i, 2))
		_ = idx.Content(i)
		_ = idx.Layers()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// The same digest cannot be two contents.
func TestIndexContradiction(t *testing.T) {
	layers := layersOf([]string{"d/ d/a=1", "b=22"})
	layers[1].TOC.Entries[0].Digest = layers[0].TOC.Entries[1].Digest
	x, err := Merge(layers)
	if err != nil {
		t.Fatal(err)
	}
	err = WriteIndex(io.Discard, x, layers)
	e, ok := errors.AsType[*EntryError](err)
	if !ok || !strings.Contains(err.Error(), `"d/a"`) || !strings.Contains(err.Error(), `"b"`) || e.LayerDigest.IsZero() {
		t.Errorf("got %v", err)
	}
}

type fullDisk struct{ left int }

var errFull = errors.New("disk full")

func (d *fullDisk) Write(p []byte) (int, error) {
	if len(p) > d.left {
		return 0, errFull
	}
	d.left -= len(p)
	return len(p), nil
}

func TestWriteIndexFails(t *testing.T) {
	x, layers := chunkyTree(t)
	n := len(indexOf(t, x, layers))
	for _, left := range []int{0, n - trailerSize - 1, n - 1} {
		if err := WriteIndex(&fullDisk{left}, x, layers); !errors.Is(err, errFull) {
			t.Errorf("%d bytes left: %v", left, err)
		}
	}
}

// Every byte matters: any change is found by the checksum; and with the
// checksum mended, what is accepted is still a proper index.
func TestIndexDamage(t *testing.T) {
	x, layers := chunkyTree(t)
	good := indexOf(t, x, layers)
	for i := range good {
		for _, bit := range []byte{1, 0x80} {
			b := bytes.Clone(good)
			b[i] ^= bit
			if _, err := OpenIndex(b); !errors.Is(err, ErrIndex) {
				t.Fatalf("byte %d: %v", i, err)
			}
			reseal(b)
			if idx, err := OpenIndex(b); err == nil {
				checkOpened(t, idx)
				if !bytes.Equal(rebuild(idx), b) {
					t.Fatalf("byte %d does not matter", i)
				}
			}
		}
	}
	for n := range good {
		b := bytes.Clone(good[:n])
		reseal(b)
		if _, err := OpenIndex(b); !errors.Is(err, ErrIndex) {
			t.Fatalf("cut to %d bytes: %v", n, err)
		}
	}
	if _, err := OpenIndex(slices.Concat(good, []byte{0})); !errors.Is(err, ErrIndex) {
		t.Error("a byte too many was accepted")
	}
}

// Two that are swapped, and other lies that a checksum does not find.
func TestIndexLies(t *testing.T) {
	x, layers := chunkyTree(t)
	good := indexOf(t, x, layers)
	idx, err := OpenIndex(good)
	if err != nil {
		t.Fatal(err)
	}
	contents := headerSize + len(layers)*layerSize
	refs := contents + idx.Contents()*contentSize
	chunks := refs + idx.Chunks()*refSize
	swap := func(at, size int) func([]byte) {
		return func(b []byte) {
			p := bytes.Clone(b[at:][:size])
			copy(b[at:], b[at+size:][:size])
			copy(b[at+size:], p)
		}
	}
	for name, change := range map[string]func(b []byte){
		"contents swapped":         swap(contents, contentSize),
		"refs swapped":             swap(refs+4*(idx.Chunks()-1)-4, refSize),
		"chunks swapped":           swap(chunks, chunkSize),
		"a hole before the end":    swap(chunks+chunkSize*(idx.Chunks()-4), chunkSize),
		"layer out of range":       func(b []byte) { le.PutUint32(b[chunks+40:], 2) },
		"content out of range":     func(b []byte) { le.PutUint32(b[chunks+44:], 99) },
		"ref out of range":         func(b []byte) { le.PutUint32(b[refs:], 1<<31) },
		"ref to another content":   func(b []byte) { le.PutUint32(b[refs:], 0) },
		"span out of the blob":     func(b []byte) { le.PutUint64(b[chunks+8:], 1<<41) },
		"span overlaps the next":   func(b []byte) { le.PutUint64(b[chunks+8:], 201) },
		"span negative":            func(b []byte) { le.PutUint64(b[chunks:], 1<<63) },
		"inner offset overflows":   func(b []byte) { le.PutUint64(b[chunks+16:], 1<<63-1) },
		"inner parts overlap":      func(b []byte) { le.PutUint64(b[chunks+4*chunkSize+16:], 19) },
		"chunk too large":          func(b []byte) { le.PutUint64(b[chunks+2*chunkSize+32:], 1<<30+1) },
		"chunk of no bytes":        func(b []byte) { le.PutUint64(b[chunks+32:], 0) },
		"chunk without digest":     func(b []byte) { copy(b[chunks+48:], make([]byte, 32)) },
		"content of no bytes":      func(b []byte) { le.PutUint64(b[contents+32:], 0) },
		"content of no refs":       func(b []byte) { le.PutUint32(b[contents+44:], 0) },
		"content of too many refs": func(b []byte) { le.PutUint32(b[contents+44:], 1<<32-1) },
		"content larger":           func(b []byte) { le.PutUint64(b[contents+32:], 2) },
		"prefetch after the end":   func(b []byte) { le.PutUint64(b[headerSize+40:], 1<<41) },
		"unknown compression":      func(b []byte) { b[headerSize+48] = 4 },
		"padding":                  func(b []byte) { b[headerSize+63] = 1 },
		"another version":          func(b []byte) { b[8] = 2 },
		"counts that overflow": func(b []byte) {
			for i := 12; i < 24; i++ {
				b[i] = 0xff
			}
		},
	} {
		b := bytes.Clone(good)
		change(b)
		reseal(b)
		if _, err := OpenIndex(b); !errors.Is(err, ErrIndex) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
