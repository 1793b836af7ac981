package tarindex

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"reflect"
	"slices"

	"github.com/klauspost/compress/zstd"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// TOC returns the layer's table of contents. It is computed each time. Errors
// wrap ErrIndex. A nil error promises what package toc says of Entry and Chunk:
// chunks lie inside the blob, apart from each other, and add up to their files.
func (x *Index) TOC() (*toc.TOC, error) {
	r, err := x.replay(nil)
	if err == nil {
		defer r.z.Close()
		err = r.run()
	}
	if err != nil {
		return nil, fmt.Errorf("%w of layer %s: %w", ErrIndex, x.Blob, err)
	}
	t := &toc.TOC{Format: toc.Tar, Compression: x.Compression, Entries: r.w.entries}
	at := 0
	for i := range t.Entries {
		for j := range t.Entries[i].Chunks {
			c := &t.Entries[i].Chunks[j]
			if c.Zero {
				continue
			}
			off := c.InnerOffset
			if x.Compression == toc.None {
				c.BlobOffset, c.BlobEnd, c.InnerOffset = off, off+c.Size, 0
				continue
			}
			for at+1 < x.pointCount() && x.point(at+1).out <= off {
				at++
			}
			p := x.point(at)
			c.BlobOffset, c.BlobEnd, c.InnerOffset = p.in, x.Size, off-p.out
			if at+1 < x.pointCount() {
				c.BlobEnd = x.point(at + 1).in
			}
		}
	}
	return t, nil
}

// Prove puts the tar together again, from the skeleton and the contents that
// read gives, and compares it with the DiffID. read fills p with a content's
// bytes from off on. The error is a *DigestError if the tar is another one.
func (x *Index) Prove(ctx context.Context, read func(content toc.Digest, p []byte, off int64) error) error {
	r, err := x.replay(read)
	if err != nil {
		return fmt.Errorf("%w of layer %s: %w", ErrIndex, x.Blob, err)
	}
	defer r.z.Close()
	r.ctx, r.sum256 = ctx, sha256.New()
	if err := r.run(); err != nil {
		return fmt.Errorf("put layer %s together: %w", x.Blob, err)
	}
	if got := toc.Digest(r.sum256.Sum(nil)); got != x.DiffID {
		return &DigestError{What: "DiffID", Want: x.DiffID, Got: got}
	}
	return nil
}

// A replay is the stream of a tar whose data do not come by, or come from
// elsewhere.
type replay struct {
	x       *Index
	w       *walker
	z       *zstd.Decoder
	seen    int64 // of the skeleton
	off     int64 // in the tar
	point   int   // the next one
	digest  int   // the next one
	content toc.Digest
	read    func(content toc.Digest, p []byte, off int64) error
	ctx     context.Context
	sum256  hash.Hash
}

func (x *Index) replay(read func(toc.Digest, []byte, int64) error) (*replay, error) {
	z, err := zstd.NewReader(bytes.NewReader(x.skeleton), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderMaxMemory(maxSkeleton))
	if err != nil {
		return nil, err
	}
	r := &replay{x: x, z: z, read: read}
	r.w = newWalker(r, false)
	return r, nil
}

func (r *replay) run() error {
	err := r.w.walk()
	switch {
	case err != nil:
		return err
	case r.off != r.x.TarSize || r.seen != r.x.skeletonSize:
		return fmt.Errorf("a tar of %d bytes, of which headers %d, want %d and %d", r.off, r.seen, r.x.TarSize, r.x.skeletonSize)
	case r.digest != len(r.x.digests)/len(toc.Digest{}):
		return fmt.Errorf("%d digests are used, of %d bytes of them", r.digest, len(r.x.digests))
	}
	return nil
}

func (r *replay) skeleton(p []byte) (int, error) {
	n, err := r.z.Read(p)
	r.seen += int64(n)
	r.off += int64(n)
	if r.seen > r.x.skeletonSize || r.off > r.x.TarSize {
		return 0, fmt.Errorf("more than %d bytes of headers", r.x.skeletonSize)
	}
	if r.sum256 != nil {
		r.sum256.Write(p[:n])
	}
	return n, err
}

func (r *replay) payload(p []byte, off int64) (n int, cut bool, err error) {
	left := r.x.TarSize - r.off
	if left <= 0 {
		return 0, false, io.ErrUnexpectedEOF
	}
	for r.point < r.x.pointCount() && r.x.point(r.point).out <= r.off {
		cut = r.x.point(r.point).out == r.off
		r.point++
	}
	if r.point < r.x.pointCount() {
		left = min(left, r.x.point(r.point).out-r.off)
	}
	p = p[:min(left, int64(len(p)))]
	if r.read != nil {
		if err := r.ctx.Err(); err != nil {
			return 0, false, err
		}
		if err := r.read(r.content, p, off); err != nil {
			return 0, false, err
		}
		r.sum256.Write(p)
	}
	r.off += int64(len(p))
	return len(p), cut, nil
}

func (r *replay) begin(*toc.Entry) { r.content, _ = r.next() }

func (r *replay) data([]byte) {}

func (r *replay) end(*toc.Entry) error { return nil }

// next returns the next digest.
func (r *replay) next() (toc.Digest, bool) {
	const size = len(toc.Digest{})
	if (r.digest+1)*size > len(r.x.digests) {
		return toc.Digest{}, false
	}
	return toc.Digest(r.x.digests[r.digest*size:][:size]), true
}

func (r *replay) sum(func() toc.Digest) (toc.Digest, error) {
	d, ok := r.next()
	if !ok || d.IsZero() {
		return d, fmt.Errorf("there is no digest for it")
	}
	r.digest++
	return d, nil
}

// SameFiles returns nil if two indexes say the same of the files of a layer,
// whose blob they may cut differently; else an error that wraps ErrIndex.
func (x *Index) SameFiles(y *Index) error {
	a, err := x.TOC()
	if err != nil {
		return err
	}
	b, err := y.TOC()
	if err != nil {
		return err
	}
	same := func(a, b toc.Entry) bool {
		a.Chunks, b.Chunks = nil, nil
		return reflect.DeepEqual(a, b)
	}
	if !slices.EqualFunc(a.Entries, b.Entries, same) {
		return fmt.Errorf("%w: two indexes of layer %s have other files", ErrIndex, x.Blob)
	}
	return nil
}
