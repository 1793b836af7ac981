package image

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sort"
)

// A DigestTable is the contents of an index, read from its file piece by piece
// where an Index maps all of it: for programs that go over many images and
// want of each only what it refers to.
type DigestTable struct {
	r        io.ReaderAt
	layers   int64
	contents int64
	chunks   int64
}

// OpenDigests reads the "chunks" file r of size bytes once, in small pieces,
// and compares its checksum. Errors that are not r's wrap ErrIndex. The order
// of digests, and what OpenIndex checks of chunks, is taken on trust: the
// checksum is right, and nothing but the answers depends on it.
func OpenDigests(r io.ReaderAt, size int64) (*DigestTable, error) {
	t, err := openDigests(r, size)
	if err != nil {
		return nil, fmt.Errorf("open chunk index: %w", err)
	}
	return t, nil
}

func openDigests(r io.ReaderAt, size int64) (*DigestTable, error) {
	var head [headerSize]byte
	if size < headerSize+trailerSize {
		return nil, fmt.Errorf("%w: it has %d bytes", ErrIndex, size)
	}
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return nil, err
	}
	if string(head[:8]) != indexMagic || le.Uint32(head[8:]) != indexVersion || le.Uint64(head[24:]) != 0 {
		return nil, fmt.Errorf("%w: its header is %x", ErrIndex, head)
	}
	t := &DigestTable{r: r, layers: int64(le.Uint32(head[12:])), contents: int64(le.Uint32(head[16:])), chunks: int64(le.Uint32(head[20:]))}
	if want := headerSize + t.layers*layerSize + t.contents*contentSize + t.chunks*(refSize+chunkSize) + trailerSize; want != size {
		return nil, fmt.Errorf("%w: it has %d bytes, its header tells of %d", ErrIndex, size, want)
	}
	h := sha256.New()
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{io.NewSectionReader(r, 0, size-trailerSize)}, make([]byte, 256<<10)); err != nil {
		return nil, err
	}
	var sum [trailerSize]byte
	if _, err := r.ReadAt(sum[:], size-trailerSize); err != nil {
		return nil, err
	}
	if !bytes.Equal(h.Sum(nil), sum[:]) {
		return nil, fmt.Errorf("%w: its checksum is wrong", ErrIndex)
	}
	return t, nil
}

// Contents returns the number of contents.
func (t *DigestTable) Contents() int { return int(t.contents) }

// Prefix returns the contents whose digests begin with the byte b, in ascending
// order.
func (t *DigestTable) Prefix(b byte) ([]Content, error) {
	first, err := t.search(int(b))
	if err != nil {
		return nil, err
	}
	end, err := t.search(int(b) + 1)
	if err != nil {
		return nil, err
	}
	if end < first {
		return nil, fmt.Errorf("read chunk index: %w: contents are not in order", ErrIndex)
	}
	buf := make([]byte, (end-first)*contentSize)
	if err := t.read(buf, t.contentAt(int64(first))); err != nil {
		return nil, err
	}
	all := make([]Content, end-first)
	for i := range all {
		all[i] = contentOf(buf[i*contentSize:])
	}
	return all, nil
}

// search returns the number of the first content whose digest begins with b or
// a larger byte.
func (t *DigestTable) search(b int) (n int, err error) {
	var first [1]byte
	n = sort.Search(int(t.contents), func(i int) bool {
		if err == nil {
			err = t.read(first[:], t.contentAt(int64(i)))
		}
		return int(first[0]) >= b
	})
	return n, err
}

func (t *DigestTable) contentAt(i int64) int64 {
	return headerSize + t.layers*layerSize + i*contentSize
}

func (t *DigestTable) read(p []byte, off int64) error {
	n, err := t.r.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read chunk index: %w", err)
}

// A Place is where in which content a chunk lies.
type Place struct {
	Content int
	Offset  int64 // in the file
	Size    int64
	Digest  Digest // of the chunk
}

// EachChunk calls do with each chunk that is not all zero, in the order of the
// table, until do returns false.
func (t *DigestTable) EachChunk(do func(Place) bool) error {
	const many = 512
	var buf [many * chunkSize]byte
	start := headerSize + t.layers*layerSize + t.contents*contentSize + t.chunks*refSize
	for j := int64(0); j < t.chunks; {
		n := min(many, t.chunks-j)
		if err := t.read(buf[:n*chunkSize], start+j*chunkSize); err != nil {
			return err
		}
		for i := range n {
			r := buf[i*chunkSize:][:chunkSize]
			if le.Uint64(r[8:]) == 0 {
				return nil // holes are last
			}
			p := Place{Content: int(le.Uint32(r[44:])), Offset: int64(le.Uint64(r[24:])), Size: int64(le.Uint64(r[32:])), Digest: Digest(r[48:])}
			if int64(p.Content) >= t.contents || p.Offset < 0 || p.Size <= 0 {
				return fmt.Errorf("read chunk index: %w: chunk %d is %+v", ErrIndex, j+i, p)
			}
			if !do(p) {
				return nil
			}
		}
		j += n
	}
	return nil
}

// Content returns content i.
func (t *DigestTable) Content(i int) (Content, error) {
	var r [contentSize]byte
	if i < 0 || int64(i) >= t.contents {
		return Content{}, fmt.Errorf("read chunk index: content %d of %d", i, t.contents)
	}
	err := t.read(r[:], t.contentAt(int64(i)))
	return contentOf(r[:]), err
}

func contentOf(r []byte) Content {
	return Content{Digest: Digest(r[:32]), Size: int64(le.Uint64(r[32:])), Chunks: int(le.Uint32(r[44:]))}
}
