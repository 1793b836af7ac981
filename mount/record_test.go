package mount

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

func TestResolveMountpoint(t *testing.T) {
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "real")
	if err := os.Mkdir(target, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, link := range []string{"absolute", "relative", "twice", "loop"} {
		to := map[string]string{"absolute": target, "relative": "real", "twice": "absolute", "loop": "loop"}[link]
		if err := os.Symlink(to, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
		if link == "loop" {
			if _, err := ResolveMountpoint(filepath.Join(dir, link)); !errors.Is(err, unix.ELOOP) {
				t.Errorf("a link to itself: %v, want ELOOP", err)
			}
			continue
		}
		if got, err := ResolveMountpoint(filepath.Join(dir, link)); err != nil || got != target {
			t.Errorf("ResolveMountpoint(%s) = %s, %v; want %s", link, got, err, target)
		}
	}
}

// A record of a mount that somebody took away by other means says nothing, and
// goes.
func TestStaleRecord(t *testing.T) {
	run, mnt := t.TempDir(), t.TempDir()
	files := FilesOf(run, mnt)
	if err := files.save(Status{Mountpoint: mnt, State: Swapped, Backend: "kernel"}); err != nil {
		t.Fatal(err)
	}
	if _, err := Query(context.Background(), run, mnt); !errors.Is(err, kmount.ErrNotMounted) {
		t.Errorf("Query = %v, want ErrNotMounted", err)
	}
	if _, err := os.Stat(files.Record); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the record is still there: %v", err)
	}
	if _, err := Query(context.Background(), run, mnt); !errors.Is(err, kmount.ErrNotMounted) {
		t.Errorf("Query without a record = %v, want ErrNotMounted", err)
	}
	if all, err := List(context.Background(), run); err != nil || len(all) != 0 {
		t.Errorf("List = %v, %v; want none", all, err)
	}
	if err := Unmount(context.Background(), run, mnt); !errors.Is(err, kmount.ErrNotMounted) {
		t.Errorf("Unmount = %v, want ErrNotMounted", err)
	}
}

func TestState(t *testing.T) {
	for s := Lazy; s <= Swapped; s++ {
		text, err := s.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		var back State
		if err := back.UnmarshalText(text); err != nil || back != s {
			t.Errorf("%s read back as %s, %v", text, back, err)
		}
	}
	var s State
	if err := s.UnmarshalText([]byte("done")); err == nil {
		t.Error("state done was read")
	}
}
