package tarindex

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
)

// memory is a Store that keeps all.
type memory map[toc.Digest][]byte

func (m memory) Put(d toc.Digest, p []byte) { m[d] = p }
func (m memory) Create(int64) File          { return &memoryFile{m: m} }

type memoryFile struct {
	m memory
	b []byte
}

func (f *memoryFile) Write(p []byte)      { f.b = append(f.b, p...) }
func (f *memoryFile) Commit(d toc.Digest) { f.m[d] = f.b }
func (f *memoryFile) Abort()              {}

func (m memory) read(d toc.Digest, p []byte, off int64) error {
	if b, ok := m[d]; !ok || off+int64(len(p)) > int64(len(b)) {
		return errors.New("not there")
	} else {
		copy(p, b[off:])
	}
	return nil
}

// noise is n bytes that compress to about half.
func noise(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 9))
	block := make([]byte, 64<<10) // longer than a window
	for i := range block {
		block[i] = "abcdefghijklmnop"[r.Uint32()&15]
	}
	return bytes.Repeat(block, n/len(block)+1)[:n]
}

// sample is a tar of all kinds of entries.
func sample(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data []byte) {
		h.Size = int64(len(data))
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	add(tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o1755, Uid: 3, Gid: 4}, nil)
	add(tar.Header{Name: "dir/small"}, []byte("small"))
	add(tar.Header{Name: "dir/empty"}, nil)
	add(tar.Header{Name: "dir/large"}, noise(5<<20+777, 1))
	add(tar.Header{Name: "dir/middle"}, noise(700_000, 2))
	add(tar.Header{Name: strings.Repeat("long/", 50) + "name", Format: tar.FormatGNU}, []byte("x"))
	add(tar.Header{Name: strings.Repeat("lang/", 50) + "näme", Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.user.b": "v\x01", "SCHILY.xattr.security.capability": "\x01\x00"}}, []byte("y"))
	add(tar.Header{Name: "big-uid", Uid: 1 << 30, Format: tar.FormatGNU}, []byte("z"))
	add(tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "dir/small"}, nil)
	add(tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "dir/small"}, nil)
	add(tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}, nil)
	add(tar.Header{Name: "fifo", Typeflag: tar.TypeFifo}, nil)
	add(tar.Header{Name: "dir/small"}, []byte("smaller")) // the last one counts
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	var b bytes.Buffer
	w, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// zstdFrames compresses data in frames of n bytes, a skippable one before each.
func zstdFrames(t testing.TB, data []byte, n int) []byte {
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	var b []byte
	for len(data) > 0 {
		m := min(n, len(data))
		b = append(b, 0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 'x', 'y', 'z')
		b = z.EncodeAll(data[:m], b)
		data = data[m:]
	}
	return b
}

func layerOf(blob, plain []byte) Layer {
	return Layer{Blob: sha256.Sum256(blob), Size: int64(len(blob)), DiffID: sha256.Sum256(plain)}
}

// check builds an index of blob, compares what it says with what archive/tar
// says of plain, and reads every chunk by it.
func check(t *testing.T, blob, plain []byte) *Index {
	t.Helper()
	store := memory{}
	x, err := Build(t.Context(), bytes.NewReader(blob), layerOf(blob, plain), store)
	if err != nil {
		t.Fatal(err)
	}
	if x, err = Open(x.Bytes()); err != nil {
		t.Fatal(err)
	}
	table, err := x.TOC()
	if err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(bytes.NewReader(plain))
	i := 0
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e := table.Entries[i]
		i++
		if e.Name != h.Name || int(e.UID) != h.Uid || int(e.GID) != h.Gid || int64(e.Mode) != h.Mode&0o7777 || e.Linkname != h.Linkname || e.MtimeSec != h.ModTime.Unix() {
			t.Fatalf("entry %+v, the tar has %+v", e, h)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if e.Type != toc.Reg {
			continue
		}
		if e.Size != int64(len(data)) || e.Size > 0 && e.Digest != sha256.Sum256(data) || e.Size > 0 && !bytes.Equal(store[e.Digest], data) {
			t.Fatalf("%s: %d bytes, want %d; stored %d", e.Name, e.Size, len(data), len(store[e.Digest]))
		}
		covered := int64(0)
		for _, c := range e.Chunks {
			if c.FileOffset != covered {
				t.Fatalf("%s: chunk at %d after %d", e.Name, c.FileOffset, covered)
			}
			covered += c.Size
			want := data[c.FileOffset:][:c.Size]
			if c.Zero {
				if len(bytes.Trim(want, "\x00")) > 0 {
					t.Fatalf("%s: a hole that is none", e.Name)
				}
				continue
			}
			if c.Size > MaxChunk || c.Digest != sha256.Sum256(want) {
				t.Fatalf("%s: chunk %+v has not its digest", e.Name, c)
			}
			if got := span(t, x, blob, c); !bytes.Equal(got[c.InnerOffset:][:c.Size], want) {
				t.Fatalf("%s: chunk %+v is not in its span", e.Name, c)
			}
		}
		if covered != e.Size {
			t.Fatalf("%s: chunks of %d bytes, want %d", e.Name, covered, e.Size)
		}
	}
	if i != len(table.Entries) {
		t.Fatalf("%d entries, want %d", len(table.Entries), i)
	}
	if err := x.Prove(t.Context(), store.read); err != nil {
		t.Fatal(err)
	}
	return x
}

