// Package treediff compares two file trees by what lstat(2), getdents(2),
// readlink(2), listxattr(2) and read(2) say of them: the mounts of an image
// with the tree a reference tool unpacks from it. It changes nothing, follows
// no symlink, and does not compare what belongs to a filesystem rather than to
// its files (inode and device numbers, blocks, atime, ctime, the size of
// directories).
package treediff

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// An Attr is one thing that is compared, or a set of them.
type Attr uint

// What is compared. Everything is, unless Options leave it out.
const (
	Existence   Attr = 1 << iota // the name is in both trees
	Type                         // regular file, directory, symlink, …
	Mode                         // permissions with setuid, setgid and sticky
	Owner                        // uid and gid
	Size                         // bytes, of files and symlinks
	Mtime                        // to the nanosecond, but for Options.MtimeSlack
	Nlink                        // link count of all but directories
	NlinkOfDirs                  // link count of directories, which some filesystems do not keep
	Rdev                         // major and minor number of devices
	Target                       // of symlinks
	Xattrs                       // names and values, of all namespaces the caller may see
	Content                      // bytes, of files of equal size
	HardLinks                    // which names share an inode
	Listing                      // a folder lists ".", ".." and each name once, with its right type, and no name that lookup lacks
)

var attrNames = []string{"existence", "type", "mode", "owner", "size", "mtime", "nlink", "nlink", "rdev", "target",
	"xattr", "content", "hard links", "listing"}

