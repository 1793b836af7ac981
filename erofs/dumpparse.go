package erofs

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
)

// A DumpError says what is wrong with a line of a dump.
type DumpError struct {
	Line int // counted from 1
	Err  error
}

// Error names the line.
func (e *DumpError) Error() string { return fmt.Sprintf("dump line %d: %v", e.Line, e.Err) }

// Unwrap returns what is wrong.
func (e *DumpError) Unwrap() error { return e.Err }

const (
	dumpFields   = 11
	maxDumpLine  = 16 << 20 // bytes; only a path tens of thousands of folders deep comes near
	maxXattrText = 65535    // bytes of the xattrs of a line

	// maxDumpMode is the highest MODE. The C parser keeps 32 bits and its writer
	// stores 16; one of its own golden dumps has more, so this is no defect.
	maxDumpMode = math.MaxUint32
)

// ParseDump reads a tree from composefs-dump(5) text, section 3 of the format
// document. Where the C parser takes damaged input by accident (the defects in
// 2.15: integers with signs or too large, nanoseconds above a second, a bad
// digest of an external file, a hard link to a directory) the line is refused
// with a *DumpError. Children are in byte order in the result, and links
// lead to nodes that are no links. A nil error promises a tree that Write
// takes, save for what only the choice of a version brings to light.
func ParseDump(r io.Reader) (*Node, error) {
	d, err := ReadDump(r, false)
	if err != nil {
		return nil, err
	}
	return d.Root, nil
}

// A Dump is a tree that knows the lines it was read from.
type Dump struct {
	Root  *Node
	slabs [][]Node  // the nodes in the order of the lines
	moved []settled // directories whose nodes are in another order
}

// A settled directory has its entries where others were when they were read.
type settled struct {
	entries []*Node
	from    []int32
}

// Line returns the number of the line, counted from 1, that n was read from, or
// 0 if it is not of this dump. It looks through all nodes.
func (d *Dump) Line(n *Node) int {
	for _, m := range d.moved {
		if k := slices.Index(m.entries, n); k >= 0 {
			n = m.entries[m.from[k]]
			break
		}
	}
	line := 0
	for _, slab := range d.slabs {
		for i := range slab {
			line++
			if &slab[i] == n {
				return line
			}
		}
	}
	return 0
}

type dumpParser struct {
	strict bool
	root   *Node
	line   int

	// path is the last entry's path, and open the directories on the way to
	// it, so that an entry near the last one is found without a walk.
	path []byte
	open []openDir

	// loose has the directories that got many entries out of order, with those
	// of their entries that are directories; they are sorted at the end. All
	// others are always in order.
	loose map[*Node]*looseDir
	// last is the directory that was asked about last, and lastLoose what loose
	// has of it: entries of a directory come one after the other.
	last      *Node
	lastLoose *looseDir

	links []dumpLink
	nodes []Node   // the rest of the last slab
	slabs [][]Node // a node for each line
}

type looseDir struct {
	depth int // of the directory
	dirs  map[string]*Node
}

type openDir struct {
	end int // path[:end] names it
	dir *Node
}

type dumpLink struct {
	node   *Node // until it is resolved its Link is itself
	target []byte
	line   int
}

