package zstdchunked

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	stargz "github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	. "github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

func random(n int) []byte {
	r := rand.New(rand.NewPCG(1, uint64(n)))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// files is a tar with all kinds of entries, and the contents in it.
func files(t *testing.T) (tarball []byte, contents map[string][]byte) {
	t.Helper()
	contents = map[string][]byte{
		"usr/small": []byte("small"), "usr/large": random(3 << 20), "usr/one": random(minChunk),
		"usr/zeros":  make([]byte, 5<<20),
		"usr/holes":  append(append(random(100_000), make([]byte, 1<<20)...), random(100_000)...),
		"usr/umläut": []byte("x"),
	}
	items := []Item{Dir("usr/")}
	for _, name := range []string{"usr/small", "usr/large", "usr/one", "usr/zeros", "usr/holes", "usr/umläut"} {
		items = append(items, File(name, string(contents[name])))
	}
	items = append(items, File("usr/empty", ""), Symlink("bin", "usr/bin"), Hardlink("usr/link", "usr/small"),
		Char("dev", 1, 3), Fifo("fifo"), Whiteout("usr/gone"))
	tarball, err := Tar(items...)
	if err != nil {
		t.Fatal(err)
	}
	return append(tarball, make([]byte, 9216)...), contents
}

func layer(t *testing.T, tarball []byte, workers int) ([]byte, *Result) {
	t.Helper()
	var b bytes.Buffer
	r, err := Write(t.Context(), &b, bytes.NewReader(tarball), workers)
	if err != nil {
		t.Fatal(err)
	}
	if r.Digest != digest.FromBytes(b.Bytes()) || r.Size != int64(b.Len()) || r.DiffID != digest.FromBytes(tarball) || r.TarSize != int64(len(tarball)) {
		t.Fatalf("the result is not that of the blob: %+v", r)
	}
	return b.Bytes(), r
}

// What we write is a zstd file that holds the tar, and our reader finds every
// chunk in it.
func TestRoundTrip(t *testing.T) {
	tarball, contents := files(t)
	blob, r := layer(t, tarball, 3)
	dec, err := zstd.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	if got, err := io.ReadAll(dec); err != nil || !bytes.Equal(got, tarball) {
		t.Fatalf("decompressed: %d bytes, want the tar's %d; %v", len(got), len(tarball), err)
	}
	for _, annotations := range []map[string]string{r.Annotations, nil} { // nil: by the footer
		found, err := toc.Read(bytes.NewReader(blob), int64(len(blob)), toc.Options{Annotations: annotations, InsecureTOC: true})
		if err != nil {
			t.Fatal(err)
		}
		seen := 0
		for _, e := range found.Entries {
			if e.Type != toc.Reg || e.Size == 0 {
				continue
			}
			seen++
			want := contents[e.Name]
			if e.Digest.String() != digest.FromBytes(want).String() {
				t.Errorf("%s: digest %s", e.Name, e.Digest)
			}
			zeros := 0
			for _, c := range e.Chunks {
				part := want[c.FileOffset : c.FileOffset+c.Size]
				if c.Zero {
					zeros++
					if len(bytes.Trim(part, "\x00")) > 0 {
						t.Errorf("%s: chunk at %d is no zeros", e.Name, c.FileOffset)
					}
					continue
				}
				dec.Reset(bytes.NewReader(blob[c.BlobOffset:c.BlobEnd]))
				got, err := io.ReadAll(dec)
				if err != nil || !bytes.Equal(got, part) {
					t.Errorf("%s: chunk at %d: %d bytes, %v", e.Name, c.FileOffset, len(got), err)
				}
			}
			if wantZeros := strings.Contains("usr/zeros usr/holes", e.Name); (zeros > 0) != wantZeros {
				t.Errorf("%s: %d chunks of zeros", e.Name, zeros)
			}
		}
		if seen != len(contents) {
			t.Errorf("%d files, want %d", seen, len(contents))
		}
	}
}

// The same tar gives the same bytes with any number of threads, and cuts move
// with the content.
func TestSame(t *testing.T) {
	tarball, _ := files(t)
	a, _ := layer(t, tarball, 1)
	b, _ := layer(t, tarball, 4)
	if !bytes.Equal(a, b) {
		t.Error("the number of threads is part of the result")
	}
	chunks := func(content []byte) map[digest.Digest]bool {
		var c cutter
		c.reset(bytes.NewReader(content))
		all := map[digest.Digest]bool{}
		for {
			b, _, err := c.next()
			if err == io.EOF {
				return all
			}
			all[digest.FromBytes(b)] = true
		}
	}
	old := random(4 << 20)
	before, common := chunks(old), 0
	for d := range chunks(append([]byte("something new"), old...)) {
		if before[d] {
			common++
		}
	}
	if common < len(before)-3 {
		t.Errorf("of %d chunks only %d are the same after an insertion", len(before), common)
	}
}

// stargz-snapshotter's library opens and verifies the layer.
func TestStargzReads(t *testing.T) {
	tarball, contents := files(t)
	blob, _ := layer(t, tarball, 2)
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))), estargz.WithDecompressors(new(stargz.Decompressor)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.VerifyTOC(r.TOCDigest()); err != nil {
		t.Fatal(err)
	}
	for name, want := range contents {
		f, err := r.OpenFile(name)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(f)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d; %v", name, len(got), len(want), err)
		}
	}
}

