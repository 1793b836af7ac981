// Package look reads the merged tree of an image without mounting it: it finds
// paths, lists, copies and compares what overlayfs would show of the tree, and
// quotes names for terminals. It fetches nothing itself, prints nothing and
// knows no command.
package look

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

// Contents give the bytes of files that are not in the EROFS image.
type Contents interface {
	// ReadAt reads len(p) bytes, fewer only at the end, of an object
	// ("ab/cdef…").
	ReadAt(ctx context.Context, object string, p []byte, off int64) (n int, fetched bool, err error)
}

// A Tree is the merged tree of one image. It may be used by several goroutines.
type Tree struct {
	r        *erofs.Reader
	contents Contents
}

// New makes a Tree of an EROFS image and what has the bytes of its files.
func New(r *erofs.Reader, contents Contents) *Tree { return &Tree{r, contents} }

// A File is one name in the tree.
type File struct {
	Path string // absolute, clean
	erofs.Inode
}

// Name returns the last component of the path, "/" for the root.
func (f *File) Name() string { return path.Base(f.Path) }

// maxLinks is how many symbolic links a path may lead through, as in the
// kernel (MAXSYMLINKS).
const maxLinks = 40

// Find finds a path. Symbolic links on the way to its last component are
// followed inside the image, and with follow the last one too. The error wraps
// fs.ErrNotExist, or says which component is no folder, or that there are too
// many links.
func (t *Tree) Find(name string, follow bool) (File, error) {
	root, err := t.r.Inode(t.r.Root())
	if err != nil {
		return File{}, err
	}
	way := []File{{"/", root}}
	rest := parts(name)
	for links := 0; len(rest) > 0; {
		at := way[len(way)-1]
		part := rest[0]
		rest = rest[1:]
		if part == ".." {
			way = way[:max(1, len(way)-1)]
			continue
		}
		if !at.IsDir() {
			return File{}, &fs.PathError{Op: "open", Path: name, Err: unix.ENOTDIR}
		}
		next, err := t.child(at, part)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				err = &fs.PathError{Op: "open", Path: name, Err: unix.ENOENT}
			}
			return File{}, err
		}
		if !next.IsSymlink() || len(rest) == 0 && !follow {
			way = append(way, next)
			continue
		}
		if links++; links > maxLinks {
			return File{}, &fs.PathError{Op: "open", Path: name, Err: unix.ELOOP}
		}
		target, err := t.r.Readlink(next.Inode)
		if err != nil {
			return File{}, err
		}
		if strings.HasPrefix(target, "/") {
			way = way[:1]
		}
		rest = append(parts(target), rest...)
	}
	return way[len(way)-1], nil
}

// parts splits a path into the components that mean something.
func parts(name string) []string {
	return slices.DeleteFunc(strings.Split(name, "/"), func(s string) bool { return s == "" || s == "." })
}

// child returns the entry of a folder.
func (t *Tree) child(dir File, name string) (File, error) {
	nid, err := t.r.Lookup(dir.Inode, name)
	if err != nil {
		return File{}, err
	}
	ino, err := t.r.Inode(nid)
	if err == nil && ino.IsWhiteout() {
		err = fs.ErrNotExist
	}
	return File{path.Join(dir.Path, name), ino}, err
}

