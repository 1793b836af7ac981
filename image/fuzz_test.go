package image

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// wordsOf turns fuzz bytes into layers in the language of layerOf: two or three
// bytes a word, few names, so that they meet.
func wordsOf(b []byte) []string {
	layers := [][]string{nil}
	pop := func() byte {
		if len(b) == 0 {
			return 0
		}
		c := b[0]
		b = b[1:]
		return c
	}
	names := []string{"a", "b", "c", "d", "a", "b", ".", ".."}
	aPath := func() string {
		c := pop()
		parts := []string{names[c&3]}
		if c&0x04 != 0 {
			parts = append(parts, names[c>>3&3])
			if c&0x20 != 0 {
				parts = append(parts, names[c>>6&3])
			}
		} else if c == 0xf8 {
			parts[0] = names[pop()&7]
		}
		return strings.Join(parts, "/")
	}
	for len(b) > 0 && len(layers) < 50 {
		word := ""
		switch pop() % 16 {
		case 0:
			layers = append(layers, nil)
			continue
		case 1, 2, 3:
			word = aPath() + "/"
		case 4, 5, 6:
			word = aPath() + "=" + strings.Repeat("x", int(pop()&3))
		case 7, 8:
			word = aPath() + "=>" + aPath()
		case 9:
			word = aPath() + "->" + aPath()
		case 10, 11:
			dir, base := path.Split(aPath())
			word = dir + ".wh." + base
		case 12:
			word = aPath() + "/.wh..wh..opq"
		case 13:
			word = aPath() + "%0:" + fmt.Sprint(pop()&1)
		case 14:
			word = aPath() + "/!o"
		case 15:
			word = "./" + aPath() + "|"
		}
		last := &layers[len(layers)-1]
		*last = append(*last, word)
	}
	var words []string
	for _, l := range layers {
		words = append(words, strings.Join(l, " "))
	}
	return words
}

// A modelFile is a file of the model: maps from paths, worked through front to
// back, in quadratic time.
type modelFile struct {
	e        *toc.Entry // nil: an implicit directory
	dir      bool
	layer    int
	inode    int
	waitsFor string
}

type model map[string]modelFile

// removeBelow removes everything below p, which may be "" for the root.
func (m model) removeBelow(p string) {
	maps.DeleteFunc(m, func(q string, _ modelFile) bool {
		return q != "" && (p == "" || strings.HasPrefix(q, p+"/"))
	})
}

// mergeModel merges layers that are known to merge.
func mergeModel(layers []Layer) model {
	tree := model{"": {dir: true}}
	inodes := 0
	for i, l := range layers {
		own := model{"": {dir: true, layer: i}}
		hidden := map[string]bool{} // paths; with a slash at the end: what is below
		for k := range l.TOC.Entries {
			e := &l.TOC.Entries[k]
			inodes++
			p := strings.TrimPrefix(path.Clean("/"+e.Name), "/")
			dir, base := path.Split(p)
			switch name, ok := strings.CutPrefix(base, ".wh."); {
			case base == ".wh..wh..opq":
				hidden[dir+"/"] = true
				continue
			case ok:
				hidden[dir+name] = true
				continue
			case e.Type == toc.Char && e.DevMajor == 0 && e.DevMinor == 0:
				hidden[p] = true
				continue
			}
			f := modelFile{e: e, dir: e.Type == toc.Dir, layer: i, inode: inodes}
			if e.Type == toc.Hardlink {
				to := strings.TrimPrefix(path.Clean("/"+e.Linkname), "/")
				f.waitsFor = to
				if t, ok := own[to]; ok {
					f = t
				} else if t, ok := tree[to]; ok {
					f = t
				}
			}
			for d := path.Dir(p); p != "" && d != "."; d = path.Dir(d) {
				if _, ok := own[d]; !ok {
					own[d] = modelFile{dir: true, layer: i}
				}
			}
			if !f.dir {
				own.removeBelow(p)
			}
			own[p] = f
		}
		for again := true; again; {
			again = false
			for p, f := range own {
				if f.waitsFor == "" {
					continue
				}
				to := own[f.waitsFor]
				for q, g := range own { // all names of the link that waits
					if g.waitsFor != "" && g.inode == f.inode && q != p {
						own[q] = to
					}
				}
				own[p] = to
				again = true
			}
		}
		for p := range hidden {
			if below, ok := strings.CutSuffix(p, "/"); ok {
				tree.removeBelow(strings.TrimSuffix(below, "/"))
			} else {
				delete(tree, p)
				tree.removeBelow(p)
			}
		}
		for _, p := range slices.Sorted(maps.Keys(own)) {
			f := own[p]
			old, ok := tree[p]
			if f.dir && f.e != nil && hasOpaque(f.e.Xattrs) || ok && (!f.dir || !old.dir) {
				tree.removeBelow(p)
			}
			if !ok || !old.dir || !f.dir || f.e != nil {
				tree[p] = f
			}
		}
	}
	return tree
}

