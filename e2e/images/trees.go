package images

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A tree is a folder being changed, in few words. The first error is kept and
// everything after it does nothing.
type tree struct {
	root string
	err  error
}

func (t *tree) at(path string) string { return filepath.Join(t.root, path) }

func (t *tree) try(op, path string, err error) {
	if t.err == nil && err != nil {
		t.err = fmt.Errorf("%s %s: %w", op, path, err)
	}
}

func (t *tree) do(op, path string, f func(full string) error) {
	if t.err == nil {
		t.try(op, path, f(t.at(path)))
	}
}

// remove removes what must be there.
func (t *tree) remove(paths ...string) {
	for _, p := range paths {
		t.do("remove", p, func(full string) error {
			if _, err := os.Lstat(full); err != nil {
				return err
			}
			return os.RemoveAll(full)
		})
	}
}

func (t *tree) dir(path string, mode os.FileMode) {
	t.do("mkdir", path, func(full string) error {
		if err := os.MkdirAll(full, 0o755); err != nil {
			return err
		}
		return os.Chmod(full, mode)
	})
}

func (t *tree) file(path, text string, mode os.FileMode) {
	t.do("write", path, func(full string) error {
		if err := os.WriteFile(full, []byte(text), 0o644); err != nil {
			return err
		}
		return os.Chmod(full, mode)
	})
}

// sparse makes a file of size bytes that is a hole but for some at both ends.
func (t *tree) sparse(path string, size int64) {
	t.do("write", path, func(full string) error {
		f, err := os.Create(full)
		if err != nil {
			return err
		}
		_, err = f.WriteString("start")
		if err == nil {
			_, err = f.WriteAt([]byte("end"), size-3)
		}
		return errors.Join(err, f.Close())
	})
}

func (t *tree) link(from, path string) {
	t.do("link", path, func(full string) error { return os.Link(t.at(from), full) })
}

func (t *tree) symlink(target, path string) {
	t.do("symlink", path, func(full string) error { return os.Symlink(target, full) })
}

// node makes a fifo (S_IFIFO) or a device (S_IFCHR, S_IFBLK).
func (t *tree) node(path string, mode uint32, major, minor uint32) {
	t.do("mknod", path, func(full string) error {
		if err := unix.Mknod(full, mode, int(unix.Mkdev(major, minor))); err != nil {
			return err
		}
		return unix.Chmod(full, mode&0o7777)
	})
}

func (t *tree) owner(path string, uid, gid int) {
	t.do("chown", path, func(full string) error { return os.Lchown(full, uid, gid) })
}

func (t *tree) xattr(path, name, value string) {
	t.do("setxattr "+name, path, func(full string) error { return unix.Lsetxattr(full, name, []byte(value), 0) })
}

func (t *tree) mtime(path string, sec, nsec int64) {
	t.do("utimensat", path, func(full string) error {
		ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: sec, Nsec: nsec}}
		return unix.UtimesNanoAt(unix.AT_FDCWD, full, ts, unix.AT_SYMLINK_NOFOLLOW)
	})
}

// Extended attributes as the kernel lays them out: vfs_cap_data of revision 2
// with CAP_NET_BIND_SERVICE permitted and effective (linux/capability.h), and
// an ACL of version 2 giving user 33 read (linux/posix_acl_xattr.h).
const (
	capNetBind = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	aclUser33  = "\x02\x00\x00\x00" +
		"\x01\x00\x06\x00\xff\xff\xff\xff" + // user::rw-
		"\x02\x00\x04\x00\x21\x00\x00\x00" + // user:33:r--
		"\x04\x00\x04\x00\xff\xff\xff\xff" + // group::r--
		"\x10\x00\x04\x00\xff\xff\xff\xff" + // mask::r--
		"\x20\x00\x04\x00\xff\xff\xff\xff" // other::r--
)

// longName is a name of 255 bytes, the most a name can have.
var longName = strings.Repeat("0123456789abcdef", 16)[:255]

