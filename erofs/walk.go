package erofs

import (
	"errors"
	"fmt"
	"io/fs"
)

// A walker goes over all entries of an image, depth first in the image's
// order, "." and ".." left out. It keeps a few words for each directory on the
// way down and for each directory seen, nothing for files.
type walker struct {
	r     *Reader
	path  []byte   // of the current entry, "/" at first
	depth int      // 0 for the root
	entry DirEntry // its Name stays valid: nothing writes to what ReadDir shows
	ino   Inode

	stack []walkDir
	seen  map[uint64]struct{} // directories
	left  uint64              // entries that the image has room for
}

type walkDir struct {
	ino    Inode
	cookie uint64
	path   int // length of the directory's path
}

func (r *Reader) newWalker() *walker {
	// An entry takes at least 13 bytes. Only directories that share their
	// blocks, which no writer makes, have more entries than fit; following
	// them all could take for ever.
	return &walker{r: r, seen: map[uint64]struct{}{}, left: uint64(r.size)/(direntSize+1) + 1}
}

// next moves to the next entry. ok is false at the end and with an error. The
// directory before it is not gone into if skip is true.
func (w *walker) next(skip bool) (ok bool, err error) {
	if w.path == nil {
		w.path = []byte{'/'}
		w.entry = DirEntry{NID: w.r.root, Type: TypeDir}
		w.ino, err = w.r.Inode(w.r.root)
		return err == nil, err
	}
	if w.ino.IsDir() && !skip {
		if _, again := w.seen[w.ino.NID]; again {
			return false, &CorruptError{NID: w.ino.NID, Offset: w.ino.xattrOff,
				What: fmt.Sprintf("%.200q is a directory that was met before: a cycle or two parents", w.path)}
		}
		w.seen[w.ino.NID] = struct{}{}
		w.stack = append(w.stack, walkDir{w.ino, 0, len(w.path)})
	}
	for len(w.stack) > 0 {
		d := &w.stack[len(w.stack)-1]
		found := false
		err := w.r.ReadDir(d.ino, d.cookie, func(e DirEntry, next uint64) bool {
			d.cookie = next
			if string(e.Name) == "." || string(e.Name) == ".." {
				return true
			}
			found = true
			w.entry = e
			return false
		})
		if err != nil {
			return false, err
		}
		if !found {
			w.stack = w.stack[:len(w.stack)-1]
			continue
		}
		if w.left--; w.left == 0 {
			return false, &CorruptError{NID: d.ino.NID, Offset: d.ino.xattrOff, What: "more directory entries than the image has room for"}
		}
		w.depth = len(w.stack)
		w.path = w.path[:d.path]
		if d.path > 1 {
			w.path = append(w.path, '/')
		}
		w.path = append(w.path, w.entry.Name...)
		w.ino, err = w.r.Inode(w.entry.NID)
		if err != nil {
			return false, fmt.Errorf("%.200q: %w", w.path, err)
		}
		return true, nil
	}
	return false, nil
}

// Walk calls fn for every entry of the image, the root first, a directory
// before what is in it, entries in byte order; "." and ".." are left out. The
// path is "/" or begins with it. If fn returns fs.SkipDir for a directory it
// is not gone into; any other error ends the walk and is returned. An image
// whose directories form a cycle gives a *CorruptError.
func (r *Reader) Walk(fn func(path string, ino Inode) error) error {
	w := r.newWalker()
	skip := false
	for {
		ok, err := w.next(skip)
		if err != nil {
			return fmt.Errorf("walk image: %w", err)
		}
		if !ok {
			return nil
		}
		err = fn(string(w.path), w.ino)
		skip = err == fs.SkipDir && w.ino.IsDir()
		if err != nil && !skip {
			return err
		}
	}
}

// maxFaults is how many faults Check collects before it gives up.
const maxFaults = 20

// Check reads all metadata of the image and holds it to the format: every
// inode, name, xattr and block address in range; names in strict byte order,
// so that lookups find them and none is there twice; "." and ".." as they
// should be; no directory with two parents; entry types and link counts of
// directories as the inodes have them. The faults found, 20 at most, are
// joined into one error and name offsets (*CorruptError). A nil error promises
// that no method of the Reader will meet a fault in this image.
func (r *Reader) Check() error {
	c := &checker{r: r, parents: []uint64{r.root}}
	c.w = r.newWalker()
	for {
		ok, err := c.w.next(false)
		if err != nil {
			c.add(err)
			break
		}
		if !ok {
			break
		}
		c.entry()
		if len(c.faults) >= maxFaults {
			break
		}
	}
	if len(c.faults) == 0 {
		return nil
	}
	return fmt.Errorf("check image: %w", errors.Join(c.faults...))
}

type checker struct {
	r       *Reader
	w       *walker
	parents []uint64 // directories on the way to the entry, by depth
	faults  []error
}

func (c *checker) add(err error) { c.faults = append(c.faults, err) }

// fault notes a fault of the current entry.
func (c *checker) fault(offset int64, what string, args ...any) {
	c.add(&CorruptError{NID: c.w.ino.NID, Offset: offset, What: fmt.Sprintf("%.200q: %s", c.w.path, fmt.Sprintf(what, args...))})
}

// entry checks the walker's current entry.
func (c *checker) entry() {
	i := &c.w.ino
	if t := i.Type(); t != c.w.entry.Type {
		c.fault(i.xattrOff, "its directory has it with type %d, its inode with %d", c.w.entry.Type, t)
	}
	found := func(name string) bool {
		_, err := c.r.Xattr(*i, name)
		return err != ErrNoXattr
	}
	err := c.r.eachXattr(i, func(x storedXattr) bool {
		name := x.prefix + string(x.suffix)
		if name == "" {
			c.fault(x.pos, "an xattr without a name")
		}
		if !found(name) {
			c.fault(i.xattrOff, "its name filter denies the xattr %q", name)
		}
		return len(c.faults) < maxFaults
	})
	if err != nil {
		c.add(err)
	}
	switch {
	case i.IsDir():
		c.dir()
	case i.IsSymlink():
		if _, err := c.r.Readlink(*i); err != nil {
			c.add(err)
		}
	case i.IsRegular():
		c.data()
	}
}

// data checks that all data is inside the image.
func (c *checker) data() {
	i := &c.w.ino
	for off := int64(0); off < i.Size; {
		pos, n, err := c.r.mapAt(i, off)
		if err == nil && pos >= 0 && (pos > c.r.size || n > c.r.size-pos) {
			err = &CorruptError{NID: i.NID, Offset: pos, What: fmt.Sprintf("%.200q: data beyond the end of the image", c.w.path)}
		}
		if err != nil {
			c.add(err)
			return
		}
		off += n
	}
}

// dir checks the entries of a directory as a whole.
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
			c.fault(i.xattrOff, "its entry %q leads to nid %d, want %d", e.Name, e.NID, want)
		}
		if last != nil && string(last) >= string(e.Name) {
			c.fault(i.xattrOff, "the entry %.255q does not come after %.255q: a name twice or out of order", e.Name, last)
		}
		last = append(last[:0], e.Name...)
		return len(c.faults) < maxFaults
	})
	if err != nil {
		c.add(err)
		return
	}
	if dots != 2 && len(c.faults) < maxFaults {
		c.fault(i.xattrOff, "a directory without . or ..")
	}
	// A link count too small for the directories in it stands for many.
	if uint64(i.Nlink) != 2+subdirs && i.Nlink != 1 && len(c.faults) < maxFaults {
		c.fault(i.xattrOff, "a link count of %d with %d directories in it", i.Nlink, subdirs)
	}
}
