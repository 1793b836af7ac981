package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// The access profile of a hybrid mount has the files that the kernel opened
// from the disk, too: all of what is small, the beginning of what is large, each
// once, also by way of another mount of the same filesystem.
func TestOpensOfWholeFiles(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("the hybrid backend needs root")
		return
	}
	large := wholeOpen + 1<<20
	source := layout(t, []imagetest.Item{
		imagetest.File("first", "read first"), imagetest.File("second", "read second"), imagetest.File("never", "not read"),
		imagetest.Random("large", large, 1),
	})
	m, mnt := start(t, source, Options{Backend: Hybrid, Swap: Never})
	waitFor(t, m, Sealed)
	if n := len(m.record.noted()); n != 0 {
		t.Errorf("%d accesses before anything was opened", n)
	}
	other := t.TempDir()
	if err := unix.Mount(mnt, other, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })
	for _, path := range []string{filepath.Join(mnt, "second"), filepath.Join(mnt, "large"), filepath.Join(other, "first"), filepath.Join(mnt, "second")} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	want := []image.Digest{digestOf("read second"), digestOf(string(imagetest.RandomBytes(large, 1))), digestOf("read first")}
	var got []image.Access
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if got = m.record.noted(); len(got) >= len(want) || time.Now().After(end) {
			break
		}
	}
	if len(got) != len(want) {
		t.Fatalf("noted %v", got)
	}
	for i, a := range got {
		if a.Content != want[i] || a.Off != 0 || i == 1 && (a.N < wholeHead || a.N > wholeOpen) {
			t.Errorf("access %d: %+v, want the beginning of %s", i, a, want[i])
		}
	}
	if err := unix.Unmount(other, 0); err != nil {
		t.Error(fmt.Errorf("unmount after the watch has seen all: %w", err))
	}
	end(t, m, mnt)
}
