package cache

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// filesystems are those that the store is tried on, with the command that
// makes one and the smallest size that it can be made with.
var filesystems = []struct {
	name string
	mkfs []string
	mib  int
}{
	{"ext4", []string{"mkfs.ext4", "-q", "-E", "lazy_itable_init=0"}, 16},
	{"ext4-small-inodes", []string{"mkfs.ext4", "-q", "-I", "128"}, 16},
	{"xfs", []string{"mkfs.xfs", "-q"}, 300},
	{"btrfs", []string{"mkfs.btrfs", "-q"}, 114},
	{"tmpfs", nil, 16},
}

// newFilesystem mounts an empty filesystem of a size and returns where.
// It goes away with the test.
func newFilesystem(t testing.TB, name string, mib int) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Fatal("this test mounts filesystems: run it as root")
	}
	var mkfs []string
	for _, fs := range filesystems {
		if fs.name == name {
			mkfs = fs.mkfs
		}
	}
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if mkfs == nil {
		size := fmt.Sprintf("size=%dm", mib)
		if err := unix.Mount("none", dir, name, 0, size); err != nil {
			t.Fatalf("mount %s: %v", name, err)
		}
	} else {
		image := filepath.Join(t.TempDir(), "image")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(image, int64(mib)<<20); err != nil {
			t.Fatal(err)
		}
		run(t, append(mkfs, image)...)
		run(t, "mount", "-o", "loop", image, dir) // a loop device that umount frees
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
			unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	return dir
}

func run(t testing.TB, args ...string) {
	t.Helper()
	if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// TestFilesystems fills a store on each filesystem, fully and after an
// interruption.
func TestFilesystems(t *testing.T) {
	for _, fs := range filesystems {
		t.Run(fs.name, func(t *testing.T) {
			dir := filepath.Join(newFilesystem(t, fs.name, fs.mib), "store")
			var contents []content
			for i := range 100 {
				contents = append(contents, cut(fmt.Sprintf("a*%d", 1+100*i)), cut(fmt.Sprintf("a*%d 0*9000 b*5000", 1+i)))
			}
			x := imageOf(t, contents...)
			s := open(t, dir, Options{})
			c := contentsOf(t, s, x)
			for j := 0; j < x.Chunks(); j += 2 {
				put(t, c, x, j)
			}
			local := c.Progress()
			s.Close()
			s = open(t, dir, Options{})
			c = contentsOf(t, s, x)
			if p := c.Progress(); p != local {
				t.Fatalf("%+v came back as %+v", local, p)
			}
			putAll(t, c, x)
			wantWhole(t, s, c, x)
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			if n := check(t, s); n != 2*x.Contents() || len(staged(t, s)) != 0 {
				t.Fatalf("%d names, %d in staging", n, len(staged(t, s)))
			}
			s.Close()
			s = open(t, dir, Options{BootID: "another"})
			wantWhole(t, s, contentsOf(t, s, x), x)
			s.Close()
		})
	}
}

// TestFullDisk fills filesystems of 16 MiB to the last block: nothing may get
// a digest's name that is not whole, and when there is room again filling
// goes on.
func TestFullDisk(t *testing.T) {
	for _, name := range []string{"ext4", "tmpfs"} {
		t.Run(name, func(t *testing.T) {
			mnt := newFilesystem(t, name, 16)
			ballast := filepath.Join(mnt, "ballast")
			dir := filepath.Join(mnt, "store")
			s := open(t, dir, Options{})
			if err := os.WriteFile(ballast, make([]byte, 8<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			var contents []content
			for i := range 25 {
				contents = append(contents, cut(fmt.Sprintf("a*%d", 100000+i)), cut(fmt.Sprintf("a*%d b*150000 c*10000", 100000+i)))
			}
			x := imageOf(t, contents...)
			c := contentsOf(t, s, x)
			full := 0
			for j := range x.Chunks() {
				err := c.Put(j, x.data(j))
				if c.Missing(j) != (err != nil) {
					t.Fatalf("chunk %d: missing %v, error %v", j, c.Missing(j), err)
				}
				if err == nil {
					continue
				}
				full++
				if !errors.Is(err, unix.ENOSPC) || !strings.Contains(hint.Of(err), "make room") {
					t.Fatalf("chunk %d: %v (hint %q)", j, err, hint.Of(err))
				}
			}
			if full == 0 {
				t.Fatal("the disk did not fill")
			}
			if p := c.Progress(); p.FilesLocal == p.Files || p.FilesLocal == 0 {
				t.Fatalf("%+v", p)
			}
			check(t, s)
			for i := range x.Contents() {
				if c.Whole(i) {
					wantRead(t, c, x, i)
				}
			}
			for _, n := range staged(t, s) {
				if strings.HasPrefix(n, ".") {
					t.Errorf("litter: %s", n)
				}
			}
			if err := os.Remove(ballast); err != nil {
				t.Fatal(err)
			}
			again := contentsOf(t, s, x)
			if p, q := c.Progress(), again.Progress(); p != q {
				t.Fatalf("in memory %+v, on disk %+v", p, q)
			}
			putAll(t, c, x)
			wantWhole(t, s, c, x)
			check(t, s)
			s.Close()
		})
	}
}

// TestReadOnly remounts a filled store read-only: what is local stays
// readable in the process that has it open.
func TestReadOnly(t *testing.T) {
	mnt := newFilesystem(t, "tmpfs", 16)
	s := open(t, filepath.Join(mnt, "store"), Options{})
	whole, half, none := cut("a*5000"), cut("b*5000 c*5000"), cut("d*5000")
	x := imageOf(t, whole, half, none)
	c := contentsOf(t, s, x)
	wi, wj := x.find(t, whole, 0)
	hi, hj := x.find(t, half, 0)
	_, nj := x.find(t, none, 0)
	put(t, c, x, wj, hj)
	s.stages.closeAll() // nothing open for writing, which would keep the remount away
	s.stages.closed = false
	if err := unix.Mount("none", mnt, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	wantRead(t, c, x, wi)
	p := make([]byte, 5000)
	if n, err := c.ReadAt(hi, p, 0); n != 5000 || err != nil || p[0] != 'b' {
		t.Errorf("staged: %d, %v", n, err)
	}
	for _, j := range []int{nj, x.ContentChunk(hi, 1)} {
		if err := c.Put(j, x.data(j)); !errors.Is(err, unix.EROFS) || !c.Missing(j) {
			t.Errorf("Put: %v", err)
		}
	}
	if d, err := c.Verity(wi); err != nil || d != whole.fsVerity() {
		t.Errorf("Verity: %v", err)
	}
	s.Close()
}