// span decompresses the span of a chunk.
func span(t *testing.T, x *Index, blob []byte, c toc.Chunk) []byte {
	t.Helper()
	part := blob[c.BlobOffset:c.BlobEnd]
	switch x.Compression {
	case toc.None:
		return part
	case toc.Zstd:
		z, err := zstd.NewReader(nil)
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		out, err := z.DecodeAll(part, nil)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	p, size, err := x.Checkpoint(c.BlobOffset)
	if err != nil {
		t.Fatal(err)
	}
	if size > MaxSpan {
		t.Fatalf("a span of %d bytes", size)
	}
	z := inflate.NewReader(nil, inflate.Options{})
	if err := z.ResetAt(bytes.NewReader(part), p, size); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(z)
	if err != nil || int64(len(out)) != size {
		t.Fatalf("span at %d: %d bytes, want %d: %v", c.BlobOffset, len(out), size, err)
	}
	return out
}

func TestIndex(t *testing.T) {
	plain := sample(t)
	for name, blob := range map[string][]byte{
		"tar":            plain,
		"gzip":           gzipped(t, plain),
		"gzip members":   append(gzipped(t, plain[:3_000_000]), gzipped(t, plain[3_000_000:])...),
		"gzip and more":  append(gzipped(t, plain), "garbage"...),
		"zstd":           zstdFrames(t, plain, len(plain)),
		"zstd frames":    zstdFrames(t, plain, 300_000),
		"zstd 10 frames": zstdFrames(t, plain, 1<<20),
	} {
		t.Run(name, func(t *testing.T) {
			x := check(t, blob, plain)
			t.Logf("%d bytes for a blob of %d, %d spans", len(x.Bytes()), len(blob), x.Spans())
		})
	}
}

// Tars of other tools, with what each does its own way.
func TestOtherTars(t *testing.T) {
	dir := t.TempDir()
	script := fmt.Sprintf(`set -e
cd %s; mkdir -p src/%s; cd src
printf hello >hello; ln -s hello soft; ln hello hard; mkfifo fifo
: >%s/file
truncate -s 3M sparse; printf data | dd of=sparse bs=1 seek=1000000 conv=notrunc status=none; printf end | dd of=sparse bs=1 seek=3145725 conv=notrunc status=none
truncate -s 200K holes
head -c 600000 /dev/urandom >large
cd ..
for f in gnu oldgnu pax posix ustar v7; do tar -C src -cf $f.tar --format=$f hello soft hard large; done
for f in gnu posix; do tar -C src -cf $f-long.tar --format=$f .; done
tar -C src -cSf gnu-sparse.tar --format=gnu .
for v in 0.0 0.1 1.0; do tar -C src -cSf pax-sparse-$v.tar --format=posix --sparse-version=$v .; done
python3 -c "import tarfile
for n, f in [('gnu', tarfile.GNU_FORMAT), ('pax', tarfile.PAX_FORMAT)]:
    with tarfile.open('python-' + n + '.tar', 'w', format=f) as t: t.add('src', '.')"
bsdtar -C src -cf bsdtar.tar . ; bsdtar -C src --format=gnutar -cf bsdtar-gnu.tar .`, dir, strings.Repeat("d/", 120), strings.Repeat("d/", 120))
	if out, err := exec.Command("sh", "-c", script).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	files, err := filepath.Glob(dir + "/*.tar")
	if err != nil || len(files) != 16 {
		t.Fatalf("%d tars: %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			plain, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			check(t, plain, plain)
			check(t, gzipped(t, plain), plain)
		})
	}
}

