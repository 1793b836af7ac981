package image

import (
	"slices"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// An overlay is one layer's tree being laid over the tree below.
type overlay struct {
	wrong *toc.Entry // an entry with a parent that is no directory below, the first by name
}

// lay lays the directory upper of the layer over the directory lower.
func (o *overlay) lay(lower, upper *inode) {
	mk := upper.marks
	if mk.opaque || upper.e != nil && hasOpaque(upper.e.Xattrs) {
		lower.children = map[string]*inode{}
	}
	for _, name := range mk.whiteouts {
		delete(lower.children, name)
	}
	if upper.e != nil {
		lower.e, lower.layer = upper.e, upper.layer
	}
	for name, u := range upper.children {
		if !u.isDir() {
			lower.children[name] = u.resolve()
			continue
		}
		l := lower.children[name]
		switch implicit := u.marks.implicit; {
		case l != nil && l.isDir():
			o.lay(l, u)
		case l != nil && u.marks.ghost && l.resolve().e.Type != toc.Symlink: // whiteouts of what cannot be there
		case l != nil && implicit != nil:
			if o.wrong == nil || implicit.Name < o.wrong.Name {
				o.wrong = implicit
			}
		case !u.marks.ghost:
			adopt(u)
			lower.children[name] = u
		}
	}
}

// adopt turns a directory of a layer, below which there is none, into one of
// the merged tree.
func adopt(u *inode) {
	u.marks = nil
	for name, c := range u.children {
		switch {
		case !c.isDir():
			if c.fwd != nil {
				u.children[name] = c.resolve()
			}
		case c.marks.ghost:
			delete(u.children, name)
		default:
			adopt(c)
		}
	}
}

// finish makes nodes of the merged inodes.
func (m *merger) finish() *Tree {
	t := &Tree{Names: 1}
	t.tally(m.root)
	b := &builder{nodes: make([]Node, t.Names)}
	t.Root = b.node("")
	b.fill(t.Root, m.root)
	return t
}

// tally counts names, and the links to each inode.
func (t *Tree) tally(dir *inode) {
	t.Dirs++
	dir.nlink = 2
	t.Names += len(dir.children)
	for _, n := range dir.children {
		if n.isDir() {
			dir.nlink++
			t.tally(n)
			continue
		}
		if n.nlink++; n.nlink == 1 && n.e.Type == toc.Reg {
			t.Files++
			t.Bytes += n.e.Size
		}
	}
}

// A builder gives out nodes from one allocation.
type builder struct{ nodes []Node }

func (b *builder) node(name string) *Node {
	n := &b.nodes[0]
	b.nodes = b.nodes[1:]
	n.Name = name
	return n
}

// fill makes n what in says, with everything below it.
func (b *builder) fill(n *Node, in *inode) {
	n.Nlink, n.Layer = in.nlink, in.layer
	if e := in.e; e != nil {
		n.Mode = e.Mode & 0o7777
		n.UID, n.GID = e.UID, e.GID
		n.MtimeSec, n.MtimeNsec = e.MtimeSec, e.MtimeNsec
		n.Xattrs = shownXattrs(e.Xattrs)
		switch e.Type {
		case toc.Dir:
			n.Mode |= ModeDir
		case toc.Reg:
			n.Mode |= ModeReg
			n.Size, n.Content, n.Chunks = e.Size, e.Digest, e.Chunks
		case toc.Symlink:
			n.Mode = ModeSymlink | 0o777 // Linux knows no other
			n.Target, n.Size = e.Linkname, int64(len(e.Linkname))
		case toc.Char:
			n.Mode |= ModeChar
			n.Rdev = Rdev(e.DevMajor, e.DevMinor)
		case toc.Block:
			n.Mode |= ModeBlock
			n.Rdev = Rdev(e.DevMajor, e.DevMinor)
		case toc.Fifo:
			n.Mode |= ModeFifo
		}
	} else {
		n.Mode = ModeDir | 0o755
	}
	if !in.isDir() {
		return
	}
	names := make([]string, 0, len(in.children))
	for name := range in.children {
		names = append(names, name)
	}
	slices.Sort(names)
	n.Children = make([]*Node, len(names))
	for i, name := range names {
		c, cn := in.children[name], b.node(name)
		n.Children[i] = cn
		if c.node != nil {
			cn.Link = c.node
			continue
		}
		if !c.isDir() {
			c.node = cn
		}
		b.fill(cn, c)
	}
}

// overlayfs keeps attributes of its own under this prefix, hides them, and
// shows those that have it twice with one less (kernel, overlayfs.rst,
// "Nesting overlayfs mounts").
const overlayPrefix = "trusted.overlay."

// hasOpaque reports whether a directory with these attributes hides what is
// below it (overlayfs.rst, "Whiteouts and opaque directories").
func hasOpaque(xs []toc.Xattr) bool {
	return slices.ContainsFunc(xs, func(x toc.Xattr) bool {
		return x.Name == overlayPrefix+"opaque" && string(x.Value) == "y"
	})
}

// shownXattrs returns xs as overlayfs lists them, sorted by name.
func shownXattrs(xs []toc.Xattr) []toc.Xattr {
	private := func(x toc.Xattr) bool { return strings.HasPrefix(x.Name, overlayPrefix) }
	if !slices.ContainsFunc(xs, private) {
		return xs
	}
	var shown []toc.Xattr
	for _, x := range xs {
		if rest, ok := strings.CutPrefix(x.Name, overlayPrefix); ok {
			if !strings.HasPrefix(rest, "overlay.") {
				continue
			}
			x.Name = "trusted." + rest
		}
		shown = append(shown, x)
	}
	slices.SortFunc(shown, func(a, b toc.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return shown
}
