package erofs

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// FuzzParseDump feeds the parser anything. What it takes must survive being
// written, read back, dumped and parsed again.
func FuzzParseDump(f *testing.F) {
	for _, c := range goldens(f) {
		if dump := c.dump(f); len(dump) < 20000 {
			f.Add(dump)
		}
	}
	f.Add([]byte(top + "/a 5 100644 1 2 3 0 4.5 - h\\x00llo -\n/b 0 @100644 - - - - 0.0 /a\n/c 3 120777 1 0 0 0 -1.1 a\\\\b - - user.a=b\n"))
	f.Fuzz(func(t *testing.T, dump []byte) {
		tree, err := ParseDump(bytes.NewReader(dump))
		if err != nil {
			return
		}
		var img bytes.Buffer
		if err := Write(&img, tree, Options{MaxVersion: 1}); err != nil {
			if !strings.Contains(err.Error(), "the xattrs that composefs adds do not fit") {
				t.Fatalf("parsed, but not written: %v", err)
			}
			return
		}
		r := openImage(t, img.Bytes())
		if err := r.Check(); err != nil {
			t.Fatal(err)
		}
		back, err := Load(r)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := WriteDump(&out, r); err != nil {
			t.Fatal(err)
		}
		again, err := ParseDump(&out)
		if err != nil && strings.Contains(err.Error(), "xattrs of more than") {
			return // with the marks of Write they are too many for a dump
		}
		if err != nil {
			t.Fatal(err)
		}
		sameTree(t, again, back)
	})
}

// FuzzReader reads anything as an image.
func FuzzReader(f *testing.F) {
	small := root(dir("a", file("f", "text"), file("block", strings.Repeat("b", 3000))), file("g", "x", xattr("user.x", "y"), xattr("user.s", "s")),
		symlink("l", "to"), ext("e", 5000, "ab", xattr("user.s", "s")), special("w", modeChar, 0))
	img := image(f, small, Options{})
	f.Add(img)
	// The same without the composefs header, and with data behind its chunks.
	plain := bytes.Clone(img)
	clear(plain[:32])
	plain[superOffset+80] = incompatChunked
	r := openImage(f, img)
	le.PutUint32(plain[at(f, r, "e").inlineOff:], 3)
	le.PutUint32(plain[at(f, r, "a/block").inlineOff:], 3)
	f.Add(plain)
	f.Fuzz(func(t *testing.T, img []byte) {
		exercise(img)
	})
}

// A source makes choices from fuzz bytes; when they run out all are 0.
type source struct{ b []byte }

func (s *source) n(most int) int {
	if len(s.b) == 0 {
		return 0
	}
	c := s.b[0]
	s.b = s.b[1:]
	return int(c) % most
}

func (s *source) text(most int) string {
	k := min(s.n(most+1), len(s.b))
	t := string(s.b[:k])
	s.b = s.b[k:]
	return t
}

// tree makes a tree that the format can hold and that reads back as it was.
func (s *source) tree() *Node {
	top := s.node("", TypeDir)
	dirs, files := []*Node{top}, []*Node(nil)
	names := map[*Node]map[string]bool{}
	for k := 0; len(s.b) > 0 && k < 3000; k++ {
		d := dirs[s.n(len(dirs))]
		name := strings.Map(func(c rune) rune {
			if c == 0 || c == '/' {
				return '_'
			}
			return c
		}, s.text(40))
		if name == "" || name == "." || name == ".." {
			name = fmt.Sprintf("%05d%s", k, strings.Repeat("n", s.n(200)))
		}
		if names[d] == nil {
			names[d] = map[string]bool{}
		}
		if names[d][name] {
			continue
		}
		names[d][name] = true
		typ := uint8(s.n(9))
		if typ == 8 && len(files) > 0 {
			d.Children = append(d.Children, hard(name, files[s.n(len(files))]))
			continue
		}
		n := s.node(name, max(1, typ%8))
		d.Children = append(d.Children, n)
		if n.Mode&modeType == modeDir {
			dirs = append(dirs, n)
		} else {
			files = append(files, n)
		}
	}
	return top
}

func (s *source) node(name string, typ uint8) *Node {
	types := [...]uint32{TypeRegular: modeRegular, TypeDir: modeDir, TypeChar: modeChar, TypeBlock: modeBlock, TypeFifo: modeFifo, TypeSocket: modeSocket, TypeSymlink: modeSymlink}
	n := &Node{Name: name, Mode: types[typ] | uint32(s.n(256))<<4&0o7777, Nlink: uint32(s.n(3)), UID: uint32(s.n(2) * 70000), GID: uint32(s.n(4) * 30000)}
	n.MtimeSec, n.MtimeNsec = int64(s.n(3)-1), uint32(s.n(2)*999999999)
	switch typ {
	case TypeRegular:
		switch s.n(4) {
		case 1:
			n.Content = []byte(strings.Repeat(s.text(100)+"x", 1+s.n(49)))
			n.Size = uint64(len(n.Content))
		case 2, 3:
			n.Size = 1 << s.n(54)
			n.Target = strings.ReplaceAll(s.text(100), "\x00", "")
			n.Digest = [][]byte{nil, bytes.Repeat([]byte{byte(s.n(256))}, 32), bytes.Repeat([]byte{1}, 64)}[s.n(3)]
		}
	case TypeSymlink:
		n.Target = strings.Repeat(strings.ReplaceAll(s.text(100), "\x00", "")+"/", 1+s.n(40))
	case TypeChar, TypeBlock:
		n.Rdev = uint32(s.n(3) * 259)
	}
	for k := s.n(4); k > 0; k-- {
		prefix := []string{"user.", "trusted.", "security.", "odd", "trusted.overlay.", "user.", "user."}[s.n(7)]
		x := Xattr{fmt.Sprint(prefix, "x", k), []byte(strings.Repeat(s.text(10), 1+s.n(100)))}
		n.Xattrs = append(n.Xattrs, x)
	}
	return n
}

// FuzzWriteRead writes trees made from the bytes and reads them back.
func FuzzWriteRead(f *testing.F) {
	f.Add([]byte("a few bytes that make a tree, of no particular kind"))
	for _, step := range []int{1, 7, 31, 101} {
		var b []byte
		for i := range 2000 {
			b = append(b, byte(i*step), byte(i*i*step>>3))
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s := &source{b}
		version := uint32(s.n(2))
		tree := s.tree()
		img := image(t, tree, Options{MinVersion: version})
		r := openImage(t, img)
		if err := r.Check(); err != nil {
			t.Fatal(err)
		}
		back, err := Load(r)
		if err != nil {
			t.Fatal(err)
		}
		// Version 1 marks the parents of whiteouts, and a reader cannot tell.
		white := false
		eachNode(tree, func(n *Node) { white = white || n.Link == nil && isWhiteout(n) })
		if version == 1 && white {
			return
		}
		sameTree(t, back, tree)
	})
}
