package mount

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

func TestParseIDMap(t *testing.T) {
	for _, c := range []struct {
		in         string
		uids, gids []syscall.SysProcIDMap
	}{
		{"0-100000-65536", ids(0, 100000, 65536), ids(0, 100000, 65536)},
		{"0-1000-1,1-100000-10:5-6-1", ids(0, 1000, 1, 1, 100000, 10), ids(5, 6, 1)},
		{"0-0-4294967295", ids(0, 0, 4294967295), ids(0, 0, 4294967295)},
	} {
		uids, gids, err := parseIDMap(c.in)
		if err != nil || !slices.Equal(uids, c.uids) || !slices.Equal(gids, c.gids) {
			t.Errorf("%s: %v, %v, %v; want %v, %v", c.in, uids, gids, err, c.uids, c.gids)
		}
	}
	for _, bad := range []string{
		"", ":", "0-1", "0-1-1:", ":0-1-1", "0-1-1:0-1-1:0-1-1", "a-1-1", "0-1--1", "0-1-0", "0-1-1 ", "+0-1-1",
		"0-1-4294967295", "4294967295-0-1", "0-1-10,9-20-1", "0-1-10,20-10-1", strings.Repeat("0-1-1,", 340) + "0-1-1",
	} {
		if _, _, err := parseIDMap(bad); err == nil {
			t.Errorf("%.40q: no error", bad)
		}
	}
}

// ids makes ranges of three numbers each: in the image, on the host, how many.
func ids(n ...int) (all []syscall.SysProcIDMap) {
	for r := range slices.Chunk(n, 3) {
		all = append(all, syscall.SysProcIDMap{ContainerID: r[0], HostID: r[1], Size: r[2]})
	}
	return all
}

func FuzzParseIDMap(f *testing.F) {
	for _, s := range []string{"0-100000-65536", "0-1000-1,1-100000-10:5-6-1", "0-1-4294967295", "-:,"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		uids, gids, err := parseIDMap(s)
		if err != nil {
			return
		}
		for _, r := range append(uids, gids...) {
			if r.Size < 1 || r.ContainerID < 0 || r.HostID < 0 || r.ContainerID+r.Size > 1<<32-1 || r.HostID+r.Size > 1<<32-1 {
				t.Errorf("%q: %+v", s, r)
			}
		}
	})
}

// acl is system.posix_acl_access (linux/posix_acl_xattr.h) that gives one user
// more than its owner, group and others have.
func acl(user uint32) string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range [][3]uint32{{1, 6, 1<<32 - 1}, {2, 7, user}, {4, 4, 1<<32 - 1}, {16, 7, 1<<32 - 1}, {32, 4, 1<<32 - 1}} {
		b = binary.LittleEndian.AppendUint16(b, uint16(e[0]))
		b = binary.LittleEndian.AppendUint16(b, uint16(e[1]))
		b = binary.LittleEndian.AppendUint32(b, e[2])
	}
	return string(b)
}

// ownedFiles is an image whose files have owners.
func ownedFiles(t *testing.T) string {
	return layout(t, []imagetest.Item{
		imagetest.Dir("home", imagetest.Owner(1000, 1001), imagetest.Mode(0o755)),
		imagetest.File("home/a", "alpha", imagetest.Owner(1000, 1001)),
		imagetest.File("root", "of root"), imagetest.File("gone", "deleted"),
		imagetest.File("acl", "listed", imagetest.Xattr("system.posix_acl_access", acl(1000)), imagetest.Mode(0o674)),
		imagetest.File("high", "not mapped", imagetest.Owner(70000, 70000)),
		imagetest.Random("big", 300_000, 1, imagetest.Owner(7, 8)), imagetest.Symlink("link", "root", imagetest.Owner(3, 4)),
	})
}

// owners checks who owns the files of ownedFiles.
func owners(t *testing.T, mnt string, uid, gid uint32) {
	t.Helper()
	for path, want := range map[string][2]uint32{
		"home": {uid + 1000, gid + 1001}, "home/a": {uid + 1000, gid + 1001}, "root": {uid, gid}, "": {uid, gid},
		"acl": {uid, gid}, "big": {uid + 7, gid + 8}, "link": {uid + 3, gid + 4}, "high": {65534, 65534},
	} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(mnt, path), &st); err != nil || st.Uid != want[0] || st.Gid != want[1] {
			t.Errorf("/%s belongs to %d:%d, %v; want %d:%d", path, st.Uid, st.Gid, err, want[0], want[1])
		}
	}
	value := make([]byte, 100)
	n, err := unix.Getxattr(filepath.Join(mnt, "acl"), "system.posix_acl_access", value)
	if err != nil || string(value[:n]) != acl(uid+1000) {
		t.Errorf("ACL %x, %v; want %x", value[:max(n, 0)], err, acl(uid+1000))
	}
	if got, err := os.ReadFile(filepath.Join(mnt, "home/a")); err != nil || string(got) != "alpha" {
		t.Errorf("home/a = %q, %v", got, err)
	}
}

