package image

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// A layer in a few words, blanks between them:
//
//	d/       a directory            f=text   a file
//	s->x     a symbolic link to x   h=>x     a hard link to x
//	c%1:3    a character device     p|       a fifo
//	d/!o     a directory with trusted.overlay.opaque=y
//
// Every entry has its place in the layer as its time, so that it is seen whose
// metadata counts.
func layerOf(words string) Layer {
	x := &toc.TOC{Format: toc.EStargz, Compression: toc.Gzip}
	off := int64(100)
	for i, word := range strings.Fields(words) {
		e := toc.Entry{Mode: 0o644, MtimeSec: int64(i)}
		if name, content, ok := strings.Cut(word, "=>"); ok {
			e.Name, e.Type, e.Linkname = name, toc.Hardlink, content
		} else if name, content, ok := strings.Cut(word, "->"); ok {
			e.Name, e.Type, e.Linkname = name, toc.Symlink, content
		} else if name, content, ok := strings.Cut(word, "="); ok {
			e.Name, e.Type = name, toc.Reg
			if e.Size = int64(len(content)); e.Size > 0 {
				e.Digest = sha256.Sum256([]byte(content))
				e.Chunks = []toc.Chunk{{BlobOffset: off, BlobEnd: off + 10, Size: e.Size, Digest: e.Digest}}
				off += 10
			}
		} else if name, dev, ok := strings.Cut(word, "%"); ok {
			e.Name, e.Type = name, toc.Char
			fmt.Sscanf(dev, "%d:%d", &e.DevMajor, &e.DevMinor)
		} else if name, ok := strings.CutSuffix(word, "|"); ok {
			e.Name, e.Type = name, toc.Fifo
		} else if name, ok := strings.CutSuffix(word, "/!o"); ok {
			e.Name, e.Type, e.Mode = name, toc.Dir, 0o711
			e.Xattrs = []toc.Xattr{{Name: "trusted.overlay.opaque", Value: []byte("y")}}
		} else if strings.HasSuffix(word, "/") || word == "." {
			e.Name, e.Type, e.Mode = word, toc.Dir, 0o711
		} else {
			e.Name, e.Type = word, toc.Reg
		}
		x.Entries = append(x.Entries, e)
	}
	return Layer{Digest: sha256.Sum256([]byte(words)), Size: 1 << 40, TOC: x}
}

func layersOf(words []string) []Layer {
	var layers []Layer
	for _, w := range words {
		layers = append(layers, layerOf(w))
	}
	return layers
}

// describe writes a tree in the language of layerOf, names in order, each with
// "@layer", hard links by their first name. Directories without an entry have
// a question mark.
func describe(t *Tree) string {
	var words []string
	paths := map[*Node]string{}
	var walk func(prefix string, n *Node)
	walk = func(prefix string, n *Node) {
		for _, c := range n.Children {
			p := prefix + c.Name
			paths[c] = p
			w := ""
			switch c.Mode & ModeFmt {
			case ModeDir:
				if w = "/"; c.Mode&0o777 == 0o755 {
					w = "/?"
				}
			case ModeReg:
				w = fmt.Sprintf("=%d", c.Size)
			case ModeSymlink:
				w = "->" + c.Target
			case ModeChar:
				w = fmt.Sprintf("%%%d:%d", c.Rdev>>8, c.Rdev&0xff)
			case ModeFifo:
				w = "|"
			}
			if c.Link != nil {
				w = "=>" + paths[c.Link]
			} else {
				w += fmt.Sprintf("@%d", c.Layer)
			}
			words = append(words, p+w)
			walk(p+"/", c)
		}
	}
	walk("", t.Root)
	return strings.Join(words, " ")
}