// ReadDump is ParseDump for who wants to know lines afterwards. strict asks for
// what the C tools ask for when CFS_PARSE_STRICT is set: RDEV is 0 on all but
// devices, a symbolic link's SIZE is the length of its target and its CONTENT
// "-", and the last line ends with a newline.
func ReadDump(r io.Reader, strict bool) (*Dump, error) {
	p := &dumpParser{strict: strict, loose: map[*Node]*looseDir{}}
	in := bufio.NewReaderSize(r, 64<<10)
	var long []byte
	for {
		line, err := in.ReadSlice('\n')
		if err == bufio.ErrBufferFull {
			if len(long)+len(line) > maxDumpLine {
				return nil, &DumpError{p.line + 1, fmt.Errorf("longer than %d bytes", maxDumpLine)}
			}
			long = append(long, line...)
			continue
		}
		if err != nil && err != io.EOF {
			return nil, fmt.Errorf("read dump: %w", err)
		}
		if len(long) > 0 {
			long = append(long, line...)
			line = long
		}
		end := err == io.EOF
		if end && len(line) == 0 {
			break
		}
		p.line++
		text, terminated := bytes.CutSuffix(line, []byte{'\n'})
		if perr := p.entry(text); perr != nil {
			return nil, &DumpError{p.line, perr}
		}
		if strict && !terminated {
			return nil, &DumpError{p.line, errors.New("the last line does not end")}
		}
		if end {
			break
		}
		long = long[:0]
	}
	if p.root == nil {
		return nil, &DumpError{1, errors.New("the dump is empty, want an entry for /")}
	}
	d := &Dump{Root: p.root, slabs: p.slabs}
	if err := p.order(d); err != nil {
		return nil, err
	}
	if err := p.resolveLinks(); err != nil {
		return nil, err
	}
	return d, nil
}

// order sorts the directories that are loose. With hard links in the dump the
// nodes stay where they are, as the links lead to places.
func (p *dumpParser) order(d *Dump) error {
	dirs := slices.Collect(maps.Keys(p.loose))
	// The deepest first: its node may move when the one above is sorted.
	slices.SortFunc(dirs, func(x, y *Node) int { return cmp.Compare(p.loose[y].depth, p.loose[x].depth) })
	for _, dir := range dirs {
		c := dir.Children
		if len(p.links) > 0 {
			sortByName(c)
		} else {
			d.moved = append(d.moved, settled{c, settle(c)})
		}
		for k := 1; k < len(c); k++ {
			if c[k].Name == c[k-1].Name {
				return &DumpError{max(d.Line(c[k-1]), d.Line(c[k])), fmt.Errorf("%.200q: a second entry of this name", c[k].Name)}
			}
		}
	}
	clear(p.loose)
	return nil
}

// fields are the text of a line's fixed fields; a missing one is empty.
type fields [dumpFields][]byte

const (
	fPath = iota
	fSize
	fMode
	fNlink
	fUID
	fGID
	fRdev
	fMtime
	fPayload
	fContent
	fDigest
)

var fieldNames = [dumpFields]string{"PATH", "SIZE", "MODE", "NLINK", "UID", "GID", "RDEV", "MTIME", "PAYLOAD", "CONTENT", "DIGEST"}

// entry takes one line without its newline.
func (p *dumpParser) entry(line []byte) error {
	if bytes.IndexByte(line, 0) >= 0 {
		return errors.New("a NUL byte")
	}
	var f fields
	rest, more := line, true
	for i := range f {
		f[i], rest, more = bytes.Cut(rest, []byte{' '})
		if !more {
			break
		}
	}
	path, err := unescapeName(f[fPath])
	if err != nil {
		return fmt.Errorf("PATH: %w", err)
	}
	parent, name, err := p.place(path)
	if err != nil {
		return err
	}
	n := p.newNode()
	n.Name = string(name)
	if mode, isLink := bytes.CutPrefix(f[fMode], []byte{'@'}); isLink && parent != nil {
		err = p.link(n, mode, f[fPayload])
	} else {
		err = p.fill(n, &f, rest)
	}
	if err != nil {
		return fmt.Errorf("%.200q: %w", path, err)
	}
	if parent == nil {
		if n.Mode&modeType != modeDir {
			return errors.New("the root must be a directory")
		}
		p.root = n
	} else {
		p.insert(parent, n)
	}
	if n.Link == nil && n.Mode&modeType == modeDir {
		end := len(path)
		if parent == nil {
			end = 0
		}
		p.open = append(p.open, openDir{end, n})
	}
	p.path = append(p.path[:0], path...)
	return nil
}

