package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// A probe does one thing to a tree of the Debian image and says what came of
// it: what it read, or an errno. It may leave nothing behind.
type probe struct {
	name string
	do   func(root string) (string, error)
}

// The files that probes use, as the image has them.
const (
	probeFile = "usr/bin/perl"
	probeDir  = "usr/bin"
	probeLink = "bin" // a symbolic link, to usr/bin
)

// withFile opens the file of probes and gives its descriptor.
func withFile(flags int, do func(fd int) (string, error)) func(string) (string, error) {
	return func(root string) (string, error) {
		fd, err := unix.Open(filepath.Join(root, probeFile), flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return "open", err
		}
		defer unix.Close(fd)
		return do(fd)
	}
}

// onPath makes a probe of a call that takes a path below the root.
func onPath(name, path string, call func(path string) error) probe {
	return probe{name + " " + path, func(root string) (string, error) { return "", call(filepath.Join(root, path)) }}
}

// asUser does something with the rights of the user nobody.
func asUser(do func(root string) (string, error)) func(string) (string, error) {
	return func(root string) (text string, err error) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		unix.Setfsgid(65534)
		unix.Setfsuid(65534) // takes the capabilities that go past permissions, too
		defer unix.Setfsgid(0)
		defer unix.Setfsuid(0)
		return do(root)
	}
}

func ioctl(fd int, req uint, arg unsafe.Pointer) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg))
	if errno != 0 {
		return errno
	}
	return nil
}

func openErr(flags int, mode uint32) func(string) error {
	return func(path string) error {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, mode)
		if err == nil {
			unix.Close(fd)
		}
		return err
	}
}

func probes() []probe {
	var all []probe
	// Every change, of a name that is there, one that is not, and a folder.
	for _, path := range []string{probeFile, probeDir, probeLink, "absent", "absent/absent", probeFile + "/x", "usr/bin/absent"} {
		for name, call := range map[string]func(string) error{
			"open to write": openErr(unix.O_WRONLY, 0), "open to read and write": openErr(unix.O_RDWR, 0), "open to append": openErr(unix.O_WRONLY|unix.O_APPEND, 0),
			"open to truncate": openErr(unix.O_RDONLY|unix.O_TRUNC, 0), "create": openErr(unix.O_CREAT|unix.O_WRONLY, 0o600), "create anew": openErr(unix.O_CREAT|unix.O_EXCL|unix.O_RDWR, 0o600),
			"open or create to read": openErr(unix.O_CREAT|unix.O_RDONLY, 0o600), "O_TMPFILE": openErr(unix.O_TMPFILE|unix.O_RDWR, 0o600),
			"mkdir": func(p string) error { return unix.Mkdir(p, 0o700) }, "mkfifo": func(p string) error { return unix.Mkfifo(p, 0o600) },
			"mknod": func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o600, 0x103) }, "symlink": func(p string) error { return unix.Symlink("x", p) },
			"unlink": unix.Unlink, "rmdir": unix.Rmdir, "chmod": func(p string) error { return unix.Chmod(p, 0o700) },
			"chown": func(p string) error { return unix.Chown(p, 1, 1) }, "chown to nobody": func(p string) error { return unix.Chown(p, -1, -1) },
			"lchown":   func(p string) error { return unix.Lchown(p, 1, 1) },
			"truncate": func(p string) error { return unix.Truncate(p, 0) },
			"utimes": func(p string) error {
				return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{{Sec: 1}, {Sec: 1}}, 0)
			},
			"setxattr": func(p string) error { return unix.Setxattr(p, "user.x", []byte("y"), 0) }, "setxattr trusted": func(p string) error { return unix.Setxattr(p, "trusted.x", []byte("y"), 0) },
			"setxattr security": func(p string) error { return unix.Setxattr(p, "security.capability", []byte("y"), 0) },
			"removexattr":       func(p string) error { return unix.Removexattr(p, "user.x") },
			"link":              func(p string) error { return unix.Link(p, p+".new") }, "link to": func(p string) error { return unix.Link(filepath.Dir(p), p+".new") },
			"rename":            func(p string) error { return unix.Rename(p, p+".new") },
			"rename exchanging": func(p string) error { return unix.Renameat2(unix.AT_FDCWD, p, unix.AT_FDCWD, p, unix.RENAME_EXCHANGE) },
			"access to write":   func(p string) error { return unix.Access(p, unix.W_OK) }, "access to run": func(p string) error { return unix.Access(p, unix.X_OK) },
			"open a folder": openErr(unix.O_RDONLY|unix.O_DIRECTORY, 0), "open without following": openErr(unix.O_RDONLY|unix.O_NOFOLLOW, 0),
			"O_PATH": openErr(unix.O_PATH|unix.O_NOFOLLOW, 0), "O_NOATIME": openErr(unix.O_RDONLY|unix.O_NOATIME, 0),
			"bind a socket": func(p string) error {
				fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				if len(p) > 100 {
					return errors.New("the path is too long for this test")
				}
				return unix.Bind(fd, &unix.SockaddrUnix{Name: p})
			},
		} {
			all = append(all, onPath(name, path, call))
		}
	}
	for _, n := range []int{255, 256} {
		all = append(all, onPath(fmt.Sprintf("stat a name of %d bytes", n), strings.Repeat("n", n), func(p string) error { return unix.Stat(p, new(unix.Stat_t)) }))
	}
	deep := func(n int) probe {
		return probe{fmt.Sprintf("stat a path of %d bytes", n), func(root string) (string, error) {
			return "", unix.Stat(root+strings.Repeat("/", n-len(root)-len(probeFile))+probeFile, new(unix.Stat_t))
		}}
	}
	all = append(all, deep(4095), deep(4096))
	for _, path := range []string{"etc/shadow", "root", "root/absent", "etc/passwd", "tmp", probeFile} {
		for name, call := range map[string]func(string) error{
			"open": openErr(unix.O_RDONLY, 0), "write": openErr(unix.O_WRONLY, 0), "create": openErr(unix.O_CREAT|unix.O_WRONLY, 0o600),
			"readable": func(p string) error { return unix.Faccessat(unix.AT_FDCWD, p, unix.R_OK, unix.AT_EACCESS) },
			"chmod":    func(p string) error { return unix.Chmod(p, 0o777) }, "unlink": unix.Unlink,
			"getxattr": func(p string) error { _, err := unix.Getxattr(p, "trusted.x", nil); return err },
		} {
			p := onPath("as nobody: "+name, path, call)
			p.do = asUser(p.do)
			all = append(all, p)
		}
	}
	return append(all, readProbes()...)
}

