package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"
)

// eachSource runs a test over the three ways to open an image.
func eachSource(t *testing.T, img []byte, test func(*testing.T, *Reader)) {
	for _, source := range []string{"bytes", "file", "ReaderAt"} {
		t.Run(source, func(t *testing.T) {
			var r *Reader
			var err error
			switch source {
			case "bytes":
				r, err = OpenBytes(img)
			case "file":
				path := filepath.Join(t.TempDir(), "image")
				if err := os.WriteFile(path, img, 0o644); err != nil {
					t.Fatal(err)
				}
				r, err = OpenFile(path)
			default:
				r, err = Open(bytes.NewReader(img), int64(len(img)))
			}
			if err != nil {
				t.Fatal(err)
			}
			test(t, r)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			if _, err := r.Inode(r.Root()); err == nil {
				t.Error("a closed reader reads")
			}
		})
	}
}

func TestReader(t *testing.T) {
	tree := sample()
	eachSource(t, image(t, tree, Options{}), func(t *testing.T, r *Reader) {
		if err := r.Check(); err != nil {
			t.Fatal(err)
		}
		back, err := Load(r)
		if err != nil {
			t.Fatal(err)
		}
		sameTree(t, back, tree)

		i := at(t, r, "etc/largest")
		want := strings.Repeat("0123456789abcdef", 312) + "12345678"
		for _, c := range []struct{ off, n int }{{0, 5000}, {0, 6000}, {4090, 20}, {4096, 904}, {4999, 1}, {5000, 1}, {17, 0}} {
			p := make([]byte, c.n)
			n, err := r.ReadAt(i, p, int64(c.off))
			end := min(c.off+c.n, len(want))
			if string(p[:n]) != want[c.off:end] || (err == io.EOF) != (n < c.n) || err != nil && err != io.EOF {
				t.Errorf("read %d at %d: %d bytes, %v", c.n, c.off, n, err)
			}
		}
		p := []byte("not zero")
		if n, err := r.ReadAt(at(t, r, "huge"), p, 1<<39); n != len(p) || err != nil || string(p) != "\x00\x00\x00\x00\x00\x00\x00\x00" {
			t.Errorf("external data reads as %q, %v", p[:n], err)
		}
		if _, err := r.ReadAt(i, p, -1); err == nil {
			t.Error("a negative offset is taken")
		}
		if _, err := r.ReadAt(at(t, r, "etc"), p, 0); err == nil {
			t.Error("a directory is read")
		}
		if s, err := r.Readlink(at(t, r, "usr/share/long")); s != strings.Repeat("/far", 1000) || err != nil {
			t.Errorf("long link: %d bytes, %v", len(s), err)
		}
		if _, err := r.Readlink(i); err == nil {
			t.Error("a file is read as a link")
		}
		if _, err := r.Lookup(i, "x"); err == nil || err == fs.ErrNotExist {
			t.Errorf("lookup in a file: %v", err)
		}
		if err := r.ReadDir(i, 0, nil); err == nil {
			t.Error("a file is listed")
		}
		if at(t, r, "etc/shared").NID != at(t, r, "usr/share/again").NID {
			t.Error("hard links have different inodes")
		}
	})
}