func TestMerge(t *testing.T) {
	for _, c := range []struct {
		name   string
		layers []string
		want   string // or "error: …"
	}{
		{"nothing", nil, ""},
		{"an empty layer", []string{""}, ""},
		{"one layer", []string{"a/ a/f=xyz b->a c%1:3 p| e"}, "a/@0 a/f=3@0 b->a@0 c%1:3@0 e=0@0 p|@0"},
		{"names in byte order", []string{"b a B é ab a.b a/"}, "B=0@0 a/@0 a.b=0@0 ab=0@0 b=0@0 é=0@0"},
		{"./ before names, / after", []string{"./ ./a/ ./a/f=x a//"}, "a/@0 a/f=1@0"},
		{". between names", []string{"a/./f=x"}, "a/?@0 a/f=1@0"},

		{"directories merge", []string{"a/ a/x=1", "a/ a/y=22"}, "a/@1 a/x=1@0 a/y=2@1"},
		{"implicit directory keeps the lower one's metadata", []string{"a/ a/x=1", "a/y=22"}, "a/@0 a/x=1@0 a/y=2@1"},
		{"implicit directory", []string{"", "a/b/c=1"}, "a/?@1 a/b/?@1 a/b/c=1@1"},
		{"implicit directory, entry later", []string{"a/b=1 a/"}, "a/@0 a/b=1@0"},
		{"entry later in another layer", []string{"a/b=1", "a/"}, "a/@1 a/b=1@0"},
		{"file over file", []string{"a=1", "a=22"}, "a=2@1"},
		{"file over directory", []string{"a/ a/x=1", "a=22"}, "a=2@1"},
		{"directory over file", []string{"a=1", "a/ a/x=22"}, "a/@1 a/x=2@1"},
		{"directory over symlink", []string{"b/ b/y a->b", "a/ a/x=22"}, "a/@1 a/x=2@1 b/@0 b/y=0@0"},
		{"symlink over directory", []string{"a/ a/x=1", "a->x"}, "a->x@1"},
		{"file, directory, file", []string{"a=1", "a/ a/b=1", "a=333"}, "a=3@2"},

		{"the last of a path counts", []string{"a=1 a=22 b->x a=333 b=1"}, "a=3@0 b=1@0"},
		{"the last of a directory counts, children stay", []string{"a/ a/x=1 a/"}, "a/@0 a/x=1@0"},
		{"directory, then file", []string{"a/ a/x=1 a=22"}, "a=2@0"},
		{"file, then directory", []string{"a=1 a/ a/x=22"}, "a/@0 a/x=2@0"},

		{"whiteout", []string{"a=1 b/ b/c=1 b/d=1", ".wh.a b/.wh.c"}, "b/@0 b/d=1@0"},
		{"whiteout of a directory", []string{"b/ b/c=1", ".wh.b"}, ""},
		{"whiteout of nothing", []string{"b/", ".wh.a x/y/.wh.a b/.wh.c"}, "b/@0"},
		{"whiteout in the lowest layer", []string{".wh.a b/.wh.c"}, ""},
		{"whiteout spares its own layer, before", []string{"a=1", "a=22 .wh.a"}, "a=2@1"},
		{"whiteout spares its own layer, after", []string{"a=1", ".wh.a a=22"}, "a=2@1"},
		{"whiteout and directory: nothing merges", []string{"a/ a/x=1", ".wh.a a/ a/y=22"}, "a/@1 a/y=2@1"},
		{"whiteout and implicit directory: nothing merges", []string{"a/ a/x=1", ".wh.a a/y=22"}, "a/?@1 a/y=2@1"},
		{"whiteout of a file, implicit directory in its place", []string{"a=1", ".wh.a a/y=22"}, "a/?@1 a/y=2@1"},
		{"whiteout in a directory that was a file in between", []string{"a/ a/x=1 a/y=1", "a/.wh.x a=1 a/"}, "a/@1 a/y=1@0"},
		{"whiteout by 0:0", []string{"a=1 b/ b/c=1", "a%0:0 b/c%0:0"}, "b/@0"},
		{"whiteout by 0:0 spares its own layer", []string{"a=1", "a=22 a%0:0"}, "a=2@1"},
		{"whiteout, then again a file", []string{"a=1", ".wh.a", "a=333"}, "a=3@2"},
		{"hidden in one layer, not in the next", []string{"a/ a/x=1", "a/ a/.wh.x", "a/ a/x=333"}, "a/@2 a/x=3@2"},
		{"opaque", []string{"a/ a/x=1 a/y/ b=1", "a/ a/.wh..wh..opq a/z=22"}, "a/@1 a/z=2@1 b=1@0"},
		{"opaque spares its own layer", []string{"a/ a/x=1", "a/ a/x=22 a/.wh..wh..opq"}, "a/@1 a/x=2@1"},
		{"opaque, without an entry", []string{"a/ a/x=1", "a/.wh..wh..opq"}, "a/@0"},
		{"opaque without a directory below", []string{"b", "a/.wh..wh..opq"}, "b=0@0"},
		{"opaque root", []string{"a/ a/x=1 b=1", ".wh..wh..opq c=1"}, "c=1@1"},
		{"opaque by attribute", []string{"a/ a/x=1", "a/!o a/y=22"}, "a/@1 a/y=2@1"},
		{"opaque by attribute, taken back", []string{"a/ a/x=1", "a/!o a/y=22 a/"}, "a/@1 a/x=1@0 a/y=2@1"},
		{"what aufs keeps", []string{".wh..wh.plnk/ .wh..wh.plnk/1.2=x .wh..wh.aufs a/.wh..wh.orph/x b=1"}, "b=1@0"},
		{"whiteout of a name that begins with a dot", []string{".a=1 ..a=1", ".wh..a .wh...a"}, ""},
		{"whiteout below a whited-out file", []string{"a=1", ".wh.a a/.wh.x b=1"}, "b=1@1"},

		{"hard link", []string{"a=1 b=>a c=>b"}, "a=1@0 b=>a c=>a"},
		{"hard link, the first name in order is the file", []string{"z=1 b=>z"}, "b=1@0 z=>b"},
		{"hard link to a symlink", []string{"a->x b=>a"}, "a->x@0 b=>a"},
		{"hard link to a device", []string{"a%1:3 b=>a"}, "a%1:3@0 b=>a"},
		{"hard link over a file", []string{"a=1 b=22 b=>a"}, "a=1@0 b=>a"},
		{"hard link to a target replaced later", []string{"a=1 b=>a a=22"}, "a=2@0 b=1@0"},
		{"hard link to a target replaced before", []string{"a=1 a=22 b=>a"}, "a=2@0 b=>a"},
		{"hard link to the layer below", []string{"a=1", "b=>a"}, "a=1@0 b=>a"},
		{"hard link to the layer below, target replaced later", []string{"a=1", "b=>a a=22"}, "a=2@1 b=1@0"},
		{"hard link to the layer below, target replaced before", []string{"a=1", "a=22 b=>a"}, "a=2@1 b=>a"},
		{"hard link to the layer below, target hidden", []string{"a=1", "b=>a .wh.a"}, "b=1@0"},
		{"hard link to the layer below, target removed in the next", []string{"a=1", "b=>a", ".wh.a"}, "b=1@0"},
		{"hard link whose target is replaced in the next layer", []string{"a=1 b=>a", "a=22"}, "a=2@1 b=1@0"},
		{"hard link to what comes later", []string{"b=>a a=1"}, "a=1@0 b=>a"},
		{"hard links to hard links that come later", []string{"d=>c c=>b b=>a a=1"}, "a=1@0 b=>a c=>a d=>a"},
		{"hard links to one that waits", []string{"b=>a c=>b a=1"}, "a=1@0 b=>a c=>a"},
		{"hard link to what is below and comes later", []string{"a=1", "b=>a a=22"}, "a=2@1 b=1@0"},
		{"hard link with ./", []string{"d/ d/a=1 ./b=>./d/./a"}, "b=1@0 d/@0 d/a=>b"},
		{"hard link to its name in the layer", []string{"a=1 b=>a a=>b"}, "a=1@0 b=>a"},
		{"hard link over a directory", []string{"a=1 d/ d/x d=>a"}, "a=1@0 d=>a"},

		{"hard link to nothing", []string{"b=>a"}, "error: layer 0 b: hard link to nothing"},
		{"hard link to nothing in two layers", []string{"x", "b=>a"}, "error: layer 1 b: hard link to nothing"},
		{"hard link through a file", []string{"a=1 b=>a/c"}, "error: layer 0 b: hard link to nothing"},
		{"hard link through a file below", []string{"a=1", "b=>a/c"}, "error: layer 1 b: hard link to nothing"},
		{"hard link through a file above", []string{"a/ a/c=1", "a=1 b=>a/c"}, "error: layer 1 b: hard link to nothing"},
		{"hard link through a symlink", []string{"d/ d/f=1 s->d b=>s/f"}, "error: layer 0 b: hard link to nothing"},
		{"hard link to a whiteout", []string{".wh.a b=>.wh.a"}, "error: layer 0 b: hard link to nothing"},
		{"hard link to itself", []string{"a=>a"}, "error: layer 0 a: hard link to itself"},
		{"hard link to itself over a file", []string{"a=1 a=>./a"}, "error: layer 0 a: hard link to itself"},
		{"hard link to itself over a file below", []string{"a=1", "a=>a"}, "error: layer 1 a: hard link to itself"},
		{"hard links in a circle", []string{"a=>b b=>a"}, "error: layer 0 a: hard link to itself"},
		{"hard links in a circle of three", []string{"a=>b b=>c c=>a"}, "error: layer 0 b: hard link to itself"},
		{"hard link to a directory", []string{"a/ b=>a"}, "error: layer 0 b: hard link to the directory"},
		{"hard link to a directory with slash", []string{"a=1 b=>a/"}, "error: layer 0 b: hard link to the directory"},
		{"hard link to a directory below", []string{"a/", "b=>a"}, "error: layer 1 b: hard link to the directory"},
		{"hard link to a directory that comes later", []string{"b=>a a/"}, "error: layer 0 b: hard link to the directory"},
		{"hard link to the root", []string{"b=>."}, "error: layer 0 b: hard link to the directory"},
		{"hard link that leaves the tree", []string{"b=>../a"}, "error: layer 0 b: hard link"},
		{"hard link to an absolute path", []string{"a=1 b=>/a"}, "error: layer 0 b: hard link"},

		{"absolute", []string{"/a=1"}, "error: layer 0 /a: the path is absolute"},
		{"the root as kaniko names it", []string{"/ a=1"}, "a=1@0"},
		{"..", []string{"a/../../b=1"}, `error: layer 0 a/../../b: the path has a part ".."`},
		{".. alone", []string{"../"}, `error: layer 0 ../: the path has a part ".."`},
		{"empty part", []string{"a//b=1"}, "error: layer 0 a//b: the path has an empty part"},
		{"slash after a file", []string{"a/=1"}, "error: layer 0 a/: the path of a reg ends in a slash"},
		{"root as a file", []string{".=1"}, "error: layer 0 .: the root is a directory"},
		{"through a symlink", []string{"s->d s/f=1"}, `error: layer 0 s/f: "s" is no directory`},
		{"through a symlink below", []string{"d/ s->d", "s/f=1"}, "error: layer 1 s/f: a directory on its path"},
		{"through a symlink below, deeper", []string{"d/ a/ a/s->d", "a/s/x/y/f=1"}, "error: layer 1 a/s/x/y/f: a directory on its path"},
		{"through a file", []string{"a=1 a/f=1"}, `error: layer 0 a/f: "a" is no directory`},
		{"through a file below", []string{"a=1", "a/f=1"}, "error: layer 1 a/f: a directory on its path"},
		{"whiteout below a directory that became a symlink", []string{"s/ s/f=1", "s->d s/.wh.f"}, "s->d@1"},
		{"whiteout below a directory that became a file", []string{"a/ a/f=1", "a/.wh.f a=2"}, "a=1@1"},
		{"the same in the other order", []string{"a/ a/f=1", "a=2 a/.wh.f"}, "a=1@1"},
		{"whiteout through a symlink below", []string{"d/ d/f s->d", "s/.wh.f"}, "error: layer 1 s/.wh.f: a directory on its path"},
		{"whiteout through a file below", []string{"a=1 b=2", "a/.wh.f a/b/.wh.g c=3"}, "a=1@0 b=1@0 c=1@1"},
		{"first by name of what is wrong", []string{"z=1 s=1 b=1", "z/a s/b b/z"}, "error: layer 1 b/z: a directory on its path"},
		{"below a whiteout", []string{".wh.a/b=1"}, "error: layer 0 .wh.a/b: a file below the whiteout"},
		{"whiteout of nothing by name", []string{".wh."}, `error: layer 0 .wh.: a whiteout of ""`},
		{"whiteout of .", []string{"a/.wh.."}, `error: layer 0 a/.wh..: a whiteout of "."`},
		{"whiteout of ..", []string{"a/.wh..."}, `error: layer 0 a/.wh...: a whiteout of ".."`},
		{"empty symlink", []string{"s->"}, "error: layer 0 s: a symbolic link's target"},
	} {
		t.Run(c.name, func(t *testing.T) {
			layers := layersOf(c.layers)
			x, err := Merge(layers)
			got := ""
			if err == nil {
				got = describe(x)
				checkTree(t, x, layers)
			} else if e, ok := errors.AsType[*EntryError](err); !ok || e.LayerDigest != layers[e.Layer].Digest {
				t.Fatalf("not a proper EntryError: %v", err)
			} else {
				got = fmt.Sprintf("error: layer %d %s: %v", e.Layer, e.Entry, e.Err)
			}
			if c.want != got && !(strings.HasPrefix(c.want, "error: ") && strings.HasPrefix(got, c.want)) {
				t.Errorf("%q\n got %s\nwant %s", c.layers, got, c.want)
			}
		})
	}
}