// readProbes read in every way there is.
func readProbes() []probe {
	digest := func(b []byte) string { return fmt.Sprintf("%d bytes, %x", len(b), sumOf(b)) }
	seek := func(off int64, whence int) func(int) (string, error) {
		return func(fd int) (string, error) {
			n, err := unix.Seek(fd, off, whence)
			return fmt.Sprint(n), err
		}
	}
	ioc := func(req uint) func(int) (string, error) {
		return func(fd int) (string, error) {
			var v [256]byte
			err := ioctl(fd, req, unsafe.Pointer(&v))
			return fmt.Sprintf("%x", v[:4]), err
		}
	}
	lock := func(typ int16) func(int) (string, error) {
		return func(fd int) (string, error) {
			return "", unix.FcntlFlock(uintptr(fd), unix.F_SETLK, &unix.Flock_t{Type: typ})
		}
	}
	pread := func(n int, off int64) func(int) (string, error) {
		return func(fd int) (string, error) {
			b := make([]byte, n)
			k, err := unix.Pread(fd, b, off)
			return digest(b[:max(k, 0)]), err
		}
	}
	rd := func(name string, do func(int) (string, error)) probe {
		return probe{name, withFile(unix.O_RDONLY, do)}
	}
	return []probe{
		rd("SEEK_DATA 0", seek(0, unix.SEEK_DATA)), rd("SEEK_HOLE 0", seek(0, unix.SEEK_HOLE)), rd("SEEK_HOLE 5000", seek(5000, unix.SEEK_HOLE)),
		rd("SEEK_DATA far", seek(1<<40, unix.SEEK_DATA)), rd("SEEK_HOLE far", seek(1<<40, unix.SEEK_HOLE)), rd("SEEK_END", seek(0, unix.SEEK_END)), rd("seek before the start", seek(-1, unix.SEEK_SET)),
		rd("TCGETS", ioc(unix.TCGETS)), rd("FIONREAD", ioc(unix.TIOCINQ)), rd("FIGETBSZ", ioc(0x2)), rd("FICLONE", ioc(unix.FICLONE)), rd("FIBMAP", ioc(0x1)), rd("an unknown ioctl", ioc(0xdead)),
		rd("pread", pread(10_000, 12_345)), rd("pread at the end", pread(1, 1<<30)), rd("pread before the start", pread(1, -1)),
		rd("write", func(fd int) (string, error) { _, err := unix.Write(fd, []byte("x")); return "", err }),
		rd("ftruncate", func(fd int) (string, error) { return "", unix.Ftruncate(fd, 0) }), rd("fallocate", func(fd int) (string, error) { return "", unix.Fallocate(fd, 0, 0, 1) }),
		rd("fchmod", func(fd int) (string, error) { return "", unix.Fchmod(fd, 0) }), rd("fsync", func(fd int) (string, error) { return "", unix.Fsync(fd) }),
		rd("fdatasync", func(fd int) (string, error) { return "", unix.Fdatasync(fd) }), rd("syncfs", func(fd int) (string, error) { return "", unix.Syncfs(fd) }),
		rd("fadvise", func(fd int) (string, error) { return "", unix.Fadvise(fd, 0, 0, unix.FADV_WILLNEED) }),
		rd("flock shared", func(fd int) (string, error) { return "", unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB) }), rd("flock exclusive", func(fd int) (string, error) { return "", unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }),
		rd("lock to read", lock(unix.F_RDLCK)), rd("lock to write", lock(unix.F_WRLCK)), rd("read a file as a folder", func(fd int) (string, error) { _, err := unix.Getdents(fd, make([]byte, 4096)); return "", err }),
		rd("preadv2", func(fd int) (string, error) {
			a, b := make([]byte, 100), make([]byte, 200)
			n, err := unix.Preadv2(fd, [][]byte{a, b}, 4090, 0)
			return fmt.Sprint(n) + digest(append(a, b...)), err
		}),
		rd("mmap shared", func(fd int) (string, error) {
			m, err := unix.Mmap(fd, 8192, 1<<20, unix.PROT_READ, unix.MAP_SHARED)
			if err != nil {
				return "", err
			}
			defer unix.Munmap(m)
			return digest(m), nil
		}),
		rd("mmap shared to write", func(fd int) (string, error) {
			m, err := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err == nil {
				unix.Munmap(m)
			}
			return "", err
		}),
		rd("mmap private, written", func(fd int) (string, error) {
			m, err := unix.Mmap(fd, 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
			if err != nil {
				return "", err
			}
			defer unix.Munmap(m)
			copy(m[100:], "changed")
			return digest(m), nil
		}),
		{"O_DIRECT", withFile(unix.O_RDONLY|unix.O_DIRECT, func(fd int) (string, error) {
			b, err := unix.Mmap(-1, 0, 64<<10, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
			if err != nil {
				return "", err
			}
			defer unix.Munmap(b)
			n, err := unix.Pread(fd, b, 4096)
			return digest(b[:max(n, 0)]), err
		})},
		rd("sendfile", func(fd int) (string, error) {
			return through(func(out int) (int, error) { off := int64(1000); return unix.Sendfile(out, fd, &off, 300_000) })
		}),
		rd("copy_file_range", func(fd int) (string, error) {
			return through(func(out int) (int, error) {
				off := int64(2000)
				return unix.CopyFileRange(fd, &off, out, nil, 300_000, 0)
			})
		}),
		rd("splice", func(fd int) (string, error) {
			var p [2]int
			if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
				return "", err
			}
			defer unix.Close(p[0])
			defer unix.Close(p[1])
			off := int64(3000)
			n, err := unix.Splice(fd, &off, p[1], nil, 30_000, 0)
			if err != nil {
				return "", err
			}
			b := make([]byte, n)
			for got := 0; got < len(b); {
				k, err := unix.Read(p[0], b[got:])
				if err != nil || k == 0 {
					return "", fmt.Errorf("pipe: %d, %w", k, err)
				}
				got += k
			}
			return digest(b), nil
		}),
		{"run", func(root string) (string, error) {
			out, err := exec.Command(filepath.Join(root, probeFile), "-e", "print 6*7").CombinedOutput()
			return string(out), err
		}},
		{"read a folder as a file", func(root string) (string, error) {
			fd, err := unix.Open(filepath.Join(root, probeDir), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return "", err
			}
			defer unix.Close(fd)
			_, err = unix.Read(fd, make([]byte, 10))
			return "", err
		}},
		{"list twice with one descriptor", func(root string) (string, error) {
			fd, err := unix.Open(filepath.Join(root, probeDir), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return "", err
			}
			defer unix.Close(fd)
			var sums []string
			for range 2 {
				names, err := namesOf(fd)
				if err != nil {
					return "", err
				}
				slices.Sort(names)
				sums = append(sums, fmt.Sprint(len(names), digest([]byte(strings.Join(names, "\n")))))
				if _, err := unix.Seek(fd, 0, unix.SEEK_SET); err != nil {
					return "", err
				}
			}
			return strings.Join(sums, "; "), nil
		}},
		{"statx", func(root string) (string, error) {
			var st unix.Statx_t
			err := unix.Statx(unix.AT_FDCWD, filepath.Join(root, probeFile), 0, unix.STATX_BASIC_STATS, &st)
			if st.Mask&unix.STATX_ATIME == 0 {
				return "without atime", err
			}
			return fmt.Sprintf("mask %x mode %o size %d nlink %d owner %d:%d mtime %d blksize %d", st.Mask&unix.STATX_BASIC_STATS, st.Mode, st.Size, st.Nlink, st.Uid, st.Gid, st.Mtime.Sec, st.Blksize), err
		}},
		{"statfs", func(root string) (string, error) {
			var st unix.Statfs_t
			err := unix.Statfs(root, &st)
			return fmt.Sprintf("namelen %d readonly %t", st.Namelen, st.Flags&unix.ST_RDONLY != 0), err
		}},
		{"inotify", func(root string) (string, error) {
			fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
			if err != nil {
				return "", err
			}
			defer unix.Close(fd)
			if _, err := unix.InotifyAddWatch(fd, filepath.Join(root, probeFile), unix.IN_OPEN|unix.IN_CLOSE_NOWRITE); err != nil {
				return "", err
			}
			if _, err := os.ReadFile(filepath.Join(root, probeFile)); err != nil {
				return "", err
			}
			b := make([]byte, 4096)
			n, err := unix.Read(fd, b)
			return fmt.Sprint(n), err
		}},
	}
}

