package composefs

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// MaxInline is the size in bytes up to which a scanned file's content goes into
// the image (format document 2.11).
const MaxInline = 64

// Xattrs says which extended attributes a scan takes.
type Xattrs uint8

// The extended attributes that a scan can take.
const (
	AllXattrs  Xattrs = iota // all that the caller may list
	UserXattrs               // those whose names begin "user."
	NoXattrs
)

// ScanOptions say how a directory becomes a tree.
type ScanOptions struct {
	Xattrs Xattrs
	// UseEpoch makes every mtime 0.
	UseEpoch bool
	// SkipDevices leaves out character and block devices.
	SkipDevices bool
	// Hardlinks makes names of one file names of one inode, with as many links
	// as the folder has names of it. Without it every name is a file of its own.
	Hardlinks bool
	// Algorithm is that of the files' fs-verity digests, 0 for SHA-256.
	Algorithm verity.Algorithm
	// Threads is how many files are read at once, 0 for one per CPU.
	Threads int
	// Store, if not nil, gets the content of each file that is not inline. It
	// has to be one of Algorithm.
	Store *Store
}

func (o *ScanOptions) algorithm() verity.Algorithm {
	if o.Algorithm == 0 {
		return verity.SHA256
	}
	return o.Algorithm
}

// Scan reads the tree below the folder dir as mkcomposefs does (section 3,
// "Directory source"): other filesystems mounted in it are gone into, files of 1
// to 64 bytes are inline, larger ones external with their fs-verity digest and a payload
// "ab/cdef…". A nil error promises that every file had the same content from
// the first byte read to the last, as far as its times tell, and that Store, if
// given, has it; Store.Sync is left to the caller. When ctx ends, so does Scan.
func Scan(ctx context.Context, dir string, o ScanOptions) (*erofs.Node, error) {
	root, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("scan: %w", err)
	}
	defer root.Close()
	threads := o.Threads
	if threads <= 0 {
		threads = runtime.NumCPU()
	}
	g, ctx := errgroup.WithContext(ctx)
	s := &scanner{options: o, threads: threads, ctx: ctx, root: root, jobs: make(chan job, 4*threads), buf: make([]byte, 1<<16), names: map[fileID]*erofs.Node{}}
	for range threads {
		g.Go(func() error {
			r := newContentReader(s)
			for j := range s.jobs {
				if err := r.fill(j); err != nil {
					return err
				}
			}
			return nil
		})
	}
	node, err := s.tree()
	close(s.jobs)
	if werr := g.Wait(); werr != nil {
		err = werr // what ended the scan, if both failed
	}
	if err != nil {
		return nil, fmt.Errorf("scan %s: %w", dir, err)
	}
	return node, nil
}

// A scanner walks the folders, in one goroutine; files go to the readers of
// content as jobs.
type scanner struct {
	options ScanOptions
	threads int
	ctx     context.Context // ends with the caller's, and when a reader of content fails
	root    *os.File
	jobs    chan job
	buf     []byte                 // of the largest list or value an xattr can have
	names   map[fileID]*erofs.Node // the first name of files that have several
}

// A fileID says which file a name leads to.
type fileID struct{ dev, ino uint64 }

// A job is a regular file whose content is wanted.
type job struct {
	node *erofs.Node
	path string // below the root
}

func (s *scanner) tree() (*erofs.Node, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(s.root.Fd()), &st); err != nil {
		return nil, err
	}
	n := s.node("", &st)
	if err := s.xattrs(n, int(s.root.Fd()), "."); err != nil {
		return nil, err
	}
	return n, s.dir(n, s.root, "")
}

// node returns the node of what st describes, without xattrs and content.
func (s *scanner) node(name string, st *unix.Stat_t) *erofs.Node {
	n := &erofs.Node{Name: name, Mode: st.Mode, UID: st.Uid, GID: st.Gid, Nlink: 1}
	if !s.options.UseEpoch {
		n.MtimeSec, n.MtimeNsec = int64(st.Mtim.Sec), uint32(st.Mtim.Nsec)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		n.Size = uint64(st.Size)
	case unix.S_IFCHR, unix.S_IFBLK:
		n.Rdev = linuxRdev(uint64(st.Rdev))
	}
	return n
}

// linuxRdev returns a device number in the 32 bits in which Linux stores it
// (include/linux/kdev_t.h, new_encode_dev).
func linuxRdev(dev uint64) uint32 {
	major, minor := unix.Major(dev), unix.Minor(dev)
	return minor&0xff | major<<8 | minor&^0xff<<12
}

