package image

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// The sizes drawn in the package comment.
const (
	indexMagic   = "cfschnks"
	indexVersion = 1

	headerSize  = 32
	layerSize   = 64
	contentSize = 48
	refSize     = 4
	chunkSize   = 80
	trailerSize = sha256.Size
)

var le = binary.LittleEndian

// ErrIndex says that the bytes given to OpenIndex are not a whole "chunks"
// file of the version we write. Such a file is made anew, not repaired.
var ErrIndex = errors.New("damaged or unknown chunk index")

// An IndexLayer is what the index keeps of a layer.
type IndexLayer struct {
	Digest      Digest // of the blob
	Size        int64  // of the blob, in bytes
	Compression toc.Compression
	PrefetchEnd int64 // bytes [0, PrefetchEnd) of the blob hold the prioritized files; 0: none known
}

// A Content is one distinct file content.
type Content struct {
	Digest Digest
	Size   int64 // in bytes, at least 1
	Chunks int   // at least 1
}

// A Chunk is one chunk of one content. Chunks of the same span have Layer,
// BlobOffset and BlobEnd in common.
type Chunk struct {
	toc.Chunk
	Layer   int // whose blob holds it
	Content int
}

// An Index knows the contents of an image and the chunks each is made of. It
// is safe for concurrent use. Its methods, given numbers within range, do not
// fail or allocate; others make them panic, as an index out of range does.
type Index struct {
	layers                   []IndexLayer
	contents, refs, chunks   []byte // the tables, parts of the slice given to OpenIndex
	contentCount, chunkCount int
}

// OpenIndex opens the index in b, which must not change as long as it is used:
// a slice or a memory mapping of the "chunks" file. Everything is checked here
// and once, in time linear in len(b); errors wrap ErrIndex.
//
// A nil error promises that every chunk lies within its blob, that spans of a
// blob are the same or disjoint, and that every content is covered by its
// chunks exactly.
func OpenIndex(b []byte) (*Index, error) {
	x, err := openIndex(b)
	if err == nil {
		err = x.check(b)
	}
	if err != nil {
		return nil, fmt.Errorf("open chunk index: %w: %w", ErrIndex, err)
	}
	return x, nil
}

// OpenCheckedIndex is OpenIndex for bytes that OpenIndex has accepted before
// and that have not changed since; its time does not depend on their number.
// Of other bytes nothing is promised, and methods may panic.
func OpenCheckedIndex(b []byte) (*Index, error) {
	x, err := openIndex(b)
	if err != nil {
		return nil, fmt.Errorf("open chunk index: %w: %w", ErrIndex, err)
	}
	return x, nil
}

// openIndex reads the header and the layers.
func openIndex(b []byte) (*Index, error) {
	if len(b) < headerSize+trailerSize {
		return nil, fmt.Errorf("it has %d bytes", len(b))
	}
	if string(b[:8]) != indexMagic || le.Uint32(b[8:]) != indexVersion || le.Uint64(b[24:]) != 0 {
		return nil, fmt.Errorf("its header is %x", b[:headerSize])
	}
	layers, contents, chunks := uint64(le.Uint32(b[12:])), uint64(le.Uint32(b[16:])), uint64(le.Uint32(b[20:]))
	// 32-bit counts times records of at most 84 bytes stay far within 64 bits.
	if want := headerSize + layers*layerSize + contents*contentSize + chunks*(refSize+chunkSize) + trailerSize; want != uint64(len(b)) {
		return nil, fmt.Errorf("it has %d bytes, its header tells of %d", len(b), want)
	}
	x := &Index{contentCount: int(contents), chunkCount: int(chunks)}
	rest := b[headerSize : len(b)-trailerSize]
	cut := func(n uint64) []byte {
		p := rest[:n:n]
		rest = rest[n:]
		return p
	}
	if err := x.openLayers(cut(layers * layerSize)); err != nil {
		return nil, err
	}
	x.contents, x.refs, x.chunks = cut(contents*contentSize), cut(chunks*refSize), cut(chunks*chunkSize)
	return x, nil
}

// check checks everything that openIndex does not, the checksum beside the rest.
func (x *Index) check(b []byte) error {
	body, sum := b[:len(b)-trailerSize], b[len(b)-trailerSize:]
	right := make(chan bool, 1)
	go func() {
		got := sha256.Sum256(body)
		right <- bytes.Equal(got[:], sum)
	}()
	err := x.checkChunks()
	if err == nil {
		err = x.checkContents()
	}
	if !<-right {
		return errors.New("its checksum is wrong")
	}
	return err
}

func (x *Index) openLayers(b []byte) error {
	x.layers = make([]IndexLayer, len(b)/layerSize)
	for i := range x.layers {
		r := b[i*layerSize:][:layerSize]
		l := IndexLayer{
			Digest: Digest(r[:32]), Size: int64(le.Uint64(r[32:])), PrefetchEnd: int64(le.Uint64(r[40:])),
			Compression: toc.Compression(r[48]),
		}
		if l.Size < 0 || l.PrefetchEnd < 0 || l.PrefetchEnd > l.Size || l.Compression > toc.GzipIndexed || !allZero(r[49:]) {
			return fmt.Errorf("layer %d is %+v", i, l)
		}
		x.layers[i] = l
	}
	return nil
}

func allZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// checkChunks checks each chunk, and the order of all.
func (x *Index) checkChunks() error {
	var last Chunk
	for j := range x.chunkCount {
		c := x.Chunk(j)
		if c.Layer >= len(x.layers) || c.Content >= x.contentCount || c.FileOffset < 0 || c.Size <= 0 {
			return fmt.Errorf("chunk %d is %+v", j, c)
		}
		if !c.Zero {
			size := x.layers[c.Layer].Size
			if c.BlobOffset < 0 || c.BlobOffset >= c.BlobEnd || c.BlobEnd > size || c.InnerOffset < 0 ||
				c.InnerOffset+c.Size < 0 || c.Size > toc.MaxChunk || c.Digest.IsZero() {
				return fmt.Errorf("chunk %d is %+v in a blob of %d bytes", j, c, size)
			}
		} else if c.BlobOffset != 0 || c.InnerOffset != 0 {
			return fmt.Errorf("chunk %d, a hole, is %+v", j, c)
		}
		if j > 0 && (last.compare(c) >= 0 || !last.apart(c)) {
			return fmt.Errorf("chunks %d and %d are not in order or overlap: %+v, %+v", j-1, j, last, c)
		}
		last = c
	}
	return nil
}

// compare orders chunks as the chunk table does.
func (c Chunk) compare(d Chunk) int {
	if c.Zero != d.Zero {
		if d.Zero {
			return -1
		}
		return 1
	}
	if !c.Zero {
		if n := cmp.Or(cmp.Compare(c.Layer, d.Layer), cmp.Compare(c.BlobOffset, d.BlobOffset), cmp.Compare(c.InnerOffset, d.InnerOffset)); n != 0 {
			return n
		}
	}
	return cmp.Or(cmp.Compare(c.Content, d.Content), cmp.Compare(c.FileOffset, d.FileOffset))
}

// apart reports whether d, next in order after c, is in another place of the
// blob, or is the same bytes. (package toc makes sure of this in each layer.)
func (c Chunk) apart(d Chunk) bool {
	switch {
	case d.Zero || c.Layer != d.Layer:
		return true
	case c.BlobOffset != d.BlobOffset || c.BlobEnd != d.BlobEnd:
		return c.BlobEnd <= d.BlobOffset
	case c.InnerOffset == d.InnerOffset:
		return c.Size == d.Size && c.Digest == d.Digest
	}
	return c.InnerOffset+c.Size <= d.InnerOffset
}

// checkContents checks each content against its chunks. As every content has
// the refs after those of the one before, and every ref leads to a chunk of
// its own content at the place where the last one ended, every chunk has one
// ref.
func (x *Index) checkContents() error {
	next := 0
	var last Digest
	for i := range x.contentCount {
		r := x.contentRecord(i)
		c, first := x.Content(i), int(le.Uint32(r[40:]))
		if c.Size <= 0 || c.Chunks == 0 || first != next || c.Chunks > x.chunkCount-next {
			return fmt.Errorf("content %d is %+v with its first ref %d, want %d", i, c, first, next)
		}
		if bytes.Compare(last[:], c.Digest[:]) >= 0 {
			return fmt.Errorf("content %d, %s, comes after %s", i, c.Digest, last)
		}
		covered := int64(0)
		for k := range c.Chunks {
			j := x.ContentChunk(i, k)
			if j < 0 || j >= x.chunkCount {
				return fmt.Errorf("content %d has chunk %d of %d", i, j, x.chunkCount)
			}
			if ch := x.Chunk(j); ch.Content != i || ch.FileOffset != covered || ch.Size > c.Size-covered {
				return fmt.Errorf("content %d, %+v, covered to %d, has chunk %d: %+v", i, c, covered, j, ch)
			} else {
				covered += ch.Size
			}
		}
		if covered != c.Size {
			return fmt.Errorf("content %d has %d bytes, its chunks %d", i, c.Size, covered)
		}
		next += c.Chunks
		last = c.Digest
	}
	if next != x.chunkCount {
		return fmt.Errorf("%d chunks, contents have %d", x.chunkCount, next)
	}
	return nil
}

func (x *Index) contentRecord(i int) []byte { return x.contents[i*contentSize:][:contentSize] }

// Layers returns the layers, the lowest first. The caller must not change the
// slice.
func (x *Index) Layers() []IndexLayer { return x.layers }

// Contents returns the number of distinct contents of at least one byte. They
// are numbered from 0 in ascending order of digest.
func (x *Index) Contents() int { return x.contentCount }

// Content returns content i.
func (x *Index) Content(i int) Content {
	return contentOf(x.contentRecord(i))
}

// ContentChunk returns the number of the k-th chunk, by place in the file, of
// content i.
func (x *Index) ContentChunk(i, k int) int {
	first := int(le.Uint32(x.contentRecord(i)[40:]))
	return int(le.Uint32(x.refs[(first+k)*refSize:]))
}

// Find returns the number of the content that has the digest d.
func (x *Index) Find(d Digest) (i int, ok bool) {
	return sort.Find(x.contentCount, func(i int) int {
		return bytes.Compare(d[:], x.contentRecord(i)[:len(d)])
	})
}

// Chunks returns the number of chunks. They are numbered from 0 in the order of
// layer, BlobOffset and InnerOffset, holes last.
func (x *Index) Chunks() int { return x.chunkCount }

// Chunk returns chunk j.
func (x *Index) Chunk(j int) Chunk {
	r := x.chunks[j*chunkSize:][:chunkSize]
	c := Chunk{
		Chunk: toc.Chunk{
			BlobOffset: int64(le.Uint64(r)), BlobEnd: int64(le.Uint64(r[8:])), InnerOffset: int64(le.Uint64(r[16:])),
			FileOffset: int64(le.Uint64(r[24:])), Size: int64(le.Uint64(r[32:])), Digest: Digest(r[48:]),
		},
		Layer: int(le.Uint32(r[40:])), Content: int(le.Uint32(r[44:])),
	}
	c.Zero = c.BlobEnd == 0
	return c
}