// String names the set: "mode", "mode+owner".
func (a Attr) String() string {
	var names []string
	for i, n := range attrNames {
		if a&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return strings.Join(names, "+")
}

// Options change what Compare calls a difference. The zero value compares
// everything exactly.
type Options struct {
	// Without is the set of things left out.
	Without Attr
	// MtimeSlack is how far two mtimes may be apart. Formats that round to
	// seconds (eStargz) need half a second.
	MtimeSlack time.Duration
	// Skip, if set, leaves out the paths it returns true for, with what is
	// below them. They must be in neither listing or in both. It is called by
	// one goroutine at a time.
	Skip func(path string) bool
}

// A Difference is one finding.
type Difference struct {
	Path string // relative to the roots, "." for themselves
	Attr Attr   // a single one
	Name string // of the extended attribute
	A, B string // what either tree says, for people
}

// String is one line: path, attribute and both values.
func (d Difference) String() string {
	what := d.Attr.String()
	if d.Name != "" {
		what += " " + d.Name
	}
	return fmt.Sprintf("%q: %s: %s | %s", d.Path, what, d.A, d.B)
}

// Compare compares the trees below the directories a and b and returns what
// differs, ordered by path. Something that cannot be read on one side is a
// difference too, so that one run shows them all; the error is for roots that
// are not directories. A nil error with no difference promises that every
// entry of both was examined.
func Compare(a, b string, o Options) ([]Difference, error) {
	c := &comparison{roots: [2]string{a, b}, o: o, first: [2]map[inode]string{{}, {}}}
	var st [2]unix.Stat_t
	for i, root := range c.roots {
		if err := unix.Stat(root, &st[i]); err != nil {
			return nil, fmt.Errorf("compare %s: %w", root, err)
		}
		if st[i].Mode&unix.S_IFMT != unix.S_IFDIR {
			return nil, fmt.Errorf("compare %s: %w", root, unix.ENOTDIR)
		}
		c.roots[i] += "/" // also a symlink given as root is walked
	}
	// The walk is one goroutine, which stats and lists; the workers read
	// attributes and contents. They end before Compare returns.
	work := make(chan entry, 256)
	var workers sync.WaitGroup
	for range max(4, runtime.GOMAXPROCS(0)) {
		workers.Go(func() {
			var buf buffers
			for e := range work {
				c.inner(e, &buf)
			}
		})
	}
	c.dir(".", st, work)
	close(work)
	workers.Wait()
	slices.SortStableFunc(c.found, func(x, y Difference) int {
		return cmp.Or(cmp.Compare(x.Path, y.Path), cmp.Compare(x.Attr, y.Attr), cmp.Compare(x.Name, y.Name))
	})
	return c.found, nil
}

// An inode is the identity of a file within one tree.
type inode struct{ dev, ino uint64 }

// An entry is a name that both trees have, with the same type.
type entry struct {
	path string
	st   [2]unix.Stat_t
}

type comparison struct {
	roots [2]string
	o     Options

	// first has, per tree, the first path seen of each inode. Walk only.
	first [2]map[inode]string

	mu    sync.Mutex // guards found
	found []Difference
}

func (c *comparison) full(side int, path string) string { return c.roots[side] + path }

// differ records a difference unless the options leave its kind out.
func (c *comparison) differ(path string, attr Attr, name, a, b string) {
	if c.o.Without&attr != 0 {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.found = append(c.found, Difference{path, attr, name, a, b})
}

// dir compares two directories, and everything below them.
func (c *comparison) dir(path string, st [2]unix.Stat_t, work chan<- entry) {
	c.stat(path, st)
	work <- entry{path, st}
	var lists [2]map[string]uint8
	for side := range lists {
		lists[side] = c.list(side, path)
	}
	names := make([]string, 0, len(lists[0]))
	for n := range lists[0] {
		names = append(names, n)
	}
	for n := range lists[1] {
		if _, ok := lists[0][n]; !ok {
			names = append(names, n)
		}
	}
	slices.Sort(names)
	for _, n := range names {
		child := n
		if path != "." {
			child = path + "/" + n
		}
		if c.o.Skip == nil || !c.o.Skip(child) {
			c.child(child, n, lists, work)
		}
	}
}

// child compares what a name stands for in both trees. It is in the listing
// of at least one.
func (c *comparison) child(path, name string, lists [2]map[string]uint8, work chan<- entry) {
	var st [2]unix.Stat_t
	var says [2]string
	there := [2]bool{}
	for side := range st {
		listedType, listed := lists[side][name]
		err := unix.Lstat(c.full(side, path), &st[side])
		there[side] = err == nil
		switch {
		case err == nil && listed:
			says[side] = typeName(st[side].Mode)
			if want := uint8(st[side].Mode & unix.S_IFMT >> 12); listedType != unix.DT_UNKNOWN && listedType != want {
				c.onSide(side, path, Listing, fmt.Sprintf("listed as %s, is %s", typeName(uint32(listedType)<<12), says[side]))
			}
		case err == nil:
			says[side] = typeName(st[side].Mode)
			c.onSide(side, path, Listing, "found by lookup, not listed")
		case listed:
			says[side] = "listed, but: " + err.Error()
			c.onSide(side, path, Listing, says[side])
		case err == unix.ENOENT:
			says[side] = "absent"
		default:
			says[side] = err.Error()
		}
	}
	if !there[0] || !there[1] {
		c.differ(path, Existence, "", says[0], says[1])
		return
	}
	if says[0] != says[1] {
		c.differ(path, Type, "", says[0], says[1])
		return
	}
	if st[0].Mode&unix.S_IFMT == unix.S_IFDIR {
		c.dir(path, st, work)
		return
	}
	c.stat(path, st)
	c.links(path, st)
	work <- entry{path, st}
}

// onSide records a finding about one tree only.
func (c *comparison) onSide(side int, path string, attr Attr, text string) {
	says := [2]string{"as expected", "as expected"}
	says[side] = text
	c.differ(path, attr, "", says[0], says[1])
}

// list reads a directory with its types (DT_*), without "." and "..".
func (c *comparison) list(side int, path string) map[string]uint8 {
	ents, err := readDirents(c.full(side, path))
	if err != nil {
		c.onSide(side, path, Listing, "read: "+err.Error())
		return nil
	}
	return c.names(side, path, ents)
}

// names checks what a directory listed.
func (c *comparison) names(side int, path string, ents []dirent) map[string]uint8 {
	names := make(map[string]uint8, len(ents))
	for _, e := range ents {
		if _, twice := names[e.name]; twice {
			c.onSide(side, path, Listing, fmt.Sprintf("lists %q twice", e.name))
		}
		names[e.name] = e.typ
	}
	for _, dots := range []string{".", ".."} {
		if _, ok := names[dots]; !ok {
			c.onSide(side, path, Listing, fmt.Sprintf("lists no %q", dots))
		}
		delete(names, dots)
	}
	return names
}

// stat compares what one lstat says.
func (c *comparison) stat(path string, st [2]unix.Stat_t) {
	a, b := &st[0], &st[1]
	if a.Mode != b.Mode {
		c.differ(path, Mode, "", fmt.Sprintf("%04o", a.Mode&0o7777), fmt.Sprintf("%04o", b.Mode&0o7777))
	}
	if a.Uid != b.Uid || a.Gid != b.Gid {
		c.differ(path, Owner, "", fmt.Sprintf("%d:%d", a.Uid, a.Gid), fmt.Sprintf("%d:%d", b.Uid, b.Gid))
	}
	nlink, kind := Nlink, a.Mode&unix.S_IFMT
	switch kind {
	case unix.S_IFDIR:
		nlink = NlinkOfDirs
	case unix.S_IFREG, unix.S_IFLNK:
		if a.Size != b.Size {
			c.differ(path, Size, "", fmt.Sprint(a.Size), fmt.Sprint(b.Size))
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if a.Rdev != b.Rdev {
			c.differ(path, Rdev, "", device(a.Rdev), device(b.Rdev))
		}
	}
	if a.Nlink != b.Nlink {
		c.differ(path, nlink, "", fmt.Sprint(a.Nlink), fmt.Sprint(b.Nlink))
	}
	if a.Mtim != b.Mtim && !near(a.Mtim, b.Mtim, c.o.MtimeSlack) {
		c.differ(path, Mtime, "", instant(a.Mtim), instant(b.Mtim))
	}
}

// links compares which earlier name, if any, a file shares its inode with.
func (c *comparison) links(path string, st [2]unix.Stat_t) {
	var firsts [2]string
	for side := range st {
		id := inode{st[side].Dev, st[side].Ino}
		first, ok := c.first[side][id]
		if !ok {
			first = path
			c.first[side][id] = path
		}
		firsts[side] = first
	}
	if firsts[0] == firsts[1] {
		return
	}
	var says [2]string
	for side, first := range firsts {
		says[side] = "an inode of its own"
		if first != path {
			says[side] = fmt.Sprintf("same inode as %q", first)
		}
	}
	c.differ(path, HardLinks, "", says[0], says[1])
}

func near(a, b unix.Timespec, slack time.Duration) bool {
	d := time.Unix(a.Sec, a.Nsec).Sub(time.Unix(b.Sec, b.Nsec)) // saturates when far apart
	return -slack <= d && d <= slack
}

func instant(t unix.Timespec) string {
	return fmt.Sprintf("%d.%09d (%s)", t.Sec, t.Nsec, time.Unix(t.Sec, t.Nsec).UTC().Format(time.RFC3339Nano))
}

func device(rdev uint64) string { return fmt.Sprintf("%d,%d", unix.Major(rdev), unix.Minor(rdev)) }

func typeName(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFREG:
		return "regular file"
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFLNK:
		return "symlink"
	case unix.S_IFCHR:
		return "character device"
	case unix.S_IFBLK:
		return "block device"
	case unix.S_IFIFO:
		return "fifo"
	case unix.S_IFSOCK:
		return "socket"
	}
	return fmt.Sprintf("type %#o", mode&unix.S_IFMT)
}
