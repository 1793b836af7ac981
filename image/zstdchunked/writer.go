// Package zstdchunked writes layers as zstd:chunked: a tar in zstd frames of
// which each file's chunks can be read by themselves, with a table of contents.
// It reads none (package toc does), and knows no images.
//
//	header ┃ chunk ┃ chunk ┃ … ┃ header ┃ …   zstd frames: together the tar
//	TOC                                        in a skippable frame, compressed
//	tar-split                                  in a skippable frame, compressed
//	footer                                     in a skippable frame, 40 bytes
//
// The TOC is JSON, of eStargz's form (stargz-snapshotter, docs/estargz.md) with
// the fields that containers/storage adds (pkg/chunked, internal/minimal):
// endOffset, chunkType, tarSplitDigest. tar-split (github.com/vbatts/tar-split) is what of the
// tar is not content, so that Podman can make the tar again from an unpacked
// tree. Both are found by annotations of the layer's descriptor. The footer is
// stargz-snapshotter's, who has no annotation for it: offset, compressed and
// uncompressed length of the TOC, type 1, all little-endian uint64, then "GnUlInUx".
package zstdchunked

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
)

// Annotations of the layer's descriptor (containers/storage, internal/minimal).
const (
	annotationChecksum = "io.github.containers.zstd-chunked.manifest-checksum"
	annotationPosition = "io.github.containers.zstd-chunked.manifest-position"
	annotationTarSplit = "io.github.containers.zstd-chunked.tarsplit-position"
)

// Limits: entries and chunks of one layer, which are kept in memory until its
// end, and what a skippable frame can hold (RFC 8878, 3.1.2).
const (
	maxEntries   = 4 << 20
	maxSkippable = 1<<32 - 1
)

// A Result describes a layer that was written.
type Result struct {
	Digest, DiffID digest.Digest // of the blob and of the tar in it
	Size, TarSize  int64         // in bytes

	// Annotations that the layer's descriptor must have, for the TOC to be
	// found and believed.
	Annotations map[string]string
}

// ErrSparse says that a tar holds a sparse file, of which it has less than the
// tree will.
var ErrSparse = errors.New("a sparse file")

// entry is an element of the TOC's "entries".
type entry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	Linkname    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	Size        int64             `json:"size,omitempty"`
	UID         int               `json:"uid,omitempty"`
	GID         int               `json:"gid,omitempty"`
	ModTime     *time.Time        `json:"modtime,omitempty"`
	AccessTime  *time.Time        `json:"accesstime,omitempty"`
	ChangeTime  *time.Time        `json:"changetime,omitempty"`
	Devmajor    int64             `json:"devMajor,omitempty"`
	Devminor    int64             `json:"devMinor,omitempty"`
	Xattrs      map[string][]byte `json:"xattrs,omitempty"`
	Digest      string            `json:"digest,omitempty"`
	Offset      int64             `json:"offset,omitempty"`
	EndOffset   int64             `json:"endOffset,omitempty"`
	ChunkSize   int64             `json:"chunkSize,omitempty"`
	ChunkOffset int64             `json:"chunkOffset,omitempty"`
	ChunkDigest string            `json:"chunkDigest,omitempty"`
	ChunkType   string            `json:"chunkType,omitempty"`
}

var types = map[byte]string{
	tar.TypeReg: "reg", tar.TypeLink: "hardlink", tar.TypeChar: "char", tar.TypeBlock: "block",
	tar.TypeDir: "dir", tar.TypeFifo: "fifo", tar.TypeSymlink: "symlink",
}

// Write writes the tar that from gives as a layer to w, compressing with as
// many threads as workers says (at least 1), which is not part of the result:
// the same tar gives the same bytes. What is held in memory grows with the number of files,
// not with their size.
func Write(ctx context.Context, w io.Writer, from io.Reader, workers int) (*Result, error) {
	r, err := write(ctx, w, from, max(workers, 1))
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("write zstd:chunked: %w", err)
	}
	return r, nil
}

