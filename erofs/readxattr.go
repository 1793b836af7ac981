package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
)

// ErrNoXattr says that an inode does not have the xattr asked for.
var ErrNoXattr = errors.New("no such xattr")

// A storedXattr is an entry of the image: its name is prefix and suffix.
type storedXattr struct {
	prefix        string
	suffix, value []byte
	pos           int64 // of the entry in the image
}

func (x *storedXattr) is(name string) bool {
	return len(name) == len(x.prefix)+len(x.suffix) && name[:len(x.prefix)] == x.prefix && name[len(x.prefix):] == string(x.suffix)
}

// eachXattr calls fn for the xattrs of an inode until it returns false: the
// inline ones, then the shared ones.
func (r *Reader) eachXattr(i *Inode, fn func(x storedXattr) bool) error {
	if i.xattrSize == 0 {
		return nil
	}
	b, err := r.bytes(i.NID, i.xattrOff, int(i.xattrSize))
	if err != nil {
		return err
	}
	refs := b[xattrHeaderSize:]
	if int(b[4])*4 > len(refs) {
		return &CorruptError{NID: i.NID, Offset: i.xattrOff + 4, What: fmt.Sprintf("%d shared xattrs in %d bytes", b[4], len(b))}
	}
	refs, inline := refs[:int(b[4])*4], refs[int(b[4])*4:]
	pos := i.inlineOff - int64(len(inline))
	for len(inline) > 0 {
		size := int(roundUp(uint64(xattrEntrySize)+uint64(inline[0])+uint64(le.Uint16(inline[2:])), 4))
		if size > len(inline) {
			return &CorruptError{NID: i.NID, Offset: pos, What: "an xattr longer than the inode has room for"}
		}
		x := r.parseXattr(inline, pos)
		if !fn(x) {
			return nil
		}
		inline, pos = inline[size:], pos+int64(size)
	}
	for ; len(refs) > 0; refs = refs[4:] {
		pos := r.xattrBase + 4*int64(le.Uint32(refs))
		h, err := r.bytes(i.NID, pos, xattrEntrySize)
		if err != nil {
			return err
		}
		e, err := r.bytes(i.NID, pos, xattrEntrySize+int(h[0])+int(le.Uint16(h[2:])))
		if err != nil {
			return err
		}
		x := r.parseXattr(e, pos)
		if !fn(x) {
			return nil
		}
	}
	return nil
}

// readPrefixes reads the image's table of long prefixes, from byte pos on of the
// image, or of the data of the packed inode if there is one: each is a u16
// length, then a u8 index of one of the prefixes that all images have and what
// comes after it, and begins at a multiple of 4 bytes.
func (r *Reader) readPrefixes(count int, pos int64, packed uint64) error {
	read := func(pos int64, n int) ([]byte, error) { return r.bytes(0, pos, n) }
	if packed != 0 {
		i, err := r.Inode(packed)
		if err != nil {
			return err
		}
		read = func(pos int64, n int) ([]byte, error) {
			b := make([]byte, n)
			_, err := r.ReadAt(i, b, pos)
			if err == io.EOF {
				err = &CorruptError{NID: packed, Offset: i.xattrOff, What: "a table of prefixes of xattr names beyond the end of its file"}
			}
			return b, err
		}
	}
	for range count {
		pos = int64(roundUp(uint64(pos), 4))
		b, err := read(pos, 2)
		if err != nil {
			return err
		}
		n := int(le.Uint16(b))
		if n < 1 || n > 1+maxXattrName {
			return &CorruptError{NID: packed, Offset: pos, What: fmt.Sprintf("a prefix of xattr names of %d bytes", n)}
		}
		if b, err = read(pos+2, n); err != nil {
			return err
		}
		if int(b[0]) >= len(xattrPrefixes) {
			return &CorruptError{NID: packed, Offset: pos + 2, What: fmt.Sprintf("a prefix of xattr names that begins with prefix %d", b[0])}
		}
		r.prefixes = append(r.prefixes, xattrPrefixes[b[0]]+string(b[1:]))
		pos += 2 + int64(n)
	}
	return nil
}

