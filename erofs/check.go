package erofs

import (
	"errors"
	"fmt"
)

// maxFaults is how many faults Check collects before it gives up.
const maxFaults = 20

// Check reads all metadata of the image and holds it to the format, as Faults
// does. The faults found, 20 at most, are joined into one error. A nil error
// promises that no method of the Reader will meet a fault in this image.
func (r *Reader) Check() error {
	var faults []error
	r.Faults(func(err error) bool {
		faults = append(faults, err)
		return len(faults) < maxFaults
	})
	if len(faults) == 0 {
		return nil
	}
	return fmt.Errorf("check image: %w", errors.Join(faults...))
}

// Faults reads all metadata of the image and calls fn for everything in it
// that contradicts the format, until fn returns false: inodes, names, xattrs
// and block addresses out of range; names out of strict byte order, so that
// lookups miss them, or there twice; "." and ".." that lead elsewhere;
// directories with two parents; entry types and link counts of directories
// that the inodes do not have; and in a composefs image a size, a number of
// inodes or a flag of the header that is not so, and overlay xattrs that
// overlayfs refuses. Errors wrap a *CorruptError, which has the offset, or
// errors.ErrUnsupported. After a fault the check goes on behind it: with the
// next block of a directory, or the next entry.
func (r *Reader) Faults(fn func(err error) bool) {
	c := &checker{r: r, fn: fn, parents: []uint64{r.root}, inodes: nidSet{}}
	c.w = r.newWalker()
	c.w.fault = c.add
	for !c.done {
		ok, err := c.w.next(false)
		if err != nil && err != errEnough {
			c.add(err)
		}
		if err != nil {
			return
		}
		if !ok {
			break
		}
		c.entry()
	}
	if r.header.Composefs && !c.done {
		c.whole()
	}
}

type checker struct {
	r       *Reader
	w       *walker
	fn      func(error) bool
	done    bool     // fn has heard enough
	broken  bool     // not every entry could be looked at
	parents []uint64 // directories on the way to the entry, by depth
	inodes  nidSet
	count   uint64 // of inodes
	chunks  uint64 // parts of files that were looked at
	acl     bool   // some inode has a POSIX ACL
	names   map[string]struct{}
}

// add passes a fault on and reports whether to go on.
func (c *checker) add(err error) bool {
	c.broken = true
	if !c.done && !c.fn(err) {
		c.done = true
	}
	return !c.done
}

// fault notes a fault of the current entry.
func (c *checker) fault(offset int64, what string, args ...any) {
	c.add(&CorruptError{NID: c.w.ino.NID, Offset: offset, What: fmt.Sprintf("%.200q: %s", c.w.path, fmt.Sprintf(what, args...))})
}

// whole checks what the header says of a composefs image (2.2, 2.4).
func (c *checker) whole() {
	h := &c.r.header
	c.w.ino = Inode{}
	if h.Size != c.r.size {
		c.add(&CorruptError{Offset: superOffset + 36, What: fmt.Sprintf("the image has %d bytes, its superblock says %d", c.r.size, h.Size)})
	}
	if !c.broken && h.Inodes != c.count {
		c.add(&CorruptError{Offset: superOffset + 16, What: fmt.Sprintf("the superblock says %d inodes, there are %d", h.Inodes, c.count)})
	}
	if c.acl && !h.HasACL {
		c.add(&CorruptError{Offset: 8, What: "the header says that there are no ACLs, and there are"})
	}
}

// entry checks the walker's current entry.
func (c *checker) entry() {
	i := &c.w.ino
	if t := i.Type(); t != c.w.entry.Type {
		c.fault(c.w.entry.pos, "its directory has it with type %d, its inode with %d", c.w.entry.Type, t)
	}
	if c.inodes.add(i.NID) {
		return // a further name of an inode that was looked at
	}
	c.count++
	if i.MtimeNsec >= 1e9 {
		c.fault(i.xattrOff, "an mtime with %d nanoseconds", i.MtimeNsec)
	}
	if i.IsWhiteout() && i.Nlink > 1 && c.r.header.Composefs {
		c.fault(i.xattrOff, "a whiteout with a link count of %d", i.Nlink)
	}
	c.xattrs()
	switch {
	case i.IsDir():
		c.dir()
	case i.IsSymlink():
		if _, err := c.r.Readlink(*i); err != nil {
			c.add(fmt.Errorf("%.200q: %w", c.w.path, err))
		}
	case i.IsRegular():
		c.data()
	}
}