func write(ctx context.Context, w io.Writer, from io.Reader, workers int) (*Result, error) {
	diffID := digest.SHA256.Digester()
	counted := &counter{w: diffID.Hash()}
	split := newTarSplit()
	stream, splitDone, err := asm.NewInputTarStreamWithDone(io.TeeReader(from, counted), split.packer, nil)
	if err != nil {
		return nil, err
	}
	p, err := newPipeline(ctx, w, workers)
	if err != nil {
		stream.Close()
		<-splitDone
		return nil, err
	}
	t := &tarReader{p: p, in: stream}
	err = t.read()
	stream.Close()
	if splitErr := <-splitDone; err == nil {
		err = splitErr
	}
	if perr := p.finish(); perr != nil {
		err = perr // the cause, if reading was only told to stop
	}
	if err != nil {
		return nil, err
	}
	annotations, err := t.trailer(split)
	if err != nil {
		return nil, err
	}
	return &Result{
		Digest: p.sum.Digest(), Size: p.n, DiffID: diffID.Digest(), TarSize: counted.n, Annotations: annotations,
	}, nil
}

// A tarReader reads the tar and hands its parts to the pipeline.
type tarReader struct {
	p       *pipeline
	in      io.Reader
	between []byte // bytes of the tar that are no content, not handed on yet
	content bool   // what is read now is content
	entries []entry
	refs    []ref // of each entry: what the pipeline will know of it
	cut     cutter
}

// A ref leads from an entry to its chunk in the pipeline.
type ref struct {
	chunk *segment
	last  *segment // of the file, for the first entry of a file
}

// Read gives the tar's bytes to archive/tar, and keeps what is no content.
func (t *tarReader) Read(b []byte) (int, error) {
	n, err := t.in.Read(b)
	if t.content {
		return n, err
	}
	t.between = append(t.between, b[:n]...)
	if len(t.between) >= maxChunk {
		if err := t.flush(); err != nil {
			return n, err
		}
	}
	return n, err
}

// flush hands on what lies between contents.
func (t *tarReader) flush() error {
	if len(t.between) == 0 {
		return nil
	}
	_, err := t.p.add(t.between, false)
	t.between = t.between[:0]
	return err
}

func (t *tarReader) read() error {
	tr := tar.NewReader(t) // reads no further than it must
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("read the tar: %w", err)
		}
		if err := t.entry(tr, h); err != nil {
			return fmt.Errorf("tar entry %q: %w", h.Name, err)
		}
	}
	buf := make([]byte, 64<<10)
	for {
		_, err := t.Read(buf)
		if err == io.EOF {
			return t.flush()
		}
		if err != nil {
			return fmt.Errorf("read the tar's end: %w", err)
		}
	}
}

func (t *tarReader) entry(tr *tar.Reader, h *tar.Header) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil // no file, and what it says is in the headers after it
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse") {
			return ErrSparse
		}
	}
	if h.Typeflag == tar.TypeGNUSparse {
		return ErrSparse
	}
	typ, ok := types[h.Typeflag]
	if !ok {
		return fmt.Errorf("type %q is not known", h.Typeflag)
	}
	if len(t.entries) >= maxEntries {
		return fmt.Errorf("more than %d entries and chunks in a layer", maxEntries)
	}
	e := entry{
		Type: typ, Name: h.Name, Linkname: h.Linkname, Mode: h.Mode, UID: h.Uid, GID: h.Gid,
		ModTime: known(h.ModTime), AccessTime: known(h.AccessTime), ChangeTime: known(h.ChangeTime),
		Devmajor: h.Devmajor, Devminor: h.Devminor,
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			if e.Xattrs == nil {
				e.Xattrs = map[string][]byte{}
			}
			e.Xattrs[name] = []byte(v)
		}
	}
	first := len(t.entries)
	t.entries, t.refs = append(t.entries, e), append(t.refs, ref{})
	if typ != "reg" || h.Size == 0 {
		return nil
	}
	t.entries[first].Size = h.Size
	if err := t.flush(); err != nil {
		return err
	}
	t.content = true
	defer func() { t.content = false }()
	return t.chunks(tr, first, h.Size)
}

