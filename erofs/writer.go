package erofs

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
)

// Options say which image Write makes of a tree.
type Options struct {
	// MinVersion and MaxVersion choose the composefs format version as the
	// C library does (format document 2.3): MinVersion, but 1 if MaxVersion is
	// at least 1 and the tree has a whiteout (a character device 0:0). A
	// MaxVersion below MinVersion counts as MinVersion. So the zero Options
	// give version 0, {0, 1} what mkcomposefs does without flags, and {1, 1}
	// version 1, which composefs-rs and its sealing specification use.
	MinVersion, MaxVersion uint32

	// LargeXattrs allows a node more xattrs than the 32,767 bytes that the C
	// library takes: as many as an EROFS inode can hold, some 256 KiB, no value
	// over 65,535 bytes. Images whose nodes have less are not changed by it.
	LargeXattrs bool

	// Tee, if not nil, receives every byte of the image too, in order: a
	// *verity.Hash there knows the image's digest when Write returns.
	Tee io.Writer

	// Warn, if not nil, is told what the image cannot say about the entry at
	// path, though it is written.
	Warn func(path, what string)
}

// A NodeError says which node of a tree the format cannot hold, and why.
type NodeError struct {
	Path string
	Node *Node
	Err  error
}

// Error names the path.
func (e *NodeError) Error() string { return e.Path + ": " + e.Err.Error() }

// Unwrap returns what is wrong.
func (e *NodeError) Unwrap() error { return e.Err }

