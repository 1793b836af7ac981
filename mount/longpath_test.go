package mount

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// readDeep reads the file "f" beneath n folders of one name, a folder at a time:
// no system call takes the whole path.
func readDeep(mnt, name string, n int) (string, error) {
	fd, err := unix.Open(mnt, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	for i := range n + 1 {
		flags, next := unix.O_PATH|unix.O_DIRECTORY, name
		if i == n {
			flags, next = unix.O_RDONLY, "f"
		}
		below, err := unix.Openat(fd, next, flags|unix.O_CLOEXEC, 0)
		unix.Close(fd)
		if err != nil {
			return "", err
		}
		fd = below
	}
	f := os.NewFile(uintptr(fd), "f")
	defer f.Close()
	data, err := io.ReadAll(f)
	return string(data), err
}

// An image whose only file has a path of nearly a page, which with the mount
// point is more than PATH_MAX, in a store whose own path is longer than
// fsconfig(2) takes.
func TestLongPaths(t *testing.T) {
	const n = 18
	name := strings.Repeat("n", 226)
	var items []imagetest.Item
	path := ""
	for range n {
		path += name + "/"
		items = append(items, imagetest.Dir(path))
	}
	const want = "far down, and large enough not to be taken for nothing"
	source := layout(t, append(items, imagetest.File(path+"f", want)))
	eachBackend(t, func(t *testing.T, b Backend) {
		root := filepath.Join(t.TempDir(), strings.Repeat("r", 200), strings.Repeat("s", 200))
		if err := os.MkdirAll(root, 0o755); err != nil {
			t.Fatal(err)
		}
		check := func(when, mnt string) {
			t.Helper()
			if got, err := readDeep(mnt, name, n); err != nil || got != want {
				t.Errorf("%s: %q, %v", when, got, err)
			}
		}
		o := Options{Backend: b, Root: root, Swap: Never}
		m, mnt := start(t, source, o)
		check("lazy", mnt)
		waitFor(t, m, Sealed)
		check("sealed", mnt)
		if err := m.swap(); err != nil {
			t.Fatal(err)
		}
		check("swapped", mnt)
		end(t, m, mnt)
		o.Swap = Require
		m, mnt = start(t, source, o)
		check("by the kernel", mnt)
		end(t, m, mnt)
		if bad := verify(t, source, VerifyOptions{Options: o}).Count(Wrong); bad != 0 {
			t.Errorf("verify: %d links are wrong", bad)
		}
	})
}
