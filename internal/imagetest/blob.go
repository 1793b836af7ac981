package imagetest

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"maps"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Blob is one layer: its bytes, the descriptor that a manifest has of it
// (media type, digest, size, annotations with the TOC's digest), and the
// digest of the uncompressed tar.
type Blob struct {
	Data   []byte
	Desc   ocispec.Descriptor
	DiffID digest.Digest
}

// Options of the writers. The zero value is right.
type Options struct {
	// ChunkSize is the largest chunk in bytes. 0: the writer's own (4 MiB for
	// EStargz and ZstdChunked, 64 KiB for ContainersZstdChunked).
	ChunkSize int

	// MinChunkSize puts several small files into one gzip member or zstd
	// frame, until it has that many compressed bytes (TOC field innerOffset).
	// EStargz and ZstdChunked only.
	MinChunkSize int

	// Prioritized files come first in the blob, before .prefetch.landmark.
	// None: the blob begins with .no.prefetch.landmark. EStargz and
	// ZstdChunked only.
	Prioritized []string

	// Level of gzip, 1 to 9; 0: 6.
	Level int

	// Workers that compress at once; 0: 1. Their number is part of the result.
	Workers int
}

func newBlob(mediaType string, data []byte, diffID digest.Digest, annotations map[string]string) *Blob {
	return &Blob{
		Data: data, DiffID: diffID,
		Desc: ocispec.Descriptor{
			MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data)), Annotations: annotations,
		},
	}
}

// EStargz makes an eStargz blob of a tar by stargz-snapshotter's writer.
func EStargz(tar []byte, o Options) (*Blob, error) {
	return BuildEStargz(io.NewSectionReader(bytes.NewReader(tar), 0, int64(len(tar))), o)
}

// BuildEStargz is EStargz for a tar that is too large for memory. The blob is
// held in memory all the same.
func BuildEStargz(tar *io.SectionReader, o Options) (*Blob, error) {
	if o.Level == 0 {
		o.Level = 6
	}
	b, err := build(tar, o, ocispec.MediaTypeImageLayerGzip, estargz.WithCompressionLevel(o.Level))
	if err != nil {
		return nil, fmt.Errorf("write eStargz: %w", err)
	}
	return b, nil
}

// ZstdChunked makes a zstd:chunked blob of a tar by stargz-snapshotter's
// writer, which has annotations of its own (io.containers.zstd-chunked.…)
// beside the TOC digest that eStargz has.
func ZstdChunked(tar []byte, o Options) (*Blob, error) {
	metadata := map[string]string{}
	b, err := build(io.NewSectionReader(bytes.NewReader(tar), 0, int64(len(tar))), o, ocispec.MediaTypeImageLayerZstd,
		estargz.WithCompression(stargzZstd{&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: metadata}}))
	if err != nil {
		return nil, fmt.Errorf("write zstd:chunked: %w", err)
	}
	maps.Copy(b.Desc.Annotations, metadata)
	return b, nil
}

type stargzZstd struct{ *zstdchunked.Compressor }

func (stargzZstd) d() *zstdchunked.Decompressor { return new(zstdchunked.Decompressor) }

func (z stargzZstd) Reader(r io.Reader) (io.ReadCloser, error) { return z.d().Reader(r) }
func (z stargzZstd) FooterSize() int64                         { return z.d().FooterSize() }
func (z stargzZstd) ParseFooter(p []byte) (payload, off, size int64, err error) {
	return z.d().ParseFooter(p)
}
func (z stargzZstd) ParseTOC(r io.Reader) (*estargz.JTOC, digest.Digest, error) {
	return z.d().ParseTOC(r)
}

func build(tar *io.SectionReader, o Options, mediaType string, more ...estargz.Option) (*Blob, error) {
	opts := append(more, estargz.WithChunkSize(o.ChunkSize), estargz.WithMinChunkSize(o.MinChunkSize),
		estargz.WithPrioritizedFiles(o.Prioritized), estargz.WithParallelism(max(o.Workers, 1)))
	b, err := estargz.Build(tar, opts...)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(b)
	if closeErr := b.Close(); err == nil {
		err = closeErr
	}
	if err != nil {
		return nil, err
	}
	return newBlob(mediaType, data, b.DiffID(), map[string]string{
		estargz.TOCJSONDigestAnnotation: b.TOCDigest().String(),
	}), nil
}

// LegacyFooter returns the eStargz blob b with the 47-byte footer of the first
// stargz (google/crfs) in place of the 51-byte one.
func LegacyFooter(b *Blob) (*Blob, error) {
	end := len(b.Data) - estargz.FooterSize
	if end < 0 || string(b.Data[end+32:end+38]) != "STARGZ" {
		return nil, fmt.Errorf("write legacy footer: not an eStargz blob")
	}
	// The extra field is the subfield's 22 bytes without its 4-byte header.
	footer := estargz.CreateGzipFooter(b.Data[end+16 : end+38])
	data := append(bytes.Clone(b.Data[:end]), footer...)
	return newBlob(b.Desc.MediaType, data, b.DiffID, maps.Clone(b.Desc.Annotations)), nil
}

// Gzip makes an ordinary gzip layer of a tar: it has no TOC.
func Gzip(tar []byte) (*Blob, error) {
	return buildGzip(bytes.NewReader(tar), gzip.DefaultCompression)
}

// BuildGzip is Gzip, compressing fast, for a tar that is too large for memory.
// The blob is held in memory all the same.
func BuildGzip(tar *io.SectionReader) (*Blob, error) { return buildGzip(tar, gzip.BestSpeed) }

func buildGzip(tar io.Reader, level int) (*Blob, error) {
	var b bytes.Buffer
	sum := digest.Canonical.Digester()
	w, err := gzip.NewWriterLevel(&b, level)
	if err == nil {
		_, err = io.Copy(io.MultiWriter(w, sum.Hash()), tar)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("write gzip: %w", err)
	}
	return newBlob(ocispec.MediaTypeImageLayerGzip, b.Bytes(), sum.Digest(), nil), nil
}