// namesOf reads a folder to its end.
func namesOf(fd int) (names []string, err error) {
	buf := make([]byte, 8192)
	for {
		n, err := unix.Getdents(fd, buf)
		if err != nil || n <= 0 {
			return names, err
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
}

func sumOf(b []byte) (sum uint64) { // FNV-1a
	sum = 14695981039346656037
	for _, c := range b {
		sum = (sum ^ uint64(c)) * 1099511628211
	}
	return sum
}

// through gives what do writes into a file.
func through(do func(out int) (int, error)) (string, error) {
	f, err := os.CreateTemp(runDir, "probe")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	n, err := do(int(f.Fd()))
	if err != nil {
		return fmt.Sprint(n), err
	}
	got, err := os.ReadFile(f.Name())
	return fmt.Sprintf("%d bytes, %x", len(got), sumOf(got)), err
}

// unlikeExt4 are the probes whose result is known to differ from ext4's, and
// what it is on each mount that does. ARCHITECTURE.md says why.
var unlikeExt4 = map[string]map[string]string{
	// The result is another filesystem's file, for which ext4 copies itself.
	"copy_file_range": {"fuse": "EXDEV", "hybrid": "EXDEV", "kernel": "EXDEV"},
	// Overlayfs has no blocks, FUSE has none that it knows of.
	"FIGETBSZ": {"hybrid": "EINVAL", "kernel": "EINVAL"},
	"FIBMAP":   {"fuse": "ok 00000000", "hybrid": "EINVAL", "kernel": "EINVAL"},
	// EROFS says that it keeps no atime.
	"statx": {"hybrid": noAtime, "kernel": noAtime},
}

const noAtime = "ok without atime"

// Whatever programs do to a mount has the result that it has on a read-only
// ext4, on each backend and after the swap.
func TestLikeExt4(t *testing.T) {
	b := newBench(t)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Debian
	ext4 := b.point()
	for _, step := range [][]string{{"--bind", set.Reference(images.Debian), ext4}, {"-o", "remount,bind,ro", ext4}} {
		if out, err := exec.Command("mount", step...).CombinedOutput(); err != nil {
			t.Fatalf("mount %v: %v: %s", step, err, out)
		}
	}
	defer unix.Unmount(ext4, 0)
	mounts := map[string]string{}
	for _, b.backend = range []string{fuseBackend, hybridBackend} {
		mounts[b.backend] = b.mount(source, "--swap", "never")
	}
	mounts["kernel"] = b.mount(source)
	b.waitFor("swapped", mounts["kernel"])
	result := func(p probe, root string) string {
		text, err := p.do(root)
		if err != nil {
			if errno, ok := errors.AsType[unix.Errno](err); ok {
				return unix.ErrnoName(errno)
			}
			return strings.ReplaceAll(err.Error(), root, "ROOT")
		}
		return "ok " + text
	}
	all := probes()
	for _, p := range all {
		want := result(p, ext4)
		for name, root := range mounts {
			got := result(p, root)
			if known, ok := unlikeExt4[p.name][name]; ok {
				if got != known {
					t.Errorf("%s: %s: %s; known to be %s (ext4: %s)", name, p.name, got, known, want)
				}
			} else if got != want {
				t.Errorf("%s: %s: %s; ext4: %s", name, p.name, got, want)
			}
		}
	}
	if len(all) < 250 {
		t.Errorf("only %d probes", len(all))
	}
	t.Logf("%d probes", len(all))
}

// Reads of random places and lengths, by read, pread and through maps, give
// what the file has, while they arrive and after (as fsx does it, without
// its writes).
func TestRandomReads(t *testing.T) {
	eachBackend(t, func(t *testing.T, b *bench) {
		// Not through a link: that is served by this process, which a page
		// fault stops as a whole.
		point := b.mount("oci:"+set.Layout(images.ZstdChunked)+":"+images.Debian, "--swap", "never", "--fill=false")
		files := []string{"usr/bin/python3.11", probeFile, "usr/bin/bash", "etc/passwd"}
		contents := map[string][]byte{}
		for _, name := range files {
			text, err := os.ReadFile(filepath.Join(set.Reference(images.Debian), name))
			if err != nil {
				t.Fatal(err)
			}
			contents[name] = text
		}
		rng := rand.New(rand.NewPCG(1, 2))
		rounds := 4000
		if testing.Short() {
			rounds = 1000
		}
		for i := range rounds {
			name := files[rng.IntN(len(files))]
			want := contents[name]
			f, err := os.Open(filepath.Join(point, name))
			if err != nil {
				t.Fatal(err)
			}
			off := rng.Int64N(int64(len(want)))
			n := min(rng.Int64N(1<<uint(4+rng.IntN(16)))+1, int64(len(want))-off)
			got := make([]byte, n)
			switch rng.IntN(4) {
			case 0:
				_, err = f.ReadAt(got, off)
			case 1:
				if _, err = f.Seek(off, 0); err == nil {
					_, err = f.Read(got)
				}
			case 2:
				start := off &^ 4095
				var m []byte
				if m, err = unix.Mmap(int(f.Fd()), start, int(off-start+n), unix.PROT_READ, unix.MAP_SHARED); err == nil {
					copy(got, m[off-start:])
					unix.Munmap(m)
				}
			case 3:
				if err = unix.Fadvise(int(f.Fd()), off&^4095, n, unix.FADV_DONTNEED); err == nil {
					_, err = f.ReadAt(got, off)
				}
			}
			f.Close()
			if err != nil || !bytes.Equal(got, want[off:off+n]) {
				t.Fatalf("read %d: %s, %d bytes at %d: %v, the right bytes: %t", i, name, n, off, err, bytes.Equal(got, want[off:off+n]))
			}
		}
	})
}
