package fetcher

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/semaphore"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

const (
	// maxWindow bounds what a zstd frame may make its decoder allocate. 8 MiB
	// is what RFC 8878 asks of decoders; level 20 of zstd needs 32.
	maxWindow = 32 << 20

	bodyBuffer  = 64 << 10
	firstBuffer = 1 << 20 // of a chunk, before its data have shown that it needs more
	keptBuffer  = 8 << 20 // what a scratch may keep
)

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

// ReadByte lets the decompressors do without a buffer of their own.
func (s *spanReader) ReadByte() (byte, error) {
	if s.left <= 0 {
		return 0, io.EOF
	}
	b, err := s.r.ReadByte()
	if err == nil {
		s.left--
	}
	return b, s.fail(err)
}

func (s *spanReader) fail(err error) error {
	if err != nil {
		s.err = noEOF(err)
		return s.err
	}
	return nil
}

// A scratch is what decoding needs and can be used again.
type scratch struct {
	body *bufio.Reader
	gzip *gzip.Reader
	zstd *zstd.Decoder
	buf  []byte
}

var scratches = sync.Pool{New: func() any { return &scratch{body: bufio.NewReaderSize(nil, bodyBuffer)} }}

// keep puts s back into the pool.
func (s *scratch) keep() {
	s.body.Reset(nil)
	if cap(s.buf) > keptBuffer {
		s.buf = nil
	}
	scratches.Put(s)
}

// decompress returns a reader of what r decompresses to.
func (s *scratch) decompress(c toc.Compression, r io.Reader) (io.Reader, error) {
	switch c {
	case toc.None:
		return r, nil
	case toc.Gzip:
		if s.gzip == nil {
			z, err := gzip.NewReader(r)
			if err != nil {
				return nil, noEOF(err)
			}
			s.gzip = z
			return z, nil
		}
		if err := s.gzip.Reset(r); err != nil {
			return nil, noEOF(err)
		}
		return s.gzip, nil
	case toc.Zstd:
		if s.zstd == nil {
			// One block at a time, in the caller's goroutine: the cores are
			// kept busy by other bodies.
			z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
				zstd.WithDecoderMaxWindow(maxWindow))
			if err != nil {
				return nil, err
			}
			s.zstd = z
		}
		if err := s.zstd.Reset(r); err != nil {
			return nil, noEOF(err)
		}
		return s.zstd, nil
	}
	return nil, errors.New(c.String())
}

// read fills a buffer of n bytes from r. What n says is not allocated before
// data have come for it.
func (s *scratch) read(r io.Reader, n int64) ([]byte, error) {
	if int64(cap(s.buf)) < min(n, firstBuffer) {
		s.buf = make([]byte, min(n, firstBuffer))
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
// Bytes of chunks in memory count against mem, at most all of it.
func store(ctx context.Context, x *image.Index, sp span, r *spanReader, s *scratch, sink Sink, mem chunkMemory) (map[int]error, error) {
	wrong := map[int]error{}
	layer := x.Chunk(sp.first).Layer
	z, err := s.decompress(x.Layers()[layer].Compression, r)
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
			weight, merr := mem.acquire(ctx, c.Size)
			if merr != nil {
				return wrong, merr
			}
			var data []byte
			var fatal error
			if data, err = s.read(z, c.Size); err == nil {
				pos = c.InnerOffset + c.Size
				fatal = put(x, first, end, data, sink, wrong)
			}
			if cap(s.buf) > keptBuffer {
				s.buf = nil
			}
			mem.release(weight)
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

// chunkMemory is what store takes the bytes of chunks from.
type chunkMemory interface {
	acquire(ctx context.Context, n int64) (int64, error)
	release(n int64)
}

// A memory bounds the bytes of chunks that are held at once.
type memory struct {
	size int64
	*semaphore.Weighted
}

func newMemory(size int64) *memory { return &memory{size, semaphore.NewWeighted(size)} }

// acquire waits for n bytes; what is more than all of it counts as all.
func (m *memory) acquire(ctx context.Context, n int64) (int64, error) {
	n = min(n, m.size)
	return n, m.Acquire(ctx, n)
}

func (m *memory) release(n int64) { m.Release(n) }