func TestWrongLayers(t *testing.T) {
	plain := sample(t)
	blob := gzipped(t, plain)
	zblob := zstdFrames(t, plain, 300_000)
	broken := errors.New("the line is dead")
	for name, c := range map[string]struct {
		r    io.Reader
		l    Layer
		want error
		kind string
	}{
		"another blob":        {bytes.NewReader(blob), Layer{Blob: toc.Digest{1}, Size: int64(len(blob))}, nil, "blob"},
		"another DiffID":      {bytes.NewReader(blob), Layer{Blob: sha256.Sum256(blob), Size: int64(len(blob)), DiffID: toc.Digest{1}}, nil, "DiffID"},
		"cut short":           {bytes.NewReader(blob[:len(blob)/2]), layerOf(blob, plain), io.ErrUnexpectedEOF, ""},
		"half a gzip":         {bytes.NewReader(blob[:len(blob)/2]), layerOf(blob[:len(blob)/2], plain), ErrLayer, ""},
		"half a zstd":         {bytes.NewReader(zblob[:len(zblob)/2]), layerOf(zblob[:len(zblob)/2], plain), ErrLayer, ""},
		"half a tar":          {bytes.NewReader(plain[:len(plain)/2]), layerOf(plain[:len(plain)/2], plain), ErrLayer, ""},
		"text":                {strings.NewReader(strings.Repeat("no tar ", 1000)), Layer{Size: 7000, Blob: sha256.Sum256([]byte(strings.Repeat("no tar ", 1000)))}, ErrLayer, ""},
		"a dead line":         {io.MultiReader(bytes.NewReader(blob[:1000]), &failing{broken}), layerOf(blob, plain), broken, ""},
		"a dead line of zstd": {io.MultiReader(bytes.NewReader(zblob[:100_000]), &failing{broken}), layerOf(zblob, plain), broken, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Build(t.Context(), c.r, c.l, memory{})
			d, isDigest := errors.AsType[*DigestError](err)
			if err == nil || c.want != nil && !errors.Is(err, c.want) || isDigest != (c.kind != "") || isDigest && d.What != c.kind || errors.Is(err, ErrLayer) != (c.want == ErrLayer) {
				t.Errorf("%v, want %v", err, c.want)
			}
		})
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

// An index that was changed is refused, or says something else, which Prove
// finds.
func TestLies(t *testing.T) {
	plain := sample(t)
	blob := gzipped(t, plain)
	store := memory{}
	x, err := Build(t.Context(), bytes.NewReader(blob), layerOf(blob, plain), store)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 1))
	refused, proven := 0, 0
	for range 60 {
		b := bytes.Clone(x.Bytes())
		at := r.IntN(len(b) - trailerSize)
		b[at] ^= byte(1 + r.IntN(255))
		sum := sha256.Sum256(b[:len(b)-trailerSize])
		copy(b[len(b)-trailerSize:], sum[:])
		y, err := Open(b)
		if err == nil {
			_, err = y.TOC()
		}
		if err != nil {
			if !errors.Is(err, ErrIndex) {
				t.Fatalf("byte %d: %v", at, err)
			}
			refused++
			continue
		}
		for i := range y.pointCount() {
			y.Checkpoint(y.point(i).in) // must not panic
		}
		inPoints := at >= headerSize && at < headerSize+len(x.points)+len(x.windows)
		if err := y.Prove(t.Context(), store.read); err == nil && !inPoints && at != 12 && (at < 16 || at >= 56) {
			// Chunk digests and points are proven by reading, the rest here.
			if at < headerSize || at >= len(b)-trailerSize-len(x.skeleton) {
				t.Fatalf("byte %d was changed, and the index is proven", at)
			}
		} else if err != nil {
			proven++
		}
	}
	t.Logf("%d refused, %d found by the DiffID", refused, proven)
}

func FuzzOpen(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "a", Size: 3, Mode: 0o644})
	w.Write([]byte("abc"))
	w.Close()
	for _, blob := range [][]byte{b.Bytes(), gzipped(f, b.Bytes()), zstdFrames(f, b.Bytes(), 600)} {
		x, err := Build(f.Context(), bytes.NewReader(blob), layerOf(blob, b.Bytes()), nil)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(x.Bytes()[:len(x.Bytes())-trailerSize])
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		sum := sha256.Sum256(body)
		x, err := Open(append(bytes.Clone(body), sum[:]...))
		if err != nil {
			return
		}
		table, err := x.TOC()
		if err != nil {
			return
		}
		for _, e := range table.Entries {
			covered := int64(0)
			for _, c := range e.Chunks {
				if c.FileOffset != covered || c.Size <= 0 || !c.Zero && (c.BlobOffset < 0 || c.BlobEnd <= c.BlobOffset || c.BlobEnd > x.Size || c.InnerOffset < 0 || c.Size > MaxChunk) {
					t.Fatalf("%q: chunk %+v of a blob of %d bytes", e.Name, c, x.Size)
				}
				covered += c.Size
				if x.Compression == toc.GzipIndexed && !c.Zero {
					x.Checkpoint(c.BlobOffset)
				}
			}
			if covered != e.Size {
				t.Fatalf("%q: %d bytes in chunks, want %d", e.Name, covered, e.Size)
			}
		}
	})
}

// FuzzBuild gives tars to the reader, compressed or not, and compares what it
// makes of them with archive/tar.
func FuzzBuild(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	w.WriteHeader(&tar.Header{Name: "a", Size: 3, Mode: 0o644, PAXRecords: map[string]string{"SCHILY.xattr.user.a": "b"}})
	w.Write([]byte("abc"))
	w.Close()
	f.Add(b.Bytes())
	f.Add(gzipped(f, b.Bytes()))
	f.Add(zstdFrames(f, b.Bytes(), 600))
	f.Fuzz(func(t *testing.T, blob []byte) {
		store := memory{}
		x, err := Build(t.Context(), bytes.NewReader(blob), Layer{Blob: sha256.Sum256(blob), Size: int64(len(blob))}, store)
		if err != nil {
			return
		}
		if x, err = Open(x.Bytes()); err != nil {
			t.Fatal(err)
		}
		if _, err := x.TOC(); err != nil {
			t.Fatal(err)
		}
		if err := x.Prove(t.Context(), store.read); err != nil {
			t.Fatal(err)
		}
	})
}
