package tarindex

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
)

// A Layer is what is promised of a layer.
type Layer struct {
	Blob   toc.Digest
	Size   int64      // of the blob, in bytes
	DiffID toc.Digest // zero: not known
}

const (
	pieceSize  = 256 << 10
	piecesKept = 6 // between two goroutines
)

// A piece is bytes that go from one goroutine to the next.
type piece struct {
	p   []byte
	cut bool // a span begins with it
}

// Build reads a layer from r, from its first byte to its last, gives the files'
// contents to store as they come (nil: they are only looked at), and returns the layer's index. Two
// goroutines more are at it, and end before it does. Errors wrap ErrLayer if
// the bytes are no layer, are *DigestError if they are another's than l's, or
// are r's or the context's.
//
// A nil error promises that the blob has the digest and size, and the tar the
// DiffID, of l.
func Build(ctx context.Context, r io.Reader, l Layer, store Store) (*Index, error) {
	x, err := build(ctx, r, l, store)
	if err != nil {
		return nil, fmt.Errorf("read layer %s: %w", l.Blob, err)
	}
	return x, nil
}

func build(ctx context.Context, r io.Reader, l Layer, store Store) (*Index, error) {
	g, ctx := errgroup.WithContext(ctx)
	blob := newPipe(ctx)
	plain := newPipe(ctx)
	sum := sha256.New()
	total := int64(0)
	g.Go(func() error {
		err := blob.feed(&counted{r: r, h: sum, n: &total}, l.Size)
		blob.close(err)
		return err
	})
	d := &decoder{in: blob, out: plain}
	g.Go(func() error {
		err := d.run()
		if err == nil {
			// What follows, for its digest.
			_, err = io.Copy(io.Discard, struct{ io.Reader }{blob})
		}
		plain.close(err)
		return err
	})
	live := newLive(plain, store)
	w := newWalker(live, true)
	g.Go(func() error {
		err := w.walk()
		live.abort()
		if err != nil && ctx.Err() == nil && !errors.Is(err, ErrLayer) && live.readErr == nil {
			err = fmt.Errorf("%w: %w", ErrLayer, err)
		}
		return err
	})
	err := g.Wait()
	if got := toc.Digest(sum.Sum(nil)); got != l.Blob && total == l.Size {
		return nil, &DigestError{What: "blob", Want: l.Blob, Got: got} // whatever else is wrong follows from it
	}
	if err != nil {
		return nil, err
	}
	diffID := toc.Digest(live.sum256.Sum(nil))
	if !l.DiffID.IsZero() && diffID != l.DiffID {
		return nil, &DigestError{What: "DiffID", Want: l.DiffID, Got: diffID}
	}
	skeleton, err := live.finish()
	if err != nil {
		return nil, err
	}
	b, err := encode(&header{
		compression: d.compression, blob: l.Blob, size: l.Size, diffID: diffID, tarSize: w.off, skeletonSize: live.bytes,
	}, d.points, live.digests, skeleton)
	if err != nil {
		return nil, err
	}
	return Open(b)
}

// counted hashes and counts what is read.
type counted struct {
	r io.Reader
	h hash.Hash
	n *int64
}

func (c *counted) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.h.Write(p[:n])
	*c.n += int64(n)
	return n, err
}

// A pipe hands pieces from one goroutine to another.
type pipe struct {
	ctx  context.Context
	full chan piece
	free chan []byte
	err  error // set before full is closed

	// The reader's:
	cur    piece
	rest   []byte // of cur
	failed error  // why no more comes, if that is not the end
}

func newPipe(ctx context.Context) *pipe {
	p := &pipe{ctx: ctx, full: make(chan piece, piecesKept), free: make(chan []byte, piecesKept)}
	for range piecesKept {
		p.free <- nil
	}
	return p
}

// buffer returns an empty one.
func (p *pipe) buffer() ([]byte, error) {
	select {
	case b := <-p.free:
		if b == nil {
			b = make([]byte, pieceSize)
		}
		return b[:0], nil
	case <-p.ctx.Done():
		return nil, context.Cause(p.ctx)
	}
}

func (p *pipe) send(b []byte, cut bool) error {
	select {
	case p.full <- piece{b, cut}:
		return nil
	case <-p.ctx.Done():
		return context.Cause(p.ctx)
	}
}

// write sends a copy of b.
func (p *pipe) write(b []byte, cut bool) error {
	for len(b) > 0 {
		buf, err := p.buffer()
		if err != nil {
			return err
		}
		n := copy(buf[:pieceSize], b)
		if err := p.send(buf[:n], cut); err != nil {
			return err
		}
		b, cut = b[n:], false
	}
	return nil
}

