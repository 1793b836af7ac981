package mount

import (
	"slices"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// Who asked to know is told when chunks begin to take memory, and when they
// have ended to.
func TestSpareMemory(t *testing.T) {
	x := indexOf(t, imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(
		imagetest.Random("one", 100<<10, 1), imagetest.Random("two", 100<<10, 2))), imagetest.Options{})))
	full := cache.Budget{Free: 1 << 60}
	store, err := cache.Open(t.TempDir(), cache.Options{Budget: full})
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	contents, err := store.Contents(x)
	if err != nil {
		t.Fatal(err)
	}
	defer contents.Close()
	var told []int64
	s := newSpareChunks(x, contents, func(n int64) { told = append(told, n) })
	data := make([]byte, 100<<10)
	if err := s.Put(0, data); !storageFails(err) || len(told) != 0 {
		t.Errorf("nobody waits: %v, told %v", err, told)
	}
	for i := range 2 {
		c := x.Chunk(i).Content
		done := s.want(c, 0, x.Content(c).Size)
		if err := s.Put(i, data[:x.Chunk(i).Size]); err != nil {
			t.Errorf("chunk %d of the %d that a reader waits for: %v", i, x.Chunks(), err)
		}
		done()
	}
	for i := range 2 {
		s.mu.Lock()
		s.drop(i)
		s.drop(i)
		s.mu.Unlock()
	}
	if !slices.Equal(told, []int64{spareBytes, 0}) || s.size != 0 || len(s.order) != 0 {
		t.Errorf("told %v, %d bytes in %v left", told, s.size, s.order)
	}
}
