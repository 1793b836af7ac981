package truth

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

// dumpOf describes a tree as composefs-dump(5) text, a line for each name in
// the order of a walk, with the paths that a store has the contents under. The
// size of a folder, which no two filesystems agree about, is 0.
func dumpOf(root string) ([]string, error) {
	d := dumper{root: root, first: map[uint64]string{}, digests: map[uint64]string{}}
	err := d.walk("/")
	return d.lines, err
}

type dumper struct {
	root    string
	lines   []string
	first   map[uint64]string // by inode: its first path
	digests map[uint64]string
}

func (d *dumper) walk(path string) error {
	full := filepath.Join(d.root, path)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return err
	}
	kind := st.Mode & unix.S_IFMT
	at, payload, digest := "", "-", "-"
	size := st.Size
	if first, ok := d.first[st.Ino]; ok && kind != unix.S_IFDIR {
		at, payload, digest = "@", escape(first, ""), d.digests[st.Ino]
	}
	switch kind {
	case unix.S_IFDIR:
		size = 0
	case unix.S_IFLNK:
		target, err := os.Readlink(full)
		if err != nil {
			return err
		}
		if at == "" {
			payload, digest = escape(target, ""), "-"
		}
	case unix.S_IFREG:
		if at == "" && size > 0 {
			f, err := os.Open(full)
			if err != nil {
				return err
			}
			sum, err := verity.Digest(f, verity.SHA256)
			f.Close()
			if err != nil {
				return err
			}
			digest = fmt.Sprintf("%x", sum)
			payload = digest[:2] + "/" + digest[2:]
		}
	default:
		size = 0
	}
	if at == "" {
		d.first[st.Ino], d.digests[st.Ino] = path, digest
	}
	xs, err := xattrsOf(full)
	if err != nil {
		return err
	}
	var attrs []string
	for name, value := range xs {
		attrs = append(attrs, " "+escape(name, "=")+"="+escape(value, "="))
	}
	slices.Sort(attrs)
	d.lines = append(d.lines, fmt.Sprintf("%s %d %s%o %d %d %d %d %d.%d %s - %s%s", escape(path, ""), size, at, st.Mode, st.Nlink,
		st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec, payload, digest, strings.Join(attrs, "")))
	if kind != unix.S_IFDIR {
		return nil
	}
	entries, err := os.ReadDir(full)
	if err != nil {
		return err
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		if err := d.walk(filepath.Join(path, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// escape writes bytes as the format has them.
func escape(s, also string) string {
	var b strings.Builder
	for i := range len(s) {
		switch c := s[i]; {
		case c == '\\':
			b.WriteString(`\\`)
		case c == '\n':
			b.WriteString(`\n`)
		case c == '\r':
			b.WriteString(`\r`)
		case c == '\t':
			b.WriteString(`\t`)
		case c <= ' ', c > '~', strings.IndexByte(also, c) >= 0:
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}

// comparable brings the lines of a dump into the form of dumpOf: xattrs in
// order, no size of folders.
func comparable(dump string) []string {
	var all []string
	for line := range strings.Lines(dump) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), " ")
		if len(f) < 11 {
			all = append(all, line)
			continue
		}
		if strings.HasPrefix(f[2], "4") {
			f[1] = "0"
		}
		slices.Sort(f[11:])
		all = append(all, strings.Join(f, " "))
	}
	return all
}

// xattrsOf reads all xattrs of a file, of a symlink its own.
func xattrsOf(path string) (map[string]string, error) {
	names := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, names)
	if err != nil {
		return nil, fmt.Errorf("list xattrs of %s: %w", path, err)
	}
	all := map[string]string{}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, fmt.Errorf("xattr %s of %s: %w", name, path, err)
		}
		all[name] = string(value[:n])
	}
	return all, nil
}