// TestLookup looks every name of a large directory up, and names beside them.
func TestLookup(t *testing.T) {
	r := openImage(t, image(t, sample(), Options{}))
	many := at(t, r, "many")
	count := 0
	err := r.ReadDir(many, 0, func(e DirEntry, _ uint64) bool {
		count++
		name := string(e.Name)
		if nid, err := r.Lookup(many, name); nid != e.NID || err != nil {
			t.Errorf("%s: %d, %v; want %d", name, nid, err, e.NID)
		}
		for _, other := range []string{name + "\x00", name + "x!", name[:len(name)-1] + "\xff", "\x00" + name} {
			if nid, err := r.Lookup(many, other); err != fs.ErrNotExist {
				t.Errorf("%q: %d, %v", other, nid, err)
			}
		}
		return true
	})
	if err != nil || count != 602 {
		t.Errorf("%d entries, %v", count, err)
	}
	for name, want := range map[string]uint64{".": many.NID, "..": r.Root()} {
		if nid, err := r.Lookup(many, name); nid != want || err != nil {
			t.Errorf("%s: %d, %v", name, nid, err)
		}
	}
	for _, name := range []string{"", "\xff", "entry", "entry-9"} {
		if _, err := r.Lookup(many, name); err != fs.ErrNotExist {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// TestReadDirCookies resumes a listing behind every entry.
func TestReadDirCookies(t *testing.T) {
	r := openImage(t, image(t, sample(), Options{}))
	for _, path := range []string{".", "many", "empty", "etc"} {
		dir := at(t, r, path)
		var names []string
		var cookies []uint64
		if err := r.ReadDir(dir, 0, func(e DirEntry, next uint64) bool {
			names, cookies = append(names, string(e.Name)), append(cookies, next)
			return true
		}); err != nil {
			t.Fatal(err)
		}
		if !slices.IsSorted(cookies) || cookies[0] == 0 || len(slices.Compact(slices.Clone(cookies))) != len(cookies) {
			t.Errorf("%s: cookies do not grow: %v", path, cookies)
		}
		for i, cookie := range cookies {
			var rest []string
			if err := r.ReadDir(dir, cookie, func(e DirEntry, next uint64) bool {
				rest = append(rest, string(e.Name))
				return len(rest) < 3
			}); err != nil || !slices.Equal(rest, names[i+1:min(i+4, len(names))]) {
				t.Fatalf("%s after %s: %v, %v", path, names[i], rest, err)
			}
		}
		if err := r.ReadDir(dir, 1<<63, func(DirEntry, uint64) bool { t.Error("an entry after the end"); return true }); err != nil {
			t.Error(err)
		}
		if err := r.ReadDir(dir, 13, nil); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("a cookie nobody gave: %v", err)
		}
	}
}

func TestXattrs(t *testing.T) {
	r := openImage(t, image(t, sample(), Options{}))
	i := at(t, r, "xattrs")
	for name, want := range map[string]string{"user.a": "1", "user.b": strings.Repeat("v", 3000), "trusted.overlay.overlay.origin": "o", "odd": "index 0", "lustre.x": "y"} {
		if v, err := r.Xattr(i, name); string(v) != want || err != nil {
			t.Errorf("%s: %.20q, %v", name, v, err)
		}
	}
	for _, name := range []string{"", "user.", "user.c", "user.aa", "trusted.overlay.origin", "odd2", "security.a", "a"} {
		if v, err := r.Xattr(i, name); err != ErrNoXattr {
			t.Errorf("%q: %q, %v", name, v, err)
		}
	}
	list, err := r.Xattrs(i)
	if err != nil || len(list) != 5 {
		t.Errorf("%d xattrs, %v", len(list), err)
	}
	for stored, visible := range map[string]string{"user.a": "user.a", "trusted.overlay.overlay.origin": "trusted.overlay.origin", "trusted.overlay.opaque": "", "trusted.x": "trusted.x"} {
		got, ok := VisibleXattr(stored)
		if ok != (visible != "") || ok && (got != visible || StoredXattr(visible) != stored) {
			t.Errorf("%s is seen as %q, %v", stored, got, ok)
		}
	}
}

// TestXXH32 holds the hash to the test values of the xxHash sources (XXH32 of
// the first bytes of its sanity buffer) and to kernel-checked filter bits by
// way of TestKernelMount.
func TestXXH32(t *testing.T) {
	buffer := make([]byte, 256)
	gen := uint64(2654435761)
	for i := range buffer {
		buffer[i] = byte(gen >> 56)
		gen *= 11400714785074694797
	}
	for _, c := range []struct {
		n          int
		seed, want uint32
	}{
		{0, 0, 0x02CC5D05}, {0, 2654435761, 0x36B78AE7}, {1, 0, 0xCF65B03E}, {1, 2654435761, 0xB4545AA4},
		{14, 0, 0x1208E7E2}, {14, 2654435761, 0x6AF1D1FE}, {222, 0, 0x5BD11DBD}, {222, 2654435761, 0x58803C5F},
	} {
		if got := xxh32(string(buffer[:c.n]), c.seed); got != c.want {
			t.Errorf("xxh32 of %d bytes, seed %d: %#x, want %#x", c.n, c.seed, got, c.want)
		}
	}
}

// TestNoAllocation holds the calls of a FUSE server's hot path over a mapping.
func TestNoAllocation(t *testing.T) {
	r := openImage(t, image(t, sample(), Options{}))
	many, top, sh := at(t, r, "many"), at(t, r, "."), at(t, r, "bin/sh")
	largest := at(t, r, "etc/largest")
	p := make([]byte, 5000)
	for name, call := range map[string]func(){
		"Inode":        func() { r.Inode(sh.NID) },
		"Lookup":       func() { r.Lookup(many, "entry-0300-xxxxxxxxxxxxxxxxxxxx") },
		"Lookup none":  func() { r.Lookup(top, "nothing") },
		"ReadDir":      func() { r.ReadDir(many, 0, func(DirEntry, uint64) bool { return true }) },
		"Xattr":        func() { r.Xattr(sh, "security.capability") },
		"Xattr shared": func() { r.Xattr(top, "security.selinux") },
		"Xattr none":   func() { r.Xattr(sh, "security.ima") },
		"ReadAt":       func() { r.ReadAt(largest, p, 0) },
	} {
		if n := testing.AllocsPerRun(100, call); n > 0 {
			t.Errorf("%s allocates %v times", name, n)
		}
	}
}

func TestConcurrent(t *testing.T) {
	tree := sample()
	r := openImage(t, image(t, tree, Options{}))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 5 {
				if back, err := Load(r); err != nil || describe(back) != describe(tree) {
					t.Errorf("load: %v", err)
				}
			}
		})
	}
	wg.Wait()
}

