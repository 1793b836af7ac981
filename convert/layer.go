package convert

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/image/zstdchunked"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// Of eStargz's writer. It cuts the tar into as many parts as it has workers,
// at a gzip member each, so that their number is part of the result.
const (
	gzipLevel      = 6
	estargzWorkers = 4
)

// maxWindow is the largest window of a zstd layer, in bytes.
const maxWindow = 128 << 20

// isLayer reports whether the media type is that of a tar, OCI's or docker's.
func isLayer(mediaType string) bool {
	switch strings.TrimSuffix(strings.TrimSuffix(mediaType, "+gzip"), "+zstd") {
	case ocispec.MediaTypeImageLayer, "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.gzip",
		"application/vnd.docker.image.rootfs.diff.tar.zstd":
		return true
	}
	return false
}

// A layerResult is a layer that is at the target.
type layerResult struct {
	desc   ocispec.Descriptor
	diffID digest.Digest

	// For the sealed digest only:
	layer  image.Layer
	verity map[image.Digest]image.Digest // of each content
}

type layerKey struct {
	blob    digest.Digest
	profile *image.Profile
}

// A layerJob is done once for all images that have the layer.
type layerJob struct {
	done   chan struct{}
	result *layerResult
	err    error
}

func (c *converter) layer(ctx context.Context, d ocispec.Descriptor, diffID digest.Digest, profile *image.Profile) (*layerResult, error) {
	if !isLayer(d.MediaType) {
		return nil, hint.Wrap(errors.New("no layer that can be converted"), "layers must be tars, as they are, with gzip or with zstd, and be in the registry themselves")
	}
	key := layerKey{d.Digest, profile}
	c.mu.Lock()
	j, ok := c.layers[key]
	if !ok {
		j = &layerJob{done: make(chan struct{})}
		c.layers[key] = j
	}
	c.mu.Unlock()
	if !ok {
		c.tell(Event{Found: d.Size})
		j.result, j.err = c.convertLayer(ctx, d, diffID, profile)
		close(j.done)
	}
	select {
	case <-j.done:
		if ok && errors.Is(j.err, context.Canceled) {
			// The image that began it has failed, and says why; that ends this one.
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		return j.result, j.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (c *converter) convertLayer(ctx context.Context, d ocispec.Descriptor, diffID digest.Digest, profile *image.Profile) (*layerResult, error) {
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	plain, err := temporary()
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	size, err := c.unpack(ctx, d, diffID, plain)
	if err != nil {
		return nil, err
	}
	a, err := scan(ctx, plain, size, profile != nil || c.o.Seal, c.o.Seal)
	if err != nil {
		return nil, fmt.Errorf("read the tar: %w", err)
	}
	first := a.wanted(profile)
	blob, err := temporary()
	if err != nil {
		return nil, err
	}
	defer blob.Close()
	r := &layerResult{verity: a.verity}
	if c.o.Format == ZstdChunked {
		err = r.zstdChunked(ctx, blob, a, first)
	} else {
		err = r.estargz(ctx, blob, a, first)
	}
	if err != nil {
		return nil, err
	}
	// What our own reader does not take was not written.
	t, err := toc.Read(blob, r.desc.Size, toc.Options{Annotations: r.desc.Annotations})
	if err != nil {
		return nil, fmt.Errorf("read what was written: %w", err)
	}
	if c.o.Seal {
		sum, err := toc.ParseDigest(r.desc.Digest.String())
		if err != nil {
			return nil, err
		}
		r.layer = image.Layer{Digest: sum, Size: r.desc.Size, TOC: t}
	}
	if err := c.to.Put(ctx, r.desc, blob); err != nil {
		return nil, err
	}
	c.tell(Event{Layer: &Layer{Source: d, Result: r.desc, DiffID: r.diffID, Prioritized: len(first)}})
	return r, nil
}

// temporary makes a file that has no name any more.
func temporary() (*os.File, error) {
	f, err := os.CreateTemp("", "cfs-fuse-convert-*")
	if err != nil {
		return nil, fmt.Errorf("make a temporary file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("make a temporary file: %w", err)
	}
	return f, nil
}

// withSpace adds what to do about a full disk.
func withSpace(err error) error {
	return hint.Wrap(err, "is there room in "+os.TempDir()+"? TMPDIR names another folder; it has to hold the layers unpacked")
}

// unpack reads a layer's blob and writes the tar in it to f. A nil error
// promises that blob and tar have their digests.
func (c *converter) unpack(ctx context.Context, d ocispec.Descriptor, diffID digest.Digest, f *os.File) (size int64, err error) {
	if d.Size <= 0 {
		return 0, fmt.Errorf("a blob of %d bytes", d.Size)
	}
	body, err := c.src.Blob(d).ReadRange(ctx, 0, d.Size)
	if err != nil {
		return 0, err
	}
	defer body.Close()
	blobSum, tarSum := digest.SHA256.Digester(), digest.SHA256.Digester()
	in := bufio.NewReaderSize(io.TeeReader(&reporter{c, body}, blobSum.Hash()), 256<<10)
	tarball, done, err := decompress(in)
	if err != nil {
		return 0, fmt.Errorf("decompress: %w", err)
	}
	defer done()
	out := &fileWriter{f: f}
	if size, err = io.Copy(io.MultiWriter(out, tarSum.Hash()), tarball); err != nil {
		if out.err != nil {
			return 0, withSpace(fmt.Errorf("write the unpacked layer: %w", err))
		}
		return 0, fmt.Errorf("decompress: %w", err)
	}
	if _, err := io.Copy(io.Discard, in); err != nil {
		return 0, err
	}
	if got := blobSum.Digest(); got != d.Digest {
		return 0, hint.Wrap(fmt.Errorf("the blob's digest is %s", got), "do not trust this source, or the way to it")
	}
	if got := tarSum.Digest(); got != diffID {
		return 0, hint.Wrap(fmt.Errorf("the tar's digest is %s, the config's DiffID %s", got, diffID), "the image is malformed; build it anew")
	}
	return size, nil
}

// decompress finds out by the first bytes how r is compressed.
func decompress(r *bufio.Reader) (_ io.Reader, done func(), err error) {
	magic, err := r.Peek(4)
	if err != nil && len(magic) < 2 {
		return nil, nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}): // RFC 1952
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, nil, err
		}
		return z, func() { z.Close() }, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}), // RFC 8878
		len(magic) == 4 && magic[0]&0xf0 == 0x50 && bytes.Equal(magic[1:], []byte{0x2a, 0x4d, 0x18}):
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return r, func() {}, nil
}