// changes is layer 3 of the Debian image: removals, replacements, and one of
// everything a tree can hold.
func changes(rootfs string) error {
	t := &tree{root: rootfs}
	t.remove("etc/motd", "usr/bin/wall", "usr/share/man", "usr/share/common-licenses/GPL-1")

	t.remove("etc/skel") // made again with other content: nothing of the old may show
	t.dir("etc/skel", 0o750)
	t.file("etc/skel/.bashrc", "# other content\n", 0o600)
	t.dir("etc/skel/new", 0o755)
	t.file("etc/skel/new/file", "new\n", 0o644)

	t.remove("usr/share/doc/nginx-common", "etc/issue.net") // directory to file, file to directory
	t.file("usr/share/doc/nginx-common", "a file now\n", 0o644)
	t.dir("etc/issue.net", 0o755)
	t.file("etc/issue.net/was-a-file", "a directory now\n", 0o644)
	t.remove("etc/debian_version", "usr/share/lintian")
	t.symlink("/etc/os-release", "etc/debian_version")
	t.symlink("doc", "usr/share/lintian")

	const d = "srv/odd/"
	t.dir("srv/odd", 0o755)
	t.link("usr/lib/os-release", d+"os-release-link") // of a lower layer
	t.link("etc/os-release", d+"symlink-link")
	t.file(d+"three", "three names\n", 0o644)
	t.link(d+"three", d+"three-2")
	t.link(d+"three", "srv/three-3")
	t.file(d+"server", "#!/bin/sh\nexit 0\n", 0o755)
	t.xattr(d+"server", "security.capability", capNetBind)
	t.xattr(d+"server", "user.note", "with\x00nul and \xff")
	t.file(d+"acl", "readable by www-data\n", 0o640)
	t.xattr(d+"acl", "system.posix_acl_access", aclUser33)
	t.xattr("srv/odd", "user.dir", "on a directory")
	t.file(d+"setuid", "u", 0o755|os.ModeSetuid)
	t.file(d+"setgid", "g", 0o755|os.ModeSetgid)
	t.dir(d+"sticky", 0o777|os.ModeSticky)
	t.owner(d+"sticky", 65534, 1<<20)
	t.node(d+"fifo", unix.S_IFIFO|0o640, 0, 0)
	t.node(d+"char", unix.S_IFCHR|0o666, 1, 3)
	t.node(d+"block", unix.S_IFBLK|0o660, 259, 300000) // both numbers above what the old 16-bit encoding holds
	t.file(d+"new\nline", "a newline in the name\n", 0o644)
	t.file(d+" \"quoted\" \\ %41 ünï", "punctuation\n", 0o644)
	t.file(d+longName, "255 bytes\n", 0o644)
	t.symlink(strings.Repeat("x/", 1000)+"x", d+"long-target")
	t.symlink("../../nowhere", d+"dangling")
	t.file(d+"empty", "", 0o644)
	t.dir(d+"empty-dir", 0o500)
	t.sparse(d+"sparse", 12<<20)
	t.file(d+"no-access", "mode 0\n", 0)
	t.file(d+"epoch", "", 0o644)
	t.mtime(d+"epoch", 0, 0)
	t.file(d+"after-2038", "", 0o644)
	t.mtime(d+"after-2038", 1<<32+5, 0)
	t.mtime(d+"dangling", 981173106, 0)
	if t.err != nil {
		return fmt.Errorf("change root filesystem: %w", t.err)
	}
	return nil
}

func (b *builder) odd(ctx context.Context) error { return b.tarred(ctx, Odd, oddLower, oddUpper) }

func (b *builder) small(ctx context.Context) error { return b.tarred(ctx, Small, smallTree) }