func TestWalk(t *testing.T) {
	r := openImage(t, image(t, sample(), Options{}))
	var paths []string
	if err := r.Walk(func(path string, i Inode) error {
		if i.IsWhiteout() {
			return nil
		}
		paths = append(paths, path)
		if path == "/many" || path == "/dev" {
			return fs.SkipDir
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	want := "/ /bin /bin/bash /bin/sh /dev /empty /etc /etc/block /etc/hostname /etc/inline /etc/largest /etc/shared /huge /many /unknown /usr /usr/share /usr/share/again /usr/share/long /usr/share/up /wh /wh/gone /wh/kept /xattrs /zero"
	if got := strings.Join(paths, " "); got != want {
		t.Errorf("got %s", got)
	}
	stop := errors.New("stop")
	if err := r.Walk(func(path string, i Inode) error { return stop }); err != stop {
		t.Errorf("got %v", err)
	}
}

// TestFS runs the tests of the standard library, which read every file to its
// end, and follows links.
func TestFS(t *testing.T) {
	tree := sample()
	eachNode(tree, func(n *Node) {
		n.Children = slices.DeleteFunc(n.Children, func(n *Node) bool { return n.Name == "huge" || n.Name == "long" })
	})
	r := openImage(t, image(t, tree, Options{}))
	if err := fstest.TestFS(r.FS(), "bin/sh", "etc/largest", "many/entry-0001-x", "zero", "usr/share/again"); err != nil {
		t.Error(err)
	}
	links := openImage(t, image(t, root(dir("a", file("f", "found"), symlink("up", "../b/abs")), dir("b", symlink("abs", "/a"), symlink("loop", "loop"), symlink("out", "../../../../a/f"))), Options{}))
	fsys := links.FS()
	for name, want := range map[string]string{"a/f": "found", "b/abs/f": "found", "a/up/up/f": "found", "b/out": "found", "b/loop": errTooMany.Error(), "a/f/x": "not a directory", "nothing": "not exist", "/a": "invalid"} {
		b, err := fs.ReadFile(fsys, name)
		if string(b) != want && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %q, %v", name, b, err)
		}
	}
	if s, err := fs.ReadLink(fsys, "a/up"); s != "../b/abs" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	if i, err := fs.Stat(fsys, "a/up"); err != nil || !i.IsDir() || i.Name() != "up" || i.Sys().(Inode).NID != at(t, links, "a").NID {
		t.Errorf("%v, %v", i, err)
	}
	if i, err := fs.Lstat(fsys, "a/up"); err != nil || i.Mode() != fs.ModeSymlink|0o777 || !i.ModTime().Equal(time.Unix(1000, 0)) {
		t.Errorf("%v, %v", i, err)
	}
}

// Images with one fault each, made by changing a good one.
func TestFaults(t *testing.T) {
	external := ext("e", 5000, "ab")
	external.Digest = bytes.Repeat([]byte{7}, 32)
	odd := file("n", "x", xattr("user.1", "ab"), xattr("user.2", "ab"), xattr(aclAccess, "acl"))
	odd.MtimeSec++
	tree := root(dir("a", dir("b", file("f", "text"))), file("g", "x", xattr("user.x", "y")), symlink("l", "to"), external, odd)
	good := image(t, tree, Options{})
	r := openImage(t, good)
	slot := func(path string) int { return int(at(t, r, path).NID) * slotSize }
	rootData := func(name string) int { // offset of the entry in the root's block
		b, pos, err := r.dirData(new(at(t, r, ".")), 0)
		if err != nil {
			t.Fatal(err)
		}
		for k := range int(le.Uint16(b[8:]) / direntSize) {
			d := dirBlock{b: b, count: int(le.Uint16(b[8:]) / direntSize)}
			if n, _ := d.name(k); string(n) == name {
				return int(pos) + direntSize*k
			}
		}
		t.Fatalf("no %s", name)
		return 0
	}
	inline := func(path string) int { return int(at(t, r, path).inlineOff) }
	for _, c := range []struct {
		name   string
		change func(b []byte)
		want   string
	}{
		{"magic", func(b []byte) { b[superOffset] = 0 }, "no EROFS superblock"},
		{"features", func(b []byte) { b[superOffset+80] = 2 }, "unsupported"},
		{"block size", func(b []byte) { b[superOffset+12] = 40 }, "blocks of"},
		{"dirblkbits", func(b []byte) { b[superOffset+90] = 1 }, "unsupported"},
		{"blocks", func(b []byte) { b[superOffset+37] = 1 }, "superblock says"},
		{"checksum", func(b []byte) { b[superOffset+8] |= 1 }, "checksum"},
		{"root nid", func(b []byte) { le.PutUint16(b[superOffset+14:], 60000) }, "root directory"},
		{"root a file", func(b []byte) { le.PutUint16(b[superOffset+14:], uint16(slot("g")/slotSize)) }, "not a directory"},
		{"cycle", func(b []byte) { le.PutUint64(b[inline("a")+2*direntSize:], uint64(slot("a")/slotSize)) }, "a cycle or two parents"},
		{"two parents", func(b []byte) { copy(b[rootData("g"):][:8], b[rootData("a"):][:8]) }, "a cycle or two parents"},
		{"entry type", func(b []byte) { b[rootData("g")+10] = TypeDir }, "with type 2"},
		{"name twice", func(b []byte) { copy(b[rootData("00")+direntSize+8:], b[rootData("00")+8:][:2]) }, "corrupt image"},
		{"nid beyond", func(b []byte) { b[rootData("g")+7] = 0xff }, "beyond the end"},
		{"name offset", func(b []byte) { b[rootData("g")+9] = 0xff }, "the name of directory entry"},
		{"first name", func(b []byte) { b[inline("a")+8] = 35 }, "first name"},
		{"dots", func(b []byte) { b[inline("a")] ^= 1 }, `its entry "." leads`},
		{"nlink", func(b []byte) { b[slot("a")+6] = 77 }, "link count of 77"},
		{"mode", func(b []byte) { b[slot("g")+5] = 0 }, "no file type"},
		{"format", func(b []byte) { b[slot("g")] = 0xff }, "inode format"},
		{"layout", func(b []byte) { b[slot("g")] = layoutInline - 1<<1 | 1 }, ""},
		{"compressed", func(b []byte) { b[slot("g")] = 3 << 1 }, "compressed"},
		{"chunk format", func(b []byte) { b[slot("e")+16] = 0xff }, "chunk format"},
		{"xattr size", func(b []byte) { le.PutUint16(b[slot("g")+2:], 0xffff) }, "xattrs of"},
		{"shared count", func(b []byte) { b[slot("g")+compactSize+4] = 200 }, "shared xattrs"},
		{"xattr entry", func(b []byte) { b[slot("g")+compactSize+12] = 200 }, "an xattr longer"},
		{"filter", func(b []byte) { le.PutUint32(b[slot("g")+compactSize:], 0xffffffff) }, "denies"},
		{"link size", func(b []byte) { b[slot("l")+9] = 0xff }, "target of"},
		{"link nul", func(b []byte) { b[inline("l")] = 0 }, "NUL"},
		{"big file", func(b []byte) { b[slot("g")+11] = 1 }, "beyond the end"},
		{"nanoseconds", func(b []byte) { le.PutUint32(b[slot("n")+40:], 1e9) }, "1000000000 nanoseconds"},
		{"inodes", func(b []byte) { b[superOffset+16]++ }, "superblock says"},
		{"xattr twice", func(b []byte) { copy(b[slot("n")+extendedSize+12:][:8], b[slot("n")+extendedSize+20:]) }, "twice"},
		{"ACL", func(b []byte) { b[8] = 0 }, "no ACLs, and there are"},
		{"redirect", func(b []byte) { b[bytes.Index(b, []byte("redirect/ab"))+8] = '.' }, "slash"},
		{"metacopy", func(b []byte) { b[bytes.Index(b, []byte("metacopy\x00"))+9] = 35 }, "metacopy"},
		{"size", func(b []byte) { b[superOffset+36]-- }, "its superblock says"},
		{"huge directory", func(b []byte) { b[slot("a")+11] = 0x7f }, "corrupt image"},
	} {
		b := bytes.Clone(good)
		c.change(b)
		r, err := OpenBytes(b)
		if err == nil {
			err = r.Check()
		}
		if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s: got %v, want …%s…", c.name, err, c.want)
		}
		var corrupt *CorruptError
		if err != nil && !errors.As(err, &corrupt) && !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("%s: %v is neither", c.name, err)
		}
	}
	for n := range len(good) / 64 {
		if r, err := OpenBytes(good[:n*64]); err == nil {
			t.Errorf("%d of %d bytes open: %v", n*64, len(good), r.Header())
		}
	}
	if _, err := OpenFile(t.TempDir()); err == nil {
		t.Error("a folder opens")
	}
}