// feed sends the size bytes that r has.
func (p *pipe) feed(r io.Reader, size int64) error {
	for size > 0 {
		buf, err := p.buffer()
		if err != nil {
			return err
		}
		n, err := io.ReadFull(r, buf[:min(pieceSize, size)])
		size -= int64(n)
		if n > 0 {
			if serr := p.send(buf[:n], false); serr != nil {
				return serr
			}
		} else {
			p.free <- buf
		}
		if err != nil {
			return noEOF(err)
		}
	}
	return nil
}

// close ends the pipe for its reader, with an error or io.EOF.
func (p *pipe) close(err error) {
	p.err = err
	close(p.full)
}

// next gives what is left of the current piece, or the next one. cut says that
// a span begins with it.
func (p *pipe) next() (b []byte, cut bool, err error) {
	if len(p.rest) > 0 {
		return p.rest, false, nil
	}
	if p.cur.p != nil {
		p.free <- p.cur.p
		p.cur.p = nil
	}
	var ok bool
	select {
	case p.cur, ok = <-p.full:
	case <-p.ctx.Done():
		p.failed = context.Cause(p.ctx)
		return nil, false, p.failed
	}
	if !ok {
		if p.failed = p.err; p.failed != nil {
			return nil, false, p.failed
		}
		return nil, false, io.EOF
	}
	p.rest = p.cur.p
	return p.rest, p.cur.cut, nil
}

// take reads from the current piece.
func (p *pipe) take(b []byte) (n int, cut bool, err error) {
	from, cut, err := p.next()
	n = copy(b, from)
	p.rest = p.rest[n:]
	return n, cut, err
}

func (p *pipe) Read(b []byte) (int, error) {
	n, _, err := p.take(b)
	return n, err
}

// A decoder decompresses one layer, and notes its points.
type decoder struct {
	in, out     *pipe
	compression toc.Compression
	points      []point
	packed      int // bytes of the points' windows
	windows     packer
}

func (d *decoder) run() error {
	var magic [4]byte
	n, err := io.ReadFull(d.in, magic[:])
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return err
	}
	in := io.MultiReader(bytes.NewReader(magic[:n]), d.in)
	m := uint32(magic[0]) | uint32(magic[1])<<8 | uint32(magic[2])<<16 | uint32(magic[3])<<24
	switch {
	case magic[0] == 0x1f && magic[1] == 0x8b: // RFC 1952
		d.compression = toc.GzipIndexed
		err = d.gzip(in)
	case m == zstdMagic || m&^15 == skipMagic:
		d.compression = toc.Zstd
		err = d.zstd(in)
	default:
		d.compression = toc.None
		for err = nil; err == nil; {
			var p []byte
			if p, err = d.out.buffer(); err == nil {
				n, err = in.Read(p[:pieceSize])
				if n > 0 {
					if serr := d.out.send(p[:n], false); serr != nil {
						return serr
					}
				} else {
					d.out.free <- p
				}
			}
		}
		if err == io.EOF {
			err = nil
		}
	}
	switch {
	case err == nil:
	case d.in.failed != nil:
		err = d.in.failed // what does not come is no fault of what came
	case errors.Is(err, inflate.ErrCorrupt), errors.Is(err, inflate.ErrChecksum), errors.Is(err, inflate.ErrTooLarge), err == io.ErrUnexpectedEOF:
		err = fmt.Errorf("%w: %w", ErrLayer, err)
	}
	return err
}

func (d *decoder) gzip(in io.Reader) error {
	var perr error
	z := inflate.NewReader(in, inflate.Options{Span: MaxSpan, MaxOutput: maxTar, Checkpoint: func(c *inflate.Checkpoint) {
		if perr == nil {
			perr = d.add(point{in: c.In, out: c.Out, gzip: c})
		}
	}})
	for {
		p, cut, err := z.Next()
		if len(p) > 0 {
			if err := d.out.write(p, cut); err != nil {
				return err
			}
		}
		if perr != nil {
			return perr
		}
		if err == io.EOF {
			return d.drop(z.OutputOffset())
		}
		if err != nil {
			return err
		}
	}
}

