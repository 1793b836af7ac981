package fusefs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// fakeContents holds objects in memory, and fails or blocks on request.
type fakeContents struct {
	mu      sync.Mutex
	objects map[string][]byte
	errs    map[string]error
	blocked map[string]chan struct{} // closed: go on
	reads   atomic.Int64
}

func (f *fakeContents) ReadAt(ctx context.Context, object string, p []byte, off int64) (int, bool, error) {
	f.reads.Add(1)
	f.mu.Lock()
	data, err, wait := f.objects[object], f.errs[object], f.blocked[object]
	f.mu.Unlock()
	if wait != nil {
		select {
		case <-wait:
		case <-ctx.Done():
			return 0, true, ctx.Err()
		}
	}
	if err != nil {
		return 0, false, err
	}
	if off >= int64(len(data)) {
		return 0, false, nil
	}
	return copy(p, data[off:]), wait != nil, nil
}

// A small language for trees: dir("x", file("y", "data"), …).

func node(mode uint32, name string) *erofs.Node {
	return &erofs.Node{Name: name, Mode: mode, UID: 1, GID: 2, Nlink: 1, MtimeSec: 1_700_000_000, MtimeNsec: 123}
}

func dir(name string, children ...*erofs.Node) *erofs.Node {
	n := node(unix.S_IFDIR|0o755, name)
	n.Children = children
	return n
}

func inline(name, data string) *erofs.Node {
	n := node(unix.S_IFREG|0o644, name)
	n.Content, n.Size = []byte(data), uint64(len(data))
	return n
}

// external is a file whose bytes are the object "aa/<name>" of size bytes.
func external(name string, size int) *erofs.Node {
	n := node(unix.S_IFREG|0o644, name)
	n.Size, n.Target = uint64(size), "aa/"+name
	return n
}

func symlink(name, target string) *erofs.Node {
	n := node(unix.S_IFLNK|0o777, name)
	n.Target = target
	return n
}

func device(name string, rdev uint32) *erofs.Node {
	n := node(unix.S_IFCHR|0o600, name)
	n.Rdev = rdev
	return n
}

func xattr(n *erofs.Node, name, value string) *erofs.Node {
	n.Xattrs = append(n.Xattrs, erofs.Xattr{Name: name, Value: []byte(value)})
	return n
}

// serve mounts the tree and returns its mount point.
func serve(t *testing.T, c Contents, o Options, children ...*erofs.Node) (string, *Server) {
	t.Helper()
	var buf bytes.Buffer
	if err := erofs.Write(&buf, dir("", children...), erofs.Options{MinVersion: 1, MaxVersion: 1}); err != nil {
		t.Fatal(err)
	}
	r, err := erofs.OpenBytes(buf.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	srv, err := Mount(mnt, r, c, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := srv.Close(ctx, mnt); err != nil {
			t.Error(err)
		}
		if _, err := kmount.At(mnt); !errors.Is(err, kmount.ErrNotMounted) {
			t.Errorf("after Close: %v, want ErrNotMounted", err)
		}
	})
	return mnt, srv
}