// newNode returns a zero node. They come in slabs, as the tree lives and dies
// as a whole.
func (p *dumpParser) newNode() *Node {
	if len(p.nodes) == 0 {
		p.nodes = make([]Node, min(max(p.line, 8), 256))
		p.slabs = append(p.slabs, p.nodes)
	}
	n := &p.nodes[0]
	p.nodes = p.nodes[1:]
	return n
}

// place finds the directory that an entry belongs into, nil for the root
// itself, and leaves the way to it in p.open.
func (p *dumpParser) place(path []byte) (parent *Node, name []byte, err error) {
	switch {
	case len(path) == 0:
		return nil, nil, errors.New("an empty PATH")
	case p.root == nil && string(path) != "/":
		return nil, nil, fmt.Errorf("the first entry is %.200q, want /", path)
	case p.root == nil:
		return nil, nil, nil
	}
	slash := bytes.LastIndexByte(path, '/')
	name = path[slash+1:]
	if err := checkName(string(name)); err != nil {
		if len(bytes.Trim(path, "/")) == 0 {
			err = errors.New("a second entry for the root")
		} else if len(name) == 0 {
			err = errors.New("a PATH ending in a slash")
		}
		return nil, nil, fmt.Errorf("%.200q: %w", path, err)
	}
	for {
		top := p.open[len(p.open)-1]
		if top.end == 0 || top.end <= slash && path[top.end] == '/' && bytes.Equal(path[:top.end], p.path[:top.end]) {
			break
		}
		p.open = p.open[:len(p.open)-1]
	}
	top := p.open[len(p.open)-1]
	dir := top.dir
	for at := top.end; at < slash; {
		start := at
		for start < slash && path[start] == '/' {
			start++
		}
		if start == slash {
			break
		}
		at = start + bytes.IndexByte(path[start:], '/')
		next := p.find(dir, path[start:at])
		switch {
		case next == nil:
			return nil, nil, fmt.Errorf("%.200q: the parent directory has no entry before it", path)
		case next.Link != nil || next.Mode&modeType != modeDir:
			return nil, nil, fmt.Errorf("%.200q: the parent is not a directory", path)
		}
		dir = next
		p.open = append(p.open, openDir{at, dir})
	}
	if p.find(dir, name) != nil {
		return nil, nil, fmt.Errorf("%.200q: a second entry for this path", path)
	}
	return dir, name, nil
}

// find returns the entry of a directory, or nil. Of a loose one it knows the
// directories only.
func (p *dumpParser) find(dir *Node, name []byte) *Node {
	if l := p.looseOf(dir); l != nil {
		return l.dirs[string(name)]
	}
	c := dir.Children
	if len(c) == 0 || c[len(c)-1].Name < string(name) {
		return nil
	}
	if k, ok := slices.BinarySearchFunc(c, name, func(n *Node, name []byte) int { return cmp.Compare(n.Name, string(name)) }); ok {
		return c[k]
	}
	return nil
}

// insert adds an entry that find does not know.
func (p *dumpParser) insert(dir, n *Node) {
	const few = 128 // moving so many pointers costs less than sorting at the end
	c := dir.Children
	if l := p.looseOf(dir); l != nil {
		l.add(n)
	} else if len(c) > 0 && c[len(c)-1].Name > n.Name {
		if len(c) < few {
			k, _ := slices.BinarySearchFunc(c, n.Name, func(n *Node, name string) int { return cmp.Compare(n.Name, name) })
			dir.Children = slices.Insert(c, k, n)
			return
		}
		l = &looseDir{depth: len(p.open), dirs: map[string]*Node{}}
		for _, n := range c {
			l.add(n)
		}
		l.add(n)
		p.loose[dir], p.last = l, nil
	}
	dir.Children = append(c, n)
}

// looseOf returns what loose has of a directory, nil if it is in order.
func (p *dumpParser) looseOf(dir *Node) *looseDir {
	if len(p.loose) == 0 {
		return nil
	}
	if p.last != dir {
		p.last, p.lastLoose = dir, p.loose[dir]
	}
	return p.lastLoose
}

// add notes an entry.
func (l *looseDir) add(n *Node) {
	if n.Link == nil && n.Mode&modeType == modeDir {
		l.dirs[n.Name] = n
	}
}