// Write writes the composefs image of the tree to w, from its first byte to
// its last in order, in large writes. The bytes depend on nothing but the tree
// (not on the order of Children or Xattrs) and are those that mkcomposefs
// writes, its peculiarities included.
//
// The tree is neither changed nor kept. It must be a tree: a node that is its
// own descendant makes Write run for ever. Of a tree outside the limits of the
// format nothing is written, and the error wraps a *NodeError. Beside
// the tree Write needs about 130 bytes of memory an entry.
func Write(w io.Writer, root *Node, o Options) error {
	b := &builder{options: o}
	if err := b.build(root); err != nil {
		return fmt.Errorf("make image: %w", err)
	}
	if o.Tee != nil {
		w = io.MultiWriter(w, o.Tee)
	}
	out := &output{w: bufio.NewWriterSize(w, 256<<10)}
	if err := b.encode(out); err != nil {
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}

// WriteFile writes the image to path by way of a temporary file beside it. A
// nil error promises that the image and its name survive a power cut; with an
// error what was at path before is still there.
func WriteFile(path string, root *Node, o Options) error {
	f, err := durable.Create(path, 0o644)
	if err != nil {
		return err
	}
	defer f.Abort()
	if err := Write(f, root, o); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return f.Commit()
}

// A builder holds what Write knows of an image beside the tree.
type builder struct {
	options Options
	version uint32
	hasACL  bool

	inodes []inode          // in the order of the image: breadth first
	linked map[*Node]uint32 // nodes that have further names, by inode number

	// ordered has the children of those directories whose Children are not in
	// order as they stand, the root's with the stubs.
	ordered map[*Node][]*Node
	stubs   map[*Node]bool // what withStubs added

	buildSec  int64 // the smallest mtime
	buildNsec uint32

	xattrs xattrTable

	inodesEnd  uint64 // bytes
	dataStart  uint64 // bytes, a multiple of blockSize
	dataBlocks uint64
}

// An inode is what Write keeps for each inode of the image.
type inode struct {
	node    *Node
	nid     uint64
	parent  uint32 // inode number
	first   uint32 // directories: number of the first child that is no link; the others follow it
	subdirs uint32 // directories: children that are directories
	block   uint32 // first of its data blocks, counted from the data area
	blocks  uint32 // data blocks
	xattr   uint32 // bytes of xattrs after the inode
	tail    uint16 // bytes of inline data after the xattrs
	typ     uint8  // directory entry type
	flags   inodeFlags
}

type inodeFlags uint8

const (
	flagCompact     inodeFlags = 1 << iota // 32-byte form
	flagStub                               // one of the 256 whiteouts in the root
	flagWhiteout                           // escaped to a regular file
	flagHasWhiteout                        // directory with an escaped whiteout in it
	flagShares                             // may have xattrs that other inodes have too
)

// build plans the whole image.
func (b *builder) build(root *Node) error {
	if root == nil || root.Link != nil || root.Mode&modeType != modeDir {
		return errors.New("/: the root must be a directory")
	}
	if err := b.survey(root); err != nil {
		return err
	}
	if err := b.number(root); err != nil {
		return err
	}
	if err := b.shareXattrs(); err != nil {
		return err
	}
	return b.layout()
}

// survey goes over the tree once to learn the version and the sizes of what
// the later passes fill.
func (b *builder) survey(root *Node) error {
	o := &b.options
	if o.MinVersion > MaxVersion || o.MaxVersion > MaxVersion {
		return fmt.Errorf("composefs format versions %d to %d: this program knows 0 to %d", o.MinVersion, o.MaxVersion, MaxVersion)
	}
	var entries, pairs, links uint64
	whiteout := false
	dirs := []*Node{root}
	visit := func(n *Node) {
		entries++
		pairs += uint64(len(n.Xattrs)) + 2
		for i := range n.Xattrs {
			if n.Xattrs[i].Name == aclAccess || n.Xattrs[i].Name == aclDefault {
				b.hasACL = true
			}
		}
		whiteout = whiteout || isWhiteout(n)
	}
	visit(root)
	for len(dirs) > 0 {
		d := dirs[len(dirs)-1]
		dirs = dirs[:len(dirs)-1]
		for _, n := range d.Children {
			if n.Link != nil {
				if b.linked == nil {
					b.linked = make(map[*Node]uint32)
				}
				b.linked[n.Link] = math.MaxUint32
				links++
				continue
			}
			visit(n)
			if len(n.Children) > 0 {
				dirs = append(dirs, n)
			}
		}
	}
	if entries+256 >= math.MaxUint32 || links >= math.MaxUint32 {
		return fmt.Errorf("%d entries: the format numbers inodes with 32 bits", entries)
	}
	b.version = o.MinVersion
	if b.version < 1 && o.MaxVersion >= 1 && whiteout {
		b.version = 1
	}
	b.inodes = make([]inode, 0, entries+256)
	b.xattrs.hashes = make([]uint64, 0, pairs+1)
	return nil
}

// isWhiteout reports whether n is what overlayfs uses to hide a name.
func isWhiteout(n *Node) bool { return n.Mode&modeType == modeChar && n.Rdev == 0 }

// number gives every inode its number, breadth first and in byte order of the
// names (format document 2.6), checks the nodes and finds the build time.
func (b *builder) number(root *Node) error {
	b.ordered = map[*Node][]*Node{}
	b.stubs = map[*Node]bool{}
	if err := b.add(root, 0); err != nil {
		return err
	}
	for i := 0; i < len(b.inodes); i++ { // grows as we go
		d := &b.inodes[i]
		if d.typ != TypeDir {
			continue
		}
		if err := b.order(uint32(i)); err != nil {
			return err
		}
		d.first = uint32(len(b.inodes))
		for _, n := range b.children(d.node) {
			if n.Link != nil {
				continue
			}
			if err := b.add(n, uint32(i)); err != nil {
				return err
			}
			if c := &b.inodes[len(b.inodes)-1]; c.typ == TypeDir {
				d.subdirs++
			} else if c.flags&flagWhiteout != 0 {
				d.flags |= flagHasWhiteout
			}
		}
	}
	return b.checkLinks()
}

// children returns the entries of a directory in order.
func (b *builder) children(dir *Node) []*Node {
	if c, ok := b.ordered[dir]; ok {
		return c
	}
	return dir.Children
}

// order checks the names in directory i and has its children in order.
func (b *builder) order(i uint32) error {
	dir := b.inodes[i].node
	byName := func(x, y *Node) int { return cmp.Compare(x.Name, y.Name) }
	children := dir.Children
	for _, n := range children {
		if err := checkName(n.Name); err != nil {
			return &NodeError{b.pathOf(i, n.Name), n, err}
		}
	}
	if i == 0 {
		children = slices.Clone(children)
	}
	if !slices.IsSortedFunc(children, byName) {
		if i != 0 {
			children = slices.Clone(children)
		}
		sortByName(children)
		b.ordered[dir] = children
	}
	for k := 1; k < len(children); k++ {
		if children[k].Name == children[k-1].Name {
			return &NodeError{b.pathOf(i, children[k].Name), children[k], errors.New("two entries of this name")}
		}
	}
	if i == 0 {
		b.ordered[dir] = b.withStubs(dir, children)
	}
	return nil
}

// withStubs adds the whiteouts "00" to "ff" that hide the folders of an object
// store lying under the image, where the tree has no such name (2.5, step 6).
func (b *builder) withStubs(root *Node, children []*Node) []*Node {
	const digits = "0123456789abcdef"
	var label []Xattr
	for _, x := range root.Xattrs {
		if x.Name == selinux {
			label = []Xattr{x}
		}
	}
	all := make([]*Node, 0, len(children)+256)
	for i := range 256 {
		name := string([]byte{digits[i>>4], digits[i&15]})
		for len(children) > 0 && children[0].Name < name {
			all = append(all, children[0])
			children = children[1:]
		}
		if len(children) > 0 && children[0].Name == name {
			continue
		}
		stub := &Node{Name: name, Mode: modeChar | 0o644, UID: root.UID, GID: root.GID, Nlink: 1,
			MtimeSec: root.MtimeSec, MtimeNsec: root.MtimeNsec, Xattrs: label}
		b.stubs[stub] = true
		all = append(all, stub)
	}
	return append(all, children...)
}

func checkName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("an entry may not have the name %q", name)
	case len(name) > MaxName:
		return fmt.Errorf("a name of %d bytes, at most %d are allowed", len(name), MaxName)
	case strings.IndexByte(name, '/') >= 0 || strings.IndexByte(name, 0) >= 0:
		return fmt.Errorf("the name %q has a slash or NUL in it", name)
	}
	return nil
}

