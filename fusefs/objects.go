package fusefs

import (
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/fusesession"
)

// Objects are a fixed set of objects, numbered from 0.
type Objects interface {
	Contents
	// Object returns the name ("ab/cdef…") and the size in bytes of object i.
	Object(i int) (name string, size int64)
	// Find returns the number of the object of that name.
	Find(name string) (i int, ok bool)
}

// objectSystem serves objects as files ab/cdef…, for an overlayfs that has it
// as a data-only lower. Node IDs follow from the numbers of the objects alone:
//
//	1            the root
//	2 + b        the folder whose name is the byte b in hexadecimal
//	258 + i      object i
//
// It cannot be listed: overlayfs looks names up, and nobody else sees it. A
// name that is no object is not remembered by the kernel as absent.
type objectSystem struct {
	*session
	objects Objects
}

var _ fuse.RawFileSystem = (*objectSystem)(nil)

const (
	firstFolder = fuse.FUSE_ROOT_ID + 1
	firstObject = firstFolder + 256
)

func newObjectSystem(objects Objects, o Options) *objectSystem {
	return &objectSystem{session: newSession(objects, o), objects: objects}
}

func (f *objectSystem) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	f.count(opLookup)
	switch {
	case h.NodeId == fuse.FUSE_ROOT_ID:
		b, ok := hexByte(name)
		if !ok {
			return fuse.ENOENT
		}
		out.NodeId = firstFolder + uint64(b)
	case h.NodeId < firstObject:
		b := byte(h.NodeId - firstFolder)
		i, ok := f.objects.Find(string([]byte{hexDigits[b>>4], hexDigits[b&15], '/'}) + name)
		if !ok {
			return fuse.ENOENT
		}
		out.NodeId = firstObject + uint64(i)
	default:
		return fuse.ENOTDIR
	}
	out.Generation = 1
	out.EntryValid, out.AttrValid = forever, forever
	f.attr(out.NodeId, &out.Attr)
	return fuse.OK
}

const hexDigits = "0123456789abcdef"

// hexByte reads two lower-case hexadecimal digits.
func hexByte(s string) (b byte, ok bool) {
	if len(s) != 2 {
		return 0, false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			b = b<<4 | (c - '0')
		case 'a' <= c && c <= 'f':
			b = b<<4 | (c - 'a' + 10)
		default:
			return 0, false
		}
	}
	return b, true
}

func (f *objectSystem) attr(node uint64, out *fuse.Attr) {
	*out = fuse.Attr{Ino: node, Mode: unix.S_IFDIR | 0o555, Nlink: 2, Blksize: 4096}
	if node >= firstObject {
		_, size := f.objects.Object(int(node - firstObject))
		out.Mode, out.Nlink = unix.S_IFREG|0o444, 1
		out.Size = uint64(size)
		out.Blocks = (uint64(size) + 4095) / 4096 * 8
	}
}

func (f *objectSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.count(opGetAttr)
	out.AttrValid = forever
	f.attr(in.NodeId, &out.Attr)
	return fuse.OK
}

func (f *objectSystem) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	start := time.Now()
	f.count(opRead)
	if in.NodeId < firstObject {
		return nil, fuse.EISDIR
	}
	name, size := f.objects.Object(int(in.NodeId - firstObject))
	off := int64(in.Offset)
	if off < 0 || off >= size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	buf = buf[:min(int64(len(buf)), int64(in.Size), size-off)]
	source, err := f.readObject(cancel, in, name, buf)
	if err != nil {
		return nil, f.fail(0, name, err)
	}
	f.answered(source, start)
	return fusesession.InPlace(len(buf)), fuse.OK
}

// StatFs answers what overlayfs asks when it is mounted.
func (f *objectSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	f.count(opStatFs)
	out.Bsize, out.Frsize = 4096, 4096
	out.NameLen = maxName
	return fuse.OK
}
