package erofs

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// top is the line of a root directory.
const top = "/ 4096 40755 2 0 0 0 0.0 - - -\n"

const sum64 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// TestDumpAccepted are lines and what they say, in describe's words.
func TestDumpAccepted(t *testing.T) {
	for _, c := range []struct{ lines, want string }{
		{"/a 5 100644 1 2 3 0 4.5 - hello -", `"/a" 100644 2:3 4.000000005 links 1 "hello"`},
		{"a 0 100644 0 0 0 0 0.0 - - -", `"/a" 100644 0:0 0.000000000 links 0`},
		{"//a 0 0100644 1 0 0 7 -3.1 - - -", `"/a" 100644 0:0 -3.000000001 links 1`},
		{"/a 9 100644 1 0 0 0 0.0 ab/cd - " + sum64, `"/a" 100644 0:0 0.000000000 links 1 9 bytes in "ab/cd" ` + sum64},
		{"/a 9 100644 1 0 0 0 0.0 ab - " + sum64 + sum64, `"/a" 100644 0:0 0.000000000 links 1 9 bytes in "ab" ` + sum64 + sum64},
		{"/a 9 100644 1 0 0 0 0.0 - - -", `"/a" 100644 0:0 0.000000000 links 1 9 bytes in "" `},
		{"/a 1 100644 1 0 0 0 0.0 x \\x2d junk", `"/a" 100644 0:0 0.000000000 links 1 "-"`},
		{`/a\x20\n\\\t\r\x3D 4 100644 1 0 0 0 0.0 - \x00=\xfF- -`, `"/a \n\\\t\r=" 100644 0:0 0.000000000 links 1 "\x00=\xff-"`},
		{`/a\x00b 0 100644 1 0 0 0 0.0 - - -`, `"/a" 100644 0:0 0.000000000 links 1`},
		{"/a 0 100644 1 0 0 0 0.0", `"/a" 100644 0:0 0.000000000 links 1`},
		{"/a 0 120777 1 0 0 0 0.0 to", `"/a" 120777 0:0 0.000000000 links 1 -> "to"`},
		{`/a 0 120777 1 0 0 0 0.0 \x2d - -`, `"/a" 120777 0:0 0.000000000 links 1 -> "-"`},
		{"/a 99 20600 1 0 0 259 0.0 - - -", `"/a" 20600 0:0 0.000000000 links 1 rdev 0x103`},
		{"/a 0 10600 1 0 0 259 0.0 - - -", `"/a" 10600 0:0 0.000000000 links 1`},
		// Of MODE the format keeps 16 bits; the C project's own dumps have more.
		{"/a 0 20720777 1 0 0 0 0.0 to", `"/a" 120777 0:0 0.000000000 links 1 -> "to"`},
		{"/a 18446744073709551615 40700 9 0 0 0 0.0 - - -", `"/a" 40700 0:0 0.000000000`},
		{`/a 0 100644 1 0 0 0 0.0 - - - user.b=1 user.a\x3d== user.b=\x002 `, `"/a" 100644 0:0 0.000000000 links 1 "user.a="="=" "user.b"="\x002"`},
		{"/b 0 100644 1 0 0 0 0.0 - - -\n/a 0 @120000 - - - - 0.0 b - -", `"/a" 100644 0:0 0.000000000 links 1` + "\n" + `"/b" = "/a"`},
		{"/a 0 @100644 - - - - - //c///d - -\n/b zzz @100644 \\q \\q 1 1 1 /a\n/c 0 40755 2 0 0 0 0.0 - - -\n/c/d 0 100644 1 0 0 0 0.0 - - -",
			`"/a" 100644 0:0 0.000000000 links 1` + "\n" + `"/b" = "/a"` + "\n" + `"/c" 40755 0:0 0.000000000` + "\n" + `"/c/d" = "/a"`},
		{"/d/ 0 100644", ""}, // refused below as well; here to see that the table can tell
	} {
		got, err := ParseDump(strings.NewReader(top + c.lines + "\n"))
		if c.want == "" {
			if err == nil {
				t.Errorf("%q: no error", c.lines)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", c.lines, err)
			continue
		}
		if _, rest, _ := strings.Cut(describe(got), "\n"); rest != c.want+"\n" {
			t.Errorf("%q:\n got %s\nwant %s", c.lines, rest, c.want)
		}
		if again, err := ParseDump(strings.NewReader(top + c.lines)); err != nil {
			t.Errorf("%q without a newline at the end: %v", c.lines, err)
		} else {
			sameTree(t, again, got)
		}
	}
}

// TestDumpRefused are dumps, the line at fault and what is said about it.
func TestDumpRefused(t *testing.T) {
	const f = " 0 100644 1 0 0 0 0.0 - - -\n"
	for _, c := range []struct {
		dump string
		line int
		want string
	}{
		{"", 1, "empty"}, {"\n", 1, "empty PATH"}, {"/a" + f, 1, "want /"}, {"/ 0 100644 1 0 0 0 0.0 - - -\n", 1, "root must be"},
		{top + "\n", 2, "empty PATH"}, {top + top, 2, "second entry for the root"}, {top + "//" + f, 2, "second entry for the root"},
		{top + "/a/" + f, 2, "slash"}, {top + "/." + f, 2, "name"}, {top + "/.." + f, 2, "name"}, {top + `/\x00a` + f, 2, "second entry for the root"},
		{top + "/a/b" + f, 2, "parent"}, {top + "/./b" + f, 2, "parent"}, {top + "/a" + f + "/a/b" + f, 3, "not a directory"}, {top + "/a" + f + "/a" + f, 3, "second entry"},
		{top + "/" + strings.Repeat("x", 256) + f, 2, "256"}, {top + "/a\x00" + f, 2, "NUL"},
		{top + "/a 0 100644 1 0 0 0 0.0 - - - user.a\n", 2, "no ="}, {top + "/a 0 100644 1 0 0 0 0.0 - - - =v\n", 2, "name of 0"},
		{top + "/a 0 100644 1 0 0 0 0.0 - - -  user.a=\n", 2, "no ="}, {top + "/a 0 100644 1 0 0 0 0.0 - - - user.a=  \n", 2, "no ="},
		{top + "/a 0 100644 1 0 0 0 0.0 - - - user.a=" + strings.Repeat("x", 65536) + "\n", 2, "65543"},
		{top + "/a 0 100644 1 0 0 0 0.0 - - - user.a=" + strings.Repeat("x", 32743) + "\n", 2, "32767"},
		{top + "/a 0 100644 1 0 0 0 0.0 - - - " + strings.Repeat("x", 256) + "=\n", 2, "256"},
		{top + "/a 0 644 1 0 0 0 0.0 - - -\n", 2, "MODE"}, {top + "/a 0 100648 1 0 0 0 0.0 - - -\n", 2, "MODE"}, {top + "/a 0 1000644 1 0 0 0 0.0 - - -\n", 2, "MODE"}, {top + "/a 0 40000100644 1 0 0 0 0.0 - - -\n", 2, "MODE"}, {top + "/a 0\n", 2, "MODE"},
		{top + "/a -1 100644 1 0 0 0 0.0 - - -\n", 2, "SIZE"}, {top + "/a \t1 100644 1 0 0 0 0.0 - - -\n", 2, "SIZE"}, {top + "/a +1 100644 1 0 0 0 0.0 - - -\n", 2, "SIZE"},
		{top + "/a 18446744073709551616 40755 1 0 0 0 0.0 - - -\n", 2, "SIZE"}, {top + "/a 9223372036854775808 100644 1 0 0 0 0.0 - - -\n", 2, "SIZE"}, {top + "/a 9007199254740993 100644 1 0 0 0 0.0 - - -\n", 2, "8 PiB"},
		{top + "/a 0 100644 4294967296 0 0 0 0.0 - - -\n", 2, "NLINK"}, {top + "/a 0 100644 1 x 0 0 0.0 - - -\n", 2, "UID"}, {top + "/a 0 100644 1 1 x 0 0.0 - - -\n", 2, "GID"}, {top + "/a 0 100644 1 1 0 x 0.0 - - -\n", 2, "RDEV"},
		{top + "/a 0 100644 1 0 0 0 0 - - -\n", 2, "MTIME"}, {top + "/a 0 100644 1 0 0 0 .1 - - -\n", 2, "MTIME"}, {top + "/a 0 100644 1 0 0 0 1. - - -\n", 2, "MTIME"}, {top + "/a 0 100644 1 0 0 0 0.1000000000 - - -\n", 2, "MTIME"},
		{top + "/a 0 100644 1 0 0 0 9223372036854775808.0 - - -\n", 2, "MTIME"},
		{top + "/a 0 120777 1 0 0 0 0.0 - - -\n", 2, "PAYLOAD"}, {top + "/a 0 120777 1 0 0 0 0.0  - -\n", 2, "PAYLOAD"}, {top + "/a 0 100644 1 0 0 0 0.0 " + strings.Repeat("x", 4096) + " - -\n", 2, "PAYLOAD"},
		{top + `/a 0 100644 1 0 0 0 0.0 \q - -` + "\n", 2, "escape"}, {top + `/a 0 100644 1 0 0 0 0.0 \x1 - -` + "\n", 2, "escape"}, {top + `/a 0 100644 1 0 0 0 0.0 \x1g - -` + "\n", 2, "escape"}, {top + `/a 0 100644 1 0 0 0 0.0 a\ - -` + "\n", 2, "backslash"},
		{top + "/a 1 100644 1 0 0 0 0.0 - xx -\n", 2, "CONTENT"}, {top + "/a 1 100644 1 0 0 0 0.0 -\n", 2, "CONTENT"}, {top + "/a 5001 100644 1 0 0 0 0.0 - " + strings.Repeat("x", 5001) + " -\n", 2, "CONTENT"},
		{top + "/a 77 120777 1 0 0 0 0.0 to\n", 2, "CONTENT"}, {top + "/a 1 120777 1 0 0 0 0.0 to xx -\n", 2, "CONTENT"}, {top + "/a 0 40755 1 0 0 0 0.0 - xx -\n", 2, "CONTENT"},
		{top + `/a 0 100644 1 0 0 0 0.0 - - \q` + "\n", 2, "DIGEST"}, {top + `/a 0 40755 1 0 0 0 0.0 - - a\` + "\n", 2, "DIGEST"},
		{top + "/a 1 100644 1 0 0 0 0.0 - - abc\n", 2, "DIGEST"}, {top + "/a 1 100644 1 0 0 0 0.0 - - " + sum64[1:] + "g\n", 2, "DIGEST"}, {top + "/a 1 100644 1 0 0 0 0.0 - - \n", 2, "DIGEST"},
		{top + "/d 0 40755 2 0 0 0 0.0 - - -\n/a 0 @100644 1 0 0 0 0.0 d - -\n", 3, "directory"}, {top + "/a 0 @100644 1 0 0 0 0.0 / - -\n", 2, "directory"},
		{top + "/a 0 @40755 1 0 0 0 0.0 b - -\n", 2, "MODE"}, {top + "/a 0 @644 1 0 0 0 0.0 b - -\n", 2, "MODE"}, {top + "/a 0 @100644 1 0 0 0 0.0 - - -\n", 2, "target"}, {top + "/a 0 @100644\n", 2, "target"},
		{top + "/a 0 @100644 1 0 0 0 0.0 b - -\n", 2, "no \"b\""}, {top + "/a 0 @100644 1 0 0 0 0.0 a - -\n", 2, "circle"},
		{top + "/a 0 @100644 1 0 0 0 0.0 b - -\n/b 0 @100644 1 0 0 0 0.0 c - -\n/c 0 @100644 1 0 0 0 0.0 a - -\n", 4, "circle"},
		{top + "/a 0 @100644 1 0 0 0 0.0 b - -\n/b 0 @100644 1 0 0 0 0.0 x - -\n", 3, "no \"x\""}, {top + "/a" + f + "/b 0 @100644 1 0 0 0 0.0 a/c - -\n", 3, "no \"a/c\""},
		{top + "/a 0 @100644 1 0 0 0 0.0 b - -\n/b" + f + "/a/c" + f, 4, "not a directory"},
	} {
		_, err := ParseDump(strings.NewReader(c.dump))
		var e *DumpError
		if !errors.As(err, &e) || e.Line != c.line || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%.300q:\n got %v\nwant line %d, …%s…", c.dump, err, c.line, c.want)
		}
	}
}

func TestDumpStrict(t *testing.T) {
	for _, c := range []struct {
		line   string
		strict bool // accepted when strict
	}{
		{"/a 0 100644 1 0 0 0 0.0 - - -\n", true}, {"/a 0 100644 1 0 0 0 0.0 - - -", false}, {"/a 0 100644 1 0 0 1 0.0 - - -\n", false}, {"/a 0 20644 1 0 0 1 0.0 - - -\n", true},
		{"/a 2 120777 1 0 0 0 0.0 to - -\n", true}, {"/a 1 120777 1 0 0 0 0.0 to - -\n", false}, {"/a 2 120777 1 0 0 0 0.0 to to -\n", false},
		{"/a 77 120777 1 0 0 0 0.0 to - -\n", false},
	} {
		if _, err := ParseDump(strings.NewReader(top + c.line)); err != nil {
			t.Errorf("%q: %v", c.line, err)
		}
		if _, err := ReadDump(strings.NewReader(top+c.line), true); (err == nil) != c.strict {
			t.Errorf("%q, strict: %v", c.line, err)
		}
	}
}

func TestDumpReadFails(t *testing.T) {
	broken := errors.New("broken")
	_, err := ParseDump(io.MultiReader(strings.NewReader(top+"/a"), iotest.ErrReader(broken)))
	if !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	long := io.MultiReader(strings.NewReader(top), &repeat{'x', maxDumpLine + 1<<20})
	var e *DumpError
	if _, err := ParseDump(long); !errors.As(err, &e) || e.Line != 2 {
		t.Errorf("got %v", err)
	}
}

// repeat reads as n times the same byte.
type repeat struct {
	c byte
	n int
}

func (r *repeat) Read(p []byte) (int, error) {
	if r.n == 0 {
		return 0, io.EOF
	}
	k := min(len(p), r.n)
	for i := range p[:k] {
		p[i] = r.c
	}
	r.n -= k
	return k, nil
}

// TestDumpOrders parses the same large directory sorted, backwards and in
// strides; a quadratic parser would take minutes.
func TestDumpOrders(t *testing.T) {
	const n = 60000
	line := func(i int) string { return fmt.Sprintf("/%06d 0 100644 1 0 0 0 0.0 - - -\n", i) }
	var want []byte
	for name, at := range map[string]func(int) int{
		"sorted":    func(i int) int { return i },
		"backwards": func(i int) int { return n - 1 - i },
		"strides":   func(i int) int { return i * 7919 % n },
	} {
		var b strings.Builder
		b.WriteString(top)
		for i := range n {
			b.WriteString(line(at(i)))
		}
		tree, err := ParseDump(strings.NewReader(b.String()))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		got := image(t, tree, Options{})
		if want == nil {
			want = got
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: another image", name)
		}
		if _, err := ParseDump(strings.NewReader(b.String() + line(n/3))); err == nil {
			t.Errorf("%s: an entry twice is not noticed", name)
		}
	}
}

// TestDumpLinkChain follows many links through one another.
// TestDumpLines: a large folder out of order is sorted, in the memory too, and
// each node still knows its line; a name twice in it is blamed on the second.
func TestDumpLines(t *testing.T) {
	const n = 1000
	for _, links := range []bool{false, true} {
		order := rand.New(rand.NewPCG(3, 4)).Perm(n)
		var b strings.Builder
		b.WriteString(top)
		lines, line := map[string]int{"/": 1}, 1
		add := func(path, rest string) {
			b.WriteString(path + rest + "\n")
			line++
			lines[path] = line
		}
		for _, k := range order {
			path := fmt.Sprintf("/entry%04d", k)
			if k%3 > 0 {
				add(path, " 0 100644 1 0 0 0 0.0 - - -")
				continue
			}
			add(path, " 0 40755 2 0 0 0 0.0 - - -")
			if k%300 > 0 {
				continue
			}
			for _, i := range order {
				add(fmt.Sprintf("%s/%s%d", path, strings.Repeat("x", i%9), i), " 0 100644 1 0 0 0 0.0 - - -")
			}
		}
		if links {
			add("/link", fmt.Sprintf(" 0 @100644 - - - - 0.0 /entry%04d - -", 1))
		}
		d, err := ReadDump(strings.NewReader(b.String()), true)
		if err != nil {
			t.Fatal(err)
		}
		found := 0
		var visit func(path string, n *Node)
		visit = func(path string, n *Node) {
			found++
			if path == "" {
				path = "/"
			}
			if got := d.Line(n); got != lines[path] {
				t.Fatalf("%s: line %d, want %d", path, got, lines[path])
			}
			if !slices.IsSortedFunc(n.Children, func(x, y *Node) int { return strings.Compare(x.Name, y.Name) }) {
				t.Errorf("%s is not in order", path)
			}
			for _, c := range n.Children {
				visit(strings.TrimSuffix(path, "/")+"/"+c.Name, c)
			}
		}
		visit("", d.Root)
		if found != len(lines) {
			t.Errorf("%d nodes of %d lines", found, len(lines))
		}
		if d.Line(&Node{}) != 0 {
			t.Error("a node of nowhere has a line")
		}
		for _, again := range []string{"/entry0007 0 100644", "/entry0006 0 40755", "/entry0005 0 40755"} {
			_, err = ReadDump(strings.NewReader(b.String()+again+" 1 0 0 0 0.0 - - -\n/z 0 100644 1 0 0 0 0.0 - - -\n"), false)
			var e *DumpError
			if !errors.As(err, &e) || e.Line != line+1 || !strings.Contains(err.Error(), "second entry") {
				t.Errorf("%s again: %v, want line %d", again, err, line+1)
			}
		}
	}
}

func TestDumpLinkChain(t *testing.T) {
	const n = 50000
	var b strings.Builder
	b.WriteString(top)
	for i := range n {
		fmt.Fprintf(&b, "/%06d 0 @100644 1 0 0 0 0.0 %06d - -\n", i, i+1)
	}
	chain := b.String()
	tree, err := ParseDump(strings.NewReader(chain + fmt.Sprintf("/%06d 0 100644 1 0 0 0 0.0 - - -\n", n)))
	if err != nil {
		t.Fatal(err)
	}
	if last := tree.Children[n]; tree.Children[0].Link != last || tree.Children[n-1].Link != last {
		t.Error("a link does not lead to the node")
	}
	if _, err := ParseDump(strings.NewReader(chain + fmt.Sprintf("/%06d 0 @100644 1 0 0 0 0.0 0 - -\n", n))); err == nil {
		t.Error("a bad end of the chain is not noticed")
	}
}

// TestWriteDump compares lines with what section 3 of the format document
// says that composefs-info writes.
func TestWriteDump(t *testing.T) {
	b := file("b", "-", xattr("user.e=", "a=\n"), xattr("trusted.overlay.x", "-"))
	tree := root(xattr("user.shared", "s"), dir("a", xattr("user.shared", "s"), xattr("user.z", "inline first")),
		b, ext("c", 10, "ab/c d", digest(nil)), hard("d", b), symlink("e", "-"), special("w", modeChar, 0), special("x", modeBlock, 2049, mtime(-1, 5)))
	var got bytes.Buffer
	if err := WriteDump(&got, openImage(t, image(t, tree, Options{}))); err != nil {
		t.Fatal(err)
	}
	want := `/ 4096 40755 3 0 0 0 1000.0 - - - user.shared=s
/a 27 40755 2 0 0 0 1000.0 - - - user.z=inline\x20first user.shared=s
/b 1 100644 1 0 0 0 1000.0 - \x2d - trusted.overlay.x=- user.e\x3d=a\x3d\n
/c 10 100644 1 0 0 0 1000.0 ab/c\x20d - -
/d 1 @100644 1 0 0 0 1000.0 /b \x2d - trusted.overlay.x=- user.e\x3d=a\x3d\n
/e 1 120777 1 0 0 0 1000.0 \x2d - -
/w 0 20600 1 0 0 0 1000.0 - - -
/x 0 60600 1 0 0 2049 -1.5 - - -
`
	if got.String() != want {
		t.Errorf("got\n%swant\n%s", got.String(), want)
	}
}

// TestGoldenRoundTrip reads the C tool's images (equal to ours by TestGolden)
// back, and writes them again by way of the tree and of the dump.
func TestGoldenRoundTrip(t *testing.T) {
	exact := 0
	for _, c := range goldens(t) {
		if c.reject {
			continue
		}
		tree, err := ParseDump(bytes.NewReader(c.dump(t)))
		if err != nil {
			t.Fatal(err)
		}
		o := Options{MinVersion: c.min, MaxVersion: c.max}
		img := image(t, tree, o)
		r := openImage(t, img)
		if err := r.Check(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		back, err := Load(r)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		var dump bytes.Buffer
		if err := WriteDump(&dump, r); err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		parsed, err := ParseDump(&dump)
		if err != nil {
			t.Errorf("%s: parse our dump: %v", c.name, err)
			continue
		}
		sameTree(t, parsed, back)
		// What reading back drops by the format's rules, so that another image
		// is right: whiteout markers that the tree's author set himself, the
		// size of a device, which decides on the form of its inode, and which
		// of several names has the inode.
		var lost bool
		seen := map[*Node]bool{}
		eachNode(tree, func(n *Node) {
			seen[n] = true
			if n.Link != nil && !seen[n.Link] {
				lost = true
			}
			if t := fileType(n.Mode); t != TypeRegular && t != TypeDir && n.Size > math.MaxUint32 {
				lost = true
			}
			for _, x := range n.Xattrs {
				switch StoredXattr(x.Name) {
				case whiteoutXattr, whiteoutUser, whiteoutsXattr, whiteoutsUser:
					lost = true
				}
			}
		})
		if !lost {
			exact++
		}
		if !lost && !bytes.Equal(image(t, back, o), img) {
			t.Errorf("%s: the tree read back gives another image", c.name)
		}
	}
	if exact < 20 {
		t.Errorf("only %d images could be compared", exact)
	}
}

func eachNode(n *Node, fn func(*Node)) {
	fn(n)
	for _, c := range n.Children {
		eachNode(c, fn)
	}
}

func BenchmarkParseDump(b *testing.B) {
	var dump bytes.Buffer
	img := image(b, synthetic(100000), Options{})
	r := openImage(b, img)
	if err := WriteDump(&dump, r); err != nil {
		b.Fatal(err)
	}
	b.Run("parse", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := ParseDump(bytes.NewReader(dump.Bytes())); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(100000*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
	})
	b.Run("write", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := WriteDump(io.Discard, r); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(100000*float64(b.N)/b.Elapsed().Seconds(), "entries/s")
	})
}
