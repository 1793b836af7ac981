package mount

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A mount that was to stay on FUSE is swapped by hand, once it is sealed, and
// a second time is no error.
func TestSwapNow(t *testing.T) {
	run := filepath.Join(t.TempDir(), "run")
	source, root := twoLayers(t), filepath.Join(t.TempDir(), "root")
	lazy, lazyAt := start(t, source, Options{Root: root, Runtime: run, Swap: Never, NoFill: true})
	c, err := NewControl(lazy)
	if err != nil {
		t.Fatal(err)
	}
	err = SwapNow(t.Context(), run, lazyAt)
	if !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "it is lazy") {
		t.Errorf("swap of a lazy mount: %v, want ErrStuck and the state", err)
	}
	if s := lazy.Status(); s.State != Lazy || s.Backend == "kernel" {
		t.Errorf("after it was refused: %+v", s)
	}
	c.Close()
	end(t, lazy, lazyAt)

	m, mnt := start(t, source, Options{Root: root, Runtime: run, Swap: Never})
	if c, err = NewControl(m); err != nil {
		t.Fatal(err)
	}
	m.KeptBy(keptByNobody{}, 1)
	waitFor(t, m, Sealed)
	before := inodes(t, mnt)
	for range 2 {
		if err := SwapNow(t.Context(), run, mnt); err != nil {
			t.Fatal(err)
		}
	}
	s, err := Query(t.Context(), run, mnt)
	if err != nil || s.State != Swapped || s.Backend != "kernel" || s.Note != "" {
		t.Errorf("status: %+v, %v", s, err)
	}
	checkFiles(t, mnt)
	for path, ino := range inodes(t, mnt) {
		if before[path] != ino {
			t.Errorf("%s: inode %d, was %d", path, ino, before[path])
		}
	}
	select {
	case <-m.server.Done():
	case <-time.After(10 * time.Second):
		t.Error("FUSE is still there")
	}
	c.Close()
	if err := SwapNow(t.Context(), run, mnt); err != nil {
		t.Errorf("with no process left: %v", err)
	}
	if s, err := Query(t.Context(), run, mnt); err != nil || s.PID != 0 || s.Keeper != "" || s.KeeperPID != 0 {
		t.Errorf("with no process left: %+v, %v, want none that keeps the session", s, err)
	}
}

// keptByNobody is what a status shows of a keeper.
type keptByNobody struct{}

func (keptByNobody) Keep([]byte, map[string]*os.File) error { return nil }
func (keptByNobody) Name() (string, int)                    { return "holder", 1 << 30 }
func (keptByNobody) Replace(string) error                   { return errors.New("there is nobody") }