// A reporter tells how much of a layer has been read.
type reporter struct {
	c *converter
	r io.Reader
}

func (r *reporter) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if n > 0 {
		r.c.tell(Event{Read: int64(n)})
	}
	return n, err
}

// A fileWriter remembers that it was the file that failed.
type fileWriter struct {
	f   *os.File
	err error
}

func (w *fileWriter) Write(p []byte) (int, error) {
	n, err := w.f.Write(p)
	if err != nil {
		w.err = err
	}
	return n, err
}

// A contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}

// A contextReaderAt ends with its context.
type contextReaderAt struct {
	ctx context.Context
	r   io.ReaderAt
}

func (c *contextReaderAt) ReadAt(p []byte, off int64) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.ReadAt(p, off)
}

func (r *layerResult) zstdChunked(ctx context.Context, blob *os.File, a *archive, first []string) error {
	tarball, err := a.ordered(first)
	if err != nil {
		return err
	}
	out := &fileWriter{f: blob}
	w, err := zstdchunked.Write(ctx, out, tarball, runtime.GOMAXPROCS(0))
	if err != nil {
		if out.err != nil {
			err = withSpace(err)
		}
		return err
	}
	r.desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: w.Digest, Size: w.Size, Annotations: w.Annotations}
	r.diffID = w.DiffID
	return nil
}

// estargz writes an eStargz layer: without files to put first by Build, which
// compresses parts of the tar side by side; else by a Writer, in our own order, as
// Build puts no file first whose folders have no entries in the layer.
func (r *layerResult) estargz(ctx context.Context, blob *os.File, a *archive, first []string) error {
	out := &fileWriter{f: blob}
	sum := digest.SHA256.Digester()
	w := &countingWriter{w: io.MultiWriter(out, sum.Hash())}
	var toc digest.Digest
	var err error
	if len(first) > 0 {
		toc, err = writeEStargz(ctx, w, a, first)
	} else {
		toc, err = buildEStargz(ctx, w, a)
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			return cause
		}
		if err = fmt.Errorf("write eStargz: %w", err); out.err != nil || errors.Is(err, unix.ENOSPC) {
			err = withSpace(err)
		}
		return err
	}
	// What any gzip tool makes of it is the layer's tar.
	plain := digest.SHA256.Digester()
	z, err := gzip.NewReader(bufio.NewReaderSize(io.NewSectionReader(blob, 0, w.n), 256<<10))
	var size int64
	if err == nil {
		size, err = io.Copy(plain.Hash(), &contextReader{ctx, z})
	}
	if err != nil {
		return fmt.Errorf("read what was written: %w", err)
	}
	r.desc = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: sum.Digest(), Size: w.n, Annotations: map[string]string{
		estargz.TOCJSONDigestAnnotation:         toc.String(),
		estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(size, 10),
	}}
	r.diffID = plain.Digest()
	return nil
}

func writeEStargz(ctx context.Context, out io.Writer, a *archive, first []string) (toc digest.Digest, err error) {
	tarball, err := a.ordered(first)
	if err != nil {
		return "", err
	}
	w := estargz.NewWriterLevel(out, gzipLevel)
	if err := w.AppendTar(&contextReader{ctx, tarball}); err != nil {
		return "", err
	}
	return w.Close()
}

func buildEStargz(ctx context.Context, out io.Writer, a *archive) (toc digest.Digest, err error) {
	// Not by WithContext: ended by that, Build leaves temporary files.
	in := &contextReaderAt{ctx, a.f}
	b, err := estargz.Build(io.NewSectionReader(in, 0, a.size), estargz.WithCompressionLevel(gzipLevel), estargz.WithParallelism(estargzWorkers))
	if err != nil {
		return "", err
	}
	if _, err = io.Copy(out, b); err != nil {
		io.Copy(io.Discard, b) // else Build waits for its reader for ever
	}
	return b.TOCDigest(), errors.Join(err, b.Close())
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