// add checks node n and makes it the next inode.
func (b *builder) add(n *Node, parent uint32) error {
	ino := inode{node: n, parent: parent, typ: fileType(n.Mode)}
	switch {
	case isWhiteout(n) && b.stubs[n]:
		ino.flags |= flagStub
	case isWhiteout(n):
		ino.flags |= flagWhiteout
		ino.typ = TypeRegular
	}
	b.inodes = append(b.inodes, ino)
	if err := b.check(&ino); err != nil {
		return b.fault(uint32(len(b.inodes)-1), err)
	}
	if len(b.inodes) == 1 || n.MtimeSec < b.buildSec || n.MtimeSec == b.buildSec && n.MtimeNsec < b.buildNsec {
		b.buildSec, b.buildNsec = n.MtimeSec, n.MtimeNsec
	}
	if _, ok := b.linked[n]; ok {
		b.linked[n] = uint32(len(b.inodes) - 1)
	}
	return nil
}

// check holds a node against the limits of the format (2.11), its xattrs
// excepted.
func (b *builder) check(i *inode) error {
	n := i.node
	switch {
	case i.typ == typeUndefined || n.Mode > math.MaxUint16:
		return fmt.Errorf("mode %#o is not a file type and permissions", n.Mode)
	case n.MtimeNsec >= 1e9:
		return fmt.Errorf("mtime has %d nanoseconds", n.MtimeNsec)
	case len(n.Children) > 0 && i.typ != TypeDir:
		return errors.New("only a directory can have entries")
	case n.Size > math.MaxInt64 && i.typ != TypeDir && i.typ != TypeSymlink:
		return fmt.Errorf("size %d is above 2^63-1", n.Size)
	case i.typ == TypeSymlink && (n.Target == "" || len(n.Target) > MaxTarget || strings.IndexByte(n.Target, 0) >= 0):
		return fmt.Errorf("a symbolic link's target of %d bytes, 1 to %d without NUL are allowed", len(n.Target), MaxTarget)
	case i.typ != TypeRegular || n.Size == 0 || i.flags&flagWhiteout != 0:
		return nil
	case n.Content != nil && uint64(len(n.Content)) != n.Size:
		return fmt.Errorf("content of %d bytes and a size of %d", len(n.Content), n.Size)
	case len(n.Content) > MaxInline:
		return fmt.Errorf("content of %d bytes, at most %d fit into an image", len(n.Content), MaxInline)
	case n.Content != nil:
		return nil
	case len(n.Target) > MaxTarget || strings.IndexByte(n.Target, 0) >= 0:
		return fmt.Errorf("a payload of %d bytes, at most %d without NUL are allowed", len(n.Target), MaxTarget)
	case len(n.Digest) != 0 && len(n.Digest) != 32 && len(n.Digest) != 64:
		return fmt.Errorf("a digest of %d bytes, want 32 (SHA-256) or 64 (SHA-512)", len(n.Digest))
	}
	if _, chunks := chunking(n.Size); chunks > maxChunks {
		return fmt.Errorf("size %d is above the format's limit of 8 PiB", n.Size)
	}
	return nil
}

// external reports whether the file's data is outside the image.
func (i *inode) external() bool {
	return i.typ == TypeRegular && i.flags&flagWhiteout == 0 && i.node.Size > 0 && i.node.Content == nil
}

// checkLinks makes sure that every link leads to an inode that may have
// further names.
func (b *builder) checkLinks() error {
	if len(b.linked) == 0 {
		return nil
	}
	for i := range b.inodes {
		if b.inodes[i].typ != TypeDir {
			continue
		}
		for _, n := range b.inodes[i].node.Children {
			if n.Link == nil {
				continue
			}
			what := ""
			switch to := b.linked[n.Link]; {
			case n.Link.Link != nil:
				what = "another link"
			case to == math.MaxUint32:
				what = "a node that is not in the tree"
			case b.inodes[to].typ == TypeDir:
				what = "a directory"
			default:
				continue
			}
			return &NodeError{b.pathOf(uint32(i), n.Name), n, errors.New("a hard link to " + what)}
		}
	}
	return nil
}

// fault returns err as one of the node of inode i.
func (b *builder) fault(i uint32, err error) error {
	return &NodeError{b.path(i), b.inodes[i].node, err}
}

// path returns the path of inode i for messages.
func (b *builder) path(i uint32) string {
	if i == 0 {
		return "/"
	}
	return b.pathOf(b.inodes[i].parent, b.inodes[i].node.Name)
}

// pathOf returns the path of an entry of directory i.
func (b *builder) pathOf(i uint32, name string) string {
	names := []string{name}
	for ; i != 0; i = b.inodes[i].parent {
		names = append(names, b.inodes[i].node.Name)
	}
	slices.Reverse(names)
	return "/" + strings.Join(names, "/")
}
