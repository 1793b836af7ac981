package composefs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// treeOf makes a folder from lines of a small language, in order:
//
//	dir PATH
//	file PATH CONTENT        CONTENT may be N*TEXT
//	link PATH TARGET         symbolic
//	hard PATH EXISTING
//	char PATH MAJOR MINOR
//	fifo PATH
//	xattr PATH NAME VALUE
//	mode PATH OCTAL
func treeOf(t testing.TB, spec string) string {
	t.Helper()
	root := t.TempDir()
	for line := range strings.Lines(spec) {
		f := strings.Fields(line)
		if len(f) == 0 {
			continue
		}
		path := filepath.Join(root, f[1])
		var err error
		switch f[0] {
		case "dir":
			err = os.Mkdir(path, 0o755)
		case "file":
			err = os.WriteFile(path, []byte(content(f[2])), 0o644)
		case "link":
			err = os.Symlink(f[2], path)
		case "hard":
			err = os.Link(filepath.Join(root, f[2]), path)
		case "char":
			var major, minor uint32
			fmt.Sscan(f[2], &major)
			fmt.Sscan(f[3], &minor)
			err = unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor)))
		case "fifo":
			err = unix.Mkfifo(path, 0o600)
		case "xattr":
			err = unix.Lsetxattr(path, f[2], []byte(f[3]), 0)
		case "mode":
			var mode uint32
			fmt.Sscanf(f[2], "%o", &mode)
			err = unix.Chmod(path, mode)
		default:
			t.Fatalf("what is %q?", line)
		}
		if err != nil {
			t.Fatalf("%s: %v", strings.TrimSpace(line), err)
		}
	}
	stamp := time.Unix(1700000000, 123456789)
	err := filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		ts := unix.NsecToTimespec(stamp.UnixNano())
		return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		t.Fatal(err)
	}
	return root
}

func content(s string) string {
	var n int
	if count, text, ok := strings.Cut(s, "*"); ok {
		if _, err := fmt.Sscan(count, &n); err == nil {
			return strings.Repeat(text, n)
		}
	}
	return s
}

