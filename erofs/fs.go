package erofs

import (
	"errors"
	"io"
	"io/fs"
	"slices"
	"strings"
	"time"
)

// FS returns the image as an fs.FS: what a kernel mount of the image alone
// shows, whiteouts and overlay xattr markers included, with External files
// reading as zeros. It also has the methods of fs.ReadDirFS, fs.ReadFileFS,
// fs.StatFS and fs.ReadLinkFS; files are io.ReaderAt and io.Seeker, and the
// Sys of an fs.FileInfo is an Inode. Symbolic links are followed inside the
// image, absolute ones from its root. It is good until the Reader is closed.
func (r *Reader) FS() fs.FS { return imageFS{r} }

type imageFS struct{ r *Reader }

var (
	_ fs.ReadDirFS   = imageFS{}
	_ fs.ReadFileFS  = imageFS{}
	_ fs.StatFS      = imageFS{}
	_ fs.ReadLinkFS  = imageFS{}
	_ fs.ReadDirFile = (*openFolder)(nil)
	_ io.ReaderAt    = (*openFile)(nil)
	_ io.Seeker      = (*openFile)(nil)
)

// maxSymlinks is how many symbolic links a path may lead through, as in Linux.
const maxSymlinks = 40

var (
	errNotDir  = errors.New("not a directory")
	errIsDir   = errors.New("is a directory")
	errTooMany = errors.New("too many symbolic links")
)

// resolve finds the inode of a path; follow says what to do with a symbolic
// link at its end.
func (f imageFS) resolve(op, name string, follow bool) (Inode, error) {
	i, err := f.walkTo(name, follow)
	if err != nil {
		return i, &fs.PathError{Op: op, Path: name, Err: err}
	}
	return i, nil
}

func (f imageFS) walkTo(name string, follow bool) (Inode, error) {
	if !fs.ValidPath(name) {
		return Inode{}, fs.ErrInvalid
	}
	at, err := f.r.Inode(f.r.root)
	if err != nil {
		return at, err
	}
	for links := 0; name != ""; {
		var part string
		part, name, _ = strings.Cut(name, "/")
		if part == "" || part == "." {
			continue
		}
		if !at.IsDir() {
			return at, errNotDir
		}
		nid, err := f.r.Lookup(at, part)
		if err != nil {
			return at, err
		}
		next, err := f.r.Inode(nid)
		if err != nil {
			return next, err
		}
		if !next.IsSymlink() || name == "" && !follow {
			at = next
			continue
		}
		if links++; links > maxSymlinks {
			return next, errTooMany
		}
		target, err := f.r.Readlink(next)
		if err != nil {
			return next, err
		}
		if target[0] == '/' {
			if at, err = f.r.Inode(f.r.root); err != nil {
				return at, err
			}
		}
		if name != "" {
			target += "/" + name
		}
		name = target
	}
	return at, nil
}

// Open opens a file or directory, through symbolic links.
func (f imageFS) Open(name string) (fs.File, error) {
	i, err := f.resolve("open", name, true)
	if err != nil {
		return nil, err
	}
	of := openFile{r: f.r, name: name, ino: i}
	if i.IsDir() {
		return &openFolder{openFile: of}, nil
	}
	return &of, nil
}

// Stat describes what name leads to.
func (f imageFS) Stat(name string) (fs.FileInfo, error) { return f.stat("stat", name, true) }

// Lstat describes name itself.
func (f imageFS) Lstat(name string) (fs.FileInfo, error) { return f.stat("lstat", name, false) }

func (f imageFS) stat(op, name string, follow bool) (fs.FileInfo, error) {
	i, err := f.resolve(op, name, follow)
	if err != nil {
		return nil, err
	}
	return fileInfo{name[strings.LastIndexByte(name, '/')+1:], i}, nil
}

// ReadLink returns the target of a symbolic link.
func (f imageFS) ReadLink(name string) (string, error) {
	i, err := f.resolve("readlink", name, false)
	if err != nil {
		return "", err
	}
	if !i.IsSymlink() {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: fs.ErrInvalid}
	}
	target, err := f.r.Readlink(i)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	return target, nil
}

// ReadDir lists a directory, sorted.
func (f imageFS) ReadDir(name string) ([]fs.DirEntry, error) {
	i, err := f.resolve("readdir", name, true)
	if err != nil {
		return nil, err
	}
	if !i.IsDir() {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: errNotDir}
	}
	d := &openFolder{openFile: openFile{r: f.r, name: name, ino: i}}
	return d.ReadDir(-1)
}

// ReadFile returns what a file holds.
func (f imageFS) ReadFile(name string) ([]byte, error) {
	file, err := f.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(file) // grows as data comes, whatever the size says
}

// fileInfo describes an inode.
type fileInfo struct {
	name string
	ino  Inode
}