// TestEveryFault damages an image in many places; each must be named, with an
// offset at it.
func TestEveryFault(t *testing.T) {
	tree := root()
	for k := range 40 {
		d := dir(fmt.Sprintf("d%02d", k))
		for i := range 400 { // some blocks of entries
			d.Children = append(d.Children, file(fmt.Sprintf("file-%03d", i), ""))
		}
		tree.Children = append(tree.Children, d)
	}
	b := image(t, tree, Options{})
	good := openImage(t, bytes.Clone(b))
	var want []int64
	for k := range 40 {
		name := fmt.Sprintf("d%02d", k)
		d := at(t, good, name)
		_, pos, err := good.dirData(&d, int64(k%2))
		if err != nil {
			t.Fatal(err)
		}
		b[pos+8] = 7                                                   // the first name's offset
		f := at(t, good, name+[]string{"/file-399", "/file-000"}[k%2]) // in the other block
		b[f.NID*slotSize+5] = 0                                        // the mode
		want = append(want, pos+8, int64(f.NID*slotSize))
	}
	r := openImage(t, b)
	var got []int64
	r.Faults(func(err error) bool {
		corrupt, ok := errors.AsType[*CorruptError](err)
		if !ok {
			t.Fatal(err)
		}
		got = append(got, corrupt.Offset)
		return true
	})
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("faults at %d\nwant %d", got, want)
	}
	count := 0
	r.Faults(func(error) bool { count++; return count < 7 })
	if count != 7 {
		t.Errorf("told of %d faults, wanted 7", count)
	}
}

