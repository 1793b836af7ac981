package treediff

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// buffers belong to one worker.
type buffers [2][]byte

// contentBuffer is how much of a file is read at a time, per tree: large
// enough that the kernel reads ahead.
const contentBuffer = 256 << 10

// inner compares what is behind an entry: symlink target, extended
// attributes, content.
func (c *comparison) inner(e entry, buf *buffers) {
	kind := e.st[0].Mode & unix.S_IFMT
	if kind == unix.S_IFLNK && c.o.Without&Target == 0 {
		var targets [2]string
		for side := range targets {
			t, err := os.Readlink(c.full(side, e.path))
			targets[side] = fmt.Sprintf("%q", t)
			if err != nil {
				targets[side] = err.Error()
			}
		}
		if targets[0] != targets[1] {
			c.differ(e.path, Target, "", targets[0], targets[1])
		}
	}
	if c.o.Without&Xattrs == 0 {
		c.xattrs(e.path)
	}
	if kind == unix.S_IFREG && e.st[0].Size == e.st[1].Size && c.o.Without&Content == 0 {
		c.content(e.path, buf)
	}
}

func (c *comparison) xattrs(path string) {
	var lists [2]map[string]string
	for side := range lists {
		var err error
		if lists[side], err = readXattrs(c.full(side, path)); err != nil {
			c.onSide(side, path, Xattrs, err.Error())
			return
		}
	}
	for name, a := range lists[0] {
		b, ok := lists[1][name]
		if !ok {
			c.differ(path, Xattrs, name, fmt.Sprintf("%q", a), "absent")
		} else if a != b {
			c.differ(path, Xattrs, name, fmt.Sprintf("%q", a), fmt.Sprintf("%q", b))
		}
	}
	for name, b := range lists[1] {
		if _, ok := lists[0][name]; !ok {
			c.differ(path, Xattrs, name, "absent", fmt.Sprintf("%q", b))
		}
	}
}

// readXattrs reads all extended attributes of a path itself. A filesystem that
// has none (ENOTSUP) gives an empty list.
func readXattrs(path string) (map[string]string, error) {
	list, err := sized(func(p []byte) (int, error) { return unix.Llistxattr(path, p) })
	if errors.Is(err, unix.ENOTSUP) || len(list) == 0 && err == nil {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listxattr: %w", err)
	}
	all := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		value, err := sized(func(p []byte) (int, error) { return unix.Lgetxattr(path, name, p) })
		if err != nil {
			return nil, fmt.Errorf("getxattr %s: %w", name, err)
		}
		all[name] = string(value)
	}
	return all, nil
}

// sized calls a function of the xattr family with a buffer that fits.
func sized(get func([]byte) (int, error)) ([]byte, error) {
	buf := make([]byte, 1024)
	for {
		n, err := get(buf)
		if err == nil {
			return buf[:n], nil
		}
		if !errors.Is(err, unix.ERANGE) {
			return nil, err
		}
		if n, err = get(nil); err != nil {
			return nil, err
		}
		buf = make([]byte, n+256)
	}
}

// content compares two files of equal size, up to the first difference.
func (c *comparison) content(path string, buf *buffers) {
	var files [2]*os.File
	for side := range files {
		f, err := os.OpenFile(c.full(side, path), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			c.onSide(side, path, Content, err.Error())
			return
		}
		defer f.Close()
		files[side] = f
		if buf[side] == nil {
			buf[side] = make([]byte, contentBuffer)
		}
	}
	for off := int64(0); ; {
		var n [2]int
		var errs [2]error
		for side, f := range files {
			n[side], errs[side] = io.ReadFull(f, buf[side])
			if errs[side] != nil && errs[side] != io.EOF && errs[side] != io.ErrUnexpectedEOF {
				c.onSide(side, path, Content, fmt.Sprintf("read at %d: %v", off+int64(n[side]), errs[side]))
				return
			}
		}
		a, b := buf[0][:n[0]], buf[1][:n[1]]
		if !bytes.Equal(a, b) {
			i := 0
			for i < min(len(a), len(b)) && a[i] == b[i] {
				i++
			}
			c.differ(path, Content, "", excerpt(a, i, off), excerpt(b, i, off))
			return
		}
		if errs[0] != nil || errs[1] != nil {
			return
		}
		off += int64(n[0])
	}
}

func excerpt(p []byte, i int, off int64) string {
	if i == len(p) {
		return fmt.Sprintf("ends at %d", off+int64(i))
	}
	return fmt.Sprintf("at %d: %q", off+int64(i), p[i:min(len(p), i+16)])
}

// A dirent is one record of getdents64(2).
type dirent struct {
	name string
	typ  uint8 // DT_*
}

// readDirents lists a directory as the kernel gives it, "." and ".."
// included, in its order.
func readDirents(path string) ([]dirent, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var all []dirent
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Getdents(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if n <= 0 || err != nil {
			return all, err
		}
		// struct linux_dirent64: u64 ino, s64 off, u16 reclen, u8 type, name with NUL
		for p := buf[:n]; len(p) > 0; {
			length := int(binary.NativeEndian.Uint16(p[16:]))
			name := p[19:length]
			if i := slices.Index(name, 0); i >= 0 {
				name = name[:i]
			}
			all = append(all, dirent{string(name), p[18]})
			p = p[length:]
		}
	}
}