// dir reads what is in the folder f, whose node is n and whose path is path.
func (s *scanner) dir(n *erofs.Node, f *os.File, path string) error {
	names, err := f.Readdirnames(-1)
	if err != nil {
		return fmt.Errorf("/%s: %w", path, err)
	}
	slices.Sort(names)
	n.Children = make([]*erofs.Node, 0, len(names))
	for _, name := range names {
		if s.ctx.Err() != nil {
			return s.ctx.Err()
		}
		full := name
		if path != "" {
			full = path + "/" + name
		}
		child, err := s.entry(f, name, full)
		if err != nil {
			return err
		}
		if child != nil {
			n.Children = append(n.Children, child)
		}
	}
	return nil
}

// entry returns the node of one name in a folder, nil if it is left out.
func (s *scanner) entry(dir *os.File, name, path string) (*erofs.Node, error) {
	at := int(dir.Fd())
	fail := func(err error) (*erofs.Node, error) { return nil, fmt.Errorf("/%s: %w", path, err) }
	var st unix.Stat_t
	if err := unix.Fstatat(at, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fail(err)
	}
	kind := st.Mode & unix.S_IFMT
	if s.options.SkipDevices && (kind == unix.S_IFCHR || kind == unix.S_IFBLK) {
		return nil, nil
	}
	n := s.node(name, &st)
	// A whiteout says that there is no file; two of them cannot be the same one.
	if s.options.Hardlinks && kind != unix.S_IFDIR && st.Nlink > 1 && (kind != unix.S_IFCHR || st.Rdev != 0) {
		id := fileID{uint64(st.Dev), st.Ino}
		if first, again := s.names[id]; again {
			first.Nlink++
			return &erofs.Node{Name: name, Link: first}, nil
		}
		s.names[id] = n
	}
	if err := s.xattrs(n, at, name); err != nil {
		return fail(err)
	}
	switch kind {
	case unix.S_IFLNK:
		k, err := unix.Readlinkat(at, name, s.buf)
		if err != nil {
			return fail(err)
		}
		n.Target = string(s.buf[:k])
	case unix.S_IFREG:
		if n.Size == 0 {
			break
		}
		select {
		case s.jobs <- job{n, path}:
		case <-s.ctx.Done():
			return nil, s.ctx.Err()
		}
	case unix.S_IFDIR:
		fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fail(err)
		}
		f := os.NewFile(uintptr(fd), path)
		defer f.Close()
		return n, s.dir(n, f, path)
	}
	return n, nil
}

// xattrs gives n the xattrs of a name in the folder at. The way by /proc also
// reaches the xattrs of symbolic links and of files that cannot be opened.
func (s *scanner) xattrs(n *erofs.Node, at int, name string) error {
	if s.options.Xattrs == NoXattrs {
		return nil
	}
	path := "/proc/self/fd/" + strconv.Itoa(at) + "/" + name
	k, err := unix.Llistxattr(path, s.buf)
	if k == 0 || errors.Is(err, unix.EOPNOTSUPP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list xattrs: %w", err)
	}
	for key := range strings.SplitSeq(strings.TrimSuffix(string(s.buf[:k]), "\x00"), "\x00") {
		if s.options.Xattrs == UserXattrs && !strings.HasPrefix(key, "user.") {
			continue
		}
		k, err := unix.Lgetxattr(path, key, s.buf)
		if err != nil {
			return fmt.Errorf("read xattr %s: %w", key, err)
		}
		if k > math.MaxUint16 {
			return fmt.Errorf("xattr %s has %d bytes, at most %d fit into an image", key, k, math.MaxUint16)
		}
		n.Xattrs = append(n.Xattrs, erofs.Xattr{Name: key, Value: slices.Clone(s.buf[:k])})
	}
	return nil
}

// WriteImage writes the image of a tree to path. A file is replaced when its
// successor is whole and synced (erofs.WriteFile), where a symbolic link at
// path leads. What is no regular file (a device, a
// pipe) is written to, and so is a file that is named by a descriptor
// (/proc/self/fd/3, /dev/stdout): whoever opened it waits for the bytes there.
func WriteImage(path string, root *erofs.Node, o erofs.Options) error {
	fi, err := os.Stat(path)
	if err == nil && (!fi.Mode().IsRegular() || isDescriptor(path)) {
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
		if err != nil {
			return err
		}
		err = erofs.Write(f, root, o)
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		return err
	}
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	return erofs.WriteFile(path, root, o)
}

// isDescriptor reports whether path leads through an entry of /proc, whose
// links lead to open files rather than to names.
func isDescriptor(path string) bool {
	for range 40 {
		var fs unix.Statfs_t
		if err := unix.Statfs(filepath.Dir(path), &fs); err == nil && fs.Type == unix.PROC_SUPER_MAGIC {
			return true
		}
		target, err := os.Readlink(path)
		if err != nil {
			return false
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		path = target
	}
	return false
}
