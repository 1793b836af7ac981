package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
)

// mapAt returns where byte off of the inode's data is in the image, -1 for a
// hole, and how many bytes from there lie together. off is inside the size.
func (r *Reader) mapAt(i *Inode, off int64) (pos, n int64, err error) {
	corrupt := func(what string, v any) (int64, int64, error) {
		return 0, 0, &CorruptError{NID: i.NID, Offset: i.xattrOff, What: fmt.Sprintf(what, v)}
	}
	block := func(first uint64, off, n int64) (int64, int64, error) {
		if first > uint64(r.size)>>r.blockBits {
			return corrupt("data block %d is beyond the end of the image", first)
		}
		return int64(first)<<r.blockBits + off, n, nil
	}
	switch i.layout {
	case layoutPlain:
		if i.u == wholeHole {
			return -1, i.Size - off, nil
		}
		return block(i.u, off, i.Size-off)
	case layoutInline:
		tail := (i.Size - 1) >> r.blockBits << r.blockBits // the last block is the inline one
		if off < tail {
			return block(i.u, off, tail-off)
		}
		return i.inlineOff + off - tail, i.Size - off, nil
	case layoutChunked:
		bits := r.blockBits + uint(i.u&0x1f)
		within := off & (1<<bits - 1)
		n := min(i.Size-off, 1<<bits-within)
		if i.external {
			return -1, i.Size - off, nil
		}
		if i.u&0x20 == 0 { // a map of 4-byte block numbers
			b, err := r.bytes(i.NID, int64(roundUp(uint64(i.inlineOff), 4))+off>>bits*4, 4)
			if err != nil {
				return 0, 0, err
			}
			if first := le.Uint32(b); first != nullAddr {
				return block(uint64(first), within, n)
			}
			return -1, n, nil
		}
		b, err := r.bytes(i.NID, int64(roundUp(uint64(i.inlineOff), 8))+off>>bits*8, 8)
		if err != nil {
			return 0, 0, err
		}
		first, null := uint64(le.Uint32(b[4:])), uint64(nullAddr)
		if i.u&0x40 != 0 {
			first, null = first|uint64(le.Uint16(b))<<32, 1<<48-1
		}
		if first == null {
			return -1, n, nil
		}
		if device := le.Uint16(b[2:]); device != 0 {
			return 0, 0, fmt.Errorf("nid %d: data on device %d beside the image: %w", i.NID, device, errors.ErrUnsupported)
		}
		return block(first, within, n)
	}
	return 0, 0, fmt.Errorf("nid %d: compressed data: %w", i.NID, errors.ErrUnsupported)
}

// ReadAt reads the data of a regular file or a symbolic link from off on, as
// io.ReaderAt has it: n < len(p) comes with an error, io.EOF at the end. Holes
// read as zeros, and so does an External file, whose data is not in the image.
func (r *Reader) ReadAt(i Inode, p []byte, off int64) (n int, err error) {
	if !i.IsRegular() && !i.IsSymlink() {
		return 0, fmt.Errorf("read nid %d: not a regular file", i.NID)
	}
	if off < 0 {
		return 0, fmt.Errorf("read nid %d: offset %d is negative", i.NID, off)
	}
	for n < len(p) {
		if off >= i.Size {
			return n, io.EOF
		}
		pos, part, err := r.mapAt(&i, off)
		if err != nil {
			return n, err
		}
		k := int(min(part, int64(len(p)-n)))
		if pos < 0 {
			clear(p[n : n+k])
		} else if r.b == nil {
			if k, err = r.readInto(&i, p[n:n+k], pos); err != nil {
				return n + k, err
			}
		} else {
			b, err := r.bytes(i.NID, pos, k)
			if err != nil {
				return n, err
			}
			copy(p[n:], b)
		}
		n += k
		off += int64(k)
	}
	return n, nil
}

// readInto reads straight into the caller's buffer.
func (r *Reader) readInto(i *Inode, p []byte, pos int64) (int, error) {
	if pos > r.size || int64(len(p)) > r.size-pos {
		return 0, &CorruptError{NID: i.NID, Offset: pos, What: "data beyond the end of the image"}
	}
	n, err := r.r.ReadAt(p, pos)
	if n == len(p) {
		return n, nil
	}
	if err == nil || err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, fmt.Errorf("read image at byte %d: %w", pos, err)
}

// Readlink returns the target of a symbolic link.
func (r *Reader) Readlink(i Inode) (string, error) {
	if !i.IsSymlink() {
		return "", fmt.Errorf("nid %d is not a symbolic link", i.NID)
	}
	if i.Size < 1 || i.Size > MaxTarget {
		return "", &CorruptError{NID: i.NID, Offset: i.xattrOff, What: fmt.Sprintf("a symbolic link's target of %d bytes", i.Size)}
	}
	var buf [256]byte
	b := buf[:]
	if i.Size > int64(len(buf)) {
		b = make([]byte, i.Size)
	}
	b = b[:i.Size]
	if _, err := r.ReadAt(i, b, 0); err != nil {
		return "", err
	}
	if bytes.IndexByte(b, 0) >= 0 {
		return "", &CorruptError{NID: i.NID, Offset: i.xattrOff, What: "a symbolic link's target with a NUL"}
	}
	return string(b), nil
}

// content returns all data of a small file in a new slice.
func (r *Reader) content(i Inode) ([]byte, error) {
	if i.Size > MaxInline {
		return nil, &CorruptError{NID: i.NID, Offset: i.xattrOff, What: fmt.Sprintf("%d bytes of content, composefs has at most %d", i.Size, MaxInline)}
	}
	b := make([]byte, i.Size)
	_, err := r.ReadAt(i, b, 0)
	return b, err
}

// dirData returns block number k of a directory and where it is.
func (r *Reader) dirData(dir *Inode, k int64) (b []byte, pos int64, err error) {
	off := k << r.blockBits
	pos, n, err := r.mapAt(dir, off)
	if err != nil {
		return nil, 0, err
	}
	if pos < 0 {
		return nil, 0, &CorruptError{NID: dir.NID, Offset: dir.xattrOff, What: "a hole in a directory"}
	}
	want := min(dir.Size-off, 1<<r.blockBits)
	if n < want || want > math.MaxInt32 {
		return nil, 0, &CorruptError{NID: dir.NID, Offset: pos, What: "a directory block in pieces"}
	}
	b, err = r.bytes(dir.NID, pos, int(want))
	return b, pos, err
}