// tarred makes an image of layers that GNU tar writes, in its PAX format.
func (b *builder) tarred(ctx context.Context, name string, layers ...func(*tree)) error {
	image := b.path(Plain) + ":" + name
	if err := b.run(ctx, "umoci", "new", "--image", image); err != nil {
		return err
	}
	for i, fill := range layers {
		root, tar := b.path("tree"), b.path("tree.tar")
		t := &tree{root: root}
		t.dir(".", 0o755)
		fill(t)
		if name == Odd {
			t.mtime(".", 1e9+int64(i), 1+int64(i))
		} else if err := wholeSeconds(root); err != nil {
			return err
		}
		if t.err != nil {
			return t.err
		}
		for _, step := range [][]string{
			{"tar", "--create", "--file", tar, "--directory", root, "--format=pax", "--pax-option=delete=atime,delete=ctime",
				"--xattrs", "--xattrs-include=*", "--sort=name", "--numeric-owner", "."},
			{"umoci", "raw", "add-layer", "--image", image, tar},
		} {
			if err := b.run(ctx, step[0], step[1:]...); err != nil {
				return err
			}
		}
		if err := errors.Join(os.RemoveAll(root), os.Remove(tar)); err != nil {
			return err
		}
	}
	return nil
}

func oddLower(t *tree) {
	t.dir("opaque/below/deep", 0o755)
	t.file("opaque/gone", "hidden by the upper layer\n", 0o644)
	t.file("opaque/kept", "hidden, then there again\n", 0o644)
	t.file("opaque/below/deep/gone", "hidden\n", 0o644)
	t.dir("merged", 0o755)
	t.file("merged/gone", "whiteout\n", 0o644)
	t.file("merged/lower", "stays\n", 0o644)
	t.link("merged/lower", "outside")
	t.link("merged/gone", "survivor") // its other name is removed above
	t.file("merged/target", "old\n", 0o644)
	t.link("merged/target", "merged/old-link") // keeps the old content when the target is replaced
	t.xattr("merged/lower", "user.nul", "\x00a\x00")
	t.xattr("merged/lower", "trusted.note", "root only")
	t.file("big", strings.Repeat("a block that compresses well\n", 400_000), 0o644) // several chunks
	t.sparse("sparse", 64<<20)
	t.node("null", unix.S_IFCHR|0o666, 1, 3)
	t.symlink("merged/lower", "link")
	for i, sec := range []int64{-2, -1, 0, 1, 1<<31 - 1, 1 << 31, 1<<33 - 1} {
		name := fmt.Sprintf("time-%d", sec)
		t.file(name, name, 0o644)
		t.mtime(name, sec, int64(i)*123456789+1)
	}
	t.mtime("link", 1234567890, 987654321)
	t.mtime("null", 1234567890, 999999999)
	t.mtime("merged", 1234567890, 1)
	t.mtime("opaque", 1234567890, 2)
}

func oddUpper(t *tree) {
	t.dir("opaque", 0o711)
	t.file("opaque/.wh..wh..opq", "", 0o644)
	t.file("opaque/kept", "the upper one\n", 0o600)
	t.dir("merged", 0o755)
	t.file("merged/.wh.gone", "", 0o644)
	t.file("merged/target", "new\n", 0o644)
	t.file("merged/upper", "added\n", 0o644)
	t.mtime("merged", 1334567890, 3)
	t.mtime("opaque", 1334567890, 4)
	t.mtime("opaque/kept", time.Date(2020, 2, 29, 1, 2, 3, 0, time.UTC).Unix(), 5)
}

// smallTree is 20 folders of 20 files of up to 60 KB, no two alike.
func smallTree(t *tree) {
	rng := rand.New(rand.NewPCG(1, 2))
	for d := range 20 {
		dir := fmt.Sprintf("d%02d", d)
		t.dir(dir, 0o755)
		for f := range 20 {
			name := fmt.Sprintf("%s/f%02d", dir, f)
			var text strings.Builder
			for n := rng.IntN(60_000); text.Len() < n; {
				fmt.Fprintf(&text, "%s line %d %x\n", name, text.Len(), rng.Uint32())
			}
			t.file(name, text.String(), 0o644)
		}
		t.link(dir+"/f00", dir+"/link")
		t.symlink("f01", dir+"/symlink")
		t.xattr(dir+"/f02", "user.name", dir)
	}
}
