package composefs

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

const (
	sumA = "aa00000000000000000000000000000000000000000000000000000000000000"
	sumB = "bb00000000000000000000000000000000000000000000000000000000000000"
	objA = "aa/00000000000000000000000000000000000000000000000000000000000000"
	objB = "bb/00000000000000000000000000000000000000000000000000000000000000"
)

// example has every kind of entry, names that need escapes, and a file and a
// symbolic link whose first names are in /lib and whose others are elsewhere.
const example = `/ 4096 40755 4 0 0 0 1.0 - - -
/lib 70 40755 2 0 0 0 1.0 - - -
/lib/lone-dash 1 120777 2 0 0 0 1.0 \x2d - -
/lib/shared 100 100644 3 0 0 0 1.0 ` + objA + ` - ` + sumA + ` user.x=a\x20b
/opt 32 40755 2 0 0 0 1.0 - - -
/opt/dash 1 @120777 2 0 0 0 1.0 /lib/lone-dash - -
/opt/hidden 0 20000 1 0 0 0 1.0 - - -
/opt/shared1 100 @100644 3 0 0 0 1.0 /lib/shared - ` + sumA + ` user.x=a\x20b
/opt/shared2 100 @100644 3 0 0 0 1.0 /lib/shared - ` + sumA + ` user.x=a\x20b
/opt/with\x20space\n\\\xff 7 100644 1 0 0 0 1.0 - content -
/unnamed 9000 100644 1 0 0 0 1.0 - - -
/usr 27 40755 2 0 0 0 1.0 - - -
/usr/b 200 100644 1 0 0 0 1.0 ` + objB + ` - ` + sumB + `
/usr/tty 0 20620 1 0 5 1280 1.0 - - -
`

func exampleImage(t testing.TB) *erofs.Reader {
	t.Helper()
	root, err := erofs.ParseDump(strings.NewReader(example))
	if err != nil {
		t.Fatal(err)
	}
	return imageOf(t, root)
}

// lines returns the lines of s that begin with one of the words.
func lines(s string, words ...string) string {
	var out strings.Builder
	for line := range strings.Lines(s) {
		for _, w := range words {
			if strings.HasPrefix(line, w) {
				out.WriteString(line)
				break
			}
		}
	}
	return out.String()
}

const listing = "/lib/\t\n" +
	"/lib/lone-dash\t-> -\n" +
	"/lib/shared\t@ " + objA + "\n" +
	"/opt/\t\n" +
	"/opt/dash\n" +
	"/opt/hidden\n" +
	"/opt/shared1\n" +
	"/opt/shared2\n" +
	"/opt/with space\\n\\\\\\xff\n" +
	"/unnamed\n" +
	"/usr/\t\n" +
	"/usr/b\t@ " + objB + "\n" +
	"/usr/tty\n"

func TestList(t *testing.T) {
	r := exampleImage(t)
	for _, c := range []struct {
		filter Filter
		want   string
	}{
		{nil, listing},
		{Filter{"usr", "opt"}, strings.NewReplacer(
			"/opt/dash\n", "/opt/dash\t-> -\n",
			"/opt/shared1\n", "/opt/shared1\t@ "+objA+"\n").Replace(lines(listing, "/usr", "/opt"))},
		{Filter{"unnamed"}, "/unnamed\n"},
		{Filter{"us", "absent"}, ""},
	} {
		var b strings.Builder
		if err := List(&b, r, c.filter); err != nil || b.String() != c.want {
			t.Errorf("filter %q: %v\n%swant:\n%s", c.filter, err, b.String(), c.want)
		}
	}
}