// link takes a line whose MODE begins with "@": of the fields only PATH, MODE
// and PAYLOAD count.
func (p *dumpParser) link(n *Node, mode, payload []byte) error {
	m, err := parseUint(mode, 8, maxDumpMode)
	if err != nil {
		return fmt.Errorf("MODE: %w", err)
	}
	if t := fileType(uint32(m)); t == typeUndefined || t == TypeDir {
		return fmt.Errorf("MODE: a hard link cannot be of mode @%o", m)
	}
	if string(payload) == "-" {
		return errors.New("PAYLOAD: a hard link needs a target")
	}
	target, err := unescapeName(payload)
	if err != nil {
		return fmt.Errorf("PAYLOAD: %w", err)
	}
	if len(target) == 0 {
		return errors.New("PAYLOAD: a hard link needs a target")
	}
	n.Link = n
	p.links = append(p.links, dumpLink{n, bytes.Clone(target), p.line})
	return nil
}

// fill takes a line that is no hard link.
func (p *dumpParser) fill(n *Node, f *fields, xattrs []byte) error {
	var err error
	number := func(field int, base, most uint64) uint64 {
		v, e := parseUint(f[field], base, most)
		if e != nil && err == nil {
			err = fmt.Errorf("%s: %w", fieldNames[field], e)
		}
		return v
	}
	n.Size = number(fSize, 10, math.MaxUint64)
	n.Mode = uint32(number(fMode, 8, maxDumpMode)) & math.MaxUint16
	n.Nlink = uint32(number(fNlink, 10, math.MaxUint32))
	n.UID = uint32(number(fUID, 10, math.MaxUint32))
	n.GID = uint32(number(fGID, 10, math.MaxUint32))
	n.Rdev = uint32(number(fRdev, 10, math.MaxUint32))
	if err != nil {
		return err
	}
	if n.MtimeSec, n.MtimeNsec, err = parseTime(f[fMtime]); err != nil {
		return fmt.Errorf("MTIME: %w", err)
	}
	typ := fileType(n.Mode)
	if typ == typeUndefined {
		return fmt.Errorf("MODE: %o has no file type", n.Mode)
	}
	if typ != TypeChar && typ != TypeBlock {
		if p.strict && n.Rdev != 0 {
			return errors.New("RDEV: not 0 on something that is no device")
		}
		n.Rdev = 0
	}
	if err := p.data(n, typ, f); err != nil {
		return err
	}
	if len(xattrs) > 0 {
		return n.parseXattrs(xattrs)
	}
	return nil
}

// data takes the fields that say what an entry holds.
func (p *dumpParser) data(n *Node, typ uint8, f *fields) error {
	var payload, content []byte
	var err error
	if string(f[fPayload]) != "-" {
		if payload, err = unescapeName(f[fPayload]); err != nil {
			return fmt.Errorf("PAYLOAD: %w", err)
		}
		if len(payload) > MaxTarget {
			return fmt.Errorf("PAYLOAD: %d bytes, at most %d are allowed", len(payload), MaxTarget)
		}
	}
	hasContent := string(f[fContent]) != "-"
	if hasContent {
		if content, err = unescape(f[fContent]); err != nil {
			return fmt.Errorf("CONTENT: %w", err)
		}
	}
	digest := f[fDigest]
	if string(digest) != "-" {
		if digest, err = unescapeName(digest); err != nil {
			return fmt.Errorf("DIGEST: %w", err)
		}
	}
	switch {
	case hasContent && uint64(len(content)) != n.Size:
		return fmt.Errorf("CONTENT: %d bytes, but SIZE is %d", len(content), n.Size)
	case typ == TypeSymlink:
		if len(payload) == 0 {
			return errors.New("PAYLOAD: a symbolic link needs a target")
		}
		if p.strict && (hasContent || n.Size != uint64(len(payload))) {
			return fmt.Errorf("SIZE, CONTENT: want %d and - for a symbolic link", len(payload))
		}
		n.Target = string(payload)
		return nil
	case len(content) > MaxInline:
		return fmt.Errorf("CONTENT: %d bytes, at most %d fit into an image", len(content), MaxInline)
	case typ == TypeDir:
		return nil
	case n.Size > math.MaxInt64:
		return fmt.Errorf("SIZE: %d is above 2^63-1", n.Size)
	case typ != TypeRegular:
		return nil
	}
	n.Target = string(payload)
	if hasContent {
		n.Content = append(make([]byte, 0, len(content)), content...)
	}
	if n.Size == 0 || hasContent {
		return nil // the digest does not matter and may be malformed
	}
	if _, chunks := chunking(n.Size); chunks > maxChunks {
		return fmt.Errorf("SIZE: %d is above the format's limit of 8 PiB", n.Size)
	}
	if string(f[fDigest]) != "-" {
		if len(digest) != 64 && len(digest) != 128 {
			return fmt.Errorf("DIGEST: %d characters, want 64 or 128", len(digest))
		}
		n.Digest = make([]byte, len(digest)/2)
		if _, err := hex.Decode(n.Digest, digest); err != nil {
			return fmt.Errorf("DIGEST: %w", err)
		}
	}
	return nil
}