func TestTree(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	c := &fakeContents{objects: map[string][]byte{"aa/big": big}}
	mnt, _ := serve(t, c, Options{},
		inline("small", "inline bytes"),
		external("big", len(big)),
		node(unix.S_IFREG|unix.S_ISUID|0o4755, "empty"),
		symlink("link", "small"),
		device("null", 1<<8|3),
		dir("sub", dir("deep", inline("x", "y")), inline("odd\nname\xff", "z")),
		node(unix.S_IFIFO|0o600, "fifo"),
	)
	for path, want := range map[string]string{"small": "inline bytes", "link": "inline bytes", "sub/deep/x": "y", "sub/odd\nname\xff": "z", "empty": "", "big": string(big)} {
		got, err := os.ReadFile(filepath.Join(mnt, path))
		if err != nil || string(got) != want {
			t.Errorf("%q: %d bytes, %v; want %d bytes", path, len(got), err, len(want))
		}
	}
	entries, err := os.ReadDir(mnt)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{"big", "empty", "fifo", "link", "null", "small", "sub"}; !slices.Equal(names, want) {
		t.Errorf("names = %q, want %q (the stubs 00 to ff are whiteouts)", names, want)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(mnt, "null"), &st); err != nil || st.Rdev != 1<<8|3 || st.Mode != unix.S_IFCHR|0o600 {
		t.Errorf("null: rdev %d mode %o, %v", st.Rdev, st.Mode, err)
	}
	if st.Uid != 1 || st.Gid != 2 || st.Mtim.Sec != 1_700_000_000 || st.Mtim.Nsec != 123 {
		t.Errorf("null: owner %d:%d mtime %d.%d", st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	}
	if err := unix.Lstat(filepath.Join(mnt, "sub"), &st); err != nil || st.Nlink != 3 {
		t.Errorf("sub: %d links, %v; want 3", st.Nlink, err)
	}
	for _, absent := range []string{"00", "ff", "nosuch", "sub/nosuch"} {
		if _, err := os.Lstat(filepath.Join(mnt, absent)); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("lstat %s: %v, want ENOENT", absent, err)
		}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(mnt, &fs); err != nil || fs.Bfree != 0 || fs.Namelen != 255 {
		t.Errorf("statfs = %+v, %v", fs, err)
	}
}

func TestLargeFolder(t *testing.T) {
	const n = 20_000
	children := make([]*erofs.Node, n)
	for i := range children {
		children[i] = inline(fmt.Sprintf("file-%06d", i), "x")
	}
	mnt, _ := serve(t, &fakeContents{}, Options{}, dir("many", children...))
	entries, err := os.ReadDir(filepath.Join(mnt, "many"))
	if err != nil || len(entries) != n {
		t.Fatalf("%d entries, %v; want %d", len(entries), err, n)
	}
	for i, e := range entries {
		if want := fmt.Sprintf("file-%06d", i); e.Name() != want {
			t.Fatalf("entry %d = %s, want %s", i, e.Name(), want)
		}
	}
}

func TestXattrs(t *testing.T) {
	f := inline("f", "x")
	xattr(f, "user.plain", "a\x00b")
	xattr(f, "trusted.overlay.opaque", "y") // shown as it is: the writer escapes it
	xattr(f, "trusted.other", "t")
	xattr(f, "security.capability", "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	mnt, _ := serve(t, &fakeContents{objects: map[string][]byte{"aa/e": []byte("1")}}, Options{}, f, external("e", 1))
	path := filepath.Join(mnt, "f")
	buf := make([]byte, 4096)
	n, err := unix.Llistxattr(path, buf)
	if err != nil {
		t.Fatal(err)
	}
	names := strings.Split(strings.TrimRight(string(buf[:n]), "\x00"), "\x00")
	slices.Sort(names)
	if want := []string{"security.capability", "trusted.other", "trusted.overlay.opaque", "user.plain"}; !slices.Equal(names, want) {
		t.Errorf("names = %q, want %q", names, want)
	}
	for name, want := range map[string]string{"user.plain": "a\x00b", "trusted.overlay.opaque": "y", "trusted.other": "t"} {
		n, err := unix.Lgetxattr(path, name, buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("%s = %q, %v; want %q", name, buf[:max(n, 0)], err, want)
		}
	}
	if n, err := unix.Lgetxattr(path, "user.plain", nil); n != 3 || err != nil {
		t.Errorf("size of user.plain = %d, %v", n, err)
	}
	if _, err := unix.Lgetxattr(path, "user.plain", buf[:1]); err != unix.ERANGE {
		t.Errorf("short buffer: %v, want ERANGE", err)
	}
	// The image's own notes on external files are nobody's business.
	for _, name := range []string{"trusted.overlay.redirect", "trusted.overlay.metacopy", "user.none"} {
		if _, err := unix.Lgetxattr(filepath.Join(mnt, "e"), name, buf); err != unix.ENODATA {
			t.Errorf("%s: %v, want ENODATA", name, err)
		}
	}
	if n, err := unix.Llistxattr(filepath.Join(mnt, "e"), buf); n != 0 || err != nil {
		t.Errorf("xattrs of e: %q, %v; want none", buf[:max(n, 0)], err)
	}
}

func TestReadOnly(t *testing.T) {
	mnt, _ := serve(t, &fakeContents{}, Options{}, inline("f", "x"), dir("d"))
	f := filepath.Join(mnt, "f")
	for what, err := range map[string]error{
		"write":    os.WriteFile(f, nil, 0o600),
		"create":   os.WriteFile(f+"2", nil, 0o600),
		"mkdir":    os.Mkdir(f+"3", 0o700),
		"unlink":   os.Remove(f),
		"rmdir":    os.Remove(filepath.Join(mnt, "d")),
		"rename":   os.Rename(f, f+"4"),
		"link":     os.Link(f, f+"5"),
		"symlink":  os.Symlink("x", f+"6"),
		"chmod":    os.Chmod(f, 0o600),
		"chown":    os.Chown(f, 0, 0),
		"utimes":   os.Chtimes(f, time.Now(), time.Now()),
		"truncate": os.Truncate(f, 0),
		"setxattr": unix.Setxattr(f, "user.x", []byte("y"), 0),
		"mknod":    unix.Mknod(f+"7", unix.S_IFIFO, 0),
	} {
		if !errors.Is(err, unix.EROFS) {
			t.Errorf("%s: %v, want EROFS", what, err)
		}
	}
}

func TestErrnos(t *testing.T) {
	var reported atomic.Int64
	c := &fakeContents{errs: map[string]error{
		"aa/full": fmt.Errorf("store: %w", unix.ENOSPC), "aa/lost": errors.New("registry is gone"),
	}}
	mnt, _ := serve(t, c, Options{OnError: func(uint64, string, error) { reported.Add(1) }},
		external("full", 10), external("lost", 10), external("short", 10))
	for name, want := range map[string]error{"full": unix.ENOSPC, "lost": unix.EIO, "short": unix.EIO} {
		if _, err := os.ReadFile(filepath.Join(mnt, name)); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
	if reported.Load() < 3 {
		t.Errorf("%d errors reported, want at least 3", reported.Load())
	}
}

// The second pass over everything must not reach us: that is what the long
// timeouts, the kept caches and ENOSYS to OPEN are for.
func TestKernelKeepsWhatItKnows(t *testing.T) {
	c := &fakeContents{objects: map[string][]byte{"aa/a": []byte("aaaa"), "aa/b": []byte("bbbb")}}
	mnt, srv := serve(t, c, Options{}, external("a", 4), dir("d", external("b", 4)))
	pass := func() {
		for _, p := range []string{"a", "d/b"} {
			if _, err := os.ReadFile(filepath.Join(mnt, p)); err != nil {
				t.Fatal(err)
			}
		}
		os.Lstat(filepath.Join(mnt, "absent"))
	}
	pass()
	reads := c.reads.Load()
	if reads != 2 {
		t.Errorf("first pass: %d reads, want 2", reads)
	}
	before := srv.Requests()
	if before["lookup"] == 0 || before["read"] != 2 || before["open"] > 1 || before["flush"] > 1 {
		t.Errorf("first pass asked for %v", before)
	}
	pass()
	if after := srv.Requests(); !maps.Equal(after, before) {
		t.Errorf("second pass: %v requests, %v before it", after, before)
	}
}

// A reader that waits for a source must die when it is killed, and must not
// notice a signal that it handles.
func TestSignals(t *testing.T) {
	wait := make(chan struct{})
	c := &fakeContents{
		objects: map[string][]byte{"aa/slow": []byte("slow bytes")},
		blocked: map[string]chan struct{}{"aa/slow": wait},
	}
	mnt, _ := serve(t, c, Options{}, external("slow", 10))
	path := filepath.Join(mnt, "slow")

	for _, direct := range []string{"", "iflag=direct"} { // by readahead, and by a request of its own
		cmd := exec.Command("dd", "status=none", "if="+path, direct)
		if direct == "" {
			cmd.Args = cmd.Args[:3]
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(300 * time.Millisecond)
		start := time.Now()
		cmd.Process.Signal(unix.SIGTERM) // SIGINT may be ignored, and that is inherited
		cmd.Wait()
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("dd %s ended %v after SIGTERM, want at once", direct, d)
		}
	}

	// This one handles the signal and must get its bytes all the same.
	cmd := exec.Command("python3", "-c", `
import mmap, os, signal, sys
signal.signal(signal.SIGUSR1, lambda *a: None)
fd = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT)
buf = mmap.mmap(-1, 4096)
print("ready", flush=True)
n = os.readv(fd, [buf])
print(buf[:n].decode())
`, path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	lines.Scan() // ready
	time.Sleep(200 * time.Millisecond)
	cmd.Process.Signal(unix.SIGUSR1)
	time.Sleep(200 * time.Millisecond)
	close(wait)
	lines.Scan()
	if err := cmd.Wait(); err != nil || lines.Text() != "slow bytes" {
		t.Errorf("reader with a handler got %q, %v", lines.Text(), err)
	}
}

// A held file stays readable after the mount is gone from sight, and the
// server ends when it is closed.
func TestHeldFile(t *testing.T) {
	c := &fakeContents{objects: map[string][]byte{"aa/f": []byte("held")}}
	var buf bytes.Buffer
	if err := erofs.Write(&buf, dir("", external("f", 4)), erofs.Options{MinVersion: 1, MaxVersion: 1}); err != nil {
		t.Fatal(err)
	}
	r, err := erofs.OpenBytes(buf.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	srv, err := Mount(mnt, r, c, Options{})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(mnt, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := kmount.Detach(mnt); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(f)
	if err != nil || string(got) != "held" {
		t.Errorf("held file: %q, %v", got, err)
	}
	select {
	case <-srv.Done():
		t.Error("the server ended while a file was open")
	case <-time.After(100 * time.Millisecond):
	}
	f.Close()
	select {
	case <-srv.Done():
	case <-time.After(10 * time.Second):
		t.Error("the server did not end after the last file was closed")
	}
}
