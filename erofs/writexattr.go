package erofs

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
)

// An xattrTable finds the xattrs that several inodes have, which the image
// stores once (format document 2.7).
type xattrTable struct {
	hashes []uint64 // of each (name, value), inode after inode; nil after shareXattrs
	seed   maphash.Seed

	shared []sharedXattr
	index  map[string]uint32 // key of a (name, value) to its place in shared
	size   uint64            // bytes of the table in the image

	key   []byte  // scratch of find
	list  []Xattr // scratch of xattrsOf
	value []byte  // scratch of xattrsOf
}

type sharedXattr struct {
	Xattr
	uses   uint32
	offset uint32 // in bytes, from the start of the table
}

// setter makes changes to a list of xattrs and keeps the account that the C
// library keeps of them ("xattr budget" in 2.5): it starts at zero whatever
// the node has, and it wraps.
type setter struct {
	list   []Xattr
	budget uint64
	err    error
}

// xattrCost is what an xattr counts in the account of its node.
func xattrCost(name string, value []byte) uint64 { return uint64(7 + len(name) + len(value)) }

func (s *setter) set(name string, value []byte) {
	k := slices.IndexFunc(s.list, func(x Xattr) bool { return x.Name == name })
	if k >= 0 {
		if s.budget -= xattrCost(name, s.list[k].Value); len(s.list) == 1 {
			s.budget = xattrHeaderSize
		}
		s.list[k].Value = value
	} else {
		if len(s.list) == 0 {
			s.budget += xattrHeaderSize
		}
		s.list = append(s.list, Xattr{name, value})
	}
	if s.budget += xattrCost(name, value); s.budget > maxXattrs && s.err == nil {
		s.err = fmt.Errorf("the xattrs that composefs adds do not fit: %s would replace a longer value (at most %d bytes are counted)", name, maxXattrs)
	}
}

// xattrsOf returns the xattrs of an inode as they are stored, in byte order of
// their names. The result is valid until the next call.
func (b *builder) xattrsOf(ino *inode, root bool) ([]Xattr, error) {
	n, t := ino.node, &b.xattrs
	s := setter{list: t.list[:0]}
	for _, x := range n.Xattrs {
		s.list = append(s.list, Xattr{StoredXattr(x.Name), x.Value})
	}
	if ino.external() {
		// The metacopy value is overlayfs's struct ovl_metacopy: version 0,
		// length, flags 0, algorithm 1 or 2, digest.
		t.value = append(t.value[:0], 0, byte(4+len(n.Digest)), 0, byte(len(n.Digest)/32))
		t.value = append(t.value, n.Digest...)
		if len(n.Digest) == 0 {
			t.value = t.value[:0]
		}
		metacopy := len(t.value)
		t.value = append(append(t.value, '/'), n.Target...)
		s.set(metacopyXattr, t.value[:metacopy:metacopy])
		if n.Target != "" {
			s.set(redirectXattr, t.value[metacopy:])
		}
	}
	if ino.flags&flagWhiteout != 0 {
		s.set(whiteoutXattr, nil)
		s.set(whiteoutUser, nil)
	}
	if ino.flags&flagHasWhiteout != 0 {
		s.set(whiteoutsXattr, nil)
		s.set(whiteoutsUser, nil)
		if b.version >= 1 {
			s.set(nestedOpaque, []byte{'x'})
			s.set(nestedUser, []byte{'x'})
		}
	}
	if root {
		s.set(opaqueXattr, []byte{'y'})
	}
	t.list = s.list
	slices.SortFunc(s.list, func(x, y Xattr) int { return cmp.Compare(x.Name, y.Name) })
	return s.list, s.err
}

// checkXattrs holds the xattrs of a node against the limits of the format.
func (b *builder) checkXattrs(i uint32, stored []Xattr) error {
	ino := &b.inodes[i]
	total := uint64(xattrHeaderSize)
	for _, x := range ino.node.Xattrs {
		switch {
		case x.Name == "" || len(x.Name) > maxXattrName || strings.IndexByte(x.Name, 0) >= 0:
			return fmt.Errorf("an xattr's name of %d bytes, 1 to %d without NUL are allowed", len(x.Name), maxXattrName)
		case len(x.Value) > maxXattrValue:
			return fmt.Errorf("xattr %q of %d bytes, at most %d are allowed", x.Name, len(x.Value), maxXattrValue)
		case x.Name == opaqueXattr && bytes.Equal(x.Value, []byte{'y'}) &&
			ino.flags&flagHasWhiteout != 0 && b.version >= 1 && b.options.Warn != nil:
			b.options.Warn(b.path(i), "the directory is opaque and has a whiteout in it; the format keeps only the whiteout")
		}
		if !b.marks(ino, x) {
			total += xattrCost(x.Name, x.Value)
		}
	}
	limit := uint64(maxXattrs)
	if b.options.LargeXattrs {
		limit = maxXattrArea
	}
	if total > limit {
		return fmt.Errorf("xattrs of %d bytes, at most %d are allowed", total, limit)
	}
	for k := 1; k < len(stored); k++ {
		if stored[k].Name == stored[k-1].Name {
			return fmt.Errorf("xattr %q twice", stored[k].Name)
		}
	}
	return nil
}

