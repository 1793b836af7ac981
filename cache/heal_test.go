package cache

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// rot changes one byte of a file, as a disk does.
func rot(t testing.TB, path string, off int64) {
	t.Helper()
	plain(t, path)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 0x40
	if _, err := f.WriteAt(b[:], off); err != nil {
		t.Fatal(err)
	}
}

// plain makes a file one that can be written to: where it has fs-verity, a copy
// takes all its names in the store, with what is noted on it.
func plain(t testing.TB, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err == nil {
		f.Close()
		return
	}
	if !errors.Is(err, unix.EPERM) {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Dir(path)
	for !exists(filepath.Join(root, versionName)) {
		root = filepath.Dir(root)
	}
	tmp := filepath.Join(root, "staging", ".tmp-plain")
	if err := os.WriteFile(tmp, data, objectMode); err != nil {
		t.Fatal(err)
	}
	var noted [32]byte
	if n, err := unix.Getxattr(path, verityXattr, noted[:]); err == nil && n == len(noted) {
		if err := unix.Setxattr(tmp, verityXattr, noted[:], 0); err != nil {
			t.Fatal(err)
		}
	}
	ino := stat(t, path).Ino
	err = filepath.WalkDir(root, func(name string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || stat(t, name).Ino != ino {
			return err
		}
		return errors.Join(os.Remove(name), os.Link(tmp, name))
	})
	if err := errors.Join(err, os.Remove(tmp)); err != nil {
		t.Fatal(err)
	}
}

// A chunk that another process staged and that is damaged since is absent for
// the first reader that meets it, in whichever way it came to be read, and
// comes again; chunks beside it stay.
func TestReadMeetsDamagedChunk(t *testing.T) {
	ct := cut("a*4096 b*4096 0*4096 c*4096 d*100")
	x := imageOf(t, ct)
	for _, other := range []string{"nobody", "a process that fills"} {
		t.Run(other, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, Options{})
			c := contentsOf(t, s, x)
			i, _ := x.find(t, ct, 0)
			for k := range 4 {
				put(t, c, x, x.ContentChunk(i, k))
			}
			if other == "nobody" {
				s.Close()
			}
			rot(t, filepath.Join(dir, "staging", stagingName(ct.digest)), 5000)
			s = open(t, dir, Options{})
			c = contentsOf(t, s, x)
			for k := range 4 {
				if c.Missing(x.ContentChunk(i, k)) {
					t.Fatalf("chunk %d is missing", k)
				}
			}
			p := make([]byte, len(ct.data))
			n, err := c.ReadAt(i, p, 0)
			if n != 4096 || err != nil || !bytes.Equal(p[:n], ct.data[:n]) {
				t.Fatalf("before the damage: %d, %v", n, err)
			}
			n, err = c.ReadAt(i, p, 4096)
			if absent, ok := errors.AsType[*AbsentError](err); n != 0 || !ok || absent.Chunk != x.ContentChunk(i, 1) {
				t.Fatalf("at the damage: %d, %v", n, err)
			}
			if j := x.ContentChunk(i, 1); !c.Missing(j) || c.Progress().BytesLocal != 3*4096 {
				t.Fatalf("missing %v, %+v", c.Missing(j), c.Progress())
			}
			put(t, c, x, x.ContentChunk(i, 1))
			n, err = c.ReadAt(i, p, 0)
			if n != 4*4096 || err != nil || !bytes.Equal(p[:n], ct.data[:n]) {
				t.Fatalf("mended: %d, %v", n, err)
			}
			put(t, c, x, x.ContentChunk(i, 4))
			wantWhole(t, s, c, x)
			check(t, s)
		})
	}
}

// Damage that no reader met is found when the file is whole and hashed: the
// chunk is absent again, the image is not accused.
func TestFinishMeetsDamagedChunk(t *testing.T) {
	ct := cut("a*4096 b*4096 c*4096")
	x := imageOf(t, ct)
	for _, k := range []int{0, 1, 2} {
		dir := t.TempDir()
		s := open(t, dir, Options{})
		c := contentsOf(t, s, x)
		i, _ := x.find(t, ct, 0)
		put(t, c, x, x.ContentChunk(i, 0), x.ContentChunk(i, 1))
		path := filepath.Join(dir, "staging", stagingName(ct.digest))
		damaged := x.ContentChunk(i, min(k, 1))
		if k < 2 {
			rot(t, path, int64(k)*4096+17)
		} else { // cut short: every chunk's end
			if err := os.Truncate(path, 5000); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(path, 3*4096); err != nil {
				t.Fatal(err)
			}
		}
		put(t, c, x, x.ContentChunk(i, 2))
		if c.Whole(i) || !c.Missing(damaged) || c.Progress().BytesLocal != 2*4096 {
			t.Fatalf("chunk %d: whole %v, missing %v, %+v", k, c.Whole(i), c.Missing(damaged), c.Progress())
		}
		if n := len(list(t, s)); n != 2 {
			t.Fatalf("%q", list(t, s))
		}
		s.Close() // the map says so too
		s = open(t, dir, Options{})
		c = contentsOf(t, s, x)
		if p := c.Progress(); p.BytesLocal != 2*4096 {
			t.Fatalf("chunk %d: afterwards %+v", k, p)
		}
		put(t, c, x, damaged)
		wantWhole(t, s, c, x)
	}
}

// A chunk that contradicts the digest of the whole is still the image's fault.
func TestLyingIsNoDamage(t *testing.T) {
	ct := cut("a*4096 b*4096").lying()
	x := imageOf(t, ct)
	s := open(t, t.TempDir(), Options{})
	c := contentsOf(t, s, x)
	i, _ := x.find(t, ct, 0)
	put(t, c, x, x.ContentChunk(i, 0))
	err := c.Put(x.ContentChunk(i, 1), x.data(x.ContentChunk(i, 1)))
	if _, ok := errors.AsType[*DigestError](err); !ok {
		t.Fatal(err)
	}
}

// A whole file that the disk cannot read (or in which fs-verity finds damage)
// is moved aside and absent: damagedWhole decides by reading it.
func TestDamagedWhole(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	ct, good := cut("a*5000"), cut("b*5000")
	x := imageOf(t, ct, good)
	c := contentsOf(t, s, x)
	putAll(t, c, x)
	i, _ := x.find(t, ct, 0)
	g, _ := x.find(t, good, 0)
	rot(t, filepath.Join(s.ContentsDir(), ct.digest.Path()), 77)
	for n, want := range map[int]bool{i: true, g: false} {
		h, ok, err := c.openWhole(x.Content(n))
		if !ok || err != nil {
			t.Fatal(ok, err)
		}
		if got := s.damagedWhole(h.val, x.Content(n)); got != want {
			t.Errorf("content %d: damaged %v", n, got)
		}
		if want {
			s.files.drop(h)
		}
		s.files.release(h)
	}
	if n := len(list(t, s)); n != 2 {
		t.Errorf("left: %q", list(t, s))
	}
	if aside, err := os.ReadDir(filepath.Join(s.Root(), asideName)); err != nil || len(aside) != 1 {
		t.Errorf("aside: %v, %v", aside, err)
	}
	p := make([]byte, 10)
	if _, err := c.ReadAt(i, p, 0); !errors.As(err, new(*AbsentError)) {
		t.Errorf("read: %v", err)
	}
	wantRead(t, c, x, g)
	putAll(t, c, x)
	wantWhole(t, s, c, x)
}
