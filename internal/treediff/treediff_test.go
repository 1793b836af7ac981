package treediff

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// grow makes below root what the lines say, one thing each:
//
//	dir PATH · file PATH TEXT · link FROM PATH · symlink TARGET PATH
//	fifo PATH · char PATH MAJOR MINOR · mode PATH OCTAL · owner PATH UID GID
//	xattr PATH NAME VALUE · mtime PATH SEC NSEC · rm PATH
//
// Every mtime that is not said is 1e9 seconds.
func grow(t *testing.T, root string, lines ...string) {
	t.Helper()
	times := map[string]unix.Timespec{}
	for _, line := range lines {
		f := strings.Fields(line)
		p := filepath.Join(root, f[1])
		var a, b int64
		if len(f) > 3 {
			fmt.Sscan(f[2], &a)
			fmt.Sscan(f[3], &b)
		}
		var err error
		switch f[0] {
		case "dir":
			err = os.Mkdir(p, 0o755)
		case "file":
			err = os.WriteFile(p, []byte(strings.Join(f[2:], " ")), 0o644)
		case "link":
			err = os.Link(p, filepath.Join(root, f[2]))
		case "symlink":
			err = os.Symlink(f[1], filepath.Join(root, f[2]))
		case "fifo":
			err = unix.Mkfifo(p, 0o644)
		case "char":
			err = unix.Mknod(p, unix.S_IFCHR|0o600, int(unix.Mkdev(uint32(a), uint32(b))))
		case "mode":
			var m uint32
			fmt.Sscanf(f[2], "%o", &m)
			err = unix.Chmod(p, m)
		case "owner":
			err = os.Lchown(p, int(a), int(b))
		case "xattr":
			err = unix.Lsetxattr(p, f[2], []byte(f[3]), 0)
		case "mtime":
			times[p] = unix.Timespec{Sec: a, Nsec: b}
		case "rm":
			err = os.RemoveAll(p)
		default:
			t.Fatalf("unknown line %q", line)
		}
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
	}
	err := filepath.WalkDir(root, func(p string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		ts, ok := times[p]
		if !ok {
			ts.Sec = 1e9
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, p, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		t.Fatal(err)
	}
}

var base = []string{
	"dir d", "dir d/e", "file d/f text", "file d/g more text", "link d/f d/f2", "symlink d/f l",
	"fifo p", "char c 1 3", "file x abc", "xattr x user.a 1", "file empty",
}

func TestCompare(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("device nodes, owners and trusted xattrs need root: run the tests as root")
	}
	for _, c := range []struct {
		name string
		more []string // done to the second tree only
		o    Options
		want []string // path: attribute
	}{
		{name: "equal"},
		{name: "missing", more: []string{"rm d/g"}, want: []string{"d/g: existence"}},
		{name: "missing folder", more: []string{"rm d/e"}, want: []string{"d: nlink", "d/e: existence"}},
		{name: "added", more: []string{"file new x"}, want: []string{"new: existence"}},
		{name: "file to folder", more: []string{"rm x", "dir x"}, want: []string{".: nlink", "x: type"}},
		{name: "file to symlink", more: []string{"rm d/g", "symlink x d/g"}, want: []string{"d/g: type"}},
		{name: "mode", more: []string{"mode x 600"}, want: []string{"x: mode"}},
		{name: "setuid", more: []string{"mode x 4644"}, want: []string{"x: mode"}},
		{name: "sticky", more: []string{"mode d 1755"}, want: []string{"d: mode"}},
		{name: "owner", more: []string{"owner x 0 7"}, want: []string{"x: owner"}},
		{name: "owner of symlink", more: []string{"owner l 9 0"}, want: []string{"l: owner"}},
		{name: "size", more: []string{"file x abcd"}, want: []string{"x: size"}},
		{name: "content", more: []string{"file x abd"}, want: []string{"x: content"}},
		{name: "mtime", more: []string{"mtime x 1000000000 1"}, want: []string{"x: mtime"}},
		{name: "mtime of root", more: []string{"mtime . 5 0"}, want: []string{".: mtime"}},
		{name: "mtime of symlink", more: []string{"mtime l 5 0"}, want: []string{"l: mtime"}},
		{name: "mtime within slack", more: []string{"mtime x 1000000000 400000000", "mtime p 1000000000 600000000"},
			o: Options{MtimeSlack: time.Second / 2}, want: []string{"p: mtime"}},
		{name: "target", more: []string{"rm l", "symlink d/g l"}, want: []string{"l: target"}},
		{name: "device", more: []string{"rm c", "char c 1 5"}, want: []string{"c: rdev"}},
		{name: "link broken", more: []string{"rm d/f2", "file d/f2 text"}, want: []string{"d/f: nlink", "d/f2: nlink", "d/f2: hard links"}},
		{name: "linked elsewhere", more: []string{"rm d/f2", "link d/g d/f2"},
			want: []string{"d/f: nlink", "d/f2: size", "d/f2: hard links", "d/g: nlink", "d/g: hard links"}},
		{name: "xattr value", more: []string{"xattr x user.a 2"}, want: []string{"x: xattr user.a"}},
		{name: "xattr added", more: []string{"xattr d trusted.t 1"}, want: []string{"d: xattr trusted.t"}},
		{name: "xattr of symlink", more: []string{"xattr l trusted.t 1"}, want: []string{"l: xattr trusted.t"}},
		{name: "many at once", more: []string{"file x abd", "mode x 600", "owner x 0 7"}, want: []string{"x: mode", "x: owner", "x: content"}},
		{name: "left out", more: []string{"file x abd", "mode x 600", "owner x 0 7"}, o: Options{Without: Mode | Content}, want: []string{"x: owner"}},
		{name: "links of folders left out", more: []string{"rm d/e"}, o: Options{Without: NlinkOfDirs}, want: []string{"d/e: existence"}},
		{name: "skipped", more: []string{"rm d/e", "file x abd"}, o: Options{Without: NlinkOfDirs, Skip: func(p string) bool { return p == "d/e" }},
			want: []string{"x: content"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, b := t.TempDir(), t.TempDir()
			grow(t, a, base...)
			grow(t, b, append(slices.Clone(base), c.more...)...)
			for swapped, roots := range [][2]string{{a, b}, {b, a}} {
				diffs, err := Compare(roots[0], roots[1], c.o)
				if err != nil {
					t.Fatal(err)
				}
				var got []string
				for _, d := range diffs {
					what := d.Path + ": " + d.Attr.String()
					if d.Name != "" {
						what += " " + d.Name
					}
					got = append(got, what)
				}
				if !slices.Equal(got, c.want) {
					t.Errorf("swapped %d: got %q, want %q\n%v", swapped, got, c.want, diffs)
				}
			}
		})
	}
}

// A difference must be found wherever in a file it is.
func TestContentOffsets(t *testing.T) {
	for _, at := range []int{0, 1, contentBuffer - 1, contentBuffer, contentBuffer + 1, 3*contentBuffer + 6} {
		a, b := t.TempDir(), t.TempDir()
		text := make([]byte, 3*contentBuffer+7)
		for _, root := range []string{a, b} {
			if err := os.WriteFile(filepath.Join(root, "f"), text, 0o644); err != nil {
				t.Fatal(err)
			}
			text[at] = 1
		}
		diffs, err := Compare(a, b, Options{Without: Mtime})
		if err != nil {
			t.Fatal(err)
		}
		if want := fmt.Sprintf("at %d:", at); len(diffs) != 1 || diffs[0].Attr != Content || !strings.HasPrefix(diffs[0].A, want) {
			t.Errorf("byte %d: got %v, want one difference of content %q", at, diffs, want)
		}
	}
}

func TestDifferenceString(t *testing.T) {
	d := Difference{Path: "a\nb", Attr: Xattrs, Name: "user.x", A: `"1"`, B: "absent"}
	if got, want := d.String(), `"a\nb": xattr user.x: "1" | absent`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := (Mode | Owner).String(), "mode+owner"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(attrNames) != 14 || Attr(1<<13) != Listing {
		t.Error("attrNames and the constants do not agree")
	}
}

func TestRootsMustBeDirectories(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, roots := range [][2]string{{dir, file}, {file, dir}, {dir, filepath.Join(dir, "none")}} {
		if _, err := Compare(roots[0], roots[1], Options{}); err == nil {
			t.Errorf("Compare(%q, %q) gave no error", roots[0], roots[1])
		}
	}
}

// A root given as a symlink is the directory it leads to.
func TestRootSymlink(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	grow(t, a, base...)
	grow(t, b, base...)
	link := filepath.Join(t.TempDir(), "l")
	if err := os.Symlink(b, link); err != nil {
		t.Fatal(err)
	}
	diffs, err := Compare(a, link, Options{})
	if err != nil || len(diffs) > 0 {
		t.Errorf("got %v, %v", diffs, err)
	}
}

// A filesystem whose listings do not agree with its lookups is found out. No
// kernel filesystem does that, so the listings are given.
func TestListing(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	for _, root := range []string{a, b} {
		grow(t, root, "dir d", "file f x", "file g y")
	}
	good := []dirent{{".", unix.DT_DIR}, {"..", unix.DT_DIR}, {"d", unix.DT_DIR}, {"f", unix.DT_REG}, {"g", unix.DT_UNKNOWN}}
	without := func(name string) []dirent {
		return slices.DeleteFunc(slices.Clone(good), func(e dirent) bool { return e.name == name })
	}
	with := func(name string, typ uint8) []dirent { return append(without(name), dirent{name, typ}) }
	for _, c := range []struct {
		name string
		ents []dirent
		want string
	}{
		{"good", good, ""},
		{"no dot", without("."), `".": listing: as expected | lists no "."`},
		{"no dots", without(".."), `".": listing: as expected | lists no ".."`},
		{"twice", append(without(""), dirent{"f", unix.DT_REG}), `".": listing: as expected | lists "f" twice`},
		{"wrong type", with("f", unix.DT_LNK), `"f": listing: as expected | listed as symlink, is regular file`},
		{"wrong type of folder", with("d", unix.DT_REG), `"d": listing: as expected | listed as regular file, is directory`},
		{"left out", without("f"), `"f": listing: as expected | found by lookup, not listed`},
		{"not there", with("h", unix.DT_REG), `"h": existence: absent | listed, but: no such file or directory` + "\n" +
			`"h": listing: as expected | listed, but: no such file or directory`},
	} {
		t.Run(c.name, func(t *testing.T) {
			cmp := &comparison{roots: [2]string{a + "/", b + "/"}, first: [2]map[inode]string{{}, {}}}
			work := make(chan entry, 16)
			lists := [2]map[string]uint8{cmp.names(0, ".", good), cmp.names(1, ".", c.ents)}
			for _, name := range []string{"d", "f", "g", "h"} {
				if name != "h" || lists[1]["h"] != 0 {
					cmp.child(name, name, lists, work)
				}
			}
			var got []string
			for _, d := range cmp.found {
				got = append(got, d.String())
			}
			slices.Sort(got)
			if strings.Join(got, "\n") != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
}
