package kmount

import (
	"os"
	"path/filepath"
	"sync"
	"testing"
)

// What is built in a private namespace outlives it, and no thread of ours is
// left in one, the first least of all.
func TestInPrivate(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := Mounts()
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	made := make([]*os.File, 20)
	for i := range made {
		all.Go(func() {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "x"), []byte("content"), 0o644); err != nil {
				t.Error(err)
				return
			}
			lower, err := New("tmpfs", 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer lower.Close()
			second, err := New("tmpfs", 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer second.Close()
			err = InPrivate(func() error {
				if now, err := os.Readlink("/proc/self/ns/mnt"); err != nil || now != before {
					t.Errorf("meanwhile the process is in %s, %v; want %s", now, err, before)
				}
				if here, err := os.Readlink("/proc/thread-self/ns/mnt"); err != nil || here == before {
					t.Errorf("the thread is in %s, %v; want a namespace of its own", here, err)
				}
				made[i], err = New("overlay", 0, String("lowerdir", Path(lower)+":"+Path(second)+":"+dir))
				return err
			}, lower, second)
			if err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, m := range made {
		if m == nil {
			continue
		}
		mnt := t.TempDir()
		if err := Attach(m, mnt); err != nil {
			t.Fatal(err)
		}
		m.Close()
		if got, err := os.ReadFile(filepath.Join(mnt, "x")); err != nil || string(got) != "content" {
			t.Errorf("x = %q, %v", got, err)
		}
		if err := Unmount(mnt); err != nil {
			t.Error(err)
		}
	}
	if after, err := os.Readlink("/proc/self/ns/mnt"); err != nil || after != before {
		t.Errorf("mount namespace %s, %v; was %s", after, err, before)
	}
	if now, err := Mounts(); err != nil || len(now) != len(mounts) {
		t.Errorf("%d mounts, %v; were %d", len(now), err, len(mounts))
	}
}