// parseXattrs takes the KEY=VALUE fields. The last of equal keys wins.
func (n *Node) parseXattrs(text []byte) error {
	if len(text) > maxXattrText {
		return fmt.Errorf("xattrs of %d bytes of text, at most %d are allowed", len(text), maxXattrText)
	}
	total := uint64(xattrHeaderSize)
	n.Xattrs = make([]Xattr, 0, 1+bytes.Count(text, []byte{' '}))
	for len(text) > 0 {
		var field []byte
		field, text, _ = bytes.Cut(text, []byte{' '})
		key, value, ok := bytes.Cut(field, []byte{'='})
		if !ok {
			return fmt.Errorf("xattr %.100q: no =", field)
		}
		key, err := unescapeName(key)
		if err != nil {
			return fmt.Errorf("xattr: %w", err)
		}
		if len(key) == 0 || len(key) > maxXattrName {
			return fmt.Errorf("xattr: a name of %d bytes, 1 to %d are allowed", len(key), maxXattrName)
		}
		if value, err = unescape(value); err != nil {
			return fmt.Errorf("xattr %q: %w", key, err)
		}
		x := Xattr{string(key), append(make([]byte, 0, len(value)), value...)}
		k := n.findXattr(x.Name)
		if k >= 0 {
			total -= xattrCost(x.Name, n.Xattrs[k].Value)
			n.Xattrs[k] = x
		} else {
			n.Xattrs = append(n.Xattrs, x)
		}
		if total += xattrCost(x.Name, x.Value); total > maxXattrs {
			return fmt.Errorf("xattrs of more than %d bytes", maxXattrs)
		}
	}
	return nil
}

// findXattr returns the place of the xattr in n, or -1. It looks through them
// all: the account of xattrs keeps them to a few thousand.
func (n *Node) findXattr(name string) int {
	return slices.IndexFunc(n.Xattrs, func(x Xattr) bool { return x.Name == name })
}

// resolveLinks finds what the hard links lead to, through other links. Each
// link is followed once.
func (p *dumpParser) resolveLinks() error {
	var index map[*Node]int // of all links, made when a link leads to another
	var chain []*Node
	var target []byte // of the last look-up, often that of the next one too
	var found *Node
	for i := range p.links {
		chain = chain[:0]
		at, k := p.links[i].node, i
		for at.Link == at {
			if k < 0 {
				if index == nil {
					index = make(map[*Node]int, len(p.links))
					for i := range p.links {
						index[p.links[i].node] = i
					}
				}
				k = index[at]
			}
			at.Link = nil // on the way
			chain = append(chain, at)
			l := &p.links[k]
			if !bytes.Equal(target, l.target) {
				target, found = l.target, p.lookup(l.target)
			}
			if at, k = found, -1; at == nil {
				return &DumpError{l.line, fmt.Errorf("PAYLOAD: there is no %.200q to link to", target)}
			}
			switch {
			case at.Link != nil:
			case at.Mode == 0: // only links have none
				return &DumpError{l.line, fmt.Errorf("%.200q: the hard links lead in a circle", target)}
			case at.Mode&modeType == modeDir:
				return &DumpError{l.line, fmt.Errorf("PAYLOAD: a hard link to the directory %.200q", target)}
			}
		}
		if at.Link != nil {
			at = at.Link
		}
		for _, n := range chain {
			n.Link = at
		}
	}
	return nil
}

