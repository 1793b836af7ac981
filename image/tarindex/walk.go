package tarindex

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// A stream is a tar that comes by, from a blob or from an index.
type stream interface {
	// skeleton reads what is not the data of a file.
	skeleton(p []byte) (int, error)
	// payload reads data of the current file, p being its bytes from off on. It
	// may leave p as it is. cut says that a span begins with p; inside what was
	// read none does.
	payload(p []byte, off int64) (n int, cut bool, err error)
	// begin and end enclose the data of a file. sum gives the next digest: the
	// content's, then those of its data chunks if there are several, or there
	// is a hole; got is what it would be if the data came by.
	begin(e *toc.Entry)
	end(e *toc.Entry) error
	data(p []byte)
	sum(got func() toc.Digest) (toc.Digest, error)
}

// A walker reads a tar and makes its table of contents.
type walker struct {
	s       stream
	hashed  bool // the data come by, and digests are computed
	off     int64
	holes   int64
	entries []toc.Entry
	chunks  int

	// Of the current file.
	inFile  bool
	bufOff  int64 // offset in the file of the buffer that is read into
	bufCap  int
	cur     []toc.Chunk // InnerOffset: offset in the tar
	sparse  bool
	content hash.Hash
	chunk   hash.Hash
	inChunk bool // chunk has the latest one's bytes; else content has them all
	digests []toc.Digest
	buf     []byte
}

func newWalker(s stream, hashed bool) *walker {
	return &walker{s: s, hashed: hashed, content: sha256.New(), chunk: sha256.New(), buf: make([]byte, 256<<10)}
}

// walk reads the tar to its end.
func (w *walker) walk() error {
	t := tar.NewReader(w)
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil && !errors.Is(err, tar.ErrInsecurePath) {
			return fmt.Errorf("tar at byte %d: %w", w.off, err)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e, err := entry(h)
		if err != nil {
			return fmt.Errorf("tar entry %q: %w", h.Name, err)
		}
		if len(w.entries) == maxEntries {
			return fmt.Errorf("%w: more than %d entries", ErrLayer, maxEntries)
		}
		if e.Type == toc.Reg && e.Size > 0 {
			if err := w.file(t, h, &e); err != nil {
				return fmt.Errorf("tar entry %q: %w", h.Name, err)
			}
		}
		w.entries = append(w.entries, e)
	}
	// What follows the end of the archive is part of the DiffID.
	_, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{w}, w.buf)
	return err
}

// Read gives archive/tar its bytes.
func (w *walker) Read(p []byte) (int, error) {
	if !w.inFile {
		n, err := w.s.skeleton(p)
		w.off += int64(n)
		return n, err
	}
	// archive/tar reads data to the place in our buffer where they belong, past
	// holes: p is a part of the buffer, whose capacity says which.
	off := w.bufOff + int64(w.bufCap-cap(p))
	n, cut, err := w.s.payload(p, off)
	if n > 0 {
		if cerr := w.piece(off, p[:n], cut); cerr != nil {
			return 0, cerr
		}
		w.off += int64(n)
	}
	return n, err
}

// piece notes that p are the file's bytes from off on, and the tar's at w.off.
func (w *walker) piece(off int64, p []byte, cut bool) error {
	covered := int64(0)
	var last *toc.Chunk
	if n := len(w.cur); n > 0 {
		last = &w.cur[n-1]
		covered = last.FileOffset + last.Size
	}
	if off < covered || off > covered && !w.sparse {
		return fmt.Errorf("data for byte %d come after those up to %d", off, covered)
	}
	for at := w.off; len(p) > 0; {
		if last == nil || last.Zero || cut || off > covered || last.Size == MaxChunk {
			if w.chunks++; w.chunks > maxChunks {
				return fmt.Errorf("%w: more than %d chunks", ErrLayer, maxChunks)
			}
			w.closeChunk()
			w.hole(covered, off)
			w.cur = append(w.cur, toc.Chunk{FileOffset: off, InnerOffset: at})
			last, cut = &w.cur[len(w.cur)-1], false
			w.inChunk = w.sparse || len(w.cur) > 1
		}
		n := min(int64(len(p)), MaxChunk-last.Size)
		if w.hashed && w.inChunk {
			w.chunk.Write(p[:n])
		}
		if w.hashed && !w.sparse {
			w.content.Write(p[:n])
		}
		last.Size += n
		p, at, off = p[n:], at+n, off+n
		covered = off
	}
	return nil
}

// hole adds one before off, if there is one.
func (w *walker) hole(from, off int64) {
	if off > from {
		w.cur = append(w.cur, toc.Chunk{FileOffset: from, Size: off - from, Zero: true})
	}
}

// closeChunk finishes the digest of the latest chunk, if it has one of its own.
func (w *walker) closeChunk() {
	n := len(w.cur)
	if !w.hashed || n == 0 || w.cur[n-1].Zero {
		return
	}
	h := w.chunk
	if !w.inChunk {
		h = w.content
	}
	w.digests = append(w.digests, toc.Digest(h.Sum(nil)))
	w.chunk.Reset()
}