// tar-split makes the tar again from the contents.
func TestTarSplit(t *testing.T) {
	tarball, contents := files(t)
	blob, r := layer(t, tarball, 2)
	var off, size, raw int64
	fields := strings.Split(r.Annotations[annotationTarSplit], ":")
	for i, n := range []*int64{&off, &size, &raw} {
		for _, c := range fields[i] {
			*n = *n*10 + int64(c-'0')
		}
	}
	dec, err := zstd.NewReader(bytes.NewReader(blob[off : off+size]))
	if err != nil {
		t.Fatal(err)
	}
	defer dec.Close()
	text, err := io.ReadAll(dec)
	if err != nil || int64(len(text)) != raw {
		t.Fatalf("%d bytes, want %d; %v", len(text), raw, err)
	}
	getter := storage.NewBufferFileGetPutter()
	for name, b := range contents {
		getter.Put(name, bytes.NewReader(b))
	}
	out := asm.NewOutputTarStream(getter, storage.NewJSONUnpacker(bytes.NewReader(text)))
	defer out.Close()
	if got, err := io.ReadAll(out); err != nil || !bytes.Equal(got, tarball) {
		t.Errorf("%d bytes, want the tar's %d; %v", len(got), len(tarball), err)
	}
}

type failing struct{ after int }

func (f *failing) Write(p []byte) (int, error) {
	if f.after -= len(p); f.after < 0 {
		return 0, io.ErrShortWrite
	}
	return len(p), nil
}

func TestErrors(t *testing.T) {
	tarball, _ := files(t)
	for _, after := range []int{0, 100, 1 << 20, 3 << 20} {
		if _, err := Write(t.Context(), &failing{after}, bytes.NewReader(tarball), 2); !errors.Is(err, io.ErrShortWrite) {
			t.Errorf("a disk full after %d: %v", after, err)
		}
	}
	for _, n := range []int{100, 512, 1 << 20} {
		if _, err := Write(t.Context(), io.Discard, bytes.NewReader(tarball[:n+100]), 2); err == nil {
			t.Errorf("a tar cut at %d: no error", n+100)
		}
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("stop")
	cancel(stop)
	if _, err := Write(ctx, io.Discard, bytes.NewReader(tarball), 2); !errors.Is(err, stop) {
		t.Errorf("cancelled: %v", err)
	}
	if _, err := Write(t.Context(), io.Discard, strings.NewReader(strings.Repeat("no tar", 1000)), 2); err == nil {
		t.Error("no tar: no error")
	}
}

// Whatever the tar, the blob decompresses to it, and our reader understands the
// TOC or says what is wrong.
func FuzzWrite(f *testing.F) {
	small, err := Tar(Dir("d/"), File("d/f", "content"), Symlink("s", "d/f"))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small)
	f.Fuzz(func(t *testing.T, tarball []byte) {
		var b bytes.Buffer
		r, err := Write(t.Context(), &b, bytes.NewReader(tarball), 1)
		if err != nil {
			return
		}
		dec, err := zstd.NewReader(bytes.NewReader(b.Bytes()))
		if err != nil {
			t.Fatal(err)
		}
		defer dec.Close()
		if got, err := io.ReadAll(dec); err != nil || !bytes.Equal(got, tarball) {
			t.Fatalf("%d bytes of %d, %v", len(got), len(tarball), err)
		}
		if r.DiffID != digest.FromBytes(tarball) {
			t.Fatal("wrong DiffID")
		}
		toc.Read(bytes.NewReader(b.Bytes()), int64(b.Len()), toc.Options{Annotations: r.Annotations})
	})
}
