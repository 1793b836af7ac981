package erofs

import (
	"bytes"
	"cmp"
	"fmt"
	"slices"
	"strings"
	"testing"
)

// Trees of tests are described by these: dir("etc", file("passwd", "root…")).

// A change alters the node it is given to.
type change func(*Node)

func build(name string, mode uint32, parts []any) *Node {
	n := &Node{Name: name, Mode: mode, Nlink: 1, MtimeSec: 1000}
	for _, p := range parts {
		switch p := p.(type) {
		case *Node:
			n.Children = append(n.Children, p)
		case change:
			p(n)
		default:
			panic(fmt.Sprintf("%T in a tree", p))
		}
	}
	return n
}

func root(parts ...any) *Node             { return build("", modeDir|0o755, parts) }
func dir(name string, parts ...any) *Node { return build(name, modeDir|0o755, parts) }

// file is an inline file.
func file(name, content string, parts ...any) *Node {
	n := build(name, modeRegular|0o644, parts)
	n.Size, n.Content = uint64(len(content)), []byte(content)
	return n
}

// ext is an external file with a payload and a SHA-256 digest made from it.
func ext(name string, size uint64, payload string, parts ...any) *Node {
	object := change(func(n *Node) {
		n.Size, n.Target = size, payload
		n.Digest = bytes.Repeat([]byte(payload + "x")[:1], 32)
	})
	return build(name, modeRegular|0o644, append([]any{object}, parts...))
}

func symlink(name, target string, parts ...any) *Node {
	n := build(name, modeSymlink|0o777, parts)
	n.Target = target
	return n
}

// special is anything else, by type bits and device.
func special(name string, typ, rdev uint32, parts ...any) *Node {
	n := build(name, typ|0o600, parts)
	n.Rdev = rdev
	return n
}

// hard is a further name of to.
func hard(name string, to *Node) *Node { return &Node{Name: name, Link: to} }

func xattr(name, value string) change {
	return func(n *Node) { n.Xattrs = append(n.Xattrs, Xattr{name, []byte(value)}) }
}
func mode(m uint32) change { return func(n *Node) { n.Mode = n.Mode&modeType | m } }
func owner(u, g uint32) change {
	return func(n *Node) { n.UID, n.GID = u, g }
}
func mtime(s int64, ns uint32) change { return func(n *Node) { n.MtimeSec, n.MtimeNsec = s, ns } }
func nlink(k uint32) change           { return func(n *Node) { n.Nlink = k } }
func digest(d []byte) change          { return func(n *Node) { n.Digest = d } }

// sample is a tree with some of everything.
func sample() *Node {
	shared := file("shared", "linked twice\n", nlink(2))
	var many []any
	for i := range 600 {
		many = append(many, file(fmt.Sprintf("entry-%04d-%s", i, strings.Repeat("x", i%40)), ""))
	}
	return root(xattr("security.selinux", "system_u:object_r:root_t:s0\x00"),
		dir("bin", ext("sh", 123456, "ab/cdef", mode(0o4755), xattr("security.capability", "\x01\x00\x00\x02\x00\x04"+strings.Repeat("\x00", 14))), symlink("bash", "sh")),
		dir("dev", special("null", modeChar, 1<<8|3), special("sda", modeBlock, 8<<8|1|1<<20), special("log", modeSocket, 0), special("pipe", modeFifo, 0)),
		dir("empty", mtime(-5, 999999999)),
		dir("etc", file("hostname", "box\n", owner(70000, 80000)), file("inline", strings.Repeat("0123456789", 123)),
			file("block", strings.Repeat("b", 3000)), file("largest", strings.Repeat("0123456789abcdef", 312)+"12345678"), shared),
		dir("many", many...),
		dir("usr", dir("share", hard("again", shared), symlink("long", strings.Repeat("/far", 1000)), symlink("up", "../../etc")), xattr("user.note", "x=y")),
		dir("wh", special("gone", modeChar, 0), file("kept", "here"), xattr("trusted.overlay.opaque", "y")),
		file("zero", ""), ext("huge", 1<<40, "99/aa", mtime(1<<33, 5)), ext("unknown", 7, "", digest(nil)),
		file("xattrs", "x", xattr("user.a", "1"), xattr("user.b", strings.Repeat("v", 3000)), xattr("trusted.overlay.origin", "o"), xattr("odd", "index 0"), xattr("lustre.x", "y")),
	)
}

// describe puts a tree into lines, one an entry, for comparing. Nodes compare
// as Write takes them: order of children and xattrs does not count, nor do
// fields that the format has no place for.
func describe(n *Node) string {
	var b strings.Builder
	names := map[*Node]string{}
	var visit func(path string, n *Node)
	visit = func(path string, n *Node) {
		if n.Link != nil {
			n = n.Link
		}
		if first, ok := names[n]; ok {
			fmt.Fprintf(&b, "%q = %q\n", path, first)
			return
		}
		names[n] = path
		fmt.Fprintf(&b, "%q %o %d:%d %d.%09d", path, n.Mode, n.UID, n.GID, n.MtimeSec, n.MtimeNsec)
		typ := fileType(n.Mode)
		if typ != TypeDir {
			fmt.Fprintf(&b, " links %d", n.Nlink)
		}
		switch {
		case typ == TypeSymlink:
			fmt.Fprintf(&b, " -> %q", n.Target)
		case typ == TypeChar || typ == TypeBlock:
			fmt.Fprintf(&b, " rdev %#x", n.Rdev)
		case typ == TypeRegular && n.Size > 0 && n.Content != nil:
			fmt.Fprintf(&b, " %q", n.Content)
		case typ == TypeRegular && n.Size > 0:
			fmt.Fprintf(&b, " %d bytes in %q %x", n.Size, n.Target, n.Digest)
		}
		xattrs := slices.Clone(n.Xattrs)
		slices.SortFunc(xattrs, func(x, y Xattr) int { return cmp.Compare(x.Name, y.Name) })
		for _, x := range xattrs {
			fmt.Fprintf(&b, " %q=%q", x.Name, x.Value)
		}
		b.WriteByte('\n')
		children := slices.Clone(n.Children)
		slices.SortFunc(children, func(x, y *Node) int { return cmp.Compare(x.Name, y.Name) })
		for _, c := range children {
			visit(path+"/"+c.Name, c)
		}
	}
	visit("", n)
	return b.String()
}

// sameTree fails the test at the first line in which two trees differ.
func sameTree(t *testing.T, got, want *Node) {
	t.Helper()
	g, w := strings.Split(describe(got), "\n"), strings.Split(describe(want), "\n")
	for i := range max(len(g), len(w)) {
		if i >= len(g) || i >= len(w) || g[i] != w[i] {
			t.Fatalf("trees differ in line %d:\n got %.500s\nwant %.500s", i+1, strings.Join(g[min(i, len(g)):min(i+1, len(g))], ""), strings.Join(w[min(i, len(w)):min(i+1, len(w))], ""))
		}
	}
}

// openImage opens an image in memory.
func openImage(t testing.TB, b []byte) *Reader {
	t.Helper()
	r, err := OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// at returns the inode of a path.
func at(t testing.TB, r *Reader, path string) Inode {
	t.Helper()
	i, err := imageFS{r}.resolve("stat", cmp.Or(path, "."), false)
	if err != nil {
		t.Fatal(err)
	}
	return i
}
