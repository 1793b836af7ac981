package composefs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A Filter names entries of an image's root; what is not in them is left out.
// An empty Filter leaves nothing out.
type Filter []string

// keeps reports whether the entry at path, which begins with a slash, is shown.
func (f Filter) keeps(path string) bool {
	top, _, _ := strings.Cut(path[1:], "/")
	return len(f) == 0 || top == "" || slices.Contains(f, top)
}

// walk calls fn for every entry that the author of a composefs image gave it,
// the root and what the filter leaves out excepted.
func walk(r *erofs.Reader, filter Filter, fn func(path string, i erofs.Inode) error) error {
	if !r.Header().Composefs {
		return errors.New("not a composefs image")
	}
	return r.Walk(func(path string, i erofs.Inode) error {
		switch {
		case path == "/" || i.IsWhiteout():
			return nil
		case filter.keeps(path):
			return fn(path, i)
		case i.IsDir():
			return fs.SkipDir
		}
		return nil
	})
}

// List prints the entries of an image, depth first and in byte order, as
// `composefs-info ls` does: the path, with a slash after a directory, then a
// tab and "-> " with the target of a symbolic link or "@ " with the payload of
// an external file. Of an inode with several names only the first that is
// shown has more than its path, as with composefs-info.
func List(w io.Writer, r *erofs.Reader, filter Filter) error {
	out := bufio.NewWriterSize(w, 64<<10)
	var line []byte
	seen := map[uint64]struct{}{}
	err := walk(r, filter, func(path string, i erofs.Inode) error {
		line = appendEscaped(line[:0], path, true)
		_, again := seen[i.NID]
		if i.IsSymlink() || i.External() {
			seen[i.NID] = struct{}{}
		}
		switch {
		case again:
		case i.IsDir():
			line = append(line, "/\t"...)
		case i.IsSymlink():
			target, err := r.Readlink(i)
			if err != nil {
				return err
			}
			line = appendEscaped(append(line, "\t-> "...), target, false)
		case i.External():
			object, _, err := r.Payload(i)
			if err != nil {
				return err
			}
			if object != "" {
				line = appendEscaped(append(line, "\t@ "...), object, false)
			}
		}
		_, err := out.Write(append(line, '\n'))
		return err
	})
	if err != nil {
		return err
	}
	return out.Flush()
}

// appendEscaped appends s as composefs-info prints paths; spaces says that a
// space stays one.
func appendEscaped(b []byte, s string, spaces bool) []byte {
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\\':
			b = append(b, `\\`...)
		case c == '\n':
			b = append(b, `\n`...)
		case c == '\r':
			b = append(b, `\r`...)
		case c == '\t':
			b = append(b, `\t`...)
		case c > ' ' && c < 0x7f, c == ' ' && spaces:
			b = append(b, c)
		default:
			b = fmt.Appendf(b, `\x%02x`, c)
		}
	}
	return b
}

// CheckContentPaths fails unless the payload of every external file is the path
// that its fs-verity digest has in a store of objects ("ab/cdef…"): the image is
// then the one that mkcomposefs makes of the same tree with --digest-store.
func CheckContentPaths(r *erofs.Reader) error {
	return walk(r, nil, func(path string, i erofs.Inode) error {
		if !i.External() {
			return nil
		}
		payload, digest, err := r.Payload(i)
		if err != nil {
			return err
		}
		if len(digest) == 0 {
			return fmt.Errorf("%s: no fs-verity digest", path)
		}
		if want := fmt.Sprintf("%x/%x", digest[:1], digest[1:]); payload != want {
			return fmt.Errorf("%s: its payload is %q, its digest's path %q", path, payload, want)
		}
		return nil
	})
}

// Objects is a set of payloads.
type Objects map[string]struct{}

// Add puts the payloads of an image's files into the set.
func (o Objects) Add(r *erofs.Reader, filter Filter) error {
	return walk(r, filter, func(_ string, i erofs.Inode) error {
		if !i.External() {
			return nil
		}
		object, _, err := r.Payload(i)
		if err == nil && object != "" {
			o[object] = struct{}{}
		}
		return err
	})
}

// Sorted returns the payloads in byte order.
func (o Objects) Sorted() []string {
	all := make([]string, 0, len(o))
	for object := range o {
		all = append(all, object)
	}
	slices.Sort(all)
	return all
}

// Missing returns the payloads, in byte order, that are not below the folder
// basedir.
func (o Objects) Missing(basedir string) ([]string, error) {
	dir, err := os.OpenFile(basedir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("folder of objects: %w", err)
	}
	defer dir.Close()
	return slices.DeleteFunc(o.Sorted(), func(object string) bool {
		var st unix.Stat_t
		return unix.Fstatat(int(dir.Fd()), strings.TrimLeft(object, "/"), &st, 0) == nil
	}), nil
}

