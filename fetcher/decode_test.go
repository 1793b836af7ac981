package fetcher

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"runtime"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A piece is a chunk of a span: bytes [inner, inner+size) of what it
// decompresses to.
type piece struct{ inner, size int64 }

// spanIndex makes an index of one layer, whose blob is one span that is said to
// hold the pieces. truth is what it does decompress to, as far as is known.
func spanIndex(t testing.TB, c toc.Compression, size int64, truth []byte, pieces []piece) (*image.Index, error) {
	t.Helper()
	tc := &toc.TOC{Format: toc.EStargz, Compression: c}
	for i, p := range pieces {
		var d image.Digest
		if p.inner+p.size <= int64(len(truth)) {
			d = sha256.Sum256(truth[p.inner : p.inner+p.size])
		} else {
			d = sha256.Sum256([]byte{byte(i)})
		}
		// Contents must differ, or they are one.
		content := sha256.Sum256([]byte{byte(i), 1})
		tc.Entries = append(tc.Entries, toc.Entry{
			Name: string(rune('a' + i)), Type: toc.Reg, Size: p.size, Digest: content,
			Chunks: []toc.Chunk{{BlobOffset: 0, BlobEnd: size, InnerOffset: p.inner, Size: p.size, Digest: d}},
		})
	}
	ls := []image.Layer{{Digest: image.Digest{1}, Size: size, TOC: tc}}
	tree, err := image.Merge(ls)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := image.WriteIndex(&b, tree, ls); err != nil {
		return nil, err
	}
	return image.OpenIndex(b.Bytes())
}

// storeSpan runs store over a span in memory.
func storeSpan(x *image.Index, data []byte, sink Sink) (map[int]error, error) {
	s := scratches.Get().(*scratch)
	defer s.keep()
	s.body.Reset(bytes.NewReader(data))
	sp := spanOf(x, 0)
	return store(ctx, x, sp, &spanReader{r: s.body, left: sp.limit - sp.off}, s, sink, newMemory(DefaultMemory))
}

func gzipped(parts ...[]byte) []byte {
	var b bytes.Buffer
	for _, p := range parts {
		w, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
		w.Write(p)
		w.Close()
	}
	return b.Bytes()
}

func zstdOf(p []byte) []byte {
	w := imagetest.Must(zstd.NewWriter(nil))
	defer w.Close()
	return w.EncodeAll(p, nil)
}

func TestStoreSpan(t *testing.T) {
	truth := []byte(words(200_000, 1))
	for name, tc := range map[string]struct {
		c      toc.Compression
		data   []byte
		pieces []piece
		wrong  int // chunks
	}{
		"stored":            {toc.None, truth, []piece{{0, 10}, {10, 199_990}}, 0},
		"gzip":              {toc.Gzip, gzipped(truth), []piece{{0, 100_000}, {150_000, 50_000}}, 0},
		"two members":       {toc.Gzip, gzipped(truth[:70_000], truth[70_000:]), []piece{{60_000, 20_000}}, 0},
		"zstd":              {toc.Zstd, zstdOf(truth), []piece{{5, 100}, {200, 100_000}}, 0},
		"two frames":        {toc.Zstd, append(zstdOf(truth[:70_000]), zstdOf(truth[70_000:])...), []piece{{60_000, 20_000}}, 0},
		"the same twice":    {toc.Gzip, gzipped(truth), []piece{{0, 1000}, {2500, 2000}, {2500, 2000}, {5000, 5}}, 0},
		"cut":               {toc.Gzip, gzipped(truth)[:30_000], []piece{{0, 1000}, {199_000, 1000}}, 1},
		"too short":         {toc.Zstd, zstdOf(truth[:1000]), []piece{{0, 500}, {900, 101}, {1950, 10}}, 2},
		"no gzip":           {toc.Gzip, truth, []piece{{0, 10}}, 1},
		"no zstd":           {toc.Zstd, truth, []piece{{0, 10}}, 1},
		"another content":   {toc.None, truth, []piece{{0, 10}, {250_000, 1}}, 1},
		"window too large":  {toc.Zstd, []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xb0, 0x01, 0x00, 0x00}, []piece{{0, 10}}, 1},
		"a large size said": {toc.Gzip, gzipped(truth), []piece{{0, toc.MaxChunk}}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			x, err := spanIndex(t, tc.c, int64(len(tc.data)), truth, tc.pieces)
			if err != nil {
				t.Fatal(err)
			}
			sink := newSink(x)
			wrong, err := storeSpan(x, tc.data, sink)
			if err != nil || len(wrong) != tc.wrong {
				t.Fatalf("wrong: %v, %v", wrong, err)
			}
			for j := range x.Chunks() {
				if sink.Missing(j) != (wrong[j] != nil) {
					t.Errorf("chunk %d: missing is %v, %v", j, sink.Missing(j), wrong[j])
				}
			}
		})
	}
}

