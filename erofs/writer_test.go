package erofs

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

// TestSmallest is the image whose digest section 2.1 of the format document
// gives.
func TestSmallest(t *testing.T) {
	h := verity.New(verity.SHA256)
	b := image(t, root(mtime(0, 0)), Options{Tee: h})
	const want = "8f589e8f57ecb88823736b0d857ddca1e1068a23e264fad164b28f7038eb3682"
	if got := hex.EncodeToString(h.Sum()); len(b) != 16384 || got != want {
		t.Errorf("%d bytes, digest %s; want 16384, %s", len(b), got, want)
	}
}

// TestRoundTrip writes trees and reads them back, whole and through a dump.
func TestRoundTrip(t *testing.T) {
	marked := root(dir("d", xattr("trusted.overlay.opaque", "y"), xattr("user.overlay.opaque", "z")))
	for name, tree := range map[string]*Node{"sample": sample(), "empty": root(), "opaque": marked} {
		for version := range uint32(MaxVersion + 1) {
			t.Run(fmt.Sprint(name, version), func(t *testing.T) {
				b := image(t, tree, Options{MinVersion: version})
				r := openImage(t, b)
				if err := r.Check(); err != nil {
					t.Fatal(err)
				}
				if h := r.Header(); !h.Composefs || h.Version != version || h.Size != int64(len(b)) || h.HasACL {
					t.Errorf("header %+v", h)
				}
				back, err := Load(r)
				if err != nil {
					t.Fatal(err)
				}
				if version == 0 || name != "sample" { // version 1 marks the whiteout's parent
					sameTree(t, back, tree)
				}
				if again := image(t, back, Options{MinVersion: version}); !bytes.Equal(again, b) {
					t.Error("the tree read back gives another image")
				}
				var dump bytes.Buffer
				if err := WriteDump(&dump, r); err != nil {
					t.Fatal(err)
				}
				parsed, err := ReadDump(&dump, true)
				if err != nil {
					t.Fatal(err)
				}
				sameTree(t, parsed.Root, back)
			})
		}
	}
}

// TestOrderDoesNotMatter shuffles directories and xattrs, and sees that Write
// leaves the tree as it was.
func TestOrderDoesNotMatter(t *testing.T) {
	want := image(t, sample(), Options{})
	tree := sample()
	var turn func(n *Node)
	turn = func(n *Node) {
		for i, k := 0, len(n.Children)-1; i < k; i, k = i+1, k-1 {
			n.Children[i], n.Children[k] = n.Children[k], n.Children[i]
		}
		for i, k := 0, len(n.Xattrs)-1; i < k; i, k = i+1, k-1 {
			n.Xattrs[i], n.Xattrs[k] = n.Xattrs[k], n.Xattrs[i]
		}
		for _, c := range n.Children {
			turn(c)
		}
	}
	turn(tree)
	first := tree.Children[0].Name
	if got := image(t, tree, Options{}); !bytes.Equal(got, want) {
		t.Error("another image from another order")
	}
	if tree.Children[0].Name != first || len(tree.Children) != len(sample().Children) {
		t.Error("Write changed the tree")
	}
}

// TestVersions are the rules of section 2.3.
func TestVersions(t *testing.T) {
	plain, white := root(file("a", "")), root(special("a", modeChar, 0))
	for _, c := range []struct {
		tree     *Node
		min, max uint32
		want     uint32
		fails    bool
	}{
		{plain, 0, 0, 0, false}, {plain, 0, 1, 0, false}, {plain, 1, 0, 1, false}, {plain, 1, 1, 1, false},
		{white, 0, 0, 0, false}, {white, 0, 1, 1, false}, {white, 1, 0, 1, false},
		{plain, 2, 0, 0, true}, {plain, 0, 2, 0, true},
	} {
		var b bytes.Buffer
		err := Write(&b, c.tree, Options{MinVersion: c.min, MaxVersion: c.max})
		if (err != nil) != c.fails || c.fails && b.Len() > 0 {
			t.Errorf("%d to %d: %v and %d bytes", c.min, c.max, err, b.Len())
		} else if err == nil && openImage(t, b.Bytes()).Header().Version != c.want {
			t.Errorf("%d to %d: not version %d", c.min, c.max, c.want)
		}
	}
}