// xattrs checks the xattrs of the current entry.
func (c *checker) xattrs() {
	i := &c.w.ino
	if i.xattrSize == 0 {
		return
	}
	if c.names == nil {
		c.names = map[string]struct{}{}
	}
	clear(c.names)
	err := c.r.eachXattr(i, func(x storedXattr) bool {
		name := x.prefix + string(x.suffix)
		if _, twice := c.names[name]; twice {
			c.fault(x.pos, "the xattr %q twice", name)
		}
		c.names[name] = struct{}{}
		switch name {
		case "":
			c.fault(x.pos, "an xattr without a name")
		case aclAccess, aclDefault:
			c.acl = true
		case metacopyXattr:
			if i.external && len(x.value) != 0 && digestOf(x.value) == nil {
				c.fault(x.pos, "a metacopy xattr of %d bytes that is none", len(x.value))
			}
		case redirectXattr:
			if i.external && (len(x.value) == 0 || x.value[0] != '/') {
				c.fault(x.pos, "a redirect that does not begin with a slash")
			}
		}
		if denied, _ := c.r.denied(i, name); denied {
			c.fault(i.xattrOff, "its name filter denies the xattr %q", name)
		}
		return !c.done
	})
	if err != nil {
		c.add(fmt.Errorf("%.200q: %w", c.w.path, err))
	}
}

// data checks that all data is inside the image.
func (c *checker) data() {
	i := &c.w.ino
	for off := int64(0); off < i.Size; {
		// Only inodes that share their chunk maps, which no writer makes, have
		// more chunks than fit; looking at them all could take for ever.
		if c.chunks++; c.chunks > uint64(c.r.size)/4+2*c.count {
			c.fault(i.inlineOff, "more chunks than the image has room for")
			return
		}
		pos, n, err := c.r.mapAt(i, off)
		if err == nil && pos >= 0 && (pos > c.r.size || n > c.r.size-pos) {
			err = &CorruptError{NID: i.NID, Offset: pos, What: "data beyond the end of the image"}
		}
		if err != nil {
			c.add(fmt.Errorf("%.200q: %w", c.w.path, err))
			return
		}
		off += n
	}
}

// dir checks the entries of a directory as a whole. What cannot be read the
// walker meets again and tells.
func (c *checker) dir() {
	i, depth := &c.w.ino, c.w.depth
	c.parents = append(c.parents[:depth+1], i.NID)
	var last []byte
	subdirs := uint64(0)
	dots := 0
	err := c.r.ReadDir(*i, 0, func(e DirEntry, next uint64) bool {
		want := e.NID
		switch string(e.Name) {
		case ".":
			dots++
			want = i.NID
		case "..":
			dots++
			want = c.parents[depth]
		default:
			if e.Type == TypeDir {
				subdirs++
			}
		}
		if e.NID != want {
			c.fault(e.pos, "its entry %q leads to nid %d, want %d", e.Name, e.NID, want)
		}
		if last != nil && string(last) >= string(e.Name) {
			c.fault(e.pos, "the entry %.255q does not come after %.255q: a name twice or out of order", e.Name, last)
		}
		last = append(last[:0], e.Name...)
		return !c.done
	})
	if err != nil || c.done {
		return
	}
	if dots != 2 {
		c.fault(i.xattrOff, "a directory without . or ..")
	}
	// A link count too small for the directories in it stands for many.
	if uint64(i.Nlink) != 2+subdirs && i.Nlink != 1 {
		c.fault(i.xattrOff, "a link count of %d with %d directories in it", i.Nlink, subdirs)
	}
}