// The owners are mapped while the mount is lazy, after the swap, of which the
// process that lent its user namespace knows nothing any more, and when the
// kernel alone mounts the image.
func TestIDMap(t *testing.T) {
	source := ownedFiles(t)
	t.Run("mapping", func(t *testing.T) {
		o := Options{Root: filepath.Join(t.TempDir(), "root"), View: View{IDMap: "0-100000-65536:0-200000-65536"}}
		m, mnt := start(t, source, o)
		if s := m.Status(); s.IDMap != o.View.IDMap || s.Backend == string(FUSE) {
			t.Errorf("status: %+v", s)
		}
		owners(t, mnt, 100000, 200000)
		waitFor(t, m, Swapped)
		owners(t, mnt, 100000, 200000)
		end(t, m, mnt)
		m, mnt = start(t, source, o)
		if s := m.Status(); s.State != Swapped || s.Backend != "kernel" {
			t.Errorf("mounted again: %+v", s)
		}
		owners(t, mnt, 100000, 200000)
	})
	t.Run("namespace", func(t *testing.T) {
		cmd := exec.Command("sleep", "1000")
		high := ids(0, 300000, 65536)
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER, UidMappings: high, GidMappings: high}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := false
		stop := func() {
			if !ended {
				cmd.Process.Kill()
				cmd.Wait()
				ended = true
			}
		}
		defer stop()
		m, mnt := start(t, source, Options{View: View{IDMap: fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid)}, Swap: Never})
		owners(t, mnt, 300000, 300000)
		stop()
		waitFor(t, m, Sealed)
		if err := m.swap(); err != nil {
			t.Fatal(err)
		}
		owners(t, mnt, 300000, 300000)
	})
	for spec, word := range map[string]string{"/proc/self/ns/user": "map the IDs", "/no/such/file": "user namespace", "1-2": "IMAGE-HOST-COUNT"} {
		refusedView(t, source, Options{View: View{IDMap: spec}}, word)
	}
	refusedView(t, source, Options{View: View{IDMap: "0-1-1"}, Backend: FUSE}, "--backend fuse")
	refusedView(t, "composefs:/no/such", Options{View: View{IDMap: "0-1-1"}}, "composefs:")
}

// refusedView checks that a mount fails with word, and leaves nothing mounted.
func refusedView(t *testing.T, source string, o Options, word string) {
	t.Helper()
	if o.Root == "" {
		o.Root = filepath.Join(t.TempDir(), "root")
	}
	mnt := t.TempDir()
	m, err := Start(t.Context(), source, mnt, o)
	if err == nil {
		end(t, m, mnt)
	}
	if err == nil || !strings.Contains(err.Error(), word) || hint.Of(err) == "" {
		t.Errorf("%+v: %v, hint %q; want %q and a hint", o.View, err, hint.Of(err), word)
	}
	if info, err := kmount.At(mnt); !errors.Is(err, kmount.ErrNotMounted) {
		t.Errorf("%+v: %+v is mounted, %v", o.View, info, err)
	}
}

