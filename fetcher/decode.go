package fetcher

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"sync"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
	"github.com/klauspost/compress/zstd"
)

const (
	bodyBuffer  = 64 << 10
	firstBuffer = 1 << 20 // of a chunk, before its data have shown that it needs more; what a scratch keeps
)

// windows are what zstd frames may make a decoder keep, by class: small ones,
// 8 MiB, which RFC 8878 asks of every decoder, and the 32 of level 20 of zstd.
// Larger ones are refused.
var windows = [...]int64{1 << 20, 8 << 20, 32 << 20}

// A spanReader gives the bytes of one span out of a body.
type spanReader struct {
	r    *bufio.Reader
	left int64
	err  error // what kept the bytes from coming, as against what is wrong with them
}

func (s *spanReader) Read(p []byte) (int, error) {
	if s.left <= 0 {
		return 0, io.EOF
	}
	n, err := s.r.Read(p[:min(int64(len(p)), s.left)])
	s.left -= int64(n)
	return n, s.fail(err)
}

func (s *spanReader) fail(err error) error {
	if err != nil {
		s.err = noEOF(err)
		return s.err
	}
	return nil
}

// A scratch is what decoding needs and can be used again, as far as it is small.
type scratch struct {
	body *bufio.Reader
	gzip *inflate.Reader
	buf  []byte
	wide bool // allow zstd every window, whatever the first frame says

	checkpoint func(layer int, off int64) (*inflate.Checkpoint, int64, error)
}

// scratch returns one for f, which keep ends.
func (f *Fetcher) scratch() *scratch {
	s := scratches.Get().(*scratch)
	s.checkpoint = f.opts.Checkpoint
	return s
}

var scratches = sync.Pool{New: func() any { return &scratch{body: bufio.NewReaderSize(nil, bodyBuffer)} }}

// What is large is used for one span, under the memory that the span counts
// for: chunks above firstBuffer, and the decoders of each class.
var (
	buffers  sync.Pool // of *[]byte
	decoders [len(windows)]sync.Pool
)

// keep puts s back into the pool.
func (s *scratch) keep() {
	s.body.Reset(nil)
	if s.gzip != nil {
		s.gzip.Reset(nil, inflate.Options{})
	}
	s.wide, s.checkpoint = false, nil
	scratches.Put(s)
}

// class returns which of windows the span ahead needs, by the header of its
// first frame, and how many bytes of it the decoder will use.
func (s *scratch) class(r *spanReader) (class int, bytes int64) {
	raw, _ := r.r.Peek(int(min(zstd.HeaderMaxSize, r.left))) // what is wrong with the body shows when it is read
	var h zstd.Header
	if h.Decode(raw) == nil && !h.Skippable {
		bytes = int64(min(h.WindowSize, 1<<40))
		if h.SingleSegment {
			bytes = int64(min(h.FrameContentSize, 1<<40))
		}
	}
	for class < len(windows)-1 && bytes > windows[class] {
		class++
	}
	if s.wide {
		class, bytes = len(windows)-1, windows[len(windows)-1]
	}
	return class, min(bytes, windows[class])
}

func decoder(class int) (*zstd.Decoder, error) {
	if z, ok := decoders[class].Get().(*zstd.Decoder); ok {
		return z, nil
	}
	// One block at a time, in the caller's goroutine: the cores are kept busy
	// by other bodies. The limit of memory is that of frames of one segment.
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(uint64(windows[class])), zstd.WithDecoderMaxMemory(uint64(windows[class])))
}

// decompress returns a reader of what r, the span at off of a layer's blob,
// decompresses to. done ends its use.
func (s *scratch) decompress(c toc.Compression, layer int, off int64, class int, r io.Reader) (_ io.Reader, done func(), err error) {
	done = func() {}
	switch c {
	case toc.None:
		return r, done, nil
	case toc.Gzip:
		if s.gzip == nil {
			s.gzip = inflate.NewReader(r, inflate.Options{})
		} else {
			s.gzip.Reset(r, inflate.Options{})
		}
		return s.gzip, done, nil
	case toc.Zstd:
		z, err := decoder(class)
		if err != nil {
			return nil, done, err
		}
		done = func() {
			z.Reset(nil)
			decoders[class].Put(z)
		}
		if err := z.Reset(r); err != nil {
			return nil, done, noEOF(err)
		}
		return z, done, nil
	}
	if c == toc.GzipIndexed && s.checkpoint != nil {
		point, size, err := s.checkpoint(layer, off)
		if err != nil {
			return nil, done, err
		}
		if s.gzip == nil {
			s.gzip = inflate.NewReader(nil, inflate.Options{})
		}
		return s.gzip, done, s.gzip.ResetAt(r, point, size)
	}
	return nil, done, errors.New(c.String())
}