// checkTree checks what Merge promises of every tree.
func checkTree(t testing.TB, x *Tree, layers []Layer) {
	t.Helper()
	names := map[*Node]uint32{}
	count := Tree{Root: x.Root, Names: 1}
	var walk func(n *Node, depth int)
	walk = func(n *Node, depth int) {
		count.Dirs++
		subdirs := uint32(0)
		if !n.IsDir() || n.Link != nil || depth > maxPath {
			t.Fatalf("node %+v at depth %d", n, depth)
		}
		for i, c := range n.Children {
			count.Names++
			if c.Name == "" || c.Name == "." || c.Name == ".." || strings.ContainsAny(c.Name, "/\x00") ||
				len(c.Name) > maxName || strings.HasPrefix(c.Name, whiteout) {
				t.Fatalf("a file called %q", c.Name)
			}
			if i > 0 && n.Children[i-1].Name >= c.Name {
				t.Fatalf("%q follows %q", c.Name, n.Children[i-1].Name)
			}
			if c.Link != nil {
				if names[c.Link] == 0 || c.Link.IsDir() || c.Mode != 0 || c.Chunks != nil || c.Children != nil {
					t.Fatalf("link %+v", c)
				}
				names[c.Link]++
				continue
			}
			if c.Layer < 0 || c.Layer >= len(layers) || c.Mode&^(ModeFmt|0o7777) != 0 {
				t.Fatalf("node %+v", c)
			}
			if c.IsDir() {
				subdirs++
				walk(c, depth+1)
				continue
			}
			names[c]++
			switch c.Mode & ModeFmt {
			case ModeReg:
				count.Files++
				count.Bytes += c.Size
				covered := int64(0)
				for _, ch := range c.Chunks {
					covered += ch.Size
				}
				if covered != c.Size || c.Content.IsZero() != (c.Size == 0) {
					t.Fatalf("%q: %d bytes, its chunks have %d, its digest is %s", c.Name, c.Size, covered, c.Content)
				}
			case ModeSymlink:
				if c.Target == "" || c.Size != int64(len(c.Target)) {
					t.Fatalf("symlink %+v", c)
				}
			case ModeChar:
				if c.Rdev == 0 {
					t.Fatalf("a whiteout is in the tree: %+v", c)
				}
			case ModeFifo, ModeBlock:
			default:
				t.Fatalf("node %+v", c)
			}
		}
		if n.Nlink != 2+subdirs {
			t.Fatalf("directory %q has %d links, %d subdirectories", n.Name, n.Nlink, subdirs)
		}
	}
	walk(x.Root, 0)
	for n, k := range names {
		if n.Nlink != k {
			t.Fatalf("%q has %d links, %d names", n.Name, n.Nlink, k)
		}
	}
	if *x != count {
		t.Fatalf("counts are %+v, want %+v", *x, count)
	}
}