// exercise calls everything on an image that may be anything.
func exercise(b []byte) error {
	r, err := OpenBytes(b)
	if err != nil {
		return err
	}
	errs := []error{r.Check()}
	r.Faults(func(error) bool { return true })
	budget := 2000
	errs = append(errs, r.Walk(func(path string, i Inode) error {
		if budget--; budget == 0 {
			return io.EOF
		}
		r.Xattrs(i)
		r.Xattr(i, "user.a")
		r.Payload(i)
		r.Readlink(i)
		p := make([]byte, 100)
		for _, off := range []int64{0, 4090, i.Size - 50, 1 << 40} {
			r.ReadAt(i, p, off)
		}
		if i.IsDir() {
			for _, name := range []string{".", "a", "entry-0300", "zz"} {
				r.Lookup(i, name)
			}
			for _, cookie := range []uint64{0, 1, 12, 24, 4096, 4108, 1 << 40} {
				r.ReadDir(i, cookie, func(DirEntry, uint64) bool { return false })
			}
		}
		return nil
	}))
	if _, err := Load(r); err != nil {
		errs = append(errs, err)
	}
	if err := WriteDump(io.Discard, r); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// TestMutations changes bytes of a good image at random; nothing may panic or
// run away.
func TestMutations(t *testing.T) {
	good := image(t, sample(), Options{})
	rnd := rand.New(rand.NewPCG(7, 7))
	noticed := 0
	for range 300 {
		b := bytes.Clone(good)
		for range 1 + rnd.IntN(4) {
			at := rnd.IntN(len(b))
			if rnd.IntN(2) == 0 {
				at = superOffset + rnd.IntN(superSize+20000)%(len(b)-superOffset)
			}
			switch rnd.IntN(3) {
			case 0:
				b[at] ^= 1 << rnd.IntN(8)
			case 1:
				b[at] = byte(rnd.Uint32())
			default:
				b[at] = 0xff
			}
		}
		if exercise(b) != nil {
			noticed++
		}
	}
	t.Logf("%d of 300 changed images had a fault that Check names", noticed)
}

func BenchmarkReader(b *testing.B) {
	tree := synthetic(100000)
	r := openImage(b, image(b, tree, Options{}))
	top := at(b, r, ".")
	big := root()
	for i := range 300000 {
		big.Children = append(big.Children, file(fmt.Sprintf("%07d", i), ""))
	}
	rb := openImage(b, image(b, big, Options{}))
	rbTop := at(b, rb, ".")
	b.Run("Lookup", func(b *testing.B) {
		for b.Loop() {
			r.Lookup(top, "directory-060000")
		}
	})
	b.Run("Lookup in 300,000", func(b *testing.B) {
		for b.Loop() {
			rb.Lookup(rbTop, "0123456")
		}
	})
	b.Run("Inode", func(b *testing.B) {
		for b.Loop() {
			r.Inode(top.NID)
		}
	})
	b.Run("Xattr denied by the filter", func(b *testing.B) {
		i := at(b, r, "directory-060000")
		for b.Loop() {
			r.Xattr(i, "security.capability")
		}
	})
	b.Run("ReadDir of 300,000", func(b *testing.B) {
		for b.Loop() {
			rb.ReadDir(rbTop, 0, func(DirEntry, uint64) bool { return true })
		}
	})
	b.Run("Check", func(b *testing.B) {
		for b.Loop() {
			if err := r.Check(); err != nil {
				b.Fatal(err)
			}
		}
	})
}