// TestMetacopy compares the values that overlayfs reads.
func TestMetacopy(t *testing.T) {
	d512 := bytes.Repeat([]byte{0xcd}, 64)
	r := openImage(t, image(t, root(
		ext("a", 5, "ab/cd", digest(bytes.Repeat([]byte{0xab}, 32))), ext("b", 5, "/ab/cd", digest(d512)), ext("c", 5, "", digest(nil))), Options{}))
	for _, c := range []struct{ name, metacopy, redirect string }{
		{"a", "\x00\x24\x00\x01" + strings.Repeat("\xab", 32), "/ab/cd"},
		{"b", "\x00\x44\x00\x02" + strings.Repeat("\xcd", 64), "//ab/cd"},
		{"c", "", "none"},
	} {
		i := at(t, r, c.name)
		metacopy, err := r.Xattr(i, metacopyXattr)
		if string(metacopy) != c.metacopy || err != nil {
			t.Errorf("%s: metacopy %q, %v", c.name, metacopy, err)
		}
		redirect, err := r.Xattr(i, redirectXattr)
		if string(redirect) != c.redirect && (c.redirect != "none" || err != ErrNoXattr) {
			t.Errorf("%s: redirect %q, %v", c.name, redirect, err)
		}
		if !i.External() {
			t.Errorf("%s is not external", c.name)
		}
	}
	if path, sum, err := r.Payload(at(t, r, "b")); path != "/ab/cd" || !bytes.Equal(sum, d512) || err != nil {
		t.Errorf("payload %q %x %v", path, sum, err)
	}
	if path, sum, err := r.Payload(at(t, r, "c")); path != "" || sum != nil || err != nil {
		t.Errorf("payload %q %x %v", path, sum, err)
	}
}

func TestSharedLimit(t *testing.T) {
	var parts []any
	for i := range 200 {
		parts = append(parts, xattr(fmt.Sprintf("user.%03d", i), "v"))
	}
	tree := root(file("a", "", parts...), file("b", "", parts...))
	r := openImage(t, image(t, tree, Options{}))
	if err := r.Check(); err != nil {
		t.Fatal(err)
	}
	b, err := r.bytes(0, at(t, r, "a").xattrOff, 12)
	if err != nil || b[4] != maxShared {
		t.Errorf("%d references, want %d", b[4], maxShared)
	}
	back, err := Load(r)
	if err != nil {
		t.Fatal(err)
	}
	sameTree(t, back, tree)
}

// TestRejected are the trees that the format cannot hold. Each error names the
// path.
func TestRejected(t *testing.T) {
	outside := file("x", "")
	folder := dir("d")
	long := strings.Repeat("n", 256)
	for _, c := range []struct {
		tree *Node
		want string
	}{
		{nil, "root must be a directory"},
		{file("", ""), "root must be a directory"},
		{root(file("a", ""), dir("a")), "/a: two entries"},
		{root(dir("d", file("b", ""), file("a", ""), file("b", ""))), "/d/b: two entries"},
		{root(file("", "")), "name"}, {root(file(".", "")), "name"}, {root(dir("d", file("..", ""))), `/d/..: an entry may not`},
		{root(file("a/b", "")), "slash"}, {root(file("a\x00", "")), "NUL"}, {root(file(long, "")), "256 bytes"},
		{root(&Node{Name: "a", Mode: 0o644}), "/a: mode 0644"}, {root(&Node{Name: "a", Mode: 0o300644}), "/a: mode"},
		{root(file("a", "", mtime(0, 1e9))), "nanoseconds"},
		{root(file("a", "", change(func(n *Node) { n.Children = []*Node{file("b", "")} }))), "only a directory"},
		{root(symlink("a", "")), "0 bytes"}, {root(symlink("a", strings.Repeat("x", 4096))), "4096 bytes"}, {root(symlink("a", "x\x00")), "NUL"},
		{root(ext("a", 1, strings.Repeat("x", 4096))), "payload"}, {root(ext("a", 1, "x\x00")), "payload"},
		{root(ext("a", 1, "x", digest(make([]byte, 20)))), "digest of 20"},
		{root(ext("a", 1<<53+1, "x")), "8 PiB"}, {root(special("a", modeFifo, 0, change(func(n *Node) { n.Size = 1 << 63 }))), "2^63"},
		{root(&Node{Name: "a", Mode: modeRegular, Size: 3, Content: []byte("ab")}), "content of 2"},
		{root(file("a", strings.Repeat("x", 5001))), "5001"},
		{root(file("a", "", xattr("", "v"))), "name of 0"}, {root(file("a", "", xattr("u\x00", "v"))), "NUL"}, {root(file("a", "", xattr(long, "v"))), "256"},
		{root(file("a", "", xattr("user.a", strings.Repeat("x", 65536)))), "65536"},
		{root(file("a", "", xattr("user.a", strings.Repeat("x", 32743)))), "32768"},
		{root(file("a", "", xattr("user.a", "1"), xattr("user.a", "2"))), `"user.a" twice`},
		{root(dir("d", special("w", modeChar, 0)), dir("d2", xattr("user.overlay.whiteouts", "x"))), ""}, // no whiteout in d2
		{root(special("w", modeChar, 0, xattr("user.overlay.whiteout", "longer than nothing, by more than its budget"))), "/w: the xattrs that composefs adds"},
		{root(hard("a", outside)), "/a: a hard link to a node that is not in the tree"},
		{root(folder, hard("l", folder)), "/l: a hard link to a directory"},
	} {
		var b bytes.Buffer
		err := Write(&b, c.tree, Options{})
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%v, want none", err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("got %v, want …%s…", err, c.want)
		case c.want != "" && b.Len() > 0:
			t.Errorf("%v, but %d bytes were written", err, b.Len())
		}
	}
	// The largest xattrs that fit.
	image(t, root(file("a", "", xattr("user.a", strings.Repeat("x", 32742)))), Options{})
}

