package toc

import (
	"cmp"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Landmarks are files of the root that estargz.Build adds: the prioritized
// files are before .prefetch.landmark, or there are none.
const (
	prefetchLandmark   = ".prefetch.landmark"
	noPrefetchLandmark = ".no.prefetch.landmark"
)

// A record is one element of the TOC's "entries".
type record struct {
	Entry  // as far as one record tells; Digest may be set for an empty file
	typ    recordType
	offset int64 // in the blob
	inner  int64 // innerOffset
	end    int64 // endOffset (containers/storage); 0: not told

	chunkOffset, chunkSize int64 // chunkSize 0: to the end of the file
	chunkDigest            Digest
	zeros                  bool
}

// recordType is a Type, or chunk.
type recordType uint8

const chunk recordType = 255

// A parser makes entries of records.
type parser struct {
	s      scanner
	t      *TOC
	tarEnd int64

	chunks []Chunk // of all entries, in their order
	starts []int   // of each entry: the index of its first chunk

	// cuts are the offsets at which any chunk begins, where a span whose end
	// is not told may end.
	cuts []int64

	// The regular file that chunk records belong to is the last entry, when
	// open; fileEnd is its endOffset.
	open    bool
	fileEnd int64
}

// toBeCut stands for the BlobEnd of a chunk until cuts is complete.
const toBeCut = -1

// parse fills t from its JSON text. The tar is the blob's bytes [0, tarEnd).
func parse(t *TOC, text []byte, tarEnd int64) error {
	p := &parser{s: scanner{b: text}, t: t, tarEnd: tarEnd}
	seen := false
	version := int64(0)
	err := p.s.object(func(key []byte) (err error) {
		switch string(key) {
		case "version":
			version, err = p.s.integer()
			return err
		case "entries":
			if seen {
				return p.s.errorf("a second list of entries")
			}
			seen = true
			return p.s.array(p.record)
		}
		return p.s.skip(0)
	})
	if err != nil {
		return err
	}
	if p.s.peek() != 0 || p.s.i < len(p.s.b) {
		return p.s.errorf("something follows the TOC")
	}
	if version != 1 {
		return fmt.Errorf("TOC version %d is not known, only 1", version)
	}
	if err := p.closeFile(); err != nil {
		return err
	}
	return p.finish()
}

// record reads the next record and adds it.
func (p *parser) record() error {
	var r record
	if err := p.fields(&r); err != nil {
		if r.Name != "" {
			return fmt.Errorf("entry %q: %w", r.Name, err)
		}
		return err
	}
	if err := p.add(&r); err != nil {
		return fmt.Errorf("entry %q: %w", r.Name, err)
	}
	return nil
}

func (p *parser) fields(r *record) error {
	s := &p.s
	return s.object(func(key []byte) (err error) {
		var v []byte
		var n int64
		switch string(key) {
		case "name":
			if v, err = s.str(); err != nil {
				return err
			}
			// The chunks of a file repeat its name: keep one copy.
			if e := p.last(); e != nil && string(v) == e.Name {
				r.Name = e.Name
			} else {
				r.Name = string(v)
			}
		case "linkName":
			v, err = s.str()
			r.Linkname = string(v)
		case "type":
			if v, err = s.str(); err == nil {
				r.typ, err = parseType(v)
			}
		case "modtime":
			if v, err = s.str(); err == nil {
				r.MtimeSec, r.MtimeNsec, err = parseTime(string(v))
			}
		case "mode":
			n, err = s.field(key, 1<<62)
			r.Mode = uint32(n & 0o7777) // old tars have the file type above
		case "uid": // the last uid is no uid: (uid_t)-1
			n, err = s.field(key, 1<<32-2)
			r.UID = uint32(n)
		case "gid":
			n, err = s.field(key, 1<<32-2)
			r.GID = uint32(n)
		case "devMajor":
			n, err = s.field(key, maxMajor)
			r.DevMajor = uint32(n)
		case "devMinor":
			n, err = s.field(key, maxMinor)
			r.DevMinor = uint32(n)
		case "size":
			r.Size, err = s.field(key, maxFile)
		case "offset":
			r.offset, err = s.field(key, 1<<62)
		case "endOffset":
			r.end, err = s.field(key, 1<<62)
		case "innerOffset":
			r.inner, err = s.field(key, maxInner)
		case "chunkOffset":
			r.chunkOffset, err = s.field(key, maxFile)
		case "chunkSize":
			r.chunkSize, err = s.field(key, maxFile)
		case "digest":
			err = s.digest(key, &r.Digest)
		case "chunkDigest":
			err = s.digest(key, &r.chunkDigest)
		case "chunkType":
			if v, err = s.str(); err == nil && len(v) > 0 && string(v) != "zeros" {
				err = fmt.Errorf("chunk type %.20q is not known", v)
			}
			r.zeros = len(v) > 0
		case "xattrs":
			r.Xattrs, err = s.xattrs()
		default: // userName, groupName, accesstime, changetime, …
			err = s.skip(0)
		}
		return err
	})
}

// field reads a number from 0 to limit.
func (s *scanner) field(key []byte, limit int64) (int64, error) {
	name := string(key)
	n, err := s.integer()
	if err == nil && (n < 0 || n > limit) {
		err = fmt.Errorf("want 0 to %d, found %d", limit, n)
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", name, err)
	}
	return n, nil
}

// digest reads a digest; an empty string leaves d zero.
func (s *scanner) digest(key []byte, d *Digest) error {
	name := string(key)
	v, err := s.str()
	if err != nil || len(v) == 0 {
		return err
	}
	// The fast path of ParseDigest, which decides what is wrong otherwise.
	if len(v) == len("sha256:")+hex.EncodedLen(len(d)) && string(v[:7]) == "sha256:" && !hasUpper(v[7:]) {
		if _, err := hex.Decode(d[:], v[7:]); err == nil {
			return nil
		}
	}
	if *d, err = ParseDigest(string(v)); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func hasUpper(b []byte) bool {
	for _, c := range b {
		if 'A' <= c && c <= 'Z' {
			return true
		}
	}
	return false
}

// xattrs reads an object of base64 values. Of a name that occurs twice the
// last counts, as in encoding/json.
func (s *scanner) xattrs() ([]Xattr, error) {
	var xs []Xattr
	err := s.object(func(key []byte) error {
		name := string(key)
		if name == "" || len(name) > maxXattrName || strings.IndexByte(name, 0) >= 0 {
			return fmt.Errorf("no extended attribute can be called %.300q", name)
		}
		v, err := s.str()
		if err != nil {
			return err
		}
		value := make([]byte, base64.StdEncoding.DecodedLen(len(v)))
		n, err := base64.StdEncoding.Decode(value, v)
		if err == nil && n > maxXattrValue {
			err = fmt.Errorf("%d bytes, the limit is %d", n, maxXattrValue)
		}
		if err != nil {
			return fmt.Errorf("extended attribute %q: %w", name, err)
		}
		xs = append(xs, Xattr{name, value[:n:n]})
		return nil
	})
	if err != nil || len(xs) < 2 {
		return xs, err
	}
	slices.SortStableFunc(xs, func(a, b Xattr) int { return strings.Compare(a.Name, b.Name) })
	kept := xs[:1]
	for _, x := range xs[1:] {
		if x.Name == kept[len(kept)-1].Name {
			kept[len(kept)-1] = x
		} else {
			kept = append(kept, x)
		}
	}
	return kept, nil
}

func parseType(v []byte) (recordType, error) {
	if string(v) == "chunk" {
		return chunk, nil
	}
	for t := Dir; t <= Fifo; t++ {
		if string(v) == typeNames[t] {
			return recordType(t), nil
		}
	}
	return 0, fmt.Errorf("type %.20q is not known", v)
}

// parseTime reads RFC 3339. Go's zero time, which early containers/storage
// wrote for an unknown one, counts as none.
func parseTime(s string) (sec int64, nsec uint32, err error) {
	if s == "" {
		return 0, 0, nil
	}
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil {
		return 0, 0, fmt.Errorf("modtime: %w", err)
	}
	if t.IsZero() {
		return 0, 0, nil
	}
	return t.Unix(), uint32(t.Nanosecond()), nil
}

func (p *parser) last() *Entry {
	if n := len(p.t.Entries); n > 0 {
		return &p.t.Entries[n-1]
	}
	return nil
}

// add makes an entry of r, or a chunk of the open one.
func (p *parser) add(r *record) error {
	switch r.typ {
	case 0:
		return errors.New("it has no type")
	case chunk:
		if !p.open || r.Name != "" && r.Name != p.last().Name {
			return errors.New("a chunk that follows no regular file of its name")
		}
		if r.end != 0 && r.end != p.fileEnd {
			return fmt.Errorf("a chunk's endOffset is %d, its file's %d", r.end, p.fileEnd)
		}
		r.Name = p.last().Name
		return p.addChunk(r)
	}
	if err := p.closeFile(); err != nil {
		return err
	}
	if isLandmark(r) {
		return p.landmark(r)
	}
	if len(p.t.Entries) == maxEntries {
		return fmt.Errorf("more than %d entries in a layer", maxEntries)
	}
	e := r.Entry
	e.Type = Type(r.typ)
	if e.Type != Reg {
		e.Size, e.Digest = 0, Digest{}
	}
	p.t.Entries = append(p.t.Entries, e)
	p.starts = append(p.starts, len(p.chunks))
	if e.Type != Reg {
		return nil
	}
	p.open, p.fileEnd = true, r.end
	if e.Size == 0 {
		return nil
	}
	return p.addChunk(r)
}

// isLandmark reports whether r is one of the files that are marks for us and
// not files of the image.
func isLandmark(r *record) bool {
	name := strings.TrimLeft(strings.TrimPrefix(r.Name, "./"), "/")
	return r.typ == recordType(Reg) && (name == prefetchLandmark || name == noPrefetchLandmark)
}

func (p *parser) landmark(r *record) error {
	if r.offset >= p.tarEnd {
		return fmt.Errorf("offset %d is not within the %d bytes of the tar", r.offset, p.tarEnd)
	}
	p.cuts = append(p.cuts, r.offset)
	if !strings.HasSuffix(r.Name, noPrefetchLandmark) {
		p.t.PrefetchEnd = r.offset
	}
	return nil
}

func (p *parser) addChunk(r *record) error {
	if len(p.chunks) == maxChunks {
		return fmt.Errorf("more than %d chunks in a layer", maxChunks)
	}
	if r.offset >= p.tarEnd {
		return fmt.Errorf("offset %d is not within the %d bytes of the tar", r.offset, p.tarEnd)
	}
	p.cuts = append(p.cuts, r.offset)
	p.chunks = append(p.chunks, Chunk{
		BlobOffset: r.offset, BlobEnd: toBeCut, InnerOffset: r.inner,
		FileOffset: r.chunkOffset, Size: r.chunkSize, Digest: r.chunkDigest, Zero: r.zeros,
	})
	return nil
}

// closeFile checks the open file, whose chunks are now all known.
func (p *parser) closeFile() error {
	if !p.open {
		return nil
	}
	p.open = false
	e := p.last()
	chunks := p.chunks[p.starts[len(p.starts)-1]:]
	if err := closeFile(e, chunks, p.fileEnd, p.tarEnd); err != nil {
		return fmt.Errorf("entry %q: %w", e.Name, err)
	}
	return nil
}

func closeFile(e *Entry, chunks []Chunk, fileEnd, tarEnd int64) error {
	if fileEnd > tarEnd {
		return fmt.Errorf("endOffset %d is not within the %d bytes of the tar", fileEnd, tarEnd)
	}
	if e.Size == 0 {
		e.Digest = Digest{}
		if len(chunks) > 0 {
			return errors.New("an empty file has chunks")
		}
		return nil
	}
	covered := int64(0)
	for i := range chunks {
		c := &chunks[i]
		if c.FileOffset != covered {
			return fmt.Errorf("chunk %d begins at %d of the file, the one before it ends at %d", i, c.FileOffset, covered)
		}
		if c.Size == 0 {
			c.Size = e.Size - covered
		}
		if c.Size <= 0 || c.Size > e.Size-covered {
			return fmt.Errorf("chunk %d: %d bytes at %d of a file of %d bytes", i, c.Size, c.FileOffset, e.Size)
		}
		covered += c.Size
		if !c.Zero && c.Size > MaxChunk {
			return fmt.Errorf("chunk %d has %d bytes, the limit is %d", i, c.Size, MaxChunk)
		}
		if fileEnd != 0 {
			c.BlobEnd = fileEnd
			if i+1 < len(chunks) {
				c.BlobEnd = chunks[i+1].BlobOffset
			}
			if !c.Zero && c.BlobEnd <= c.BlobOffset {
				return fmt.Errorf("chunk %d: nothing is between its offset %d and its end %d", i, c.BlobOffset, c.BlobEnd)
			}
		}
	}
	if covered != e.Size {
		return fmt.Errorf("its chunks have %d bytes together, the file %d", covered, e.Size)
	}
	return closeDigests(e, chunks)
}

// closeDigests makes sure that everything can be checked. The digest of a file
// and that of its only chunk stand for one another.
func closeDigests(e *Entry, chunks []Chunk) error {
	if len(chunks) == 1 && !chunks[0].Zero {
		c := &chunks[0]
		switch {
		case c.Digest.IsZero():
			c.Digest = e.Digest
		case e.Digest.IsZero():
			e.Digest = c.Digest
		case e.Digest != c.Digest:
			return fmt.Errorf("the file's digest is %s, that of its only chunk %s", e.Digest, c.Digest)
		}
	}
	if e.Digest.IsZero() {
		return errors.New("it has no digest, so its content cannot be checked")
	}
	for i, c := range chunks {
		if c.Digest.IsZero() && !c.Zero {
			return fmt.Errorf("chunk %d has no digest, so it cannot be checked", i)
		}
	}
	return nil
}

// finish sets the ends of all spans, checks that they are apart, and hands the
// chunks to their entries.
func (p *parser) finish() error {
	slices.Sort(p.cuts)
	p.cuts = slices.Compact(p.cuts)
	for i := range p.chunks {
		c := &p.chunks[i]
		if c.Zero {
			c.BlobOffset, c.BlobEnd, c.InnerOffset = 0, 0, 0
			continue
		}
		if c.BlobEnd == toBeCut {
			c.BlobEnd = p.tarEnd
			if k, _ := slices.BinarySearch(p.cuts, c.BlobOffset+1); k < len(p.cuts) {
				c.BlobEnd = p.cuts[k]
			}
		}
	}
	if err := p.checkApart(); err != nil {
		return err
	}
	for i := range p.t.Entries {
		end := len(p.chunks)
		if i+1 < len(p.starts) {
			end = p.starts[i+1]
		}
		if start := p.starts[i]; start < end {
			p.t.Entries[i].Chunks = p.chunks[start:end:end]
		}
	}
	return nil
}

// checkApart makes sure that spans are the same or disjoint, and that chunks of
// one span are apart within it, or the same: a writer may store equal chunks
// of different files once.
func (p *parser) checkApart() error {
	order := make([]int32, 0, len(p.chunks))
	for i, c := range p.chunks {
		if !c.Zero {
			order = append(order, int32(i))
		}
	}
	slices.SortFunc(order, func(i, j int32) int { return p.chunks[i].compareBlob(&p.chunks[j]) })
	for k := 1; k < len(order); k++ {
		a, b := &p.chunks[order[k-1]], &p.chunks[order[k]]
		if !a.apart(b) {
			return fmt.Errorf("entry %q: its chunk at [%d, %d)+%d of the blob overlaps that at [%d, %d)+%d of entry %q",
				p.owner(order[k]), b.BlobOffset, b.BlobEnd, b.InnerOffset, a.BlobOffset, a.BlobEnd, a.InnerOffset, p.owner(order[k-1]))
		}
	}
	return nil
}

// compareBlob orders by place in the blob, and then so that chunks that are
// the same are neighbours.
func (c *Chunk) compareBlob(d *Chunk) int {
	return cmp.Or(
		cmp.Compare(c.BlobOffset, d.BlobOffset),
		cmp.Compare(c.BlobEnd, d.BlobEnd),
		cmp.Compare(c.InnerOffset, d.InnerOffset),
		cmp.Compare(c.Size, d.Size),
	)
}

// apart reports whether d may follow c in the order of compareBlob.
func (c *Chunk) apart(d *Chunk) bool {
	if c.BlobOffset != d.BlobOffset || c.BlobEnd != d.BlobEnd {
		return c.BlobEnd <= d.BlobOffset
	}
	if c.InnerOffset == d.InnerOffset {
		return c.Size == d.Size && c.Digest == d.Digest
	}
	return c.InnerOffset+c.Size <= d.InnerOffset
}

// owner returns the name of the entry that has chunk i.
func (p *parser) owner(i int32) string {
	k, found := slices.BinarySearch(p.starts, int(i))
	for found && k+1 < len(p.starts) && p.starts[k+1] == int(i) {
		k++ // entries without chunks begin where the next one does
	}
	if !found {
		k--
	}
	return p.t.Entries[k].Name
}