// marks reports whether Write sets x on the inode anyhow: a tree that was read
// back from an image has it too, on top of what its author was allowed.
func (b *builder) marks(ino *inode, x Xattr) bool {
	return ino.flags&flagHasWhiteout != 0 && b.version >= 1 && string(x.Value) == "x" &&
		(x.Name == nestedUser || StoredXattr(x.Name) == nestedOpaque)
}

// entrySize returns the bytes that an xattr takes in an inode or in the table.
func entrySize(x Xattr) uint64 {
	_, suffix := splitXattr(x.Name)
	return roundUp(uint64(xattrEntrySize+len(suffix)+len(x.Value)), 4)
}

// shareXattrs checks all xattrs, finds those that occur in several inodes,
// lays the shared table out and leaves in each inode the size of its xattrs.
//
// Most pairs occur once (the redirects), so they are not kept: a first pass
// hashes all pairs, a second one compares those whose hash came up again.
func (b *builder) shareXattrs() error {
	t := &b.xattrs
	t.seed = maphash.MakeSeed()
	for i := range b.inodes {
		ino := &b.inodes[i]
		list, err := b.xattrsOf(ino, i == 0)
		if err == nil {
			err = b.checkXattrs(uint32(i), list)
		}
		if err != nil {
			return b.fault(uint32(i), err)
		}
		if len(list) > 0 {
			ino.xattr = xattrHeaderSize
		}
		for _, x := range list {
			ino.xattr += uint32(entrySize(x))
			t.hashes = append(t.hashes, maphash.String(t.seed, x.Name)*0x9E3779B97F4A7C15+maphash.Bytes(t.seed, x.Value))
		}
	}
	again := repeated(t.hashes)
	t.index = make(map[string]uint32)
	k := 0
	for i := range b.inodes {
		ino := &b.inodes[i]
		if ino.xattr == 0 {
			continue
		}
		list, _ := b.xattrsOf(ino, i == 0) // no error: it gave none above
		for _, x := range list {
			if again.has(t.hashes[k]) {
				t.count(x)
				ino.flags |= flagShares
			}
			k++
		}
	}
	t.hashes = nil
	if err := t.arrange(); err != nil {
		return err
	}
	for i := range b.inodes {
		ino := &b.inodes[i]
		if ino.flags&flagShares == 0 {
			continue
		}
		list, _ := b.xattrsOf(ino, i == 0)
		size, refs := uint64(xattrHeaderSize), 0
		for _, x := range list {
			if refs < maxShared && t.find(x) != nil {
				refs++
				size += 4
			} else {
				size += entrySize(x)
			}
		}
		ino.xattr = uint32(size)
	}
	return nil
}

// makeKey returns what stands for x in the index; a name has no NUL.
func (t *xattrTable) makeKey(x Xattr) []byte {
	t.key = append(append(append(t.key[:0], x.Name...), 0), x.Value...)
	return t.key
}

// count notes one more inode with x.
func (t *xattrTable) count(x Xattr) {
	key := t.makeKey(x)
	k, ok := t.index[string(key)]
	if !ok {
		k = uint32(len(t.shared))
		t.index[string(key)] = k
		t.shared = append(t.shared, sharedXattr{Xattr: Xattr{x.Name, bytes.Clone(x.Value)}})
	}
	t.shared[k].uses++
}

// find returns the shared xattr equal to x, or nil.
func (t *xattrTable) find(x Xattr) *sharedXattr {
	if k, ok := t.index[string(t.makeKey(x))]; ok {
		return &t.shared[k]
	}
	return nil
}

// arrange puts the table into the format's order: descending by name, length
// of the value, value.
func (t *xattrTable) arrange() error {
	t.shared = slices.DeleteFunc(t.shared, func(x sharedXattr) bool { return x.uses < 2 })
	slices.SortFunc(t.shared, func(x, y sharedXattr) int {
		return -cmp.Or(cmp.Compare(x.Name, y.Name), cmp.Compare(len(x.Value), len(y.Value)), bytes.Compare(x.Value, y.Value))
	})
	clear(t.index)
	for k := range t.shared {
		x := &t.shared[k]
		x.offset = uint32(t.size)
		t.size += entrySize(x.Xattr)
		t.index[string(t.makeKey(x.Xattr))] = uint32(k)
	}
	if t.size > 1<<32-blockSize {
		return errors.New("the shared xattrs are more than 4 GiB")
	}
	return nil
}

// A hashSet is an open hash table whose entries carry in their lowest bit that
// they came up more than once.
type hashSet []uint64

// repeated returns the set of hashes.
func repeated(hashes []uint64) hashSet {
	size := 1
	for size < len(hashes)+len(hashes)/2+1 {
		size *= 2
	}
	s := make(hashSet, size)
	for _, h := range hashes {
		h = h&^1 | 2 // never the 0 of an empty place
		switch k := s.place(h); s[k] {
		case 0:
			s[k] = h
		default:
			s[k] |= 1
		}
	}
	return s
}

// place returns where h, with its lowest bits as repeated makes them, is or
// would be.
func (s hashSet) place(h uint64) int {
	mask := uint64(len(s) - 1)
	for k := h >> 2 & mask; ; k = (k + 1) & mask {
		if s[k] == 0 || s[k]&^1 == h {
			return int(k)
		}
	}
}

// has reports whether h was put into the set more than once.
func (s hashSet) has(h uint64) bool { return s[s.place(h&^1|2)]&1 != 0 }