// imageOf returns an open image of the tree.
func imageOf(t testing.TB, root *erofs.Node) *erofs.Reader {
	t.Helper()
	var b bytes.Buffer
	if err := erofs.Write(&b, root, erofs.Options{MaxVersion: 1}); err != nil {
		t.Fatal(err)
	}
	r, err := erofs.OpenBytes(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// show prints a tree as its dump, without the fields that machines differ in.
func show(t testing.TB, root *erofs.Node) string {
	t.Helper()
	var b, out strings.Builder
	if err := Dump(&b, imageOf(t, root), nil); err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(b.String()) {
		f := strings.Fields(line)
		if f[2][:1] == "4" {
			f[1] = "-"
		}
		fmt.Fprintln(&out, strings.Join(append(f[:8:8], f[8:]...), " "))
	}
	return out.String()
}

const everything = `
	dir d
	file d/big 65*x
	hard d/big2 d/big
	file d/inline 64*y
	file d/empty 0*z
	link d/dangling ../nowhere
	char null 1 3
	char whiteout 0 0
	char far 300 70000
	fifo pipe
	xattr d/big user.colour blue
	xattr d trusted.secret s
	xattr . trusted.top 1
	xattr d/dangling trusted.onlink yes
	mode d/big 4755
	dir empty`

func TestScan(t *testing.T) {
	dir := treeOf(t, everything)
	sum, err := verity.Digest(strings.NewReader(content("65*x")), verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	object, digest := payload(sum), fmt.Sprintf("%x", sum)
	m := "1700000000.123456789"
	all := strings.ReplaceAll(`/ - 40755 4 0 0 0 M - - - trusted.top=1
/d - 40755 2 0 0 0 M - - - trusted.secret=s
/d/big 65 104755 1 0 0 0 M OBJ - SUM user.colour=blue
/d/big2 65 104755 1 0 0 0 M OBJ - SUM user.colour=blue
/d/dangling 10 120777 1 0 0 0 M ../nowhere - - trusted.onlink=yes
/d/empty 0 100644 1 0 0 0 M - - -
/d/inline 64 100644 1 0 0 0 M - YYY -
/empty - 40755 2 0 0 0 M - - -
/far 0 20600 1 0 0 286338160 M - - -
/null 0 20600 1 0 0 259 M - - -
/pipe 0 10600 1 0 0 0 M - - -
/whiteout 0 20600 1 0 0 0 M - - -
`, " M ", " "+m+" ")
	all = strings.NewReplacer("OBJ", object, "SUM", digest, "YYY", content("64*y")).Replace(all)
	drop := func(s string, lines ...string) string {
		var out strings.Builder
		for line := range strings.Lines(s) {
			if !containsAny(line, lines) {
				out.WriteString(line)
			}
		}
		return out.String()
	}
	cut := func(s string, texts ...string) string {
		for _, text := range texts {
			s = strings.ReplaceAll(s, text, "")
		}
		return s
	}
	trusted := []string{" trusted.top=1", " trusted.secret=s", " trusted.onlink=yes"}
	for _, c := range []struct {
		name string
		o    ScanOptions
		want string
	}{
		{"all", ScanOptions{}, all},
		{"one thread", ScanOptions{Threads: 1}, all},
		{"epoch", ScanOptions{UseEpoch: true}, strings.ReplaceAll(all, m, "0.0")},
		{"no devices", ScanOptions{SkipDevices: true}, drop(all, "/far", "/null", "/whiteout")},
		{"user xattrs", ScanOptions{Xattrs: UserXattrs}, cut(all, trusted...)},
		{"no xattrs", ScanOptions{Xattrs: NoXattrs}, cut(all, append(trusted, " user.colour=blue")...)},
	} {
		root, err := Scan(context.Background(), dir, c.o)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		got := show(t, root)
		// A whiteout's folder has a marker that dumps show (section 2.14).
		got = cut(got, " trusted.overlay.opaque=x", " user.overlay.opaque=x")
		if got != c.want {
			t.Errorf("%s:\n%swant:\n%s", c.name, got, c.want)
		}
	}
}

func containsAny(s string, texts []string) bool {
	for _, text := range texts {
		if strings.Contains(s, text) {
			return true
		}
	}
	return false
}

func TestScanErrors(t *testing.T) {
	dir := treeOf(t, "file f 100*x")
	for path, want := range map[string]error{
		filepath.Join(dir, "absent"): unix.ENOENT,
		filepath.Join(dir, "f"):      unix.ENOTDIR,
	} {
		if _, err := Scan(context.Background(), path, ScanOptions{}); !errors.Is(err, want) {
			t.Errorf("Scan(%s) = %v, want %v", path, err, want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Scan(ctx, dir, ScanOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// A file that is not what the walk saw must not get a digest.
func TestScanOfChangingFile(t *testing.T) {
	dir := treeOf(t, "file f 100*x\nfile small ab")
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := &scanner{root: f}
	for _, n := range []*erofs.Node{
		{Mode: unix.S_IFREG | 0o644, Size: 99},
		{Mode: unix.S_IFREG | 0o600, Size: 100},
	} {
		if err := newContentReader(s).fill(job{n, "f"}); !errors.Is(err, errChanged) || !strings.Contains(err.Error(), "/f") {
			t.Errorf("mode %o, size %d: %v, want %v and the path", n.Mode, n.Size, err, errChanged)
		}
	}
}

func TestDeepFolders(t *testing.T) {
	dir := t.TempDir()
	at := dir
	for range 200 {
		at = filepath.Join(at, "d")
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(at, "f"), make([]byte, 5000), 0o644); err != nil {
		t.Fatal(err)
	}
	root, err := Scan(context.Background(), dir, ScanOptions{})
	if err != nil {
		t.Fatal(err)
	}
	n, depth := root, 0
	for len(n.Children) == 1 {
		n, depth = n.Children[0], depth+1
	}
	if depth != 201 || n.Name != "f" || len(n.Digest) != 32 {
		t.Errorf("at depth %d: %+v", depth, n)
	}
}

func TestWriteImage(t *testing.T) {
	root := &erofs.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2}
	var want bytes.Buffer
	if err := erofs.Write(&want, root, erofs.Options{}); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(in("old"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("old", in("link")); err != nil {
		t.Fatal(err)
	}
	for path, file := range map[string]string{in("new"): in("new"), in("link"): in("old")} {
		if err := WriteImage(path, root, erofs.Options{}); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, want.Bytes()) {
			t.Errorf("%s: %d bytes, %v", file, len(got), err)
		}
	}
	if fi, err := os.Lstat(in("link")); err != nil || fi.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link was replaced: %v, %v", fi, err)
	}
	if err := unix.Mkfifo(in("pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	read := make(chan []byte)
	go func() {
		b, _ := os.ReadFile(in("pipe"))
		read <- b
	}()
	if err := WriteImage(in("pipe"), root, erofs.Options{}); err != nil {
		t.Error(err)
	}
	if got := <-read; !bytes.Equal(got, want.Bytes()) {
		t.Errorf("through a pipe: %d bytes", len(got))
	}
	if err := WriteImage(dir, root, erofs.Options{}); !errors.Is(err, unix.EISDIR) {
		t.Errorf("to a folder: %v", err)
	}
	if err := WriteImage("/dev/null", root, erofs.Options{}); err != nil {
		t.Error(err)
	}
	if fi, err := os.Stat("/dev/null"); err != nil || fi.Mode().IsRegular() {
		t.Fatalf("/dev/null is %v, %v", fi.Mode(), err)
	}
}
