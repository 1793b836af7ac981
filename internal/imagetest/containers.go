package imagetest

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Annotations of containers/storage's dialect (pkg/chunked/internal/minimal).
const (
	containersChecksum = "io.github.containers.zstd-chunked.manifest-checksum"
	containersPosition = "io.github.containers.zstd-chunked.manifest-position"
	containersTarSplit = "io.github.containers.zstd-chunked.tarsplit-position"
)

// holeThreshold is the shortest run of zero bytes that containers/storage
// makes a chunk of its own.
const holeThreshold = 1 << 10

type containersEntry struct {
	Type        string            `json:"type"`
	Name        string            `json:"name"`
	Linkname    string            `json:"linkName,omitempty"`
	Mode        int64             `json:"mode,omitempty"`
	Size        int64             `json:"size,omitempty"`
	UID         int               `json:"uid,omitempty"`
	GID         int               `json:"gid,omitempty"`
	ModTime     *time.Time        `json:"modtime,omitempty"`
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

var containersTypes = map[byte]string{
	tar.TypeReg: "reg", tar.TypeLink: "hardlink", tar.TypeChar: "char", tar.TypeBlock: "block",
	tar.TypeDir: "dir", tar.TypeFifo: "fifo", tar.TypeSymlink: "symlink",
}

// frames writes zstd frames one after another and knows where each begins.
type frames struct {
	out bytes.Buffer
	enc *zstd.Encoder
	err error
}

func (f *frames) write(p []byte) {
	if _, err := f.enc.Write(p); f.err == nil {
		f.err = err
	}
}

// cut ends the frame and returns the offset at which the next one begins.
func (f *frames) cut() int64 {
	if err := f.enc.Close(); f.err == nil {
		f.err = err
	}
	f.enc.Reset(&f.out)
	return int64(f.out.Len())
}

// skippable appends a skippable frame (RFC 8878, 3.1.2) that holds p, and
// returns the offset of p.
func (f *frames) skippable(p []byte) int64 {
	b := binary.LittleEndian.AppendUint32(nil, 0x184d2a50)
	f.out.Write(binary.LittleEndian.AppendUint32(b, uint32(len(p))))
	off := int64(f.out.Len())
	f.out.Write(p)
	return off
}

// piece is a part of a file that becomes a chunk.
type piece struct {
	off, size int
	zeros     bool
}

// cutPieces cuts content into runs of at least holeThreshold zero bytes and,
// between them, pieces of at most size bytes. containers/storage cuts the
// latter by a rolling checksum, which a reader need not know.
func cutPieces(content []byte, size int) []piece {
	var ps []piece
	data := func(from, to int) {
		for ; from < to; from += size {
			ps = append(ps, piece{off: from, size: min(size, to-from)})
		}
	}
	from := 0
	for i := 0; i < len(content); {
		if content[i] != 0 {
			i++
			continue
		}
		end := i
		for end < len(content) && content[end] == 0 {
			end++
		}
		if end-i >= holeThreshold {
			data(from, i)
			ps = append(ps, piece{i, end - i, true})
			from = end
		}
		i = end
	}
	data(from, len(content))
	return ps
}

// ContainersZstdChunked makes a zstd:chunked blob of a tar as containers/storage
// does (buildah, podman and skopeo push it): every chunk in its own frame, runs
// of zeros as chunks of type "zeros", the TOC and then tar-split data in
// skippable frames, a footer of 64 bytes, and annotations that give the TOC's
// position and the digest of its compressed bytes. The tar-split frame holds
// only filler.
func ContainersZstdChunked(tarball []byte, o Options) (*Blob, error) {
	b, err := containersZstdChunked(tarball, o)
	if err != nil {
		return nil, fmt.Errorf("write zstd:chunked (containers/storage): %w", err)
	}
	return b, nil
}

func containersZstdChunked(tarball []byte, o Options) (*Blob, error) {
	if o.ChunkSize == 0 {
		o.ChunkSize = 64 << 10
	}
	var f frames
	var err error
	if f.enc, err = zstd.NewWriter(&f.out, zstd.WithEncoderConcurrency(1)); err != nil {
		return nil, err
	}
	var entries []containersEntry
	r := bytes.NewReader(tarball) // a tar.Reader reads from it no further than it must
	tr := tar.NewReader(r)
	written := 0
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		pos := len(tarball) - r.Len()
		f.write(tarball[written:pos])
		written = pos
		content, err := io.ReadAll(tr)
		if err != nil {
			return nil, err
		}
		written += len(content)
		es, err := f.entry(h, content, o.ChunkSize)
		if err != nil {
			return nil, err
		}
		entries = append(entries, es...)
	}
	f.write(tarball[written:])
	f.cut()
	return f.finish(entries, tarball)
}