// With LargeXattrs a node has as much as EROFS can hold, and the kernel, the
// reader and Load agree on it; images without such nodes stay as they are.
func TestLargeXattrs(t *testing.T) {
	large := Options{MinVersion: 1, LargeXattrs: true}
	if !bytes.Equal(image(t, sample(), large), image(t, sample(), Options{MinVersion: 1})) {
		t.Error("the option changes an image that does not need it")
	}
	full := func(last int) *Node {
		v := func(c string, n int) string { return strings.Repeat(c, n) }
		return root(file("a", "", xattr("user.a", v("a", 65535)), xattr("user.b", v("b", 65535)), xattr("trusted.c", v("c", 65535)),
			xattr("security.d", v("d", last))), dir("d", xattr("user.shared", v("s", 65535))), dir("e", xattr("user.shared", v("s", 65535))))
	}
	tree := full(60_000)
	img := image(t, tree, large)
	r := openImage(t, img)
	got, err := Load(r)
	if err != nil {
		t.Fatal(err)
	}
	sameTree(t, got, tree)
	sameAsKernel(t, r, mountImage(t, saved(t, img), "ro"), false)
	err = Write(io.Discard, full(65535), large)
	if err == nil || !strings.Contains(err.Error(), "at most 262148 are allowed") {
		t.Errorf("more than an inode can hold: %v", err)
	}
}

func TestWarn(t *testing.T) {
	var warned []string
	tree := root(dir("d", xattr("trusted.overlay.opaque", "y"), special("w", modeChar, 0)))
	image(t, tree, Options{MinVersion: 1, Warn: func(path, what string) { warned = append(warned, path+": "+what) }})
	if len(warned) != 1 || !strings.HasPrefix(warned[0], "/d: ") {
		t.Errorf("warned %q", warned)
	}
}

type fullDisk struct{ room int }

var errFull = errors.New("disk full")

func (d *fullDisk) Write(p []byte) (int, error) {
	if d.room -= len(p); d.room < 0 {
		return 0, errFull
	}
	return len(p), nil
}

func TestWriteFails(t *testing.T) {
	for _, room := range []int{0, 300 << 10} {
		if err := Write(&fullDisk{room}, synthetic(20000), Options{}); !errors.Is(err, errFull) {
			t.Errorf("with room for %d: %v", room, err)
		}
	}
}

func TestWriteFile(t *testing.T) {
	folder := t.TempDir()
	path := filepath.Join(folder, "image")
	if err := WriteFile(path, sample(), Options{}); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(got, image(t, sample(), Options{})) {
		t.Errorf("the file is not the image: %v", err)
	}
	if err := WriteFile(path, root(file("", "")), Options{}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a bad tree gives %v", err)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(got, now) {
		t.Errorf("a failed write changed the file: %v", err)
	}
	if list, err := os.ReadDir(folder); err != nil || len(list) != 1 {
		t.Errorf("litter: %v %v", list, err)
	}
}

// synthetic makes a tree of about n entries like a distribution's: files with
// objects of their own, some directories, links and labels.
func synthetic(n int) *Node {
	top := root()
	var d *Node
	var last *Node
	for i := range n {
		switch {
		case i%20 == 0:
			parent := top
			if i%60 != 0 {
				parent = d
			}
			d = dir(fmt.Sprintf("directory-%06d", i), xattr("security.selinux", "system_u:object_r:usr_t:s0"))
			parent.Children = append(parent.Children, d)
		case i%11 == 3:
			d.Children = append(d.Children, symlink(fmt.Sprintf("lib%07d.so", i), fmt.Sprintf("lib%07d.so.1.2.3", i)))
		case i%17 == 5 && last != nil:
			d.Children = append(d.Children, hard(fmt.Sprintf("hard-%07d", i), last))
		default:
			sum := make([]byte, 32)
			for k := range 8 {
				sum[k], sum[k+8] = byte(i>>(8*k)), byte(i*2654435761>>(8*k))
			}
			h := hex.EncodeToString(sum)
			last = &Node{Name: fmt.Sprintf("file-%07d.txt", i), Mode: modeRegular | 0o644, Nlink: 1, MtimeSec: 1000 + int64(i%1000), Size: uint64(i) + 1,
				Target: h[:2] + "/" + h[2:], Digest: sum, Xattrs: d.Xattrs}
			d.Children = append(d.Children, last)
		}
	}
	return top
}