// lookup returns the entry at path in the finished tree, or nil.
func (p *dumpParser) lookup(path []byte) *Node {
	n := p.root
	for {
		path = bytes.TrimLeft(path, "/")
		if len(path) == 0 || n.Link != nil {
			break
		}
		var name []byte
		name, path, _ = bytes.Cut(path, []byte{'/'})
		if n = p.find(n, name); n == nil {
			return nil
		}
	}
	if len(path) > 0 {
		return nil
	}
	return n
}

// parseUint reads digits of the base and nothing else.
func parseUint(b []byte, base, most uint64) (uint64, error) {
	var v uint64
	for _, c := range b {
		d := uint64(c) - '0'
		if d >= base {
			return 0, fmt.Errorf("%.40q is not a number of base %d", b, base)
		}
		if v > (math.MaxUint64-d)/base {
			return 0, fmt.Errorf("%.40q is too large", b)
		}
		v = v*base + d
	}
	if len(b) == 0 {
		return 0, errors.New("no number")
	}
	if v > most {
		return 0, fmt.Errorf("%.40q is too large", b)
	}
	return v, nil
}

// parseTime reads "sec.nsec"; "1.1" is a second and a nanosecond.
func parseTime(b []byte) (sec int64, nsec uint32, err error) {
	s, ns, ok := bytes.Cut(b, []byte{'.'})
	if !ok {
		return 0, 0, fmt.Errorf("%.40q is not SECONDS.NANOSECONDS", b)
	}
	s, negative := bytes.CutPrefix(s, []byte{'-'})
	most := uint64(math.MaxInt64)
	if negative {
		most++
	}
	v, err := parseUint(s, 10, most)
	if err != nil {
		return 0, 0, err
	}
	n, err := parseUint(ns, 10, 999999999)
	if err != nil {
		return 0, 0, err
	}
	if negative {
		v = -v
	}
	return int64(v), uint32(n), nil
}

// unescapeName is unescape for what is a C string: it ends at a NUL.
func unescapeName(b []byte) ([]byte, error) {
	b, err := unescape(b)
	b, _, _ = bytes.Cut(b, []byte{0})
	return b, err
}

// unescape returns what a field stands for: b itself if nothing is escaped.
func unescape(b []byte) ([]byte, error) {
	k := bytes.IndexByte(b, '\\')
	if k < 0 {
		return b, nil
	}
	out := append(make([]byte, 0, len(b)), b[:k]...)
	for b = b[k:]; len(b) > 0; {
		if b[0] != '\\' {
			out, b = append(out, b[0]), b[1:]
			continue
		}
		if len(b) < 2 {
			return nil, errors.New("a backslash at the end")
		}
		c := b[1]
		switch c {
		case '\\':
		case 'n':
			c = '\n'
		case 'r':
			c = '\r'
		case 't':
			c = '\t'
		case 'x':
			var v [1]byte
			if len(b) < 4 {
				return nil, fmt.Errorf("%q is not an escape", b)
			}
			if _, err := hex.Decode(v[:], b[2:4]); err != nil {
				return nil, fmt.Errorf("%q is not an escape", b[:4])
			}
			c = v[0]
			b = b[2:]
		default:
			return nil, fmt.Errorf("%q is not an escape", b[:2])
		}
		out, b = append(out, c), b[2:]
	}
	return out, nil
}