// Children returns what is in a folder, by name in byte order.
func (t *Tree) Children(dir File) ([]File, error) {
	if strings.Count(dir.Path, "/") > maxDepth {
		return nil, fmt.Errorf("read %.100s…: more than %d folders in one another: %w", dir.Path, maxDepth, unix.ELOOP)
	}
	var all []File
	var inner error
	err := t.r.ReadDir(dir.Inode, 0, func(e erofs.DirEntry, _ uint64) bool {
		name := string(e.Name)
		if name == "." || name == ".." {
			return true
		}
		ino, err := t.r.Inode(e.NID)
		if err == nil && strings.Contains(name, "/") {
			err = fmt.Errorf("folder %s: a name with a slash", dir.Path)
		}
		if inner = err; err == nil && !ino.IsWhiteout() {
			all = append(all, File{path.Join(dir.Path, name), ino})
		}
		return err == nil
	})
	if err == nil {
		err = inner
	}
	slices.SortFunc(all, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return all, err
}

// maxDepth bounds how deep folders may lie in one another: an image whose
// folders form a cycle must come to an end.
const maxDepth = 4096

// Walk calls fn for a file and everything below it, a folder before what is in
// it, by name, with how far below the first one it lies. fs.SkipDir from fn
// leaves a folder out; any other error ends the walk.
func (t *Tree) Walk(f File, fn func(f File, depth int) error) error {
	return t.walk(f, 0, folders{}, fn)
}

// folders are those that were gone into, by nid. A folder has one name only: an
// image in which it has more is no tree, and has no end if folders form a cycle.
type folders map[uint64]bool

func (s folders) enter(f File) error {
	if s[f.NID] {
		return fmt.Errorf("read %.100s: a folder that is in two places of the image: %w", f.Path, unix.ELOOP)
	}
	s[f.NID] = true
	return nil
}

func (t *Tree) walk(f File, depth int, seen folders, fn func(File, int) error) error {
	err := fn(f, depth)
	if err != nil || !f.IsDir() {
		if errors.Is(err, fs.SkipDir) {
			err = nil
		}
		return err
	}
	if err := seen.enter(f); err != nil {
		return err
	}
	all, err := t.Children(f)
	for _, c := range all {
		if err == nil {
			err = t.walk(c, depth+1, seen, fn)
		}
	}
	return err
}

// Target returns where a symbolic link leads, "" for all else.
func (t *Tree) Target(f File) (string, error) {
	if !f.IsSymlink() {
		return "", nil
	}
	return t.r.Readlink(f.Inode)
}

// Xattrs returns the extended attributes that a program would see, by name.
func (t *Tree) Xattrs(f File) ([]erofs.Xattr, error) {
	all, err := t.r.Xattrs(f.Inode)
	var seen []erofs.Xattr
	for _, x := range all {
		if name, ok := erofs.VisibleXattr(x.Name); ok {
			seen = append(seen, erofs.Xattr{Name: name, Value: bytes.Clone(x.Value)})
		}
	}
	slices.SortFunc(seen, func(a, b erofs.Xattr) int { return strings.Compare(a.Name, b.Name) })
	return seen, err
}

// Object returns the name ("ab/cdef…") of the object that has a file's bytes,
// "" if the image has them itself or it has none.
func (t *Tree) Object(f File) (string, error) {
	if !f.External() {
		return "", nil
	}
	name, _, err := t.r.Payload(f.Inode)
	return name, err
}

// Open returns the bytes of a regular file; reads end with ctx.
func (t *Tree) Open(ctx context.Context, f File) (*io.SectionReader, error) {
	switch {
	case f.IsDir():
		return nil, &fs.PathError{Op: "read", Path: f.Path, Err: unix.EISDIR}
	case !f.IsRegular():
		return nil, &fs.PathError{Op: "read", Path: f.Path, Err: errors.New("not a regular file")}
	}
	object, err := t.Object(f)
	if err != nil {
		return nil, err
	}
	return io.NewSectionReader(&fileReader{t, ctx, f, object}, 0, f.Size), nil
}

type fileReader struct {
	t      *Tree
	ctx    context.Context
	f      File
	object string
}

func (r *fileReader) ReadAt(p []byte, off int64) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	if r.object == "" {
		return r.t.r.ReadAt(r.f.Inode, p, off)
	}
	if off >= r.f.Size {
		return 0, io.EOF
	}
	want := min(int64(len(p)), r.f.Size-off)
	n, _, err := r.t.contents.ReadAt(r.ctx, r.object, p[:want], off)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
		return n, fmt.Errorf("read %s: %w", r.f.Path, err)
	case int64(n) < want:
		return n, fmt.Errorf("read %s: %w", r.f.Path, io.ErrUnexpectedEOF)
	case n < len(p):
		return n, io.EOF
	}
	return n, nil
}
