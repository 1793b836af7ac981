package durable

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

func TestWriteFileReplaces(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	for _, want := range []string{"first", "second, longer", ""} {
		if err := WriteFile(path, []byte(want), 0o640); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(path)
		if err != nil || string(got) != want {
			t.Fatalf("got %q, %v; want %q", got, err, want)
		}
		fi, err := os.Stat(path)
		if err != nil || fi.Mode() != 0o640 {
			t.Fatalf("mode %v, %v", fi.Mode(), err)
		}
	}
	if n := names(t, dir); len(n) != 1 {
		t.Fatalf("left behind: %v", n)
	}
}

func TestNothingAtPathBeforeCommit(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	f, err := Create(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("before commit: %v", err)
	}
	f.Abort()
	f.Abort()
	if n := names(t, dir); len(n) != 0 {
		t.Fatalf("after abort: %v", n)
	}
	if err := f.Commit(); !errors.Is(err, os.ErrClosed) {
		t.Fatalf("commit after abort: %v", err)
	}
}

func TestCommitThatCannotRename(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	if err := os.MkdirAll(filepath.Join(path, "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, []byte("a"), 0o600); err == nil {
		t.Fatal("a file replaced a folder")
	}
	if n := names(t, dir); len(n) != 1 {
		t.Fatalf("left behind: %v", n)
	}
}

func TestNoFolder(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "absent")
	if err := WriteFile(filepath.Join(dir, "x"), nil, 0o600); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("WriteFile: %v", err)
	}
	if err := SyncDir(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("SyncDir: %v", err)
	}
	if _, err := Clean(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Clean: %v", err)
	}
}

func TestCleanSparesTheLiving(t *testing.T) {
	dir := t.TempDir()
	alive, err := Create(filepath.Join(dir, "x"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer alive.Abort()
	for _, n := range []string{TempPrefix + "dead", TempPrefix + "dead2", "other"} {
		if err := os.WriteFile(filepath.Join(dir, n), []byte("litter"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, TempPrefix+"folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	n, err := Clean(dir)
	if err != nil || n != 2 {
		t.Fatalf("removed %d, %v; want 2", n, err)
	}
	if got := names(t, dir); len(got) != 3 {
		t.Fatalf("left: %v", got)
	}
	if err := alive.Commit(); err != nil {
		t.Fatal(err)
	}
}

// TestCleanBesideWriters lets Clean run against writers: none of them may
// lose its file.
func TestCleanBesideWriters(t *testing.T) {
	dir := t.TempDir()
	stop := make(chan struct{})
	done := make(chan error, 1)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if _, err := Clean(dir); err != nil {
				done <- err
				return
			}
		}
	}()
	for range 500 {
		f, err := Create(filepath.Join(dir, "x"), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(f.Name(), filepath.Join(dir, "y")); err != nil {
			t.Fatalf("a living file was cleaned: %v", err)
		}
		f.Close()
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
