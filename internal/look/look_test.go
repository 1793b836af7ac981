package look

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

// fakeContents have the bytes of objects in memory.
type fakeContents map[string]string

func (c fakeContents) ReadAt(_ context.Context, object string, p []byte, off int64) (int, bool, error) {
	s, ok := c[object]
	if !ok {
		return 0, false, fs.ErrNotExist
	}
	return copy(p, s[off:]), false, nil
}

// lateContents can be read when something has been done.
type lateContents struct {
	Contents
	done <-chan struct{}
}

func (c lateContents) ReadAt(ctx context.Context, object string, p []byte, off int64) (int, bool, error) {
	select {
	case <-c.done:
	case <-ctx.Done():
		return 0, false, ctx.Err()
	}
	return c.Contents.ReadAt(ctx, object, p, off)
}

const large = 6000 // more than an image holds itself

// tree makes a tree of nodes in the root.
func tree(t *testing.T, children ...*erofs.Node) *Tree {
	t.Helper()
	var image bytes.Buffer
	if err := erofs.Write(&image, &erofs.Node{Mode: unix.S_IFDIR | 0o755, Children: children}, erofs.Options{MaxVersion: 1}); err != nil {
		t.Fatal(err)
	}
	r, err := erofs.OpenBytes(image.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	contents := fakeContents{}
	for _, name := range []string{"aa/a", "bb/b"} {
		contents[name] = strings.Repeat(name[:1], large)
	}
	return New(r, contents)
}

func dir(name string, children ...*erofs.Node) *erofs.Node {
	return &erofs.Node{Name: name, Mode: unix.S_IFDIR | 0o750, Children: children, MtimeSec: 1e9}
}

func file(name, content string) *erofs.Node {
	return &erofs.Node{Name: name, Mode: unix.S_IFREG | 0o640, Nlink: 1, Size: uint64(len(content)), Content: []byte(content), MtimeSec: 1e9, MtimeNsec: 7}
}

func external(name, object string) *erofs.Node {
	return &erofs.Node{Name: name, Mode: unix.S_IFREG | 0o600, Nlink: 1, Size: large, Target: object, Digest: bytes.Repeat([]byte{object[0]}, 32)}
}

func link(name, target string) *erofs.Node {
	return &erofs.Node{Name: name, Mode: unix.S_IFLNK | 0o777, Nlink: 1, Target: target}
}

func TestFind(t *testing.T) {
	tr := tree(t, dir("a", dir("b", file("f", "hi")), link("up", "../a/b"), link("abs", "/a/b/f")), link("far", "/../../a/./up//"), link("x", "y"), link("y", "x"))
	for _, c := range []struct {
		path   string
		follow bool
		want   string
		err    error
	}{
		{"", false, "/", nil}, {"/", true, "/", nil}, {"/a/b/f", false, "/a/b/f", nil}, {"a/b/../b/f", false, "/a/b/f", nil},
		{"/../../a", false, "/a", nil}, {"/a/up", false, "/a/up", nil}, {"/a/up", true, "/a/b", nil}, {"/a/up/f", false, "/a/b/f", nil},
		{"/far/f", false, "/a/b/f", nil}, {"/a/abs", true, "/a/b/f", nil}, {"/x", false, "/x", nil}, {"/x", true, "", unix.ELOOP}, {"/x/y", false, "", unix.ELOOP},
		{"/none", false, "", fs.ErrNotExist}, {"/a/b/f/g", false, "", unix.ENOTDIR}, {"/a/b/f/..", false, "/a/b", nil}, {"/a/abs/g", false, "", unix.ENOTDIR},
		{"/ff", false, "", fs.ErrNotExist}, // a whiteout that hides a folder of objects
	} {
		f, err := tr.Find(c.path, c.follow)
		if !errors.Is(err, c.err) || err == nil && f.Path != c.want {
			t.Errorf("%s: %s, %v; want %s, %v", c.path, f.Path, err, c.want, c.err)
		}
	}
}

func TestOpen(t *testing.T) {
	tr := tree(t, file("in", "inside"), external("out", "aa/a"), external("lost", "cc/c"), dir("d"))
	for name, want := range map[string]string{"/in": "inside", "/out": strings.Repeat("a", large)} {
		f, err := tr.Find(name, true)
		if err != nil {
			t.Fatal(err)
		}
		r, err := tr.Open(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(r); err != nil || string(got) != want {
			t.Errorf("%s: %.20q, %v", name, got, err)
		}
	}
	lost, err := tr.Find("/lost", true)
	if err != nil {
		t.Fatal(err)
	}
	r, err := tr.Open(t.Context(), lost)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(r); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/lost") {
		t.Error(err)
	}
	d, err := tr.Find("/d", true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Open(t.Context(), d); !errors.Is(err, unix.EISDIR) {
		t.Error(err)
	}
}

func TestDiff(t *testing.T) {
	a := tree(t, dir("d", file("gone", "12"), external("same", "aa/a"), external("other", "aa/a")), file("kind", "x"), link("l", "1"), file("inline", "abc"), file("z", "z"))
	mode := file("z", "z")
	mode.Mode, mode.UID, mode.MtimeSec = unix.S_IFREG|0o4755, 7, 5
	mode.Xattrs = []erofs.Xattr{{Name: "user.x", Value: []byte("1")}}
	b := tree(t, dir("d", external("same", "aa/a"), external("other", "bb/b"), dir("new", file("n", "123"))), dir("kind", file("k", "k")), link("l", "2"), file("inline", "abd"), mode)
	for _, c := range []struct {
		times bool
		want  []string
	}{
		{false, []string{"removed /d/gone [] 2 0", "added /d/new [] 0 0", "added /d/new/n [] 0 3", "changed /d/other [content] 6000 6000",
			"changed /inline [content] 3 3", "changed /kind [type mode] 1 0", "added /kind/k [] 0 1", "changed /l [target] 0 0", "changed /z [mode owner xattrs] 1 1"}},
		{true, nil},
	} {
		var got []string
		fa, err := a.Find("/", false)
		if err != nil {
			t.Fatal(err)
		}
		fb, err := b.Find("/", false)
		if err != nil {
			t.Fatal(err)
		}
		err = Diff(a, b, fa, fb, c.times, func(ch Change) error {
			got = append(got, fmt.Sprint(ch.Kind, " ", ch.Path, " ", ch.What, " ", ch.Before, " ", ch.After))
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if c.want != nil && !slices.Equal(got, c.want) {
			t.Errorf("got  %q\nwant %q", got, c.want)
		}
		if c.times && !slices.Contains(got, "changed /z [mode owner mtime xattrs] 1 1") {
			t.Errorf("with times: %q", got)
		}
	}
}

// TestCopy copies over what is there: files, folders, links of a stranger.
func TestCopy(t *testing.T) {
	hard := file("h", "hard")
	hard.Nlink = 2
	caps := external("big", "aa/a")
	caps.Xattrs = []erofs.Xattr{{Name: "user.note", Value: []byte("v")}}
	tr := tree(t, dir("top", hard, &erofs.Node{Name: "i", Link: hard}, caps, dir("sub", file("f", "new")), link("l", "/etc/passwd"), link("sub2", "sub")))
	top, err := tr.Find("/top", false)
	if err != nil {
		t.Fatal(err)
	}
	to := t.TempDir()
	outside := filepath.Join(to, "outside")
	here := filepath.Join(to, "here")
	for _, d := range []string{outside, here, filepath.Join(here, "top")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside+"/victim", filepath.Join(here, "top/h")); err != nil {
		t.Fatal(err)
	}
	var fetched []string
	var bytesSeen int64
	// A copy that has all it reads may end before anything is fetched ahead: this one waits.
	ahead, brought := context.WithCancel(t.Context())
	defer brought()
	tr.contents = lateContents{tr.contents, ahead.Done()}
	o := CopyOptions{Recursive: true, Bytes: func(n int64) { bytesSeen += n }, Fetch: func(_ context.Context, object string) error {
		fetched = append(fetched, object)
		brought()
		return nil
	}}
	done, err := tr.Copy(t.Context(), top, here, "top", o)
	if err != nil || done.Files != 8 || done.Bytes != large+4+3 || bytesSeen != done.Bytes || !slices.Equal(fetched, []string{"aa/a"}) {
		t.Fatalf("%+v, %v, fetched %q", done, err, fetched)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
	var h, i unix.Stat_t
	if err := errors.Join(unix.Lstat(here+"/top/h", &h), unix.Lstat(here+"/top/i", &i)); err != nil || h.Ino != i.Ino || h.Mode&unix.S_IFMT != unix.S_IFREG {
		t.Errorf("h and i: %v, inodes %d and %d, mode %o", err, h.Ino, i.Ino, h.Mode)
	}
	if h.Mtim.Sec != 1e9 || h.Mtim.Nsec != 7 || h.Mode&0o7777 != 0o640 {
		t.Errorf("h: %+v", h)
	}
	got, err := os.ReadFile(here + "/top/big")
	value := make([]byte, 10)
	n, xerr := unix.Getxattr(here+"/top/big", "user.note", value)
	if err != nil || string(got) != strings.Repeat("a", large) || xerr != nil || string(value[:n]) != "v" {
		t.Errorf("big: %d bytes, %v, user.note %q, %v", len(got), err, value[:max(0, n)], xerr)
	}
	if target, err := os.Readlink(here + "/top/l"); err != nil || target != "/etc/passwd" {
		t.Errorf("l leads to %q, %v", target, err)
	}

	// What is in a folder keeps its hard links, too.
	into := t.TempDir()
	if done, err := tr.CopyInto(t.Context(), top, into, o); err != nil || done.Files != 7 {
		t.Errorf("%+v, %v", done, err)
	}
	if err := errors.Join(unix.Lstat(into+"/h", &h), unix.Lstat(into+"/i", &i)); err != nil || h.Ino != i.Ino {
		t.Errorf("h and i: %v, inodes %d and %d", err, h.Ino, i.Ino)
	}

	// A folder that is a link leads nowhere.
	if err := errors.Join(os.RemoveAll(here+"/top/sub"), os.Symlink(outside, here+"/top/sub")); err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Copy(t.Context(), top, here, "top", o); err == nil || !strings.Contains(err.Error(), "link") {
		t.Errorf("a copy through a link: %v", err)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside: %v, %v", left, err)
	}
	for _, name := range []string{"", "..", "a/b", "."} {
		if _, err := tr.Copy(t.Context(), top, here, name, o); err == nil {
			t.Errorf("a copy to the name %q", name)
		}
	}
	if _, err := tr.Copy(t.Context(), top, here, "top", CopyOptions{}); err == nil {
		t.Error("a folder was copied without Recursive")
	}
}

// TestCycle has a folder be below itself: everything ends.
func TestCycle(t *testing.T) {
	var image bytes.Buffer
	if err := erofs.Write(&image, &erofs.Node{Mode: unix.S_IFDIR | 0o755, Children: []*erofs.Node{dir("a", dir("b", dir("name-of-it")))}}, erofs.Options{MaxVersion: 1}); err != nil {
		t.Fatal(err)
	}
	b := image.Bytes()
	r, err := erofs.OpenBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	tr := New(r, fakeContents{})
	var nids [2]uint64
	for i, name := range []string{"/a", "/a/b"} {
		f, err := tr.Find(name, false)
		if err != nil {
			t.Fatal(err)
		}
		nids[i] = f.NID
	}
	// The entry of b in a leads back to a.
	find, to := binary.LittleEndian.AppendUint64(nil, nids[1]), binary.LittleEndian.AppendUint64(nil, nids[0])
	changed := 0
	for at := 0; at+12 <= len(b); at += 4 { // its offset of the name is that of the third entry
		if bytes.Equal(b[at:at+8], find) && binary.LittleEndian.Uint16(b[at+8:]) == 3*12+3 {
			changed += copy(b[at:], to)
		}
	}
	if changed != 8 {
		t.Fatalf("%d bytes were changed", changed)
	}
	top, err := tr.Find("/a", false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.Copy(t.Context(), top, t.TempDir(), "a", CopyOptions{Recursive: true}); !errors.Is(err, unix.ELOOP) {
		t.Errorf("copy: %v", err)
	}
	if err := tr.Walk(top, func(File, int) error { return nil }); !errors.Is(err, unix.ELOOP) {
		t.Errorf("walk: %v", err)
	}
	for f := top; ; { // as who walks for himself
		all, err := tr.Children(f)
		if errors.Is(err, unix.ELOOP) {
			break
		}
		if err != nil || len(all) != 1 {
			t.Fatalf("%.100s: %d children, %v", f.Path, len(all), err)
		}
		f = all[0]
	}
	if err := Diff(tr, tr, top, top, false, func(Change) error { return nil }); !errors.Is(err, unix.ELOOP) {
		t.Errorf("diff: %v", err)
	}
}
