package composefs

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// fill scans dir into the store and returns the payloads of its files by name.
func fill(t testing.TB, dir, store string, threads int) map[string]string {
	t.Helper()
	s, err := OpenStore(store, verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	root, err := Scan(context.Background(), dir, ScanOptions{Store: s, Threads: threads})
	if err == nil {
		err = s.Sync()
	}
	if err != nil {
		t.Fatal(err)
	}
	payloads := map[string]string{}
	var add func(n *erofs.Node, path string)
	add = func(n *erofs.Node, path string) {
		for _, c := range n.Children {
			if c.Digest != nil {
				payloads[path+c.Name] = c.Target
			}
			add(c, path+c.Name+"/")
		}
	}
	add(root, "")
	return payloads
}

func inode(t testing.TB, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestStore(t *testing.T) {
	dir := treeOf(t, `
		file a 100*a
		file same 100*a
		file tiny t
		file empty 0*x
		dir d
		file d/large 300000*large
		mode a 4700`)
	store := filepath.Join(t.TempDir(), "not", "yet", "there")
	payloads := fill(t, dir, store, 4)
	if len(payloads) != 3 || payloads["a"] != payloads["same"] {
		t.Fatalf("payloads: %v", payloads)
	}
	objects := 0
	err := filepath.WalkDir(store, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			objects++
		}
		return err
	})
	if err != nil || objects != 2 {
		t.Errorf("%d files in the store, %v; want 2", objects, err)
	}
	for name, object := range payloads {
		path := filepath.Join(store, object)
		want, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
		}
		if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o644 {
			t.Errorf("%s: mode %v, %v; want 0644", name, fi.Mode(), err)
		}
		sum, err := verity.Digest(bytes.NewReader(want), verity.SHA256)
		if err != nil || object != payload(sum) {
			t.Errorf("%s: %s, want %s", name, object, payload(sum))
		}
	}

	// What is there stays, what is damaged in its length is written again.
	a, large := filepath.Join(store, payloads["a"]), filepath.Join(store, payloads["d/large"])
	before := inode(t, a)
	if err := os.Truncate(large, 17); err != nil {
		t.Fatal(err)
	}
	fill(t, dir, store, 1)
	if inode(t, a) != before {
		t.Error("an object that was there was written again")
	}
	if fi, err := os.Stat(large); err != nil || fi.Size() != 5*300000 {
		t.Errorf("a short object was left: %v, %v", fi, err)
	}
}

func TestStoreErrors(t *testing.T) {
	dir := treeOf(t, "file f 100*x\nfile notdir x")
	if _, err := OpenStore(filepath.Join(dir, "notdir"), verity.SHA256); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("OpenStore of a file: %v", err)
	}
	store := t.TempDir()
	s, err := OpenStore(store, verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	sum, err := verity.Digest(strings.NewReader(content("100*x")), verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(store, payload(sum)[:2]), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Scan(context.Background(), dir, ScanOptions{Store: s})
	if !errors.Is(err, unix.ENOTDIR) || !strings.Contains(err.Error(), "/f: object "+payload(sum)) {
		t.Errorf("a file where a folder of objects belongs: %v", err)
	}
	names, err := os.ReadDir(store)
	if err != nil || len(names) != 1 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}

// mounted makes a filesystem in a sparse file and mounts it until the test
// ends.
func mounted(t *testing.T, size int64, mkfs ...string) string {
	t.Helper()
	img, mnt := filepath.Join(t.TempDir(), "fs"), t.TempDir()
	if err := os.WriteFile(img, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(img, size); err != nil {
		t.Fatal(err)
	}
	for _, c := range [][]string{append(mkfs, img), {"mount", "-o", "loop", img, mnt}} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", c, err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", mnt).CombinedOutput(); err != nil {
			t.Errorf("umount: %v\n%s", err, out)
		}
	})
	return mnt
}

// Where the filesystem can share blocks, an object costs none.
func TestStoreShares(t *testing.T) {
	mnt := mounted(t, 320<<20, "mkfs.xfs", "-q")
	dir := filepath.Join(mnt, "tree")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const size = 48 << 20
	if err := os.WriteFile(filepath.Join(dir, "f"), bytes.Repeat([]byte("no zeros"), size/8), 0o644); err != nil {
		t.Fatal(err)
	}
	root, err := os.Open(mnt)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	free := func() uint64 {
		var st unix.Statfs_t
		if err := errors.Join(unix.Syncfs(int(root.Fd())), unix.Statfs(mnt, &st)); err != nil {
			t.Fatal(err)
		}
		return st.Bfree * uint64(st.Bsize)
	}
	before := free()
	store := filepath.Join(mnt, "store")
	payloads := fill(t, dir, store, 1)
	if used := int64(before) - int64(free()); used > size/4 {
		t.Errorf("%d bytes of the filesystem for an object of %d", used, size)
	}
	if got, err := Measure(filepath.Join(store, payloads["f"]), verity.SHA256); err != nil || payload(got) != payloads["f"] {
		t.Errorf("the object's digest is %x, %v; want %s", got, err, payloads["f"])
	}
}

func TestStoreDiskFull(t *testing.T) {
	mnt := t.TempDir()
	if err := unix.Mount("tmpfs", mnt, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Error(err)
		}
	})
	dir := treeOf(t, "file f 3000000*x")
	s, err := OpenStore(mnt, verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Scan(context.Background(), dir, ScanOptions{Store: s})
	if !errors.Is(err, unix.ENOSPC) {
		t.Errorf("disk full: %v", err)
	}
	if names, err := os.ReadDir(mnt); err != nil || len(names) != 0 {
		t.Errorf("left behind: %v, %v", names, err)
	}
}
