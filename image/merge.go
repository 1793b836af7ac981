package image

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// Limits of Linux (linux/limits.h): NAME_MAX, and PATH_MAX with and without
// the NUL at the end.
const (
	maxName   = 255
	maxPath   = 4096
	maxTarget = maxPath - 1
)

// maxInodes bounds what the layers may make together, and with it what paths
// that name thousands of directories each can cost.
const maxInodes = 4 << 20

// Whiteouts (OCI image-spec, layer.md). ".wh..wh." is what aufs keeps for
// itself; of its names only the opaque marker means something.
const (
	whiteout       = ".wh."
	whiteoutPlain  = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// An inode is a file or directory while trees are put together; several names
// may lead to one. Its fields are set by layerTree and overlay alone.
type inode struct {
	e     *toc.Entry // nil: a directory without an entry, or an unresolved link
	layer int

	children map[string]*inode // not nil: a directory
	marks    *marks            // of a directory in a layer's tree; nil: none

	// link is set while a hard link's target is not known; fwd then leads to
	// the inode it turned out to be.
	link *toc.Entry
	fwd  *inode

	nlink uint32
	node  *Node // the first name, in the finished tree
}

// marks say how a directory of a layer's tree lies over the one below.
type marks struct {
	implicit  *toc.Entry // the entry on whose path the directory is; nil: it has one of its own
	ghost     bool       // nothing but whiteouts made it: without a directory below it is not there
	opaque    bool       // a marker file hides all that is below
	whiteouts []string   // names to hide below
}

func (n *inode) isDir() bool { return n.children != nil }

// resolve follows forwarded links.
func (n *inode) resolve() *inode {
	for n.fwd != nil {
		if n.fwd.fwd != nil {
			n.fwd = n.fwd.fwd // halves the path for the next caller
		}
		n = n.fwd
	}
	return n
}

// A merger puts layers over one another.
type merger struct {
	layers []Layer
	root   *inode // of everything up to the current layer
	inodes int    // made so far
	limit  int    // on them
}

// Merge lays the layers over one another, the lowest first, and returns the
// tree as overlayfs would show it. Within a layer the last entry of a path
// counts; a hard link leads to what its target was when it came, in the layer
// or else in the tree below, or to what the layer has there in the end;
// whiteouts hide what is below and nothing of their own layer. Directories
// without an entry have the metadata of the directory below, or root's
// ownership, mode 0755 and time 0.
//
// Private attributes of overlayfs (trusted.overlay.*) are not shown; an escaped
// one (trusted.overlay.overlay.*) is shown as its inner self.
//
// Time is linear in the size of the TOCs. All errors are *EntryError. The tree
// shares memory with the TOCs.
func Merge(layers []Layer) (*Tree, error) { return merge(layers, maxInodes) }

func merge(layers []Layer, limit int) (*Tree, error) {
	m := &merger{layers: layers, root: newDir(0, nil), limit: limit}
	for i := range layers {
		if err := m.add(i); err != nil {
			return nil, err
		}
	}
	return m.finish(), nil
}

// add lays layer i over the tree.
func (m *merger) add(i int) error {
	l := &layerTree{m: m, layer: i, root: newDir(i, &marks{ghost: true})}
	entries := m.layers[i].TOC.Entries
	for k := range entries {
		if err := l.add(&entries[k]); err != nil {
			return m.entryError(i, entries[k].Name, err)
		}
	}
	if err := l.placeWhiteouts(); err != nil {
		return err
	}
	if err := l.resolveLinks(); err != nil {
		return err
	}
	var o overlay
	o.lay(m.root, l.root)
	if o.wrong != nil {
		return m.entryError(i, o.wrong.Name, errors.New("a directory on its path is no directory in the layers below"))
	}
	return nil
}

func (m *merger) entryError(layer int, entry string, err error) error {
	return &EntryError{layer, m.layers[layer].Digest, entry, err}
}

// count makes room for one more inode.
func (m *merger) count() error {
	if m.inodes++; m.inodes > m.limit {
		return fmt.Errorf("more than %d files and directories in the image's layers", m.limit)
	}
	return nil
}

func newDir(layer int, mk *marks) *inode {
	return &inode{layer: layer, children: map[string]*inode{}, marks: mk}
}

// A layerTree is what one layer alone holds.
type layerTree struct {
	m     *merger
	layer int
	root  *inode
	links []*inode // hard links whose target has not come yet
	hides []hide   // whiteouts, in their order
}

// A hide is a whiteout. It is put into the layer's tree when that is done: what
// its directory is in the end is what counts.
type hide struct {
	e     *toc.Entry
	parts []string // of the directory
	name  string   // hidden below, or whiteoutOpaque
}

// splitPath splits an entry's name, or the target of a hard link, into its
// parts. The root has none.
func splitPath(name string) (parts []string, slash bool, err error) {
	switch {
	case len(name) > maxPath:
		return nil, false, fmt.Errorf("the path has %d bytes, the limit is %d", len(name), maxPath)
	case strings.IndexByte(name, 0) >= 0:
		return nil, false, errors.New("the path has a NUL byte")
	case name == "" || name == "/": // "/" is how kaniko names the root
		return nil, true, nil
	case name[0] == '/':
		return nil, false, errors.New("the path is absolute")
	}
	trimmed := strings.TrimRight(name, "/")
	slash = len(trimmed) < len(name)
	parts = make([]string, 0, strings.Count(trimmed, "/")+1)
	for part := range strings.SplitSeq(trimmed, "/") {
		switch {
		case part == ".":
			continue
		case part == "":
			return nil, false, errors.New("the path has an empty part")
		case part == "..":
			return nil, false, errors.New("the path has a part \"..\"")
		case len(part) > maxName:
			return nil, false, fmt.Errorf("a name of %d bytes, the limit is %d", len(part), maxName)
		}
		parts = append(parts, part)
	}
	return parts, slash, nil
}

// add puts one entry into the tree.
func (l *layerTree) add(e *toc.Entry) error {
	parts, slash, err := splitPath(e.Name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if e.Type != toc.Dir {
			return fmt.Errorf("the root is a directory, not a %s", e.Type)
		}
		l.root.setEntry(e)
		return nil
	}
	if slash && e.Type != toc.Dir {
		return fmt.Errorf("the path of a %s ends in a slash", e.Type)
	}
	for i, part := range parts {
		if strings.HasPrefix(part, whiteout) {
			return l.addMark(e, parts[:i], part, i == len(parts)-1)
		}
	}
	if e.Type == toc.Char && e.DevMajor == 0 && e.DevMinor == 0 {
		return l.addMark(e, parts[:len(parts)-1], whiteout+parts[len(parts)-1], true)
	}
	dir, err := l.parent(e, parts[:len(parts)-1], false)
	if err != nil {
		return err
	}
	return l.put(dir, parts, e)
}

// parent walks to the directory that parts name and makes what is missing, as
// ghosts for a whiteout. A whiteout below what is no directory in this layer
// has nothing to hide, as that replaces what is below as a whole, and gets nil:
// umoci writes such whiteouts where a directory became a file.
func (l *layerTree) parent(e *toc.Entry, parts []string, ghost bool) (*inode, error) {
	dir := l.root
	for i := 0; ; i++ {
		if !ghost {
			dir.marks.ghost = false
		}
		if i == len(parts) {
			return dir, nil
		}
		next := dir.children[parts[i]]
		if next == nil {
			if err := l.m.count(); err != nil {
				return nil, err
			}
			next = newDir(l.layer, &marks{implicit: e, ghost: ghost})
			dir.children[parts[i]] = next
		}
		if !next.isDir() && ghost {
			return nil, nil
		}
		if !next.isDir() {
			return nil, fmt.Errorf("%q is no directory", strings.Join(parts[:i+1], "/"))
		}
		dir = next
	}
}

// addMark keeps a whiteout called name of the directory parts.
func (l *layerTree) addMark(e *toc.Entry, parts []string, name string, last bool) error {
	hidden := strings.TrimPrefix(name, whiteout)
	switch {
	case strings.HasPrefix(name, whiteoutPlain):
		if name != whiteoutOpaque || !last {
			return nil
		}
	case !last:
		return fmt.Errorf("a file below the whiteout %q", name)
	case hidden == "" || hidden == "." || hidden == "..":
		return fmt.Errorf("a whiteout of %q", hidden)
	}
	if name != whiteoutOpaque {
		name = hidden
	}
	l.hides = append(l.hides, hide{e, parts, name})
	return nil
}

// placeWhiteouts puts the layer's whiteouts into its tree.
func (l *layerTree) placeWhiteouts() error {
	for _, h := range l.hides {
		dir, err := l.parent(h.e, h.parts, true)
		switch {
		case err != nil:
			return l.m.entryError(l.layer, h.e.Name, err)
		case dir == nil: // below what is no directory
		case h.name == whiteoutOpaque:
			dir.marks.opaque = true
		default:
			dir.marks.whiteouts = append(dir.marks.whiteouts, h.name)
		}
	}
	return nil
}

// setEntry gives the directory n, of a layer's tree, its entry.
func (n *inode) setEntry(e *toc.Entry) {
	n.e = e
	n.marks.implicit, n.marks.ghost = nil, false
}

// put makes e the file of dir that has the path parts.
func (l *layerTree) put(dir *inode, parts []string, e *toc.Entry) error {
	name := parts[len(parts)-1]
	old := dir.children[name]
	switch e.Type {
	case toc.Dir:
		if old == nil || !old.isDir() {
			if err := l.m.count(); err != nil {
				return err
			}
			old = newDir(l.layer, &marks{})
			dir.children[name] = old
		}
		old.setEntry(e)
		return nil
	case toc.Symlink:
		if n := len(e.Linkname); n == 0 || n > maxTarget || strings.IndexByte(e.Linkname, 0) >= 0 {
			return fmt.Errorf("a symbolic link's target has 1 to %d bytes and no NUL, this one %d: %.100q", maxTarget, n, e.Linkname)
		}
	case toc.Hardlink:
		target, err := l.target(e, parts)
		if err != nil {
			return err
		}
		dir.children[name] = target
		return nil
	case toc.Reg, toc.Char, toc.Block, toc.Fifo:
	default:
		return fmt.Errorf("a file of %s", e.Type)
	}
	if err := l.m.count(); err != nil {
		return err
	}
	dir.children[name] = &inode{e: e, layer: l.layer}
	return nil
}

// target finds what the hard link e, whose own name is own, leads to.
func (l *layerTree) target(e *toc.Entry, own []string) (*inode, error) {
	parts, slash, err := splitPath(e.Linkname)
	if err != nil {
		return nil, fmt.Errorf("hard link to %.100q: %w", e.Linkname, err)
	}
	n, found := l.root.walk(parts)
	if !found {
		n, found = l.m.root.walk(parts)
	}
	switch {
	case slash || n != nil && n.isDir():
		return nil, fmt.Errorf("hard link to the directory %.100q", e.Linkname)
	case slices.Equal(parts, own):
		return nil, errSelf(e)
	case n != nil:
		return n, nil
	case found:
		return nil, errNothing(e)
	}
	if err := l.m.count(); err != nil {
		return nil, err
	}
	n = &inode{link: e, layer: l.layer}
	l.links = append(l.links, n)
	return n, nil
}

func errSelf(e *toc.Entry) error    { return fmt.Errorf("hard link to itself, %.100q", e.Linkname) }
func errNothing(e *toc.Entry) error { return fmt.Errorf("hard link to nothing, %.100q", e.Linkname) }

// walk follows parts. It reports found when that settles what is there: an
// inode, or nothing at all because a file is in the way.
func (n *inode) walk(parts []string) (at *inode, found bool) {
	for _, part := range parts {
		if !n.isDir() {
			return nil, true
		}
		if n = n.children[part]; n == nil {
			return nil, false
		}
	}
	return n, true
}

// resolveLinks finds the targets that came after their links. A link may lead
// to another one that waits; as each forwards to what is not itself, no circle
// comes about.
func (l *layerTree) resolveLinks() error {
	for _, n := range l.links {
		parts, _, _ := splitPath(n.link.Linkname) // it was looked at in target
		to, _ := l.root.walk(parts)
		var err error
		switch {
		case to == nil:
			err = errNothing(n.link)
		case to.isDir():
			err = fmt.Errorf("hard link to the directory %.100q", n.link.Linkname)
		case to.resolve() == n:
			err = errSelf(n.link)
		}
		if err != nil {
			return l.m.entryError(l.layer, n.link.Name, err)
		}
		n.fwd = to.resolve()
	}
	return nil
}