// TestIndexedSpan reads spans that begin at checkpoints: each is asked for once.
func TestIndexedSpan(t *testing.T) {
	truth := []byte(words(200_000, 1))
	data := gzipped(truth)
	x, err := spanIndex(t, toc.GzipIndexed, int64(len(data)), truth, []piece{{0, 100_000}, {150_000, 50_000}})
	if err != nil {
		t.Fatal(err)
	}
	blob := &fileBlob{"b", nil, func() (*io.SectionReader, error) {
		return io.NewSectionReader(bytes.NewReader(data), 0, int64(len(data))), nil
	}}
	f := New(x, []Blob{blob}, newSink(x), FetchOptions{Checkpoint: func(layer int, off int64) (*inflate.Checkpoint, int64, error) {
		return &inflate.Checkpoint{In: off}, int64(len(truth)), nil
	}})
	err = f.Need(ctx, 0, 0, 1)
	f.Close() // a request is counted when its body is closed
	if err != nil {
		t.Fatal(err)
	}
	if got := f.Stats()[metrics.Demand]; got.Requests != 1 {
		t.Errorf("%+v for one span", got)
	}
}

// TestBomb has a chunk that claims the largest size there may be: it must not
// be given memory before its bytes have come.
func TestBomb(t *testing.T) {
	data := gzipped(make([]byte, 1<<20))
	x, err := spanIndex(t, toc.Gzip, int64(len(data)), nil, []piece{{0, toc.MaxChunk}})
	if err != nil {
		t.Fatal(err)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if wrong, err := storeSpan(x, data, newSink(x)); err != nil || len(wrong) != 1 {
		t.Fatal(wrong, err)
	}
	runtime.ReadMemStats(&after)
	if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
		t.Errorf("%d bytes were allocated for a megabyte", n)
	}
}

// TestSourceError has the bytes not come: that is not the fault of the span.
func TestSourceError(t *testing.T) {
	truth := []byte(words(100_000, 1))
	lost := errors.New("lost")
	for c, data := range map[toc.Compression][]byte{toc.None: truth, toc.Gzip: gzipped(truth), toc.Zstd: zstdOf(truth)} {
		for cut := range 20 {
			x, err := spanIndex(t, c, int64(len(data)), truth, []piece{{50_000, 50_000}})
			if err != nil {
				t.Fatal(err)
			}
			s := &scratch{body: bufio.NewReader(io.MultiReader(bytes.NewReader(data[:cut*len(data)/40]), failing{lost}))}
			sp := spanOf(x, 0)
			wrong, err := store(ctx, x, sp, &spanReader{r: s.body, left: sp.limit}, s, newSink(x), newMemory(1))
			if !errors.Is(err, lost) || len(wrong) != 0 {
				t.Fatalf("%v cut at %d/40: %v, %v", c, cut, wrong, err)
			}
		}
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	x, err := spanIndex(t, toc.None, 10, nil, []piece{{0, 10}})
	if err != nil {
		t.Fatal(err)
	}
	s := &scratch{body: bufio.NewReader(bytes.NewReader(truth))}
	if _, err := store(canceled, x, spanOf(x, 0), &spanReader{r: s.body, left: 10}, s, newSink(x), newMemory(1)); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// FuzzSpan decompresses hostile spans. The sink takes nothing that has not its
// digest, and whatever an honest decompressor makes of the span is taken.
func FuzzSpan(f *testing.F) {
	truth := []byte(words(3000, 1))
	for c, data := range map[toc.Compression][]byte{toc.None: truth, toc.Gzip: gzipped(truth[:1000], truth[1000:]), toc.Zstd: zstdOf(truth)} {
		f.Add(uint8(c), data, uint32(0), uint32(1000), uint32(500), uint32(2500))
		f.Add(uint8(c), data[:len(data)/2], uint32(10), uint32(20), uint32(2000), uint32(1<<30))
		f.Add(uint8(c), data, uint32(1<<30), uint32(1), uint32(5), uint32(5))
	}
	f.Add(uint8(toc.Zstd), []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58, 0x03, 0x00, 0x10}, uint32(0), uint32(9), uint32(1), uint32(1))
	f.Fuzz(func(t *testing.T, compression uint8, data []byte, inner1, size1, inner2, size2 uint32) {
		c := toc.Compression(compression % 3)
		const limit = 1 << 20
		pieces := []piece{{int64(inner1) % limit, 1 + int64(size1)%limit}, {int64(inner2) % limit, 1 + int64(size2)%limit}}
		if len(data) == 0 {
			return
		}
		var truth []byte
		switch c {
		case toc.None:
			truth = data
		case toc.Gzip:
			if z, err := gzip.NewReader(bytes.NewReader(data)); err == nil {
				truth, _ = io.ReadAll(io.LimitReader(z, 2*limit))
			}
		}
		x, err := spanIndex(t, c, int64(len(data)), truth, pieces)
		if err != nil {
			return
		}
		sink := newSink(x)
		wrong, err := storeSpan(x, data, sink)
		if err != nil {
			t.Fatal(err) // neither the source nor the sink failed
		}
		for j := range x.Chunks() {
			if sink.Missing(j) == (wrong[j] == nil) {
				t.Fatalf("chunk %d: missing is %v, error %v", j, sink.Missing(j), wrong[j])
			}
			ch := x.Chunk(j)
			if end := ch.InnerOffset + ch.Size; c == toc.None && end <= int64(len(truth)) && sink.Missing(j) {
				t.Fatalf("chunk %d of a stored span: %v", j, wrong[j])
			}
		}
	})
}
