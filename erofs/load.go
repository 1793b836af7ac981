package erofs

import (
	"bytes"
	"fmt"
)

// nidSet is a set of inode numbers in pages of 4096.
type nidSet map[uint64]*[64]uint64

// add puts nid into the set and reports whether it was there.
func (s nidSet) add(nid uint64) bool {
	page := s[nid>>12]
	if page == nil {
		page = new([64]uint64)
		s[nid>>12] = page
	}
	word, bit := &page[nid>>6&63], uint64(1)<<(nid&63)
	was := *word&bit != 0
	*word |= bit
	return was
}

// linked returns the inodes that have several names, as keys: link counts are
// whatever the image's author wrote, so they do not say.
func (r *Reader) linked() (map[uint64]string, error) {
	seen, linked := nidSet{}, map[uint64]string{}
	w := r.newWalker()
	for {
		ok, err := w.next(false)
		if err != nil || !ok {
			return linked, err
		}
		if !w.ino.IsDir() && seen.add(w.ino.NID) {
			linked[w.ino.NID] = ""
		}
	}
}

// xattrCache has the shared xattrs that were read, by their place.
type xattrCache map[int64]Xattr

// loadNode returns what the tree's author gave for an inode, as
// composefs-info reads it (format document 2.14): overlay xattrs unescaped or
// turned back into fields, in the image's order. ok is false for the whiteouts
// that Write adds. Strings and slices are copies.
func (r *Reader) loadNode(name string, i *Inode, cache xattrCache) (n Node, ok bool, err error) {
	n = Node{Name: name, Mode: i.Mode, UID: i.UID, GID: i.GID, Nlink: i.Nlink, Rdev: i.Rdev,
		Size: uint64(i.Size), MtimeSec: i.MtimeSec, MtimeNsec: i.MtimeNsec}
	if i.IsWhiteout() {
		if i.Nlink > 1 {
			err = &CorruptError{NID: i.NID, Offset: i.xattrOff, What: fmt.Sprintf("a whiteout with a link count of %d", i.Nlink)}
		}
		return n, false, err
	}
	total := uint64(xattrHeaderSize)
	err = r.eachXattr(i, func(x storedXattr) bool {
		stored := x.prefix + string(x.suffix)
		visible, shown := VisibleXattr(stored)
		switch {
		case stored == redirectXattr && i.external:
			n.Target = payloadOf(x.value)
		case stored == metacopyXattr && i.external:
			n.Digest = bytes.Clone(digestOf(x.value))
		case stored == whiteoutXattr && i.IsRegular():
			n.Mode = n.Mode&^modeType | modeChar
		case stored == whiteoutXattr, stored == whiteoutUser, stored == whiteoutsXattr, stored == whiteoutsUser, !shown:
		default:
			if total += xattrCost(visible, x.value); total > maxXattrArea {
				return false
			}
			v, known := cache[x.pos]
			if !known {
				v = Xattr{visible, bytes.Clone(x.value)}
				if x.pos < i.xattrOff || x.pos >= i.inlineOff {
					cache[x.pos] = v
				}
			}
			n.Xattrs = append(n.Xattrs, v)
		}
		return true
	})
	switch {
	case err != nil:
	case total > maxXattrArea:
		err = &CorruptError{NID: i.NID, Offset: i.xattrOff, What: fmt.Sprintf("xattrs of more than %d bytes", maxXattrArea)}
	case i.IsSymlink():
		n.Target, err = r.Readlink(*i)
	case n.Mode&modeType == modeRegular && i.Size > 0 && !i.external:
		n.Content, err = r.content(*i)
	}
	return n, true, err
}

// Load reads the tree back that a composefs image was written from. Sizes and
// link counts of directories are those in the image; the whiteouts that Write
// adds to the root are left out, as composefs-info leaves them out, and with
// them any character device 0:0 that was not escaped. Of several names of an
// inode the first in depth-first order has the node, the others link to it.
// The tree does not refer to the Reader.
func Load(r *Reader) (*Node, error) {
	if !r.header.Composefs {
		return nil, fmt.Errorf("load tree: not a composefs image")
	}
	linked, err := r.linked()
	if err != nil {
		return nil, fmt.Errorf("load tree: %w", err)
	}
	first := make(map[uint64]*Node, len(linked))
	cache := xattrCache{}
	var way []*Node // the directories on the way to the entry
	w := r.newWalker()
	for {
		ok, err := w.next(false)
		if err != nil {
			return nil, fmt.Errorf("load tree: %w", err)
		}
		if !ok {
			return way[0], nil
		}
		name := string(w.entry.Name)
		node, several := first[w.ino.NID]
		if several {
			node = &Node{Name: name, Link: node}
		} else {
			n, ok, err := r.loadNode(name, &w.ino, cache)
			if err != nil {
				return nil, fmt.Errorf("load tree: %.200q: %w", w.path, err)
			}
			if !ok {
				continue
			}
			node = &n
			if _, several := linked[w.ino.NID]; several {
				first[w.ino.NID] = node
			}
		}
		if w.depth > 0 {
			dir := way[w.depth-1]
			dir.Children = append(dir.Children, node)
		}
		if w.ino.IsDir() {
			way = append(way[:w.depth], node)
		}
	}
}
