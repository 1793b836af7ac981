package fusefs

import (
	"errors"
	"io/fs"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

const (
	// maxRead is the largest READ request: linux/fuse.h allows 256 pages
	// before fs.fuse.max_pages_limit is raised.
	maxRead = 1 << 20
	// maxBackground is how many readahead requests the kernel has under way
	// at once. Each may wait for a registry, so the default of 12 would let
	// a few cold files stall the rest.
	maxBackground = 128
	// maxName is how long a name may be (NAME_MAX); the kernel asks for longer
	// ones.
	maxName = 255
	// forever is how long the kernel may believe what it was told, in
	// seconds: the image never changes under its mount.
	forever = 10 * 365 * 24 * 3600
)

// fileSystem answers the kernel's requests about an image.
type fileSystem struct {
	*session
	image *erofs.Reader
	root  uint64
}

var _ fuse.RawFileSystem = (*fileSystem)(nil)

func newFileSystem(image *erofs.Reader, contents Contents, o Options) *fileSystem {
	return &fileSystem{session: newSession(contents, o), image: image, root: image.Root()}
}

// nid turns a FUSE node ID into a nid of the image.
func (f *fileSystem) nid(node uint64) uint64 {
	if node == fuse.FUSE_ROOT_ID {
		return f.root
	}
	return node
}

// node turns a nid of the image into a FUSE node ID.
func (f *fileSystem) node(nid uint64) uint64 {
	if nid == f.root {
		return fuse.FUSE_ROOT_ID
	}
	return nid
}

func (f *fileSystem) inode(node uint64) (erofs.Inode, fuse.Status) {
	ino, err := f.image.Inode(f.nid(node))
	if err != nil {
		return ino, f.fail(f.nid(node), "", err)
	}
	return ino, fuse.OK
}

// isWhiteout reports whether overlayfs would take the inode for a whiteout.
func isWhiteout(ino *erofs.Inode) bool {
	return ino.Mode&unix.S_IFMT == unix.S_IFCHR && ino.Rdev == 0
}

// attr fills in what stat(2) shows. EROFS has one time per inode.
func attr(ino *erofs.Inode, out *fuse.Attr) {
	out.Ino = ino.NID
	out.Size = uint64(ino.Size)
	out.Blocks = (uint64(ino.Size) + 4095) / 4096 * 8
	out.Blksize = 4096
	sec := uint64(ino.MtimeSec)
	out.Mtime, out.Atime, out.Ctime = sec, sec, sec
	out.Mtimensec, out.Atimensec, out.Ctimensec = ino.MtimeNsec, ino.MtimeNsec, ino.MtimeNsec
	out.Mode = ino.Mode
	out.Nlink = ino.Nlink
	out.Uid, out.Gid = ino.UID, ino.GID
	out.Rdev = ino.Rdev
}

func (f *fileSystem) entry(ino *erofs.Inode, out *fuse.EntryOut) {
	out.NodeId = f.node(ino.NID)
	out.Generation = 1
	out.EntryValid, out.AttrValid = forever, forever
	attr(ino, &out.Attr)
}

func (f *fileSystem) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	f.count(opLookup)
	if len(name) > maxName {
		return fuse.Status(unix.ENAMETOOLONG)
	}
	dir, st := f.inode(h.NodeId)
	if !st.Ok() {
		return st
	}
	nid, err := f.image.Lookup(dir, name)
	var ino erofs.Inode
	if err == nil {
		ino, err = f.image.Inode(nid)
	}
	switch {
	case errors.Is(err, fs.ErrNotExist), err == nil && isWhiteout(&ino):
		// Node 0 with a timeout: the kernel remembers that the name is absent.
		*out = fuse.EntryOut{EntryValid: forever}
		return fuse.OK
	case err != nil:
		return f.fail(dir.NID, "", err)
	}
	f.entry(&ino, out)
	return fuse.OK
}

func (f *fileSystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	f.count(opGetAttr)
	ino, st := f.inode(in.NodeId)
	if !st.Ok() {
		return st
	}
	out.AttrValid = forever
	attr(&ino, &out.Attr)
	return fuse.OK
}

func (f *fileSystem) Readlink(_ <-chan struct{}, h *fuse.InHeader) ([]byte, fuse.Status) {
	f.count(opReadlink)
	ino, st := f.inode(h.NodeId)
	if !st.Ok() {
		return nil, st
	}
	target, err := f.image.Readlink(ino)
	if err != nil {
		return nil, f.fail(ino.NID, "", err)
	}
	return []byte(target), fuse.OK
}

func (f *fileSystem) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	f.count(opReadDir)
	return f.readDir(in, func(e *fuse.DirEntry, ino *erofs.Inode) bool {
		return out.AddDirEntry(*e)
	})
}

func (f *fileSystem) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	f.count(opReadDirPlus)
	return f.readDir(in, func(e *fuse.DirEntry, ino *erofs.Inode) bool {
		o := out.AddDirLookupEntry(*e)
		if o == nil {
			return false
		}
		if e.Name != "." && e.Name != ".." {
			f.entry(ino, o)
		}
		return true
	})
}

// readDir gives add the entries from the request's offset on, each with its
// inode, until add has no more room.
func (f *fileSystem) readDir(in *fuse.ReadIn, add func(*fuse.DirEntry, *erofs.Inode) bool) fuse.Status {
	dir, st := f.inode(in.NodeId)
	if !st.Ok() {
		return st
	}
	var inner error
	err := f.image.ReadDir(dir, in.Offset, func(e erofs.DirEntry, next uint64) bool {
		ino, err := f.image.Inode(e.NID)
		if err != nil {
			inner = err
			return false
		}
		if isWhiteout(&ino) {
			return true
		}
		return add(&fuse.DirEntry{Name: string(e.Name), Mode: ino.Mode, Ino: ino.NID, Off: next}, &ino)
	})
	if err == nil {
		err = inner
	}
	if err != nil {
		return f.fail(dir.NID, "", err)
	}
	return fuse.OK
}

func (f *fileSystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	f.count(opStatFs)
	h := f.image.Header()
	out.Bsize, out.Frsize = 4096, 4096
	out.Blocks = uint64(h.Size / 4096)
	out.Files = h.Inodes
	out.NameLen = maxName
	return fuse.OK
}