// Dump writes an image as composefs-dump(5) text (erofs.WriteDump), without
// what the filter leaves out. Of a file with several names the first that is
// shown has the file, the others are links to it.
func Dump(w io.Writer, r *erofs.Reader, filter Filter) error {
	if len(filter) == 0 {
		return erofs.WriteDump(w, r)
	}
	f := &dumpFilter{out: bufio.NewWriterSize(w, 64<<10), r: r, names: filter, moved: map[string]string{}}
	if err := erofs.WriteDump(f, r); err != nil {
		return err
	}
	return f.out.Flush()
}

// A dumpFilter takes the text of a dump and passes on the lines that a filter
// keeps. A hard link to a name that is left out becomes the file: its line has
// all fields of the file but PAYLOAD.
type dumpFilter struct {
	out   *bufio.Writer
	r     *erofs.Reader
	names Filter
	rest  []byte            // of an unfinished line
	moved map[string]string // a name that is left out: the first name that is shown; both escaped
}

func (f *dumpFilter) Write(p []byte) (int, error) {
	written := len(p)
	for {
		k := bytes.IndexByte(p, '\n')
		if k < 0 {
			f.rest = append(f.rest, p...)
			return written, nil
		}
		line := string(f.rest) + string(p[:k+1])
		f.rest, p = f.rest[:0], p[k+1:]
		if err := f.line(line); err != nil {
			return 0, err
		}
	}
}

// The fields of a dump line that matter here, counted from 0.
const (
	dumpPath    = 0
	dumpMode    = 2
	dumpPayload = 8
	dumpFixed   = 11
)

func (f *dumpFilter) line(line string) error {
	fields := strings.SplitN(line, " ", dumpFixed)
	path := unescape(fields[dumpPath])
	if !f.names.keeps(path) {
		return nil
	}
	mode, isLink := strings.CutPrefix(fields[dumpMode], "@")
	if target := fields[dumpPayload]; isLink && !f.names.keeps(unescape(target)) {
		first, ok := f.moved[target]
		if ok {
			fields[dumpPayload] = first
		} else {
			f.moved[target] = fields[dumpPath]
			own, err := f.payload(path)
			if err != nil {
				return err
			}
			fields[dumpMode], fields[dumpPayload] = mode, own
		}
		line = strings.Join(fields, " ")
	}
	_, err := f.out.WriteString(line)
	return err
}

// payload returns the PAYLOAD field of a file that is no link.
func (f *dumpFilter) payload(path string) (string, error) {
	nid := f.r.Root()
	for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		dir, err := f.r.Inode(nid)
		if err == nil {
			nid, err = f.r.Lookup(dir, name)
		}
		if err != nil {
			return "", fmt.Errorf("%.200q: %w", path, err)
		}
	}
	i, err := f.r.Inode(nid)
	if err != nil {
		return "", err
	}
	own := ""
	switch {
	case i.IsSymlink():
		own, err = f.r.Readlink(i)
	case i.External():
		own, _, err = f.r.Payload(i)
	}
	switch own {
	case "":
		own = "-"
	case "-":
		own = `\x2d`
	default:
		own = string(appendEscaped(nil, own, false))
	}
	return own, err
}

// unescape undoes appendEscaped.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b []byte
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == '\\' && i+1 < len(s) {
			i++
			switch c = s[i]; c {
			case 'n':
				c = '\n'
			case 'r':
				c = '\r'
			case 't':
				c = '\t'
			case 'x':
				if i+2 < len(s) {
					v, _ := strconv.ParseUint(s[i+1:i+3], 16, 8)
					c = byte(v)
					i += 2
				}
			}
		}
		b = append(b, c)
	}
	return string(b)
}

// Measure returns the fs-verity digest of the file at path: the kernel's where
// fs-verity of that algorithm is enabled on it, else computed.
func Measure(path string, alg verity.Algorithm) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("measure: %w", err)
	}
	defer f.Close()
	if a, digest, err := verity.Measure(f); err == nil && a == alg {
		return digest, nil
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("measure: %w", err)
	}
	var digest []byte
	if fi.Mode().IsRegular() {
		digest, err = verity.DigestAt(f, fi.Size(), alg, runtime.NumCPU())
	} else {
		digest, err = verity.Digest(f, alg)
	}
	if err != nil {
		return nil, fmt.Errorf("measure %s: %w", path, err)
	}
	return digest, nil
}