// TestMemory holds Write to its promise on memory, garbage included: what it
// allocates in all is an upper bound of what it ever holds.
func TestMemory(t *testing.T) {
	const entries = 100000
	tree := synthetic(entries)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if err := Write(io.Discard, tree, Options{}); err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / entries; each > 200 {
		t.Errorf("%d bytes allocated for each entry, want at most 200", each)
	} else {
		t.Logf("%d bytes allocated for each entry", each)
	}
}

func BenchmarkWrite(b *testing.B) {
	for _, n := range []int{10000, 100000, 1000000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			if testing.Short() && n > 100000 {
				n = 100000
			}
			tree := synthetic(n)
			b.ReportAllocs()
			for b.Loop() {
				if err := Write(io.Discard, tree, Options{}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
		})
	}
}

// TestHugeFile is the one case in which a chunk map does not fit behind its
// inode: a block of holes, whose number shares a field with the chunk format.
func TestHugeFile(t *testing.T) {
	img := image(t, root(ext("f", 1<<53, "ab"), ext("g", 1<<53-1<<46, "cd")), Options{})
	r := openImage(t, img)
	if err := r.Check(); err != nil {
		t.Fatal(err)
	}
	f, g := at(t, r, "f"), at(t, r, "g")
	if u := le.Uint32(img[f.NID*slotSize+16:]); u != 31 || f.Size != 1<<53 {
		t.Errorf("chunk format %#x, size %d", u, f.Size)
	}
	if last := img[len(img)-blockSize:]; !bytes.Equal(last, holes[:]) {
		t.Error("the last block is not all holes")
	}
	if got := img[g.inlineOff : g.inlineOff+1016*4]; !bytes.Equal(got, holes[:len(got)]) {
		t.Error("a map of 1016 chunks is not behind its inode")
	}
	p := []byte{1}
	if n, err := r.ReadAt(f, p, 1<<53-1); n != 1 || err != nil || p[0] != 0 {
		t.Errorf("read %d, %v", n, err)
	}
}

// TestDeep writes and reads a tree deeper than any stack should be.
func TestDeep(t *testing.T) {
	const depth = 20000
	top := root()
	for d, k := top, 0; k < depth; k++ {
		next := dir("d")
		d.Children = []*Node{next}
		d = next
	}
	r := openImage(t, image(t, top, Options{}))
	if err := r.Check(); err != nil {
		t.Fatal(err)
	}
	back, err := Load(r)
	if err != nil {
		t.Fatal(err)
	}
	k := 0
	for d := back; len(d.Children) == 1; d = d.Children[0] {
		k++
	}
	if k != depth {
		t.Errorf("%d deep, want %d", k, depth)
	}
}

// TestSameLayout is what lets st_ino survive the swap of a lazy image for a
// sealed one: if the stand-ins for digests and payloads in the one are equal
// and unequal as those in the other, and as long, every inode has the same nid.
// One stand-in for all would not do: Write would share it.
func TestSameLayout(t *testing.T) {
	nids := func(stand func(i int) string) (list []uint64) {
		top := root()
		for i := range 3000 {
			content := i * 7919 % 2000 // half of them twice
			sum := fmt.Appendf(nil, "%032s", stand(content))
			h := hex.EncodeToString(sum)
			top.Children = append(top.Children, ext(fmt.Sprintf("file %d", i), 5, h[:2]+"/"+h[2:], digest(sum)))
		}
		r := openImage(t, image(t, top, Options{MinVersion: 1}))
		if err := r.Walk(func(path string, i Inode) error { list = append(list, i.NID); return nil }); err != nil {
			t.Fatal(err)
		}
		return list
	}
	lazy := nids(func(i int) string { return fmt.Sprint("content ", i) })
	sealed := nids(func(i int) string { return fmt.Sprint(1999-i, " verity") })
	if !slices.Equal(lazy, sealed) {
		t.Error("inodes moved")
	}
	if slices.Equal(lazy, nids(func(int) string { return "" })) {
		t.Error("one stand-in for all gives the same layout after all")
	}
}