// file reads the data of a file.
func (w *walker) file(t *tar.Reader, h *tar.Header, e *toc.Entry) error {
	w.cur, w.digests, w.sparse, w.inChunk, w.bufOff = nil, w.digests[:0], isSparse(h), false, 0
	w.content.Reset()
	w.chunk.Reset()
	w.s.begin(e)
	for w.bufOff < e.Size {
		buf := w.buf
		w.inFile, w.bufCap = true, cap(buf)
		before := w.off
		n, err := t.Read(buf)
		w.inFile = false
		if w.sparse {
			if w.holes += int64(n) - (w.off - before); w.holes > maxHoles {
				return fmt.Errorf("%w: more than %d bytes of holes", ErrLayer, int64(maxHoles))
			}
			if w.hashed {
				w.content.Write(buf[:n])
			}
		}
		w.s.data(buf[:n])
		w.bufOff += int64(n)
		if err == io.EOF && w.bufOff == e.Size {
			break
		}
		if err != nil {
			return noEOF(err)
		}
	}
	w.closeChunk()
	covered := int64(0)
	if n := len(w.cur); n > 0 {
		covered = w.cur[n-1].FileOffset + w.cur[n-1].Size
	}
	w.hole(covered, e.Size)
	return w.closeFile(e)
}

// closeFile gives the file and its chunks their digests.
func (w *walker) closeFile(e *toc.Entry) (err error) {
	if e.Digest, err = w.s.sum(func() toc.Digest { return toc.Digest(w.content.Sum(nil)) }); err != nil {
		return err
	}
	next := 0
	for i := range w.cur {
		c := &w.cur[i]
		switch {
		case c.Zero:
			c.InnerOffset = 0
		case len(w.cur) == 1:
			c.Digest = e.Digest
		default:
			if c.Digest, err = w.s.sum(func() toc.Digest { return w.digests[next] }); err != nil {
				return err
			}
			next++
		}
	}
	e.Chunks = w.cur
	w.cur = nil
	return w.s.end(e)
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}

func isSparse(h *tar.Header) bool {
	if h.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// paxXattr begins the PAX records of extended attributes, as star and all
// container tools write them.
const paxXattr = "SCHILY.xattr."

// entry makes an entry of a header, as containerd's archive package reads it.
func entry(h *tar.Header) (toc.Entry, error) {
	e := toc.Entry{
		Name: h.Name, Mode: uint32(h.Mode & 0o7777), UID: uint32(h.Uid), GID: uint32(h.Gid),
		MtimeSec: h.ModTime.Unix(), MtimeNsec: uint32(h.ModTime.Nanosecond()),
	}
	if h.Uid < 0 || h.Uid > 1<<32-2 || h.Gid < 0 || h.Gid > 1<<32-2 {
		return e, fmt.Errorf("%w: owner %d:%d", ErrLayer, h.Uid, h.Gid)
	}
	switch h.Typeflag {
	case tar.TypeReg, '\x00', tar.TypeGNUSparse, tar.TypeCont:
		e.Type, e.Size = toc.Reg, h.Size
		if h.Size < 0 || h.Size > maxFile {
			return e, fmt.Errorf("%w: a file of %d bytes", ErrLayer, h.Size)
		}
	case tar.TypeDir:
		e.Type = toc.Dir
	case tar.TypeSymlink:
		e.Type, e.Linkname = toc.Symlink, h.Linkname
	case tar.TypeLink:
		e.Type, e.Linkname = toc.Hardlink, h.Linkname
	case tar.TypeChar, tar.TypeBlock:
		e.Type = toc.Char
		if h.Typeflag == tar.TypeBlock {
			e.Type = toc.Block
		}
		if h.Devmajor < 0 || h.Devmajor > maxMajor || h.Devminor < 0 || h.Devminor > maxMinor {
			return e, fmt.Errorf("%w: device %d:%d", ErrLayer, h.Devmajor, h.Devminor)
		}
		e.DevMajor, e.DevMinor = uint32(h.Devmajor), uint32(h.Devminor)
	case tar.TypeFifo:
		e.Type = toc.Fifo
	default:
		return e, fmt.Errorf("%w: an entry of type %q", ErrLayer, h.Typeflag)
	}
	for k, v := range h.PAXRecords {
		name, ok := strings.CutPrefix(k, paxXattr)
		if !ok {
			continue
		}
		if name == "" || len(name) > maxName || len(v) > maxValue {
			return e, fmt.Errorf("%w: extended attribute %.300q of %d bytes", ErrLayer, name, len(v))
		}
		e.Xattrs = append(e.Xattrs, toc.Xattr{Name: name, Value: []byte(v)})
	}
	slices.SortFunc(e.Xattrs, func(a, b toc.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return e, nil
}