// longPrefix is set in the prefix index of an xattr whose other bits are an
// index of the image's own prefixes.
const longPrefix = 0x80

// parseXattr takes the entry at the start of b, which holds it all.
func (r *Reader) parseXattr(b []byte, pos int64) storedXattr {
	x := storedXattr{pos: pos}
	switch k := int(b[1] &^ longPrefix); {
	case b[1]&longPrefix == 0 && k < len(xattrPrefixes):
		x.prefix = xattrPrefixes[k]
	case b[1]&longPrefix != 0 && k < len(r.prefixes):
		x.prefix = r.prefixes[k]
	}
	value := xattrEntrySize + int(b[0])
	x.suffix = b[xattrEntrySize:value:value]
	end := value + int(le.Uint16(b[2:]))
	x.value = b[value:end:end]
	return x
}

// Xattr returns the value of an xattr by the name it has in the image; see
// StoredXattr. The value is of the image. The error is ErrNoXattr itself if
// the inode has none of the name, which the inode's name filter usually says
// without a search.
func (r *Reader) Xattr(i Inode, name string) ([]byte, error) {
	if i.xattrSize == 0 {
		return nil, ErrNoXattr
	}
	if denied, err := r.denied(&i, name); err != nil {
		return nil, err
	} else if denied {
		return nil, ErrNoXattr
	}
	var value []byte
	found := false
	err := r.eachXattr(&i, func(x storedXattr) bool {
		if found = x.is(name); found {
			value = x.value
		}
		return !found
	})
	if err == nil && !found {
		err = ErrNoXattr
	}
	return value, err
}

// denied reports whether the name filter of an inode with xattrs says that it
// has none of the name.
func (r *Reader) denied(i *Inode, name string) (bool, error) {
	// Writers do not agree on the prefix of "lustre.", so on its bit.
	if !r.hasFilter || strings.HasPrefix(name, "lustre.") {
		return false, nil
	}
	b, err := r.bytes(i.NID, i.xattrOff, xattrHeaderSize)
	return err == nil && le.Uint32(b)&filterBit(splitXattr(name)) != 0, err
}

// Xattrs returns all xattrs of an inode as the image stores them, those kept
// in the inode first, then the shared ones. The values are of the image. The
// kernel shows those whose names have a known prefix ("user.", "trusted.",
// "security." or a POSIX ACL) only.
func (r *Reader) Xattrs(i Inode) ([]Xattr, error) {
	var list []Xattr
	err := r.eachXattr(&i, func(x storedXattr) bool {
		list = append(list, Xattr{x.prefix + string(x.suffix), x.value})
		return true
	})
	return list, err
}

// Payload says where the data of an External file is: the path of its object
// below the folder of objects ("ab/cdef…", "" if the image does not say) and
// the object's fs-verity digest (32 or 64 bytes of the image, nil if it does
// not say).
func (r *Reader) Payload(i Inode) (path string, digest []byte, err error) {
	if !i.external {
		return "", nil, nil
	}
	redirect, err := r.Xattr(i, redirectXattr)
	if err != nil && err != ErrNoXattr {
		return "", nil, err
	}
	metacopy, err := r.Xattr(i, metacopyXattr)
	if err != nil && err != ErrNoXattr {
		return "", nil, err
	}
	return payloadOf(redirect), digestOf(metacopy), nil
}

// payloadOf returns the path in a redirect.
func payloadOf(redirect []byte) string {
	return string(bytes.TrimPrefix(redirect, []byte{'/'}))
}

// digestOf returns the digest in a metacopy value (overlayfs's struct
// ovl_metacopy), nil if it has none.
func digestOf(metacopy []byte) []byte {
	if n := len(metacopy); n != 36 && n != 68 || metacopy[0] != 0 || int(metacopy[1]) != n || int(metacopy[3]) != (n-4)/32 {
		return nil
	}
	return metacopy[4:]
}
