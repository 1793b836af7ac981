package kmount

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// tmpfs mounts an empty tmpfs at a new folder until the test ends.
func tmpfs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	m, err := New("tmpfs", 0, String("source", "a b\\c"), String("size", "1m"))
	if err != nil {
		t.Fatalf("this test mounts and needs root: %v", err)
	}
	defer m.Close()
	if err := Attach(m, dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for Detach(dir) == nil {
		}
	})
	return dir
}

func TestNewAttachUnmount(t *testing.T) {
	dir := tmpfs(t)
	info, err := At(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.FSType != "tmpfs" || info.Source != `a b\c` || info.Mountpoint != dir {
		t.Errorf("At = %+v", info)
	}
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	held, err := os.Open(filepath.Join(dir, "x"))
	if err != nil {
		t.Fatal(err)
	}
	if err := Unmount(dir); !errors.Is(err, unix.EBUSY) {
		t.Errorf("Unmount of a busy mount: %v, want EBUSY", err)
	}
	held.Close()
	if err := Unmount(dir); err != nil {
		t.Error(err)
	}
	if _, err := At(dir); !errors.Is(err, ErrNotMounted) {
		t.Errorf("At after Unmount: %v, want ErrNotMounted", err)
	}
}

func TestAttachBeneath(t *testing.T) {
	dir := tmpfs(t)
	above, err := At(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := New("tmpfs", 0, String("source", "beneath"))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if err := AttachBeneath(m, dir); err != nil {
		t.Fatal(err)
	}
	if top, err := At(dir); err != nil || top.ID != above.ID {
		t.Errorf("top after AttachBeneath = %+v, %v; want mount %d", top, err, above.ID)
	}
	if err := Detach(dir); err != nil {
		t.Fatal(err)
	}
	if top, err := At(dir); err != nil || top.Source != "beneath" {
		t.Errorf("top after Detach = %+v, %v; want the one beneath", top, err)
	}
}

// An error has to carry what the kernel wrote: EINVAL alone explains nothing.
func TestKernelMessage(t *testing.T) {
	_, err := New("overlay", 0, String("metacopy", "perhaps"))
	var refused *Error
	if !errors.As(err, &refused) || refused.Step != "set metacopy" || !strings.Contains(refused.Kernel, "metacopy") {
		t.Errorf("error = %v, want the step and the kernel's words", err)
	}
	if _, err := New("nosuchfs", 0); !errors.Is(err, unix.ENODEV) {
		t.Errorf("unknown type: %v, want ENODEV", err)
	}
}

func TestParseMountinfo(t *testing.T) {
	got, err := parseMountinfo([]byte(`45 27 0:40 / /m\040nt\012x ro,relatime shared:1 - overlay a\134b ro,lowerdir+=/x
46 45 0:41 /sub /y rw - fuse.cfs-fuse docker://x ro
47 45 0:42 / /z rw - tmpfs  rw
`))
	if err != nil || len(got) != 3 || got[2].Source != "" || got[2].FSType != "tmpfs" {
		t.Fatalf("parseMountinfo = %v, %v", got, err)
	}
	if want := (Info{45, 27, "0:40", "/m nt\nx", "overlay", `a\b`, "ro,lowerdir+=/x", "/", "ro,relatime", true}); got[0] != want {
		t.Errorf("line 1 = %+v, want %+v", got[0], want)
	}
	for _, bad := range []string{"x", "a b c d e f - g h i", "1 2 3 4 5 - 6"} {
		if _, err := parseMountinfo([]byte(bad)); err == nil {
			t.Errorf("parseMountinfo(%q): no error", bad)
		}
	}
}