// entry writes the content and returns the TOC's entries for it.
func (f *frames) entry(h *tar.Header, content []byte, chunkSize int) ([]containersEntry, error) {
	typ, ok := containersTypes[h.Typeflag]
	if !ok {
		return nil, fmt.Errorf("entry %q: tar type %q", h.Name, h.Typeflag)
	}
	first := containersEntry{
		Type: typ, Name: h.Name, Linkname: h.Linkname, Mode: h.Mode, Size: h.Size, UID: h.Uid, GID: h.Gid,
		Devmajor: h.Devmajor, Devminor: h.Devminor, Xattrs: map[string][]byte{},
	}
	if !h.ModTime.IsZero() {
		first.ModTime = &h.ModTime
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			first.Xattrs[name] = []byte(v)
		}
	}
	entries := []containersEntry{first}
	if len(content) == 0 {
		return entries, nil
	}
	entries[0].Digest = digest.FromBytes(content).String()
	entries[0].Offset = f.cut()
	end := entries[0].Offset
	pieces := cutPieces(content, chunkSize)
	for i, p := range pieces {
		if i > 0 {
			entries = append(entries, containersEntry{Type: "chunk", Name: h.Name, ChunkOffset: int64(p.off), Offset: end})
		}
		if len(pieces) > 1 {
			entries[i].ChunkSize = int64(p.size)
			entries[i].ChunkDigest = digest.FromBytes(content[p.off : p.off+p.size]).String()
			if p.zeros {
				entries[i].ChunkType = "zeros"
			}
		}
		f.write(content[p.off : p.off+p.size])
		end = f.cut()
	}
	entries[0].EndOffset = end
	return entries, nil
}

// finish appends TOC, tar-split and footer.
func (f *frames) finish(entries []containersEntry, tarball []byte) (*Blob, error) {
	if f.err != nil {
		return nil, f.err
	}
	tarSplit := f.enc.EncodeAll([]byte("filler in place of tar-split data"), nil)
	toc, err := json.Marshal(struct {
		Version        int               `json:"version"`
		Entries        []containersEntry `json:"entries"`
		TarSplitDigest digest.Digest     `json:"tarSplitDigest"`
	}{1, entries, digest.FromBytes(tarSplit)})
	if err != nil {
		return nil, err
	}
	compressed := f.enc.EncodeAll(toc, nil)
	off := f.skippable(compressed)
	splitOff := f.skippable(tarSplit)
	var footer []byte
	for _, n := range []int64{off, int64(len(compressed)), int64(len(toc)), 1, splitOff, int64(len(tarSplit)), 33} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	f.skippable(append(footer, "GNUlInUx"...))
	return newBlob(ocispec.MediaTypeImageLayerZstd, f.out.Bytes(), digest.FromBytes(tarball), map[string]string{
		containersChecksum: digest.FromBytes(compressed).String(),
		containersPosition: fmt.Sprintf("%d:%d:%d:1", off, len(compressed), len(toc)),
		containersTarSplit: fmt.Sprintf("%d:%d:33", splitOff, len(tarSplit)),
	}), nil
}
