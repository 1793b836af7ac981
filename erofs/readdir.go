package erofs

import (
	"bytes"
	"fmt"
	"io/fs"
)

// A DirEntry is one entry of a directory.
type DirEntry struct {
	Name []byte // of the image; valid until the callback returns
	NID  uint64
	Type uint8 // TypeRegular and so on, as the directory has it

	pos int64 // of the entry in the image
}

// A dirBlock is a block of a directory that was looked at: so many entries of
// 12 bytes (nid u64, name's offset u16, type u8, zero u8), then the names, back
// to back (format document 2.10).
type dirBlock struct {
	b     []byte
	pos   int64 // in the image
	nid   uint64
	count int
}

// openBlock reads block number k of a directory.
func (r *Reader) openBlock(dir *Inode, k int64) (dirBlock, error) {
	b, pos, err := r.dirData(dir, k)
	if err != nil {
		return dirBlock{}, err
	}
	d := dirBlock{b: b, pos: pos, nid: dir.NID}
	if len(b) < direntSize {
		return d, d.corrupt(0, "a directory block of %d bytes", len(b))
	}
	names := int(le.Uint16(b[8:]))
	if names < direntSize || names%direntSize != 0 || names > len(b) {
		return d, d.corrupt(8, "the first name of a directory block at %d", names)
	}
	d.count = names / direntSize
	return d, nil
}

func (d *dirBlock) corrupt(off int, what string, args ...any) error {
	return &CorruptError{NID: d.nid, Offset: d.pos + int64(off), What: fmt.Sprintf(what, args...)}
}

// name returns the name of entry k. The last name of a block ends at the end
// of the block or at a NUL.
func (d *dirBlock) name(k int) ([]byte, error) {
	start, end := int(le.Uint16(d.b[direntSize*k+8:])), len(d.b)
	last := k+1 == d.count
	if !last {
		end = int(le.Uint16(d.b[direntSize*(k+1)+8:]))
	}
	if start < direntSize*d.count || end < start || end > len(d.b) {
		return nil, d.corrupt(direntSize*k, "the name of directory entry %d is from %d to %d", k, start, end)
	}
	name := d.b[start:end]
	if last {
		if nul := bytes.IndexByte(name, 0); nul >= 0 {
			name = name[:nul]
		}
	}
	if len(name) == 0 || len(name) > MaxName {
		return nil, d.corrupt(direntSize*k, "directory entry %d has a name of %d bytes", k, len(name))
	}
	return name, nil
}

// nidAt returns the inode that entry k leads to.
func (d *dirBlock) nidAt(k int) uint64 { return le.Uint64(d.b[direntSize*k:]) }

// Lookup returns the nid of the entry name in a directory, fs.ErrNotExist
// itself if there is none. "." and ".." are entries as any other.
//
// It searches the blocks and then the block by halves, as names are in byte
// order, and allocates nothing if the image is in memory.
func (r *Reader) Lookup(dir Inode, name string) (nid uint64, err error) {
	if !dir.IsDir() {
		return 0, fmt.Errorf("look up an entry in nid %d: not a directory", dir.NID)
	}
	if dir.dotOmitted && name == "." {
		return dir.NID, nil
	}
	// The block whose first name is the last one not above name.
	var found dirBlock
	for low, high := int64(0), (dir.Size+1<<r.blockBits-1)>>r.blockBits; low < high; {
		mid := low + (high-low)/2
		d, err := r.openBlock(&dir, mid)
		if err != nil {
			return 0, err
		}
		first, err := d.name(0)
		if err != nil {
			return 0, err
		}
		if string(first) == name {
			return d.nidAt(0), nil
		}
		if string(first) < name {
			found, low = d, mid+1
		} else {
			high = mid
		}
	}
	for low, high := 1, found.count; low < high; {
		mid := low + (high-low)/2
		n, err := found.name(mid)
		if err != nil {
			return 0, err
		}
		if string(n) == name {
			return found.nidAt(mid), nil
		}
		if string(n) < name {
			low = mid + 1
		} else {
			high = mid
		}
	}
	return 0, fs.ErrNotExist
}

// ReadDir calls fn for the entries of a directory in the image's order, "."
// and ".." among them, from the cookie from on: 0 is the start. With each
// entry fn gets the cookie to continue behind it; cookies mean something to
// the same directory of the same image only, for ever, and they grow. ReadDir
// ends without error when fn returns false.
func (r *Reader) ReadDir(dir Inode, from uint64, fn func(e DirEntry, next uint64) bool) error {
	if !dir.IsDir() {
		return fmt.Errorf("list nid %d: not a directory", dir.NID)
	}
	// A cookie is the byte in the directory's data where the next entry is;
	// 1 is behind a "." that the directory does not spell out.
	if dir.dotOmitted && from == 0 {
		if !fn(DirEntry{Name: []byte{'.'}, NID: dir.NID, Type: TypeDir}, 1) {
			return nil
		}
	}
	if from == 1 {
		from = 0
	}
	if from >= uint64(dir.Size) {
		return nil
	}
	within := int(from & (1<<r.blockBits - 1))
	if within%direntSize != 0 {
		return fmt.Errorf("list nid %d: %w: no entry ends at cookie %d", dir.NID, fs.ErrInvalid, from)
	}
	first := within / direntSize
	for off := int64(from) - int64(within); off < dir.Size; off += 1 << r.blockBits {
		d, err := r.openBlock(&dir, off>>r.blockBits)
		if err != nil {
			return err
		}
		for k := first; k < d.count; k++ {
			name, err := d.name(k)
			if err != nil {
				return err
			}
			next := uint64(off) + direntSize*uint64(k+1)
			if k+1 == d.count {
				next = uint64(off) + 1<<r.blockBits
			}
			e := DirEntry{Name: name, NID: d.nidAt(k), Type: d.b[direntSize*k+10], pos: d.pos + direntSize*int64(k)}
			if !fn(e, next) {
				return nil
			}
		}
		first = 0
	}
	return nil
}
