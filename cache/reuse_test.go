package cache

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"
)

// Chunks of a new release come from the files of the one before, wherever in
// them they lie; what is damaged there is not taken.
func TestReuse(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	old := cut("a*4096 b*5000 c*4096 d*300")
	whole := cut("w*6000")
	rotten := cut("r*4096 s*4096")
	x := imageOf(t, old, whole, rotten)
	filled(t, s, x, time.Hour)
	rot(t, filepath.Join(s.ContentsDir(), rotten.digest.Path()), 1)

	next := cut("n*100 b*5000 c*4096 w*6000 d*301 c*4096 r*4096 s*4096")
	y := imageOf(t, next, whole)
	install(t, s, y, 0)
	c := contentsOf(t, s, y)
	r, err := c.Reuse(t.Context())
	if err != nil || r.Chunks != 5 || r.Bytes != 5000+4096+6000+4096+4096 {
		t.Fatalf("%+v, %v", r, err)
	}
	i, _ := y.find(t, next, 0)
	for k, want := range []bool{true, false, false, false, true, false, true, false} {
		if got := c.Missing(y.ContentChunk(i, k)); got != want {
			t.Errorf("chunk %d: missing %v", k, got)
		}
	}
	if n := putAll(t, c, y); n != 3 {
		t.Errorf("%d chunks were fetched", n)
	}
	wantWhole(t, s, c, y)
	if r, err := c.Reuse(t.Context()); err != nil || r != (Reused{}) {
		t.Errorf("again: %+v, %v", r, err)
	}
}

// On filesystems that can, what is reused takes no room.
func TestReuseClones(t *testing.T) {
	for _, name := range []string{"xfs", "btrfs"} {
		t.Run(name, func(t *testing.T) {
			mnt := newFilesystem(t, name, 300)
			s := open(t, filepath.Join(mnt, "store"), Options{})
			words, news := "", "Z*65536 "
			for i := range 16 {
				words += fmt.Sprintf("%c*1048576 ", 'a'+i)
				news += fmt.Sprintf("%c*1048576 ", 'a'+i)
			}
			x, y := imageOf(t, cut(words)), imageOf(t, cut(news))
			filled(t, s, x, time.Hour)
			install(t, s, y, 0)
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			before := s.meter.free()
			c := contentsOf(t, s, y)
			r, err := c.Reuse(t.Context())
			if err != nil || r.Chunks != 16 || r.Cloned != 16<<20 {
				t.Fatalf("%+v, %v", r, err)
			}
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			if took := before - s.meter.free(); took > 2<<20 {
				t.Errorf("%d bytes took %d", r.Bytes, took)
			}
			putAll(t, c, y)
			wantWhole(t, s, c, y)
			s.Close()
		})
	}
}
