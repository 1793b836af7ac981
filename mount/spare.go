package mount

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// spareBytes bounds what is kept of chunks that no reader waits for.
const spareBytes = 64 << 20

// spareChunks stand between the fetcher and the store. While the store takes
// nothing (a full or failing disk, a quota, a budget) chunks that come for a
// reader are kept in memory, so that the read is answered; all others are
// refused, so that filling stops until there is room.
type spareChunks struct {
	index *image.Index
	store *cache.Contents
	grow  func(bytes int64) // Options.SpareMemory; may be nil

	count atomic.Int64 // of kept

	mu     sync.Mutex
	wanted map[*wanted]struct{}
	kept   map[int][]byte // by chunk
	order  []int          // of kept, the oldest first
	size   int64          // of kept
	err    error          // why the store took the last chunk not; nil when it did
	served int64          // bytes that were read from kept
}

// A wanted is what one reader waits for.
type wanted struct {
	content  int
	off, end int64
}

var _ fetcher.Sink = (*spareChunks)(nil)

func newSpareChunks(x *image.Index, store *cache.Contents, grow func(int64)) *spareChunks {
	return &spareChunks{index: x, store: store, grow: grow, wanted: map[*wanted]struct{}{}, kept: map[int][]byte{}}
}

// Missing reports whether a chunk is neither in the store nor in memory.
func (s *spareChunks) Missing(chunk int) bool {
	if !s.store.Missing(chunk) {
		return false
	}
	if s.count.Load() == 0 {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.kept[chunk]
	return !ok
}

// Put stores a chunk, or keeps it in memory if the store cannot and somebody
// waits.
func (s *spareChunks) Put(chunk int, data []byte) error {
	err := s.store.Put(chunk, data)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil {
		s.err = nil
		s.drop(chunk)
		return nil
	}
	if !storageFails(err) {
		return err
	}
	s.err = err
	if len(s.wanted) == 0 {
		return err
	}
	if _, ok := s.kept[chunk]; ok {
		return nil
	}
	ch := s.index.Chunk(chunk)
	if !s.room(ch.Size) && !s.isWanted(chunk) {
		return err
	}
	if len(s.kept) == 0 && s.grow != nil {
		s.grow(spareBytes)
	}
	kept := make([]byte, ch.Size) // of zeros, if data are nil
	copy(kept, data)
	s.kept[chunk] = kept
	s.order = append(s.order, chunk)
	s.size += ch.Size
	s.count.Store(int64(len(s.kept)))
	return nil
}

// storageFails reports whether an error is the disk's and may pass.
func storageFails(err error) bool {
	for _, e := range []error{cache.ErrBudget, unix.ENOSPC, unix.EDQUOT, unix.EROFS, unix.EIO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// room makes place for n bytes by dropping what nobody waits for, the oldest
// first, and reports whether there is any. mu is held.
func (s *spareChunks) room(n int64) bool {
	for i := 0; i < len(s.order) && s.size+n > spareBytes; {
		if chunk := s.order[i]; s.isWanted(chunk) {
			i++
		} else {
			s.drop(chunk)
		}
	}
	return s.size+n <= spareBytes
}

func (s *spareChunks) isWanted(chunk int) bool {
	ch := s.index.Chunk(chunk)
	for w := range s.wanted {
		if w.content == ch.Content && ch.FileOffset < w.end && w.off < ch.FileOffset+ch.Size {
			return true
		}
	}
	return false
}

func (s *spareChunks) drop(chunk int) {
	data, ok := s.kept[chunk]
	if !ok {
		return
	}
	delete(s.kept, chunk)
	s.size -= int64(len(data))
	s.count.Store(int64(len(s.kept)))
	if i := slices.Index(s.order, chunk); i >= 0 {
		s.order = slices.Delete(s.order, i, i+1)
	}
	if len(s.kept) == 0 && s.grow != nil {
		s.grow(0)
	}
}

// want says that a reader waits for n bytes at off of a content, until the
// function it returns is called.
func (s *spareChunks) want(content int, off, n int64) func() {
	w := &wanted{content, off, off + n}
	s.mu.Lock()
	s.wanted[w] = struct{}{}
	s.mu.Unlock()
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.wanted, w)
	}
}

// readAt reads bytes of a chunk from memory, as far as one chunk has them.
func (s *spareChunks) readAt(chunk int, p []byte, off int64) int {
	if s.count.Load() == 0 {
		return 0
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	data, ok := s.kept[chunk]
	off -= s.index.Chunk(chunk).FileOffset
	if !ok || off < 0 || off >= int64(len(data)) {
		return 0
	}
	n := copy(p, data[off:])
	s.served += int64(n)
	return n
}

// settle puts into the store what is kept, and fails as long as it cannot.
func (s *spareChunks) settle(ctx context.Context) error {
	for {
		s.mu.Lock()
		if len(s.order) == 0 {
			s.mu.Unlock()
			return nil
		}
		chunk := s.order[0]
		data := s.kept[chunk]
		s.mu.Unlock()
		if err := ctx.Err(); err != nil {
			return err
		}
		if s.index.Chunk(chunk).Zero {
			data = nil
		}
		err := s.store.Put(chunk, data)
		s.mu.Lock()
		s.err = err
		if err == nil {
			s.drop(chunk)
		}
		s.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// note says that the store takes nothing, if it does not.
func (s *spareChunks) note() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		return ""
	}
	return fmt.Sprintf("nothing can be stored, reads are answered from memory (%d bytes so far): %s", s.served, withHint(s.err))
}

// fill brings all that is missing into the store: first what other images have
// of it in their files. It asks the source for nothing while the store takes
// nothing.
func (m *Mount) fill(ctx context.Context) error {
	if err := m.store.Room(); err != nil {
		return err
	}
	if err := m.spare.settle(ctx); err != nil {
		return err
	}
	if r, err := m.contents.Reuse(ctx); err != nil {
		return err
	} else if r.Chunks > 0 {
		m.opts.Metrics.NotFetched(metrics.PassedReused, r.Bytes)
		m.story.shared(r.Bytes)
		m.log.Info("taken from files of other images", "chunks", r.Chunks, "bytes", r.Bytes, "shared_bytes", r.Cloned)
	}
	if err := m.fetch.Fill(ctx); err != nil {
		return err
	}
	return m.spare.settle(ctx)
}