// read fills a buffer of n bytes from r. What n says is not allocated before
// data have come for it.
func (s *scratch) read(r io.Reader, n int64) ([]byte, error) {
	if int64(cap(s.buf)) < n {
		// One that is much larger than n would count for less than it is.
		if b, ok := buffers.Get().(*[]byte); ok && int64(cap(*b)) <= max(firstBuffer, 2*n) && cap(*b) > cap(s.buf) {
			s.buf = *b
		} else if int64(cap(s.buf)) < min(n, firstBuffer) {
			s.buf = make([]byte, min(n, firstBuffer))
		}
	}
	s.buf = s.buf[:cap(s.buf)]
	for have := int64(0); ; {
		m, err := io.ReadFull(r, s.buf[have:min(n, int64(len(s.buf)))])
		have += int64(m)
		if have == n {
			return s.buf[:n], nil
		}
		if err != nil {
			return nil, noEOF(err)
		}
		grown := make([]byte, min(n, 2*int64(len(s.buf))))
		copy(grown, s.buf[:have])
		s.buf = grown
	}
}

// shrink gives a large buffer back.
func (s *scratch) shrink() {
	if cap(s.buf) > firstBuffer {
		b := s.buf
		s.buf = nil
		buffers.Put(&b)
	}
}

// A span is a run of chunks that decompress together: the chunks numbered
// [first, end) of the index, the bytes [off, limit) of the layer's blob.
type span struct {
	first, end int
	off, limit int64
}

// spanOf returns the span that chunk is in. The chunk must not be Zero.
func spanOf(x *image.Index, chunk int) span {
	c := x.Chunk(chunk)
	s := span{first: chunk, end: chunk + 1, off: c.BlobOffset, limit: c.BlobEnd}
	same := func(j int) bool {
		d := x.Chunk(j)
		return d.Layer == c.Layer && d.BlobOffset == c.BlobOffset && !d.Zero
	}
	for s.first > 0 && same(s.first-1) {
		s.first--
	}
	for n := x.Chunks(); s.end < n && same(s.end); {
		s.end++
	}
	return s
}

// store decompresses a span from r once, and gives to the sink those of its
// chunks that are missing and have their digest. It returns the chunks that
// are wrong, each with its *DigestError or *DecodeError, or the error that
// keeps it from going on: a *StoreError, r's own or the context's.
// The largest chunk and the decompressor's window count against mem, at most
// all of it.
func store(ctx context.Context, x *image.Index, sp span, r *spanReader, s *scratch, sink Sink, mem chunkMemory) (map[int]error, error) {
	wrong := map[int]error{}
	largest := int64(0)
	for j := sp.first; j < sp.end; j++ {
		if sink.Missing(j) {
			largest = max(largest, x.Chunk(j).Size)
		}
	}
	if largest == 0 {
		return wrong, nil
	}
	c := x.Layers()[x.Chunk(sp.first).Layer].Compression
	class, window := 0, int64(0)
	if c == toc.Zstd {
		class, window = s.class(r)
	}
	weight, err := mem.acquire(ctx, largest+window)
	if err != nil {
		return wrong, err
	}
	defer mem.release(weight)
	defer s.shrink()
	z, done, err := s.decompress(c, x.Chunk(sp.first).Layer, sp.off, class, r)
	defer done()
	pos := int64(0)
	for first, end := sp.first, 0; first < sp.end; first = end {
		// Chunks are in order and apart, or the same bytes (package image).
		c := x.Chunk(first)
		missing := false
		for end = first; end < sp.end && x.Chunk(end).InnerOffset == c.InnerOffset; end++ {
			missing = missing || sink.Missing(end)
		}
		if !missing {
			continue
		}
		if err == nil {
			err = discard(ctx, z, c.InnerOffset-pos)
		}
		if ctx.Err() != nil {
			return wrong, context.Cause(ctx)
		}
		if err == nil {
			var data []byte
			var fatal error
			if data, err = s.read(z, c.Size); err == nil {
				pos = c.InnerOffset + c.Size
				fatal = put(x, first, end, data, sink, wrong)
			}
			if fatal != nil {
				return wrong, fatal
			}
		}
		if r.err != nil {
			return wrong, r.err
		}
		if err != nil {
			for j := first; j < sp.end; j++ {
				if sink.Missing(j) {
					c := x.Chunk(j)
					wrong[j] = &DecodeError{c.Layer, x.Layers()[c.Layer].Digest, j, x.Content(c.Content).Digest, noEOF(err)}
				}
			}
			break
		}
	}
	return wrong, nil
}

// discard reads n bytes from r, which a hostile stream may make of few.
func discard(ctx context.Context, r io.Reader, n int64) error {
	for n > 0 && ctx.Err() == nil {
		m, err := io.CopyN(io.Discard, r, min(n, 1<<20))
		if err != nil {
			return noEOF(err)
		}
		n -= m
	}
	return nil
}

// put checks data, which are the bytes of each of the chunks [first, end), and
// gives them to the sink for those that are missing.
func put(x *image.Index, first, end int, data []byte, sink Sink, wrong map[int]error) error {
	got := image.Digest(sha256.Sum256(data))
	for j := first; j < end; j++ {
		if !sink.Missing(j) {
			continue
		}
		c := x.Chunk(j)
		if got != c.Digest {
			wrong[j] = &DigestError{c.Layer, x.Layers()[c.Layer].Digest, j, x.Content(c.Content).Digest, c.Digest, got}
		} else if err := sink.Put(j, data); err != nil {
			return &StoreError{j, err}
		}
	}
	return nil
}