func TestObjects(t *testing.T) {
	r := exampleImage(t)
	for _, c := range []struct {
		filter Filter
		want   []string
	}{
		{nil, []string{objA, objB}},
		{Filter{"opt"}, []string{objA}},
		{Filter{"unnamed"}, nil},
	} {
		o := Objects{}
		if err := o.Add(r, c.filter); err != nil || !slices.Equal(o.Sorted(), c.want) {
			t.Errorf("filter %q: %v, %v; want %v", c.filter, o.Sorted(), err, c.want)
		}
	}
	o := Objects{objA: {}, objB: {}, "/absolute": {}}
	dir := t.TempDir()
	for _, c := range []struct {
		add  string
		want []string
	}{
		{"", []string{"/absolute", objA, objB}},
		{"absolute", []string{objA, objB}},
		{objB, []string{objA}},
	} {
		if path := filepath.Join(dir, c.add); c.add != "" {
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := o.Missing(dir); err != nil || !slices.Equal(got, c.want) {
			t.Errorf("with %q: missing %v, %v; want %v", c.add, got, err, c.want)
		}
	}
	if _, err := o.Missing(filepath.Join(dir, "absent")); err == nil {
		t.Error("a folder that is not there misses nothing")
	}
}

func TestCheckContentPaths(t *testing.T) {
	for _, c := range []struct{ dump, want string }{
		{lines(example, "/ ", "/lib ", "/lib/", "/usr ", "/usr/"), ""},
		{example, "/unnamed: no fs-verity digest"},
		{strings.ReplaceAll(lines(example, "/ ", "/usr ", "/usr/"), objB, objA), "/usr/b: its payload is "},
	} {
		root, err := erofs.ParseDump(strings.NewReader(c.dump))
		if err != nil {
			t.Fatal(err)
		}
		err = CheckContentPaths(imageOf(t, root))
		if (c.want == "") != (err == nil) || err != nil && !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%v, want %q", err, c.want)
		}
	}
}

func TestDump(t *testing.T) {
	r := exampleImage(t)
	// The image's own sizes of folders, and the marker of the whiteout.
	var whole strings.Builder
	if err := erofs.WriteDump(&whole, r); err != nil {
		t.Fatal(err)
	}
	line := func(path string) string { return lines(whole.String(), path+" ") }
	for _, c := range []struct {
		filter Filter
		want   string
	}{
		{nil, whole.String()},
		{Filter{"lib", "usr"}, line("/") + lines(whole.String(), "/lib", "/usr")},
		{Filter{"lib", "opt"}, line("/") + lines(whole.String(), "/lib", "/opt")},
		{Filter{"absent"}, line("/")},
		// Without /lib the first names in /opt become the files.
		{Filter{"opt"}, line("/") + strings.NewReplacer(
			"1 @120777 2 0 0 0 1.0 /lib/lone-dash", `1 120777 2 0 0 0 1.0 \x2d`,
			"/opt/shared1 100 @100644 3 0 0 0 1.0 /lib/shared", "/opt/shared1 100 100644 3 0 0 0 1.0 "+objA,
			"/opt/shared2 100 @100644 3 0 0 0 1.0 /lib/shared", "/opt/shared2 100 @100644 3 0 0 0 1.0 /opt/shared1",
		).Replace(lines(whole.String(), "/opt"))},
	} {
		var b strings.Builder
		if err := Dump(&b, r, c.filter); err != nil || b.String() != c.want {
			t.Errorf("filter %q: %v\n%swant:\n%s", c.filter, err, b.String(), c.want)
		}
		if _, err := erofs.ParseDump(strings.NewReader(b.String())); err != nil {
			t.Errorf("filter %q: what was printed is no dump: %v", c.filter, err)
		}
	}
}

func TestMeasure(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("hello world"), 0o600); err != nil {
		t.Fatal(err)
	}
	// The beginnings are those of the format document, 2.12.
	for alg, want := range map[verity.Algorithm]string{verity.SHA256: "\x1e\x2e\xaa\x42", verity.SHA512: "\x18\x43\x02\x70"} {
		got, err := Measure(path, alg)
		if err != nil || len(got) != alg.Size() || string(got[:4]) != want {
			t.Errorf("%v: %x, %v", alg, got, err)
		}
	}
	if _, err := Measure(path+"x", verity.SHA256); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if _, err := Measure(filepath.Dir(path), verity.SHA256); err == nil {
		t.Error("a folder has a digest")
	}
}

func FuzzEscape(f *testing.F) {
	for _, s := range []string{"", "plain", "a b\n\t\r\\", "\x00\xff-=", `\x41`, `\`} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		unescape(s) // whatever it is
		for _, spaces := range []bool{false, true} {
			e := string(appendEscaped(nil, s, spaces))
			if got := unescape(e); got != s {
				t.Errorf("%q is escaped to %q and that is %q", s, e, got)
			}
			if strings.ContainsAny(e, "\n\t\r\x00") || !spaces && strings.Contains(e, " ") {
				t.Errorf("%q is escaped to %q", s, e)
			}
		}
	})
}
