package mount

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// composefsImage writes a composefs image of the named files and its folder of
// objects, and returns the paths of both.
func composefsImage(t *testing.T, files map[string]string) (imagePath, objects string) {
	t.Helper()
	dir := t.TempDir()
	objects = filepath.Join(dir, "objects")
	root := &erofs.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2}
	for name, data := range files {
		sum, err := verity.Digest(strings.NewReader(data), verity.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		object := image.Digest(sum).Path()
		if err := os.MkdirAll(filepath.Join(objects, filepath.Dir(object)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(objects, object), []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		root.Children = append(root.Children, &erofs.Node{
			Name: name, Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: uint64(len(data)), Target: object, Digest: sum,
		})
	}
	imagePath = filepath.Join(dir, sealedName)
	if err := erofs.WriteFile(imagePath, root, imageFormat); err != nil {
		t.Fatal(err)
	}
	return imagePath, objects
}

// attach makes a mount visible until the test ends.
func attach(t *testing.T, m *os.File) string {
	t.Helper()
	mnt := t.TempDir()
	if err := kmount.Attach(m, mnt); err != nil {
		t.Fatal(err)
	}
	m.Close()
	t.Cleanup(func() {
		if err := kmount.Unmount(mnt); err != nil {
			t.Error(err)
			kmount.Detach(mnt)
		}
	})
	return mnt
}

func TestKernelMount(t *testing.T) {
	big := strings.Repeat("block ", 100_000)
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha", "b": big})
	m, err := kernelMount(imagePath, objects, nil, shownView{})
	if err != nil {
		t.Fatal(err)
	}
	mnt := attach(t, m)
	for name, want := range map[string]string{"a": "alpha", "b": big} {
		got, err := os.ReadFile(filepath.Join(mnt, name))
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v; want %d", name, len(got), err, len(want))
		}
	}
	info, err := kmount.At(mnt)
	if err != nil || !isSealedMount(info) {
		t.Errorf("At = %+v, %v; want a mount that is recognised as sealed", info, err)
	}
	if err := os.WriteFile(filepath.Join(mnt, "c"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write: %v, want EROFS", err)
	}
}

// The probe must find what mounting itself does not: an object that is not
// there, and verity on a kernel without it.
func TestKernelMountProbes(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha"})
	if _, err := kernelMount(imagePath, t.TempDir(), nil, shownView{}); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EIO) {
		t.Errorf("without objects: %v, want ENOENT or EIO", err)
	}
	digest, err := measure(imagePath)
	if err != nil {
		t.Fatal(err)
	}
	// The objects have no fs-verity, so that enforcing it must fail, on a
	// kernel that knows it and on one that does not.
	if m, err := kernelMount(imagePath, objects, digest[:], shownView{}); err == nil {
		m.Close()
		t.Error("verity was enforced on objects without fs-verity")
	}
	// An image with another digest than the recorded one is not mounted at all.
	other := digest
	other[0] ^= 1
	_, err = kernelMount(imagePath, objects, other[:], shownView{})
	if mismatch, ok := errors.AsType[*verity.MismatchError](err); !ok || !bytes.Equal(mismatch.Got, digest[:]) {
		t.Errorf("an image with another digest: %v, want a mismatch with the right one", err)
	}
	damaged := filepath.Join(t.TempDir(), "x.erofs")
	if err := os.WriteFile(damaged, bytes.Repeat([]byte{0xe0}, 16384), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := kernelMount(damaged, objects, nil, shownView{}); err == nil {
		t.Error("a file of noise was mounted")
	}
}

// Kernels before 6.12 mount EROFS from a block device only.
func TestLoopDevice(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha"})
	dev, err := loopDevice(imagePath)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Base(dev.Name())
	lower, err := kmount.New("erofs", unix.MOUNT_ATTR_RDONLY, kmount.Flag("ro"), kmount.String("source", dev.Name()))
	dev.Close()
	if err != nil {
		t.Fatal(err)
	}
	o := overlay{source: imagePath, lower: lower, objects: []string{objects}, readOnly: true}
	m, err := o.mount()
	lower.Close()
	if err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	if err := kmount.Attach(m, mnt); err != nil {
		t.Fatal(err)
	}
	m.Close()
	got, err := os.ReadFile(filepath.Join(mnt, "a"))
	if err != nil || string(got) != "alpha" {
		t.Errorf("a = %q, %v", got, err)
	}
	backing := filepath.Join("/sys/block", name, "loop/backing_file")
	if b, err := os.ReadFile(backing); err != nil || strings.TrimSpace(string(b)) != imagePath {
		t.Errorf("%s backs %q, %v; want %s", name, b, err, imagePath)
	}
	if err := kmount.Unmount(mnt); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(backing); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still attached after the unmount", name)
	}
}

// Where fs-verity works it is enforced: an object in another's place is not
// read. (On a kernel without it no more than the refusal can be seen here; the
// machine of e2e/vm runs this test too.)
func TestKernelMountEnforces(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha", "b": "gamma"})
	digest, err := measure(imagePath)
	if err != nil {
		t.Fatal(err)
	}
	paths, err := filepath.Glob(filepath.Join(objects, "??", "*"))
	if err != nil || len(paths) != 2 {
		t.Fatal(paths, err)
	}
	for _, p := range append(paths, imagePath) {
		err := enableVerity(p)
		if _, unsupported := errors.AsType[*verity.NotSupportedError](err); unsupported {
			if obtained, err := tryEnforced(imagePath, objects, digest); obtained != verityEnabled || err == nil {
				t.Errorf("tried on a kernel without fs-verity: %q, %v; want a refusal", obtained, err)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if obtained, err := tryEnforced(imagePath, objects, digest); obtained != verityEnforced || err != nil {
		t.Fatalf("tried: %q, %v; want it enforced", obtained, err)
	}
	m, err := kernelMount(imagePath, objects, digest[:], shownView{})
	if err != nil {
		t.Fatal(err)
	}
	mnt := attach(t, m)
	if err := unix.Renameat2(unix.AT_FDCWD, paths[0], unix.AT_FDCWD, paths[1], unix.RENAME_EXCHANGE); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"a", "b"} {
		// What the probe has read the kernel may remember, by its object.
		if got, err := os.ReadFile(filepath.Join(mnt, name)); err == nil && string(got) != map[string]string{"a": "alpha", "b": "gamma"}[name] || err != nil && !errors.Is(err, unix.EIO) {
			t.Errorf("%s = %q, %v; want EIO", name, got, err)
		}
	}
}

func TestEscapeLower(t *testing.T) {
	if got, want := escapeLower(`/a:b\c`), `/a\:b\\c`; got != want {
		t.Errorf("escapeLower = %s, want %s", got, want)
	}
}