// chunks cuts the content of the file whose entry is first.
func (t *tarReader) chunks(tr *tar.Reader, first int, size int64) error {
	sum := digest.SHA256.Digester()
	t.cut.reset(io.TeeReader(tr, sum.Hash()))
	off := int64(0)
	for off < size {
		b, zeros, err := t.cut.next()
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		i := first
		if off > 0 {
			if i = len(t.entries); i >= maxEntries {
				return fmt.Errorf("more than %d entries and chunks in a layer", maxEntries)
			}
			t.entries = append(t.entries, entry{Type: "chunk", Name: t.entries[first].Name, ChunkOffset: off})
			t.refs = append(t.refs, ref{})
		}
		t.entries[i].ChunkSize = int64(len(b))
		if zeros {
			t.entries[i].ChunkType = "zeros"
		}
		if t.refs[i].chunk, err = t.p.add(b, true); err != nil {
			return err
		}
		t.refs[first].last = t.refs[i].chunk
		off += int64(len(b))
	}
	t.entries[first].Digest = sum.Digest().String()
	return nil
}

func known(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC() // archive/tar gives the time zone of the machine
	return &t
}

// trailer writes TOC, tar-split and footer after the tar.
func (t *tarReader) trailer(split *tarSplit) (map[string]string, error) {
	for i := range t.entries {
		if c := t.refs[i].chunk; c != nil {
			t.entries[i].Offset = c.offset
			t.entries[i].ChunkDigest = c.digest.String()
		}
		if l := t.refs[i].last; l != nil {
			t.entries[i].EndOffset = l.end
		}
	}
	if err := split.close(); err != nil {
		return nil, err
	}
	text, err := json.Marshal(struct {
		Version        int           `json:"version"`
		Entries        []entry       `json:"entries"`
		TarSplitDigest digest.Digest `json:"tarSplitDigest"`
	}{1, t.entries, digest.FromBytes(split.compressed.Bytes())})
	if err != nil {
		return nil, err
	}
	toc := t.p.enc.EncodeAll(text, nil)
	off, err := t.p.skippable(toc)
	if err != nil {
		return nil, fmt.Errorf("table of contents: %w", err)
	}
	splitOff, err := t.p.skippable(split.compressed.Bytes())
	if err != nil {
		return nil, fmt.Errorf("tar-split: %w", err)
	}
	var footer []byte
	for _, n := range []int64{off, int64(len(toc)), int64(len(text)), 1} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	if _, err := t.p.skippable(append(footer, "GnUlInUx"...)); err != nil {
		return nil, err
	}
	return map[string]string{
		annotationChecksum: digest.FromBytes(toc).String(),
		annotationPosition: fmt.Sprintf("%d:%d:%d:1", off, len(toc), len(text)),
		annotationTarSplit: fmt.Sprintf("%d:%d:%d", splitOff, split.compressed.Len(), split.raw.n),
	}, nil
}

// tarSplit gathers tar-split's data, compressed.
type tarSplit struct {
	compressed bytes.Buffer
	enc        *zstd.Encoder
	raw        *counter
	packer     storage.Packer
}

func newTarSplit() *tarSplit {
	s := &tarSplit{}
	// With valid options, as these are, it cannot fail.
	s.enc, _ = zstd.NewWriter(&s.compressed, zstd.WithEncoderConcurrency(1))
	s.raw = &counter{w: s.enc}
	s.packer = storage.NewJSONPacker(s.raw)
	return s
}

func (s *tarSplit) close() error { return s.enc.Close() }

// A counter counts what is written.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}