// describe writes the model as describe writes a tree.
func (m model) describe() string {
	var words []string
	first := map[int]string{}
	// In the order of a tree: as if the slash were the least of all bytes.
	paths := slices.SortedFunc(maps.Keys(m), func(a, b string) int {
		return slices.Compare(strings.Split(a, "/"), strings.Split(b, "/"))
	})
	for _, p := range paths {
		f := m[p]
		w := ""
		switch {
		case p == "":
			continue
		case f.e == nil:
			w = "/?"
		case f.dir:
			w = "/"
		case first[f.inode] != "":
			words = append(words, p+"=>"+first[f.inode])
			continue
		default:
			first[f.inode] = p
			switch f.e.Type {
			case toc.Reg:
				w = fmt.Sprintf("=%d", f.e.Size)
			case toc.Symlink:
				w = "->" + f.e.Linkname
			case toc.Char:
				w = fmt.Sprintf("%%%d:%d", f.e.DevMajor, f.e.DevMinor)
			case toc.Fifo:
				w = "|"
			}
		}
		words = append(words, fmt.Sprintf("%s%s@%d", p, w, f.layer))
	}
	return strings.Join(words, " ")
}

// compareWithModel merges the layers that b stands for and reports whether they
// do merge.
func compareWithModel(t testing.TB, b []byte) bool {
	words := wordsOf(b)
	layers := layersOf(words)
	x, err := Merge(layers)
	if err != nil {
		return false
	}
	checkTree(t, x, layers)
	if got, want := describe(x), mergeModel(layers).describe(); got != want {
		t.Fatalf("%q\n  merged %s\n   model %s", words, got, want)
	}
	checkIndex(t, x, layers)
	return true
}

// FuzzMerge compares trees with those of a slow and simple model.
func FuzzMerge(f *testing.F) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for n := range 40 {
		b := make([]byte, 2+n)
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) { compareWithModel(t, b[:min(len(b), 300)]) })
}

// The same with a good many random layers, so that every run does some.
func TestMergeModel(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	merged := 0
	for range 20_000 {
		b := make([]byte, rnd.IntN(60))
		for i := range b {
			b[i] = byte(rnd.Uint32())
		}
		if compareWithModel(t, b) {
			merged++
		}
	}
	if merged < 3000 {
		t.Errorf("only %d merged", merged)
	}
}

// FuzzOpenIndex changes bytes of an index, each at an offset of two bytes, and
// mends the checksum, so that everything else is looked at.
func FuzzOpenIndex(f *testing.F) {
	add := func(x *Tree, layers []Layer) {
		b := indexOf(f, x, layers)
		f.Add(b, []byte{})
		f.Add(b, []byte{0, headerSize + 48, 3, 0, 20, 0xff})
	}
	for _, words := range [][]string{nil, {"a=1 b=22 c=1"}, {"a=1 b=22 c=1", "d=333 b=1", "e=22"}} {
		layers := layersOf(words)
		x, err := Merge(layers)
		if err != nil {
			f.Fatal(err)
		}
		add(x, layers)
	}
	add(chunkyTree(f))
	f.Fuzz(func(t *testing.T, index, changes []byte) {
		b := bytes.Clone(index)
		for ; len(changes) >= 3 && len(b) > 0; changes = changes[3:] {
			b[(int(changes[0])<<8|int(changes[1]))%len(b)] = changes[2]
		}
		reseal(b)
		walkTable(t, b)
		x, err := OpenIndex(b)
		if err == nil {
			checkOpened(t, x)
			checkTable(t, b, x)
			if got := rebuild(x); !bytes.Equal(got, b) {
				t.Fatalf("two files for one index:\n%x\n%x", b, got)
			}
		}
	})
}
