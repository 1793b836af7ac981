package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The tests in this file need root, a kernel that mounts EROFS from a file
// (6.12) and erofs-utils. Without them they fail: they are what ties this
// package to the world.

// tool runs a program and fails the test if it does.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatalf("%v (this test needs erofs-utils)", err)
	}
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// mountImage mounts an image file until the test ends.
func mountImage(t *testing.T, path, options string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount(path, dir, "erofs", unix.MS_RDONLY, options); err != nil {
		t.Fatalf("mount %s (this test needs root and Linux 6.12): %v", path, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// withheld stands for a value that the kernel does not give.
const withheld = "withheld by the kernel"

// kernelXattrs returns the xattrs of a path as getxattr(2) gives them.
func kernelXattrs(path string) (map[string]string, error) {
	n, err := unix.Llistxattr(path, nil)
	if err != nil || n == 0 {
		return map[string]string{}, err
	}
	buf := make([]byte, n)
	if n, err = unix.Llistxattr(path, buf); err != nil {
		return nil, fmt.Errorf("list xattrs: %w", err)
	}
	list := map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		var value []byte
		k, err := unix.Lgetxattr(path, name, nil)
		if err == nil && k > 0 {
			value = make([]byte, k)
			k, err = unix.Lgetxattr(path, name, value)
		}
		switch err {
		case unix.EINVAL, unix.EOPNOTSUPP, unix.ENODATA:
			// Linux lists them but has its own rules on values: "user." only
			// on files and directories, ACLs and capabilities well-formed.
			list[name] = withheld
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("get xattr %s: %w", name, err)
		}
		list[name] = string(value[:k])
	}
	return list, nil
}

// sameAsKernel compares a mount with what the Reader says of the same image.
func sameAsKernel(t *testing.T, r *Reader, dir string, noacl bool) {
	t.Helper()
	count := 0
	fail := func(path, what string, got, want any) {
		t.Errorf("%.100q: %s is %.300q, the kernel says %.300q", path, what, fmt.Sprint(got), fmt.Sprint(want))
	}
	err := r.Walk(func(path string, i Inode) error {
		count++
		var st unix.Stat_t
		if err := unix.Lstat(dir+path, &st); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if st.Ino != i.NID {
			fail(path, "nid", i.NID, st.Ino)
		}
		got := fmt.Sprintf("%o %d:%d nlink %d rdev %#x size %d mtime %d.%09d blocks %d", i.Mode, i.UID, i.GID, i.Nlink, i.Rdev, i.Size, i.MtimeSec, i.MtimeNsec, i.Blocks)
		want := fmt.Sprintf("%o %d:%d nlink %d rdev %#x size %d mtime %d.%09d blocks %d", st.Mode, st.Uid, st.Gid, st.Nlink, st.Rdev, st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Blocks)
		if got != want {
			fail(path, "stat", got, want)
		}
		kernel, err := kernelXattrs(dir + path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		ours := map[string]string{}
		err = r.eachXattr(&i, func(x storedXattr) bool {
			acl := x.prefix == aclAccess || x.prefix == aclDefault
			if x.prefix != "" && !(acl && noacl) { // the kernel does not show the others
				name := x.prefix + string(x.suffix)
				if ours[name] = string(x.value); kernel[name] == withheld {
					ours[name] = withheld
				}
			}
			return true
		})
		if err != nil {
			return err
		}
		if fmt.Sprint(ours) != fmt.Sprint(kernel) {
			fail(path, "xattrs", ours, kernel)
		}
		switch {
		case i.IsSymlink():
			want, err := os.Readlink(dir + path)
			if err != nil {
				return err
			}
			if got, err := r.Readlink(i); got != want || err != nil {
				fail(path, "target", got, want)
			}
		case i.IsDir():
			want, err := os.ReadDir(dir + path)
			if err != nil {
				return err
			}
			n := 0
			err = r.ReadDir(i, 0, func(e DirEntry, _ uint64) bool {
				if name := string(e.Name); name != "." && name != ".." {
					if n >= len(want) || want[n].Name() != name || want[n].Type() != typeMode(e.Type) {
						fail(path, fmt.Sprint("entry ", n), name, want[min(n, len(want)-1)])
						return false
					}
					n++
				}
				return true
			})
			if err != nil || n != len(want) {
				fail(path, "entries", n, len(want))
			}
		case i.IsRegular() && i.Size < 1<<21:
			want, err := os.ReadFile(dir + path)
			if err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
			got, err := io.ReadAll(io.NewSectionReader(readerAt{r, i}, 0, i.Size))
			if err != nil || !bytes.Equal(got, want) {
				fail(path, fmt.Sprintf("content (%v)", err), len(got), len(want))
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d entries compared", count)
}

type readerAt struct {
	r *Reader
	i Inode
}

func (r readerAt) ReadAt(p []byte, off int64) (int, error) { return r.r.ReadAt(r.i, p, off) }

func saved(t *testing.T, img []byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, img, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestKernelMount mounts written images and compares the kernel's view with
// the Reader's, which TestReader compares with the tree.
func TestKernelMount(t *testing.T) {
	big := synthetic(3000)
	for name, tree := range map[string]*Node{"sample": sample(), "synthetic": big} {
		for version := range uint32(MaxVersion + 1) {
			t.Run(fmt.Sprint(name, version), func(t *testing.T) {
				img := image(t, tree, Options{MinVersion: version})
				sameAsKernel(t, openImage(t, img), mountImage(t, saved(t, img), ""), false)
			})
		}
	}
}

// TestKernelMountGolden does the same with the C tool's images. Their ACLs are
// random bytes, with which Linux would refuse to open anything.
func TestKernelMountGolden(t *testing.T) {
	for _, c := range goldens(t) {
		if c.reject {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			tree, err := ParseDump(bytes.NewReader(c.dump(t)))
			if err != nil {
				t.Fatal(err)
			}
			img := image(t, tree, Options{MinVersion: c.min, MaxVersion: c.max})
			sameAsKernel(t, openImage(t, img), mountImage(t, saved(t, img), "noacl"), true)
		})
	}
}

// TestFsck lets fsck.erofs check a written image and dump.erofs describe it.
func TestFsck(t *testing.T) {
	img := image(t, sample(), Options{})
	path := saved(t, img)
	tool(t, "fsck.erofs", path)
	out := tool(t, "dump.erofs", path)
	for _, want := range []string{"0xE0F5E1E2", fmt.Sprintf("Filesystem blocks:                            %d", len(img)/blockSize), "Filesystem root nid:                          36"} {
		if !strings.Contains(out, want) {
			t.Errorf("dump.erofs does not say %q:\n%s", want, out)
		}
	}
	out = tool(t, "dump.erofs", "--path=/etc/hostname", path)
	if !strings.Contains(out, "Uid: 70000   Gid: 80000  Access: 0644/rw-r--r--") {
		t.Errorf("dump.erofs says\n%s", out)
	}
}

// TestMkfs reads what mkfs.erofs writes, in several layouts.
func TestMkfs(t *testing.T) {
	source := t.TempDir()
	write := func(name string, content []byte) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(filepath.Join(source, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(source, name), content, 0o640); err != nil {
			t.Fatal(err)
		}
	}
	pattern := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i>>12 + i)
		}
		return b
	}
	for _, n := range []int{0, 1, 100, 4095, 4096, 4097, 8192, 70000, 1 << 20} {
		write(fmt.Sprintf("files/%d", n), pattern(n))
	}
	holes := pattern(1 << 20)
	clear(holes[100000:900000])
	write("files/holes", holes)
	for i := range 500 {
		write(fmt.Sprintf("many/a longer name for entry %d", i), nil)
	}
	for _, err := range []error{
		os.Symlink("files/1", filepath.Join(source, "link")), os.Link(filepath.Join(source, "files/100"), filepath.Join(source, "hard")),
		os.Symlink(strings.Repeat("x", 4000), filepath.Join(source, "longlink")), os.Mkdir(filepath.Join(source, "empty"), 0o1777),
		unix.Mknod(filepath.Join(source, "device"), unix.S_IFBLK|0o600, 2049), unix.Mkfifo(filepath.Join(source, "fifo"), 0o600),
		unix.Setxattr(filepath.Join(source, "files/1"), "user.one", []byte("1"), 0), unix.Setxattr(filepath.Join(source, "files/100"), "user.one", []byte("1"), 0),
		unix.Setxattr(filepath.Join(source, "files/1"), "trusted.two", bytes.Repeat([]byte("2"), 500), 0), os.Lchown(filepath.Join(source, "link"), 100000, 100000),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, options := range map[string][]string{
		"default":  nil,
		"compact":  {"-T1000000000", "--all-root", "-Eforce-inode-compact"},
		"extended": {"-Eforce-inode-extended", "-x1"},
		"noinline": {"-Enoinline_data"},
		"chunks":   {"--chunksize=4096"},
		"indexes":  {"--chunksize=65536", "-Eforce-chunk-indexes"},
		"blockmap": {"--chunksize=8192", "-Eforce-inode-blockmap"},
		"legacy":   {"-Elegacy-compress"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "image")
			tool(t, "mkfs.erofs", append(options, path, source)...)
			r, err := OpenFile(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { r.Close() })
			if err := r.Check(); err != nil {
				t.Error(err)
			}
			if r.Header().Composefs {
				t.Error("taken for a composefs image")
			}
			sameAsKernel(t, r, mountImage(t, path, ""), false)
			for _, file := range []string{"files/holes", "files/1048576", "files/70000", "link"} {
				want, err := os.ReadFile(filepath.Join(source, file))
				if err != nil {
					t.Fatal(err)
				}
				if got, err := (imageFS{r}).ReadFile(file); !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes, %v", file, len(got), err)
				}
			}
			if _, err := Load(r); err == nil {
				t.Error("Load takes it")
			}
		})
	}
	path := filepath.Join(t.TempDir(), "image")
	tool(t, "mkfs.erofs", "-zlz4hc", path, source)
	r, err := OpenFile(path)
	if err == nil {
		_, err = imageFS{r}.ReadFile("files/1048576")
		r.Close()
	}
	if !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("compressed data: %v", err)
	}
}

// TestKernel48bit changes an image into one of the newer kind, which
// erofs-utils 1.5 cannot write: root nid of 64 bits, a directory without ".",
// an inode whose link count is implied, and data at 48-bit chunk addresses.
func TestKernel48bit(t *testing.T) {
	block := strings.Repeat("block", 600)
	img := image(t, root(dir("a", file("f", "text")), file("block", block), ext("e", 3000, "ab/cdef"), ext("hole", 3000, "ab/cdef")), Options{})
	r := openImage(t, img)
	a, f, e, hole, b := at(t, r, "a"), at(t, r, "a/f"), at(t, r, "e"), at(t, r, "hole"), at(t, r, "block")

	clear(img[:32])
	sb := img[superOffset:]
	le.PutUint32(sb[80:], incompatChunked|incompat48bit)
	le.PutUint16(sb[14:], 0)
	le.PutUint64(sb[112:], r.Root())

	inode := img[a.NID*slotSize:]
	inode[0] |= 1 << 4
	tail := le.AppendUint64(nil, r.Root())
	tail = append(le.AppendUint16(tail, 24), TypeDir, 0)
	tail = le.AppendUint64(tail, f.NID)
	tail = append(le.AppendUint16(tail, 26), TypeRegular, 0)
	tail = append(tail, "..f"...)
	copy(img[a.inlineOff:], tail)
	le.PutUint32(inode[8:], uint32(len(tail)))

	inode = img[f.NID*slotSize:]
	inode[0] |= 1 << 4
	le.PutUint16(inode[6:], 0)

	for _, c := range []struct {
		i     Inode
		first uint64
	}{{e, b.u}, {hole, 1<<48 - 1}} {
		le.PutUint32(img[c.i.NID*slotSize+16:], 0x60)
		index := img[roundUp(uint64(c.i.inlineOff), 8):]
		le.PutUint16(index, uint16(c.first>>32))
		le.PutUint16(index[2:], 0)
		le.PutUint32(index[4:], uint32(c.first))
	}
	r = openImage(t, img)
	if err := r.Check(); err != nil {
		t.Error(err)
	}
	if got, err := (imageFS{r}).ReadFile("e"); string(got) != block || err != nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	var names []string
	for cookie, more := uint64(0), true; more; {
		more = false
		if err := r.ReadDir(at(t, r, "a"), cookie, func(e DirEntry, next uint64) bool {
			names = append(names, string(e.Name))
			cookie, more = next, true
			return false
		}); err != nil {
			t.Fatal(err)
		}
	}
	if strings.Join(names, " ") != ". .. f" {
		t.Errorf("entries %q", names)
	}
	if nid, err := r.Lookup(at(t, r, "a"), "."); nid != a.NID || err != nil {
		t.Errorf(". is %d, %v", nid, err)
	}
	sameAsKernel(t, r, mountImage(t, saved(t, img), ""), false)
}

// TestLongPrefixes changes an image into one with a table of xattr prefixes,
// which mkfs.erofs --xattr-prefix writes since erofs-utils 1.7.
func TestLongPrefixes(t *testing.T) {
	const value = "11 of bytes"
	img := image(t, root(file("f", "text", xattr("user.longish.a", "v"), xattr("user.b", "b"))), Options{})
	clear(img[:32])
	entry := img[bytes.Index(img, []byte("longish.a"))-xattrEntrySize:]
	entry[0], entry[1] = 1, longPrefix
	le.PutUint16(entry[2:], uint16(len(value)))
	copy(entry[xattrEntrySize:], "a"+value) // as many bytes as before, with the padding

	sb := img[superOffset:]
	le.PutUint32(sb[80:], incompatPrefixes)
	sb[91] = 1
	le.PutUint32(sb[92:], 512/4)
	copy(img[512:], "\x09\x00\x01longish.")

	r := openImage(t, img)
	if err := r.Check(); err != nil {
		t.Error(err)
	}
	if got, err := r.Xattr(at(t, r, "f"), "user.longish.a"); string(got) != value || err != nil {
		t.Errorf("%q, %v", got, err)
	}
	sameAsKernel(t, r, mountImage(t, saved(t, img), ""), false)

	// The same table in the data of a packed inode, where erofs-utils 1.8 has it.
	packed := image(t, root(file("f", "text", xattr("user.longish.a", "v")), file("p", "1234\x09\x00\x01longish.")), Options{})
	nid := at(t, openImage(t, packed), "p").NID
	clear(packed[:32])
	entry = packed[bytes.Index(packed, []byte("longish.a"))-xattrEntrySize:]
	entry[0], entry[1] = 1, longPrefix
	le.PutUint16(entry[2:], uint16(len(value)))
	copy(entry[xattrEntrySize:], "a"+value)
	sb = packed[superOffset:]
	le.PutUint32(sb[80:], incompatPrefixes|incompatFragments)
	sb[91] = 1
	le.PutUint32(sb[92:], 1)
	le.PutUint64(sb[96:], nid)
	r = openImage(t, packed)
	if got, err := r.Xattr(at(t, r, "f"), "user.longish.a"); string(got) != value || err != nil {
		t.Errorf("from the packed inode: %q, %v", got, err)
	}
	sb[92] = 4
	if _, err := OpenBytes(packed); err == nil {
		t.Error("a table beyond the end of the packed inode was taken")
	}

	for _, c := range []func(b []byte){
		func(b []byte) { b[512] = 0 },
		func(b []byte) { b[513] = 2 },
		func(b []byte) { b[514] = 9 },
		func(b []byte) { le.PutUint32(b[superOffset+92:], 1<<30) },
		func(b []byte) { b[superOffset+91] = 200; le.PutUint32(b[superOffset+92:], uint32(len(b)-8)/4) },
	} {
		bad := bytes.Clone(img)
		c(bad)
		if _, err := OpenBytes(bad); err == nil {
			t.Error("a damaged table of prefixes was taken")
		}
	}
}
