package mount

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// mountComposefs mounts an image until the test ends.
func mountComposefs(t *testing.T, imagePath string, o ComposefsOptions) string {
	t.Helper()
	mnt := t.TempDir()
	if err := Composefs(imagePath, mnt, o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := kmount.Unmount(mnt); err != nil {
			t.Error(err)
			kmount.Detach(mnt)
		}
	})
	return mnt
}

// objectPath is where the folder of objects has the one with this content.
func objectPath(t *testing.T, objects, content string) string {
	t.Helper()
	sum, err := verity.Digest(strings.NewReader(content), verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(objects, fmt.Sprintf("%x/%x", sum[:1], sum[1:]))
}

func TestComposefs(t *testing.T) {
	files := map[string]string{"a": "alpha", "b": strings.Repeat("b", 100_000)}
	imagePath, objects := composefsImage(t, files)
	// The object of b lies in a folder of its own, whose path is too long for
	// a parameter.
	long := filepath.Join(t.TempDir(), strings.Repeat("l", 200), strings.Repeat("o", 200))
	sum, err := verity.Digest(strings.NewReader(files["b"]), verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	object := fmt.Sprintf("%x/%x", sum[:1], sum[1:])
	if err := os.MkdirAll(filepath.Join(long, filepath.Dir(object)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(objects, object), filepath.Join(long, object)); err != nil {
		t.Fatal(err)
	}
	// Where fs-verity can be had it can be had of every object.
	for _, path := range []string{filepath.Join(long, object), objectPath(t, objects, files["a"])} {
		err := enableVerity(path)
		if _, unsupported := errors.AsType[*verity.NotSupportedError](err); err != nil && !unsupported {
			t.Fatal(err)
		}
	}
	upper, work := t.TempDir(), t.TempDir()
	for _, c := range []struct {
		name     string
		o        ComposefsOptions
		writable bool
	}{
		{"plain", ComposefsOptions{Basedirs: []string{objects, long}}, false},
		{"other order", ComposefsOptions{Basedirs: []string{long, objects}}, false},
		{"verity if it can be had", ComposefsOptions{Basedirs: []string{objects, long}, Verity: Try}, false},
		{"upper", ComposefsOptions{Basedirs: []string{objects, long}, Upper: upper, Work: work}, true},
		{"upper, read-only", ComposefsOptions{Basedirs: []string{objects, long}, Upper: upper, Work: work, ReadOnly: true}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			mnt := mountComposefs(t, imagePath, c.o)
			for name, want := range files {
				got, err := os.ReadFile(filepath.Join(mnt, name))
				if err != nil || string(got) != want {
					t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
				}
			}
			info, err := kmount.At(mnt)
			if err != nil || info.Source != "composefs" || info.FSType != "overlay" {
				t.Errorf("the mount table has %+v, %v", info, err)
			}
			err = os.WriteFile(filepath.Join(mnt, "new"), []byte("new"), 0o600)
			if c.writable {
				if got, rerr := os.ReadFile(filepath.Join(upper, "new")); err != nil || rerr != nil || string(got) != "new" {
					t.Errorf("write: %v, and the upper has %q, %v", err, got, rerr)
				}
			} else if !errors.Is(err, unix.EROFS) {
				t.Errorf("write: %v, want EROFS", err)
			}
		})
	}
}

// The objects may come after the mount.
func TestComposefsBeforeObjects(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha"})
	later := t.TempDir()
	mnt := mountComposefs(t, imagePath, ComposefsOptions{Basedirs: []string{later}})
	if _, err := os.ReadFile(filepath.Join(mnt, "a")); err == nil {
		t.Error("a file without an object was read")
	}
	if err := os.CopyFS(later, os.DirFS(objects)); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(mnt, "a")); err != nil || string(got) != "alpha" {
		t.Errorf("a = %q, %v", got, err)
	}
}

// A process in a user namespace, alive until the test ends.
func userNamespace(t *testing.T, from int) string {
	t.Helper()
	cmd := exec.Command("sleep", "60")
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: from, Size: 1000}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: ids, GidMappings: ids}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	return fmt.Sprintf("/proc/%d/ns/user", cmd.Process.Pid)
}

func TestComposefsIDMap(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha"})
	o := ComposefsOptions{Basedirs: []string{objects}, IDMap: userNamespace(t, 100000)}
	mnt := mountComposefs(t, imagePath, o)
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(mnt, "a"), &st); err != nil || st.Uid != 100000 || st.Gid != 100000 {
		t.Errorf("owned by %d:%d, %v; want 100000:100000", st.Uid, st.Gid, err)
	}
	o.IDMap = imagePath
	if err := Composefs(imagePath, t.TempDir(), o); !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), imagePath) {
		t.Errorf("idmap by what is no namespace: %v", err)
	}
}

func TestComposefsRefuses(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha"})
	f, err := os.Open(imagePath)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	right, err := verity.Digest(f, verity.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	plain := filepath.Join(t.TempDir(), "plain")
	if out, err := exec.Command("mkfs.erofs", plain, objects).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.erofs: %v\n%s", err, out)
	}
	mnt := t.TempDir()
	with := func(o ComposefsOptions) ComposefsOptions {
		o.Basedirs = append(o.Basedirs, objects)
		return o
	}
	for _, c := range []struct {
		name, image string
		o           ComposefsOptions
		want        string
	}{
		{"other digest", imagePath, with(ComposefsOptions{Digest: make([]byte, 32)}), "want sha256:0000"},
		// Nothing here has fs-verity enabled, whether or not the kernel knows it.
		{"digest without fs-verity", imagePath, with(ComposefsOptions{Digest: right}), "nothing keeps it so"},
		{"verity without fs-verity", imagePath, with(ComposefsOptions{Verity: Require}), "fs-verity"},
		{"no composefs", plain, with(ComposefsOptions{}), "not a composefs image"},
		{"no EROFS", "/dev/null", with(ComposefsOptions{}), "/dev/null"},
		{"no image", imagePath + "x", with(ComposefsOptions{}), "no such file"},
		{"no folder", imagePath, with(ComposefsOptions{Basedirs: []string{imagePath + "x"}}), "datadir+"},
		{"no upper", imagePath, with(ComposefsOptions{Upper: "/nothing", Work: "/nothing"}), "upperdir"},
	} {
		if err := Composefs(c.image, mnt, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
		if _, err := kmount.At(mnt); !errors.Is(err, kmount.ErrNotMounted) {
			t.Errorf("%s: something is mounted: %v", c.name, err)
			kmount.Detach(mnt)
		}
	}
}

func TestFirstObject(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha", "b": "beta"})
	r, err := erofs.OpenFile(imagePath)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, c := range []struct {
		dirs []string
		want string
	}{{[]string{t.TempDir()}, ""}, {[]string{t.TempDir(), objects}, "a"}} {
		o := overlay{objects: c.dirs}
		path, object, digest, err := o.firstObject(r)
		if err != nil || path != c.want {
			t.Errorf("firstObject in %v = %q, %v; want %q", c.dirs, path, err, c.want)
		}
		if c.want != "" && (!strings.HasPrefix(object, objects) || len(digest) != 32) {
			t.Errorf("object %s, digest %x", object, digest)
		}
	}
}