func (i fileInfo) Name() string       { return i.name }
func (i fileInfo) Size() int64        { return i.ino.Size }
func (i fileInfo) Mode() fs.FileMode  { return fileMode(i.ino.Mode) }
func (i fileInfo) ModTime() time.Time { return time.Unix(i.ino.MtimeSec, int64(i.ino.MtimeNsec)) }
func (i fileInfo) IsDir() bool        { return i.ino.IsDir() }
func (i fileInfo) Sys() any           { return i.ino }

// fileMode turns st_mode into Go's form of it.
func fileMode(mode uint32) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	for _, bit := range [...]struct {
		stat uint32
		mode fs.FileMode
	}{{0o4000, fs.ModeSetuid}, {0o2000, fs.ModeSetgid}, {0o1000, fs.ModeSticky}} {
		if mode&bit.stat != 0 {
			m |= bit.mode
		}
	}
	return m | typeMode(fileType(mode))
}

// typeMode returns the type bits of a directory entry type.
func typeMode(t uint8) fs.FileMode {
	switch t {
	case TypeRegular:
		return 0
	case TypeDir:
		return fs.ModeDir
	case TypeSymlink:
		return fs.ModeSymlink
	case TypeChar:
		return fs.ModeDevice | fs.ModeCharDevice
	case TypeBlock:
		return fs.ModeDevice
	case TypeFifo:
		return fs.ModeNamedPipe
	case TypeSocket:
		return fs.ModeSocket
	}
	return fs.ModeIrregular
}

// openFile is an open file of the image. Files hold nothing that Close gives
// back; it only makes later use fail.
type openFile struct {
	r      *Reader
	name   string
	ino    Inode
	off    int64
	closed bool
}

// fail returns the error of an operation on the file.
func (f *openFile) fail(op string, err error) error {
	return &fs.PathError{Op: op, Path: f.name, Err: err}
}

func (f *openFile) Stat() (fs.FileInfo, error) {
	if f.closed {
		return nil, f.fail("stat", fs.ErrClosed)
	}
	return fileInfo{f.name[strings.LastIndexByte(f.name, '/')+1:], f.ino}, nil
}

func (f *openFile) Close() error {
	if f.closed {
		return f.fail("close", fs.ErrClosed)
	}
	f.closed = true
	return nil
}

func (f *openFile) Read(p []byte) (int, error) {
	n, err := f.ReadAt(p, f.off)
	f.off += int64(n)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

func (f *openFile) ReadAt(p []byte, off int64) (int, error) {
	if f.closed {
		return 0, f.fail("read", fs.ErrClosed)
	}
	if !f.ino.IsRegular() && !f.ino.IsDir() {
		return 0, io.EOF // a device or the like: the image holds nothing of it
	}
	n, err := f.r.ReadAt(f.ino, p, off)
	if err != nil && err != io.EOF {
		err = f.fail("read", err)
	}
	return n, err
}

func (f *openFile) Seek(offset int64, whence int) (int64, error) {
	switch whence {
	case io.SeekStart:
	case io.SeekCurrent:
		offset += f.off
	case io.SeekEnd:
		offset += f.ino.Size
	default:
		offset = -1
	}
	if offset < 0 {
		return 0, f.fail("seek", fs.ErrInvalid)
	}
	f.off = offset
	return offset, nil
}

// openFolder is an open directory of the image.
type openFolder struct {
	openFile
	cookie uint64
}

func (d *openFolder) Read([]byte) (int, error) { return 0, d.fail("read", errIsDir) }

func (d *openFolder) ReadDir(n int) ([]fs.DirEntry, error) {
	if d.closed {
		return nil, d.fail("readdir", fs.ErrClosed)
	}
	var list []fs.DirEntry
	err := d.r.ReadDir(d.ino, d.cookie, func(e DirEntry, next uint64) bool {
		d.cookie = next
		if name := string(e.Name); name != "." && name != ".." {
			list = append(list, dirEntry{d.r, name, e.NID, e.Type})
		}
		return n <= 0 || len(list) < n
	})
	if err != nil {
		return list, d.fail("readdir", err)
	}
	if n > 0 && len(list) == 0 {
		return nil, io.EOF
	}
	if n <= 0 { // fs.ReadDirFS wants it, and an image may be out of order
		slices.SortStableFunc(list, func(x, y fs.DirEntry) int { return strings.Compare(x.Name(), y.Name()) })
	}
	return list, nil
}

// dirEntry is an entry of a directory of the image.
type dirEntry struct {
	r    *Reader
	name string
	nid  uint64
	typ  uint8
}

func (e dirEntry) Name() string      { return e.name }
func (e dirEntry) IsDir() bool       { return e.typ == TypeDir }
func (e dirEntry) Type() fs.FileMode { return typeMode(e.typ) }
func (e dirEntry) String() string    { return fs.FormatDirEntry(e) }

func (e dirEntry) Info() (fs.FileInfo, error) {
	i, err := e.r.Inode(e.nid)
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: e.name, Err: err}
	}
	return fileInfo{e.name, i}, nil
}