// A writable mount takes changes while it is lazy, goes on when everything is
// whole, says why it is not swapped, and shows the changes again when the kernel
// alone mounts the image.
func TestUpper(t *testing.T) {
	source := ownedFiles(t)
	dir := t.TempDir()
	o := Options{
		Root: filepath.Join(dir, "root"), NoFill: true,
		View: View{Upper: filepath.Join(dir, "upper"), Work: filepath.Join(dir, "work"), IDMap: "0-100000-65536"},
	}
	refusedView(t, source, o, "--")
	for _, d := range []string{o.View.Upper, o.View.Work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, more := range []func(*Options){
		func(o *Options) { o.View.Work = "" },
		func(o *Options) { o.Swap = Require },
		func(o *Options) { o.Verity = Require },
		func(o *Options) { o.Backend = FUSE },
	} {
		bad := o
		more(&bad)
		mnt := t.TempDir()
		if m, err := Start(t.Context(), source, mnt, bad); err == nil {
			end(t, m, mnt)
			t.Errorf("%+v was mounted", bad)
		}
	}
	m, mnt := start(t, source, o)
	change := func(name string, do func(path string) error) {
		t.Helper()
		if err := do(filepath.Join(mnt, name)); err != nil {
			t.Error(err)
		}
	}
	change("new", func(p string) error { return os.WriteFile(p, []byte("written"), 0o644) })
	change("gone", os.Remove)
	change("big", func(p string) error { return os.Chown(p, 100042, 100043) }) // overlayfs copies no byte
	change("root", func(p string) error { return os.WriteFile(p, []byte("changed"), 0o644) })
	change("home", func(p string) error { return os.Rename(filepath.Join(p, "a"), filepath.Join(mnt, "moved")) })
	check := func() {
		t.Helper()
		for name, want := range map[string]string{
			"new": "written", "root": "changed", "moved": "alpha", "acl": "listed", "big": string(imagetest.RandomBytes(300_000, 1)),
		} {
			if got, err := os.ReadFile(filepath.Join(mnt, name)); err != nil || string(got) != want {
				t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
			}
		}
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(mnt, "big"), &st); err != nil || st.Uid != 100042 || st.Gid != 100043 {
			t.Errorf("big belongs to %d:%d, %v", st.Uid, st.Gid, err)
		}
		if err := unix.Stat(filepath.Join(mnt, "moved"), &st); err != nil || st.Uid != 101000 || st.Gid != 101001 {
			t.Errorf("moved belongs to %d:%d, %v", st.Uid, st.Gid, err)
		}
		for _, name := range []string{"gone", "home/a"} {
			if _, err := os.Lstat(filepath.Join(mnt, name)); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s: %v, want ENOENT", name, err)
			}
		}
	}
	check()
	second := o
	second.Root = filepath.Join(dir, "other")
	refusedView(t, source, second, mnt+" uses it")
	readTree(t, mnt)
	m.contentsRead(t)
	waitFor(t, m, Sealed)
	check()
	change("later", func(p string) error { return os.WriteFile(p, []byte("after everything was whole"), 0o644) })
	err := m.WaitFor(t.Context(), Swapped)
	if !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "upperdir") {
		t.Errorf("WaitFor swapped: %v", err)
	}
	if err := m.swap(); err == nil || !strings.Contains(err.Error(), "upperdir") {
		t.Errorf("swap by hand: %v", err)
	}
	if s := m.Status(); s.State != Sealed || s.Backend != string(Hybrid) || s.Upper != o.View.Upper || s.Work != o.View.Work {
		t.Errorf("status: %+v", s)
	}
	end(t, m, mnt)

	m, mnt = start(t, source, o)
	s := m.Status()
	if s.State != Swapped || s.Backend != "kernel" {
		t.Errorf("mounted again: %+v", s)
	}
	if rec, ok := m.sealedRecord(); !ok || rec.Verity == verityEnforced && !strings.Contains(s.Verity, "attributes were changed while none was enforced") {
		t.Errorf("%+v, %v: verity: %s", rec, ok, s.Verity)
	} else if rec.Verity == verityEnforced {
		require := o
		require.Verity, require.Swap = Require, Require
		require.View.Upper, require.View.Work = o.View.Upper, o.View.Work
		end(t, m, mnt)
		refusedView(t, source, require, "attributes were changed")
		m, mnt = start(t, source, o)
	}
	check()
	change("big", func(p string) error { return os.WriteFile(p, imagetest.RandomBytes(300_000, 1), 0o644) })
	change("yet another", func(p string) error { return os.WriteFile(p, nil, 0o644) })
	check()
	end(t, m, mnt)

	o.View.ReadOnly = true
	_, mnt = start(t, source, o)
	check()
	if err := os.WriteFile(filepath.Join(mnt, "x"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a mount that is read-only: %v, want EROFS", err)
	}
}

// contentsRead reads, through the mount, whatever is not local yet: a file that
// was deleted or replaced is not met by a walk.
func (m *Mount) contentsRead(t *testing.T) {
	t.Helper()
	for i := range m.image.index.Contents() {
		if err := m.fetch.Need(t.Context(), i, 0, m.image.index.Content(i).Size); err != nil {
			t.Error(err)
		}
	}
}

// With SELinux the context is what mount tables show; without, the kernel says
// that it does not know the option, and nothing is mounted.
func TestContext(t *testing.T) {
	const context = "system_u:object_r:container_file_t:s0:c1,c2"
	source := twoLayers(t)
	eachBackend(t, func(t *testing.T, b Backend) {
		o := Options{Backend: b, View: View{Context: context}}
		if _, err := os.Stat("/sys/fs/selinux/enforce"); err != nil {
			refusedView(t, source, o, "Unknown parameter 'context'")
			return
		}
		m, mnt := start(t, source, o)
		for _, s := range []State{Lazy, Swapped} {
			waitFor(t, m, s)
			if info, err := kmount.At(mnt); err != nil || !strings.Contains(info.Options, "container_file_t") {
				t.Errorf("%v: %+v, %v", s, info, err)
			}
		}
	})
	refusedView(t, source, Options{View: View{Context: strings.Repeat("x", 256)}}, "the kernel takes")
}
