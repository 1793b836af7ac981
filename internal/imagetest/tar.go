// Package imagetest makes layers and images in a few words, for tests and for
// the demo:
//
//	tar, err := imagetest.Tar(
//		imagetest.Dir("etc"),
//		imagetest.File("etc/passwd", "root:x:0:0::/:/bin/sh\n", imagetest.Mode(0o600)),
//		imagetest.Symlink("etc/mtab", "/proc/mounts"),
//		imagetest.Whiteout("var/old"),
//	)
//	blob, err := imagetest.EStargz(tar, imagetest.Options{})
//	image, err := imagetest.Image(blob)
//	err = image.WriteLayout(dir, "latest")
//
// Tar turns items into a tar. EStargz, ZstdChunked (stargz-snapshotter's
// dialect), ContainersZstdChunked (containers/storage's) and Gzip turn a tar
// into a layer blob with its descriptor; Image turns blobs into an image,
// Index several images into one for many platforms. What comes out depends on
// what goes in and on nothing else, so digests may be written down.
//
// It holds everything in memory, knows no registry, and imports no testing:
// whoever does not want to look at errors wraps a call in Must.
package imagetest

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"strings"
	"time"
)

// Must returns v, or panics when err is not nil:
//
//	blob := imagetest.Must(imagetest.EStargz(tar, imagetest.Options{}))
func Must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// DefaultMtime is the modification time of an item that says none:
// 2026-01-02 03:04:05 UTC.
var DefaultMtime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// An Item is one entry of a tar. Names are written as they are given, so that
// hostile ones can be; only Dir adds the slash at the end that tar wants.
type Item struct {
	header tar.Header
	zeros  int64 // before data
	data   []byte
}

// An Attr changes an item's metadata.
type Attr func(*tar.Header)

// Mode sets the permission bits with setuid, setgid and sticky (07777). The
// default is 0755 for directories, 0777 for symlinks, 0644 else.
func Mode(mode int64) Attr { return func(h *tar.Header) { h.Mode = mode } }

// Owner sets user and group, 0 by default.
func Owner(uid, gid int) Attr { return func(h *tar.Header) { h.Uid, h.Gid = uid, gid } }

// Mtime sets the modification time. (The estargz writer rounds it to a second.)
func Mtime(t time.Time) Attr { return func(h *tar.Header) { h.ModTime = t } }

// Xattr adds an extended attribute; the value may hold any bytes.
func Xattr(name, value string) Attr {
	return func(h *tar.Header) {
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}
}

func item(h tar.Header, data []byte, attrs []Attr) Item {
	h.ModTime, h.Size, h.Format = DefaultMtime, int64(len(data)), tar.FormatPAX
	for _, a := range attrs {
		a(&h)
	}
	return Item{header: h, data: data}
}

// Dir is a directory. "./" or "." gives the root its metadata.
func Dir(name string, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: 0o755}, nil, attrs)
}

// File is a regular file.
func File(name, content string, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, []byte(content), attrs)
}

// Random is a regular file of n bytes that do not compress, the same for the
// same n and seed (see RandomBytes).
func Random(name string, n int, seed uint64, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, RandomBytes(n, seed), attrs)
}

// Sparse is a regular file of size bytes, at least those of end: zeros, and end
// at its end. The zeros are not held in memory.
func Sparse(name string, size int64, end string, attrs ...Attr) Item {
	it := File(name, end, attrs...)
	it.zeros, it.header.Size = size-int64(len(end)), size
	return it
}

// RandomBytes is the content of Random.
func RandomBytes(n int, seed uint64) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	b := make([]byte, n)
	rand.NewChaCha8(key).Read(b)
	return b
}

// Symlink is a symbolic link to target.
func Symlink(name, target string, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil, attrs)
}

// Hardlink is a further name of target, a path from the root of the tree.
func Hardlink(name, target string, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}, nil, attrs)
}

// Char is a character device. 0, 0 is overlayfs's own kind of whiteout.
func Char(name string, major, minor int64, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeChar, Name: name, Devmajor: major, Devminor: minor, Mode: 0o644}, nil, attrs)
}

// Block is a block device.
func Block(name string, major, minor int64, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeBlock, Name: name, Devmajor: major, Devminor: minor, Mode: 0o644}, nil, attrs)
}

// Fifo is a named pipe.
func Fifo(name string, attrs ...Attr) Item {
	return item(tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o644}, nil, attrs)
}

// Whiteout hides name in the layers below: it is the empty file ".wh.<base>"
// beside it (OCI image-spec, layer.md, "Whiteouts").
func Whiteout(name string) Item {
	dir, base := path.Split(strings.TrimSuffix(name, "/"))
	return File(dir+".wh."+base, "")
}

// Opaque hides everything that the layers below have in the directory dir: it
// is the empty file ".wh..wh..opq" in it (OCI image-spec, "Opaque Whiteout").
func Opaque(dir string) Item {
	if dir = strings.TrimSuffix(dir, "/"); dir != "" {
		dir += "/"
	}
	return File(dir+".wh..wh..opq", "")
}

// Tar writes the items as a tar in pax format, in their order. An item that a
// tar cannot hold, such as one with a NUL in its name, is an error.
func Tar(items ...Item) ([]byte, error) {
	var b bytes.Buffer
	if err := WriteTar(&b, items...); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// WriteTar is Tar for what is too large for memory.
func WriteTar(to io.Writer, items ...Item) error {
	w := tar.NewWriter(to)
	for _, it := range items {
		if err := w.WriteHeader(&it.header); err != nil {
			return fmt.Errorf("tar entry %q: %w", it.header.Name, err)
		}
		if _, err := io.CopyN(w, zeros{}, it.zeros); err != nil {
			return fmt.Errorf("tar entry %q: %w", it.header.Name, err)
		}
		if _, err := w.Write(it.data); err != nil {
			return fmt.Errorf("tar entry %q: %w", it.header.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("tar: %w", err)
	}
	return nil
}

// zeros reads as zero bytes without an end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// Name returns the item's name as the tar has it.
func (it Item) Name() string { return it.header.Name }

// IsDir reports whether the item is a directory.
func (it Item) IsDir() bool { return it.header.Typeflag == tar.TypeDir }

// LinkTarget returns the path that a hard link leads to, "" for all else.
func (it Item) LinkTarget() string {
	if it.header.Typeflag != tar.TypeLink {
		return ""
	}
	return it.header.Linkname
}