func mergeEntries(t testing.TB, layers ...[]toc.Entry) (*Tree, []Layer, error) {
	t.Helper()
	var ls []Layer
	for i, es := range layers {
		ls = append(ls, Layer{Digest: Digest{byte(i + 1)}, Size: 1 << 40, TOC: &toc.TOC{Compression: toc.Zstd, Entries: es}})
	}
	x, err := Merge(ls)
	if err == nil {
		checkTree(t, x, ls)
	}
	return x, ls, err
}

func TestMergeMetadata(t *testing.T) {
	x, _, err := mergeEntries(t, []toc.Entry{
		{Name: "./", Type: toc.Dir, Mode: 0o1777, UID: 1, GID: 2, MtimeSec: -3, MtimeNsec: 4, Xattrs: []toc.Xattr{{Name: "user.r", Value: []byte{0}}}},
		{Name: "setuid", Type: toc.Reg, Mode: 0o106755, UID: 4294967294, MtimeSec: 1, MtimeNsec: 999999999},
		{Name: "huge", Type: toc.Reg, Mode: 0o600, Size: 5 << 40, Digest: Digest{1}, Chunks: []toc.Chunk{{Size: 5 << 40, Zero: true}}},
		{Name: "link", Type: toc.Symlink, Mode: 0o600, Linkname: strings.Repeat("x", 4095)},
		{Name: "char", Type: toc.Char, Mode: 0o666, DevMajor: 1, DevMinor: 3},
		{Name: "block", Type: toc.Block, Mode: 0o660, DevMajor: 4095, DevMinor: 1<<20 - 1},
		{Name: "sda259", Type: toc.Block, Mode: 0o660, DevMajor: 259, DevMinor: 65537},
		{Name: "zero block", Type: toc.Block, Mode: 0o660},
		{Name: "fifo", Type: toc.Fifo, Mode: 0o622},
		{Name: "new\nline", Type: toc.Reg}, {Name: "\xff\xfe", Type: toc.Reg}, {Name: strings.Repeat("n", 255), Type: toc.Reg},
		{Name: "xattrs", Type: toc.Reg, Xattrs: []toc.Xattr{
			{Name: "security.capability", Value: []byte("\x01\x00\x00\x02\x00")},
			{Name: "system.posix_acl_access", Value: []byte("\x02\x00\x00\x00")},
			{Name: "trusted.overlay.metacopy"}, {Name: "trusted.overlay.overlay.opaque", Value: []byte("y")},
			{Name: "trusted.overlay.overlay.overlay.x", Value: []byte("z")},
			{Name: "trusted.overlayed", Value: []byte("k")}, {Name: "trusted.p", Value: []byte("q")},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	show := func(n *Node) {
		target := n.Target
		if len(target) > 10 {
			target = "long"
		}
		got = append(got, fmt.Sprintf("%.10q %o %d %d %d %x %d.%d %d %s %q", n.Name, n.Mode, n.UID, n.GID, n.Nlink, n.Rdev, n.MtimeSec, n.MtimeNsec, n.Size, target, n.Xattrs))
	}
	show(x.Root)
	for _, c := range x.Root.Children {
		show(c)
	}
	want := []string{
		`"" 41777 1 2 2 0 -3.4 0  [{"user.r" "\x00"}]`,
		`"block" 60660 0 0 1 ffffffff 0.0 0  []`,
		`"char" 20666 0 0 1 103 0.0 0  []`,
		`"fifo" 10622 0 0 1 0 0.0 0  []`,
		`"huge" 100600 0 0 1 0 0.0 5497558138880  []`,
		`"link" 120777 0 0 1 0 0.0 4095 long []`,
		`"new\nline" 100000 0 0 1 0 0.0 0  []`,
		`"nnnnnnnnnn" 100000 0 0 1 0 0.0 0  []`,
		`"sda259" 60660 0 0 1 10010301 0.0 0  []`,
		`"setuid" 106755 4294967294 0 1 0 1.999999999 0  []`,
		`"xattrs" 100000 0 0 1 0 0.0 0  [{"security.capability" "\x01\x00\x00\x02\x00"} {"system.posix_acl_access" "\x02\x00\x00\x00"} ` +
			`{"trusted.overlay.opaque" "y"} {"trusted.overlay.overlay.x" "z"} {"trusted.overlayed" "k"} {"trusted.p" "q"}]`,
		`"zero block" 60660 0 0 1 0 0.0 0  []`,
		`"\xff\xfe" 100000 0 0 1 0 0.0 0  []`,
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestMergeNames(t *testing.T) {
	long := strings.Repeat("n", 256)
	deep := strings.Repeat("d/", 2047)
	for _, c := range []struct {
		e    toc.Entry
		want string
	}{
		{toc.Entry{Name: long, Type: toc.Reg}, "a name of 256 bytes"},
		{toc.Entry{Name: "a/" + long + "/b", Type: toc.Reg}, "a name of 256 bytes"},
		{toc.Entry{Name: "a\x00b", Type: toc.Reg}, "NUL"},
		{toc.Entry{Name: deep + "ff", Type: toc.Reg}, ""},
		{toc.Entry{Name: deep + "fff", Type: toc.Reg}, "4097 bytes"},
		{toc.Entry{Name: "s", Type: toc.Symlink, Linkname: strings.Repeat("x", 4096)}, "4096"},
		{toc.Entry{Name: "s", Type: toc.Symlink, Linkname: "a\x00b"}, "NUL"},
		{toc.Entry{Name: "h", Type: toc.Hardlink, Linkname: strings.Repeat("x", 5000)}, "5000 bytes"},
		{toc.Entry{Name: "h", Type: toc.Hardlink, Linkname: "a\x00b"}, "NUL"},
		{toc.Entry{Name: "h", Type: toc.Hardlink}, "directory"},
		{toc.Entry{Name: "u"}, "unknown type"},
		{toc.Entry{Name: "", Type: toc.Dir}, ""},
		{toc.Entry{Name: "", Type: toc.Reg}, "the root is a directory"},
	} {
		_, _, err := mergeEntries(t, []toc.Entry{c.e})
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.20q: got %.300v, want %q", c.e.Name, err, c.want)
		}
	}
}

// Layers and large directories cost linear time.
func TestMergeLarge(t *testing.T) {
	const layers, dir, links = 200, 300_000, 20_000
	start := time.Now()
	all := make([][]toc.Entry, layers)
	for i := range dir {
		all[0] = append(all[0], toc.Entry{Name: fmt.Sprintf("d/%06d", i), Type: toc.Reg})
	}
	for i := range links { // each waits for the one after it
		all[1] = append(all[1], toc.Entry{Name: fmt.Sprintf("l/%06d", i), Type: toc.Hardlink, Linkname: fmt.Sprintf("l/%06d", i+1)})
	}
	all[1] = append(all[1], toc.Entry{Name: fmt.Sprintf("l/%06d", links), Type: toc.Reg})
	for i := 2; i < layers; i++ {
		all[i] = []toc.Entry{{Name: fmt.Sprintf("d/.wh.%06d", i), Type: toc.Reg}, {Name: fmt.Sprintf("d/new%d", i), Type: toc.Reg}}
	}
	x, _, err := mergeEntries(t, all...)
	if err != nil {
		t.Fatal(err)
	}
	if got := len(x.Root.Children[0].Children); got != dir {
		t.Errorf("%d names in the directory", got)
	}
	if n := x.Root.Children[1].Children[0].Nlink; n != links+1 {
		t.Errorf("%d links", n)
	}
	// A few hundred ms; anything quadratic takes hours.
	if took := time.Since(start); took > time.Minute {
		t.Errorf("it took %v", took)
	}
}

// Paths that share nothing and name thousands of directories each, and layers
// that replace one another's files, end with an error before they take all
// memory.
func TestMergeLimit(t *testing.T) {
	const limit = 10_000
	deep := strings.Repeat("d/", 1000) + "f"
	for name, layer := range map[string]func(i int) Layer{
		"directories": func(i int) Layer { return layerOf(fmt.Sprintf("%d/%s", i, deep)) },
		"ghosts":      func(i int) Layer { return layerOf(fmt.Sprintf("%d/%s/.wh.x", i, deep)) },
		"links": func(i int) Layer {
			return layerOf(strings.Repeat(fmt.Sprintf("a=>b%d ", i), 999) + fmt.Sprintf("b%d=1", i))
		},
		"files": func(i int) Layer { return layerOf(strings.Repeat("a=1 ", 1000)) },
	} {
		var layers []Layer
		for i := range 9 {
			layers = append(layers, layer(i))
		}
		if _, err := merge(layers, limit); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		_, err := merge(append(layers, layer(9), layer(10)), limit)
		if _, ok := errors.AsType[*EntryError](err); !ok || !strings.Contains(err.Error(), "more than 10000 files") {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

// Three layers of 15,000 entries each.
func BenchmarkMerge(b *testing.B) {
	var layers []Layer
	for l := range 3 {
		x := &toc.TOC{}
		for i := range 15_000 {
			x.Entries = append(x.Entries, toc.Entry{Name: fmt.Sprintf("usr/lib/go/src/package%d/file%d.go", i/40, i+l*10_000), Type: toc.Reg})
		}
		layers = append(layers, Layer{TOC: x})
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Merge(layers); err != nil {
			b.Fatal(err)
		}
	}
}
