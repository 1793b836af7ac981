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

	// fault, if not nil, is told what is wrong, and the walk goes on behind it
	// while fault returns true. If it is nil the first fault ends the walk.
	fault func(error) bool
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
		w.entry = DirEntry{NID: w.r.root, Type: TypeDir, pos: superOffset + 14}
		w.ino, err = w.r.Inode(w.r.root)
		return err == nil, err
	}
	if w.ino.IsDir() && !skip {
		if _, again := w.seen[w.ino.NID]; !again {
			w.seen[w.ino.NID] = struct{}{}
			w.stack = append(w.stack, walkDir{w.ino, 0, len(w.path)})
		} else if err := w.tell(&CorruptError{NID: w.ino.NID, Offset: w.entry.pos,
			What: fmt.Sprintf("%.200q is a directory that was met before: a cycle or two parents", w.path)}); err != nil {
			return false, err
		}
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
		if err == nil && !found {
			w.stack = w.stack[:len(w.stack)-1]
			continue
		}
		if w.left--; w.left == 0 {
			return false, &CorruptError{NID: d.ino.NID, Offset: d.ino.xattrOff, What: "more directory entries than the image has room for"}
		}
		w.depth = len(w.stack)
		w.path = w.path[:d.path]
		if err != nil {
			if err := w.tell(fmt.Errorf("%.200q: %w", w.path, err)); err != nil {
				return false, err
			}
			if !w.skipBlock(d) {
				w.stack = w.stack[:len(w.stack)-1]
			}
			continue
		}
		if d.path > 1 {
			w.path = append(w.path, '/')
		}
		w.path = append(w.path, w.entry.Name...)
		w.ino, err = w.r.Inode(w.entry.NID)
		if err == nil {
			return true, nil
		}
		if err := w.tell(fmt.Errorf("%.200q: %w", w.path, err)); err != nil {
			return false, err
		}
	}
	return false, nil
}

// errEnough ends a walk whose fault function has heard enough.
var errEnough = errors.New("enough faults")

// tell passes err on to fault and returns what ends the walk, if anything.
func (w *walker) tell(err error) error {
	if w.fault == nil {
		return err
	}
	if !w.fault(err) {
		return errEnough
	}
	return nil
}

// skipBlock moves d behind the block in which a fault was met, and reports
// whether there is a block that can be read.
func (w *walker) skipBlock(d *walkDir) bool {
	next := int64(d.cookie>>w.r.blockBits) + 1
	if next > (d.ino.Size-1)>>w.r.blockBits {
		return false
	}
	d.cookie = uint64(next) << w.r.blockBits
	_, _, err := w.r.dirData(&d.ino, next)
	return err == nil
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