// add notes a point, with its window packed: there may be thousands.
func (d *decoder) add(p point) error {
	if len(d.points) == maxPoints {
		return fmt.Errorf("%w: more than %d spans", ErrLayer, maxPoints)
	}
	if p.gzip != nil {
		p.packed, p.window, p.lengths = d.windows.pack(p.gzip), len(p.gzip.Window), len(p.gzip.Lengths)
		p.gzip.Window, p.gzip.Lengths = nil, nil
		if d.packed += len(p.packed); d.packed > MaxIndex {
			return fmt.Errorf("%w: an index of more than %d bytes", ErrLayer, MaxIndex)
		}
	}
	d.points = append(d.points, p)
	return nil
}

// drop takes away a point at the tar's end, from which nothing can be read.
func (d *decoder) drop(end int64) error {
	for n := len(d.points); n > 1 && d.points[n-1].out >= end; n-- {
		d.points = d.points[:n-1]
	}
	return nil
}

func (d *decoder) zstd(in io.Reader) error {
	f := &frames{r: newBuffered(in)}
	z, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxTar))
	if err != nil {
		return err
	}
	defer z.Close()
	out, last := int64(0), int64(-minFrames)
	for {
		start, err := f.next()
		if err == io.EOF {
			return d.drop(out)
		}
		if err != nil {
			return err
		}
		cut := out-last >= minFrames
		if cut {
			if err := d.add(point{in: start, out: out}); err != nil {
				return err
			}
			last = out
		}
		if err := z.Reset(f); err != nil {
			return zstdError(err)
		}
		for {
			p, err := d.out.buffer()
			if err != nil {
				return err
			}
			n := 0
			for n < pieceSize && err == nil { // io.ErrUnexpectedEOF of z is an error
				var m int
				m, err = z.Read(p[n:pieceSize])
				n += m
			}
			if n > 0 {
				out += int64(n)
				if serr := d.out.send(p[:n], cut); serr != nil {
					return serr
				}
				cut = false
			} else {
				d.out.free <- p
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				return zstdError(err)
			}
			if out > maxTar {
				return fmt.Errorf("%w: more than %d bytes", ErrLayer, int64(maxTar))
			}
		}
	}
}

func zstdError(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrLayer, err)
}

// A live stream is that of a layer which comes by.
type live struct {
	in      *pipe
	store   Store
	sum256  hash.Hash // of the tar
	z       *zstd.Encoder
	packed  bytes.Buffer
	bytes   int64 // of the skeleton
	digests []toc.Digest
	readErr error // of in

	small []byte
	file  File
}

func newLive(in *pipe, store Store) *live {
	l := &live{in: in, store: store, sum256: sha256.New()}
	l.z, _ = zstd.NewWriter(&l.packed, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithEncoderCRC(false))
	return l
}

func (l *live) skeleton(p []byte) (int, error) {
	n, _, err := l.in.take(p)
	if n > 0 {
		l.sum256.Write(p[:n])
		if l.bytes += int64(n); l.bytes > maxSkeleton {
			return n, fmt.Errorf("%w: more than %d bytes of headers", ErrLayer, maxSkeleton)
		}
		if _, err := l.z.Write(p[:n]); err != nil {
			return n, err
		}
	}
	return n, l.note(err)
}

func (l *live) note(err error) error {
	if err != nil && err != io.EOF {
		l.readErr = err
	}
	return err
}

func (l *live) payload(p []byte, _ int64) (int, bool, error) {
	n, cut, err := l.in.take(p)
	l.sum256.Write(p[:n])
	return n, cut, l.note(err)
}

func (l *live) begin(e *toc.Entry) {
	if l.store == nil {
		return
	}
	if e.Size <= SmallFile {
		l.small = make([]byte, 0, e.Size)
	} else {
		l.file = l.store.Create(e.Size)
	}
}

func (l *live) data(p []byte) {
	if l.file != nil {
		l.file.Write(p)
	} else if l.store != nil {
		l.small = append(l.small, p...)
	}
}

func (l *live) end(e *toc.Entry) error {
	if l.file != nil {
		l.file.Commit(e.Digest)
		l.file = nil
	} else if l.store != nil {
		l.store.Put(e.Digest, l.small)
		l.small = nil
	}
	return nil
}

// abort ends what was under way when reading failed.
func (l *live) abort() {
	if l.file != nil {
		l.file.Abort()
		l.file = nil
	}
}

func (l *live) sum(got func() toc.Digest) (toc.Digest, error) {
	d := got()
	l.digests = append(l.digests, d)
	return d, nil
}

func (l *live) finish() ([]byte, error) {
	err := l.z.Close()
	return l.packed.Bytes(), err
}
