package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"sort"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// Contents is what is local of one image. Its methods may be called from
// several goroutines. It keeps two bits for each content and chunk, found on
// disk when it is opened; what other processes add later is noticed when it is
// used, or when a chunk is asked for that would otherwise be fetched.
type Contents struct {
	s     *Store
	x     *image.Index
	files int   // contents
	cut   int   // chunks
	size  int64 // of all contents

	whole bitmap // contents
	local bitmap // chunks; every chunk of a whole content is set

	looked []atomic.Uint32 // by content: meter.others at the last look at the disk

	filesLocal, bytesLocal atomic.Int64

	mu sync.Mutex

	// guarded by mu; the bitmaps and counts above change only under it
	staged map[int]*stagedContent

	life   sync.RWMutex // held for reading by every call that uses x or s
	closed bool         // guarded by life
}

// A stagedContent is what is kept of a content of which some chunks were used.
type stagedContent struct {
	layout layoutID
	epoch  uint64 // of the stage when local last agreed with it
	pin    *handle[layoutID, *stage]
}

// Contents finds out what the store has of the image that x describes. Chunks
// that were staged before the machine was started anew are checked first. x
// must stay valid until Close. What is found stays there if the image's folder,
// with x, is in the store and the caller has a Lease on the image.
func (s *Store) Contents(x *image.Index) (*Contents, error) {
	c := &Contents{
		s:      s,
		x:      x,
		files:  x.Contents(),
		cut:    x.Chunks(),
		whole:  newBitmap(x.Contents()),
		local:  newBitmap(x.Chunks()),
		looked: make([]atomic.Uint32, x.Contents()),
		staged: make(map[int]*stagedContent),
	}
	s.mu.Lock()
	closed := s.closed
	if !closed {
		s.images[c] = struct{}{}
	}
	s.mu.Unlock()
	if closed {
		return nil, fmt.Errorf("contents of store %s: %w", s.root, os.ErrClosed)
	}
	c.life.RLock()
	done, err := s.steady()
	if err == nil {
		if err = c.findWhole(); err == nil {
			err = c.findStaged()
		}
		done()
	}
	c.life.RUnlock()
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("contents of store %s: %w", s.root, err)
	}
	return c, nil
}

// findWhole asks for each content whether it is whole. Contents are sorted by
// digest, so that a fan-out folder that is missing answers for all in it.
func (c *Contents) findWhole() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	absent := -1 // first byte of digests whose folder is missing
	present := -1
	for i := range c.files {
		ct := c.x.Content(i)
		c.size += ct.Size
		fan := int(ct.Digest[0])
		if fan == absent {
			continue
		}
		path := ct.Digest.Path()
		ok, err := hasSize(c.s.contentsDir.fd, path, ct.Size)
		switch {
		case err != nil:
			return err
		case ok:
			c.setWhole(i)
			present = fan
		case fan != present:
			present = fan
			var st unix.Stat_t
			if errors.Is(unix.Fstatat(c.s.contentsDir.fd, path[:2], &st, 0), unix.ENOENT) {
				absent = fan
			}
		}
	}
	return nil
}

// findStaged takes over what the staging maps say. Maps of contents that are
// whole, left by a crash, are removed.
func (c *Contents) findStaged() error {
	d, err := os.Open(c.s.stagingDir.f.Name())
	if err != nil {
		return err
	}
	names, err := d.Readdirnames(-1)
	d.Close()
	if err != nil {
		return err
	}
	for _, name := range names {
		hex, ok := strings.CutSuffix(name, mapSuffix)
		if !ok || !strings.HasPrefix(hex, stagingPrefix) {
			continue
		}
		digest, ok := parseHex(strings.TrimPrefix(hex, stagingPrefix))
		if !ok {
			continue
		}
		if i, ok := c.x.Find(digest); ok {
			if err := c.findStage(i, name); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *Contents) findStage(i int, name string) error {
	if c.whole.has(i) {
		f, err := c.s.lockMap(name)
		if f == nil || err != nil {
			return err
		}
		defer f.Close()
		unix.Unlinkat(c.s.stagingDir.fd, strings.TrimSuffix(name, mapSuffix), 0)
		unix.Unlinkat(c.s.stagingDir.fd, name, 0)
		return nil
	}
	m, err := c.s.readMap(name)
	if err != nil || m.layout != c.stagedContent(i).layout {
		return nil // not usable for this image
	}
	h, err := c.stage(i)
	if err != nil {
		return err
	}
	defer c.s.stages.release(h)
	if m.boot != c.s.boot {
		if err := h.val.revive(c.chunksOf(i)); err != nil {
			return err
		}
	}
	c.agree(i, h.val)
	return nil
}

// Close ends the use of the index, waiting for calls in progress. Calls after
// it fail with os.ErrClosed.
func (c *Contents) Close() error {
	c.life.Lock()
	defer c.life.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	for _, sc := range c.staged {
		if sc.pin != nil {
			c.s.stages.release(sc.pin)
		}
	}
	c.s.mu.Lock()
	delete(c.s.images, c)
	c.s.mu.Unlock()
	return nil
}

// begin starts a call; the caller must end it with c.life.RUnlock if it
// returns nil.
func (c *Contents) begin() error {
	c.life.RLock()
	if c.closed {
		c.life.RUnlock()
		return fmt.Errorf("contents: %w", os.ErrClosed)
	}
	return nil
}

// Missing reports whether a chunk, by its number in the index, is to be
// fetched: it is neither staged nor part of a whole content. It asks the disk
// when another process was found to have stored something since it last did
// for that content, and else not. A number out of range is not missing.
func (c *Contents) Missing(chunk int) bool {
	if chunk < 0 || chunk >= c.cut || c.local.has(chunk) {
		return false
	}
	if c.begin() != nil {
		return true
	}
	defer c.life.RUnlock()
	i := c.x.Chunk(chunk).Content
	others := uint32(c.s.meter.others.Load())
	if c.looked[i].Swap(others) != others {
		// An error is for who reads or puts.
		if c.x.Content(i).Chunks == 1 {
			c.lookAgainWhole(i)
		} else {
			c.lookAgain(i)
		}
	}
	return !c.local.has(chunk)
}

// Whole reports whether a content, by its number in the index, is whole.
func (c *Contents) Whole(content int) bool {
	return content >= 0 && content < c.files && c.whole.has(content)
}

// Progress returns how much is local.
func (c *Contents) Progress() Progress {
	return Progress{
		Files: c.files, FilesLocal: int(c.filesLocal.Load()),
		Bytes: c.size, BytesLocal: c.bytesLocal.Load(),
	}
}

// Put stores a chunk by its number in the index. data are its uncompressed
// bytes, which the caller has checked against the chunk's digest; for a
// chunk that is all zero they may be nil. Put keeps no reference to data. A
// nil error promises that ReadAt finds the chunk, in this process and, unless
// the machine goes down before Sync, in later ones. After an error nothing of
// it is visible: *DigestError if the content's chunks contradict its digest
// (its other chunks are absent again), else the kernel's error.
func (c *Contents) Put(chunk int, data []byte) error {
	if err := c.begin(); err != nil {
		return err
	}
	defer c.life.RUnlock()
	_, err := c.putFrom(chunk, data, nil)
	return err
}

// putFrom is Put for who has begun. The data may lie in another file too; it
// reports whether that one's blocks are shared.
func (c *Contents) putFrom(chunk int, data []byte, from *extent) (cloned bool, err error) {
	if chunk < 0 || chunk >= c.cut {
		return false, fmt.Errorf("put chunk %d of %d: %w", chunk, c.cut, unix.EINVAL)
	}
	ch := c.x.Chunk(chunk)
	ct := c.x.Content(ch.Content)
	if int64(len(data)) != ch.Size && (data != nil || !ch.Zero) {
		return false, fmt.Errorf("put chunk %d of content %s: %d bytes, want %d", chunk, ct.Digest, len(data), ch.Size)
	}
	if c.local.has(chunk) {
		return false, nil
	}
	if err := c.s.meter.admit(int64(len(data))); err != nil {
		return false, fmt.Errorf("put chunk %d of content %s: %w", chunk, ct.Digest, err)
	}
	if ct.Chunks == 1 && data != nil {
		err = c.putOnly(ct, ch.Digest, data)
		if err == nil {
			c.becomeWhole(ch.Content)
		}
	} else {
		cloned, err = c.putStaged(ch.Content, chunk, ch.FileOffset, data, from)
	}
	if err == nil {
		return cloned, nil
	}
	if _, wrong := errors.AsType[*DigestError](err); !wrong {
		c.s.metrics.ChunkFailed(metrics.ReasonStore)
	}
	err = fmt.Errorf("put chunk %d of content %s: %w", chunk, ct.Digest, err)
	if isFull(err) {
		err = hint.Wrap(err, "make room on the filesystem of "+c.s.root)
	}
	return false, err
}

func (c *Contents) putOnly(ct image.Content, checked image.Digest, data []byte) error {
	if checked != ct.Digest { // else the caller's check was the content's
		if got := image.Digest(sha256.Sum256(data)); got != ct.Digest {
			return &DigestError{Want: ct.Digest, Got: got}
		}
	}
	return c.s.storeSmall(ct.Digest, data)
}

func (c *Contents) putStaged(i, chunk int, off int64, data []byte, from *extent) (cloned bool, err error) {
	h, err := c.stage(i)
	if err != nil {
		return false, err
	}
	defer c.s.stages.release(h)
	whole, cloned, err := h.val.put(c.chunkAt(i, off), data, from, c.chunksOf(i))
	if whole {
		c.s.stages.drop(h)
		c.becomeWhole(i)
		return cloned, nil
	}
	if h.val.over() {
		c.s.stages.drop(h)
	}
	c.agree(i, h.val)
	c.pin(i, h)
	if err != nil {
		return false, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setLocal(chunk)
	return cloned, nil
}

// pin keeps a private stage open: what is in it has no name to find it by.
func (c *Contents) pin(i int, h *handle[layoutID, *stage]) {
	if !h.val.private() {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	sc := c.staged[i]
	if sc == nil || sc.pin == h {
		return
	}
	if sc.pin != nil {
		c.s.stages.release(sc.pin)
	}
	c.s.stages.hold(h)
	sc.pin = h
}

// stage acquires the stage of content i.
func (c *Contents) stage(i int) (*handle[layoutID, *stage], error) {
	ct := c.x.Content(i)
	return c.s.stages.acquire(c.stagedContent(i).layout, func(id layoutID) (*stage, error) {
		return c.s.openStage(ct, id)
	})
}

// stagedContent returns the record of content i, making it if need be. Its
// layout may be read without the lock.
func (c *Contents) stagedContent(i int) *stagedContent {
	c.mu.Lock()
	sc := c.staged[i]
	c.mu.Unlock()
	if sc != nil {
		return sc
	}
	sc = &stagedContent{layout: layoutOf(c.x.Content(i), c.chunksOf(i))}
	c.mu.Lock()
	defer c.mu.Unlock()
	if had := c.staged[i]; had != nil {
		return had
	}
	c.staged[i] = sc
	return sc
}

// chunksOf returns the chunks of content i by their place in it.
func (c *Contents) chunksOf(i int) chunkAt {
	return func(k int) image.Chunk { return c.x.Chunk(c.x.ContentChunk(i, k)) }
}

// chunkAt returns which chunk of content i holds the byte at off.
func (c *Contents) chunkAt(i int, off int64) (k int) {
	return sort.Search(c.x.Content(i).Chunks, func(k int) bool {
		return c.x.Chunk(c.x.ContentChunk(i, k)).FileOffset > off
	}) - 1
}

// agree makes local say of content i what its stage says, if the stage is
// not the one, or not in the state, that local was last made to agree with.
func (c *Contents) agree(i int, st *stage) {
	epoch := st.currentEpoch()
	c.mu.Lock()
	defer c.mu.Unlock()
	sc := c.staged[i]
	if sc == nil || sc.epoch == epoch || c.whole.has(i) {
		return
	}
	sc.epoch = epoch
	for k := range c.x.Content(i).Chunks {
		// A Put marks the stage first and local later, under the lock that is
		// held here, so that it cannot be undone.
		if j := c.x.ContentChunk(i, k); st.has(k) {
			c.setLocal(j)
		} else {
			c.clearLocal(j)
		}
	}
}

func (c *Contents) setLocal(j int) {
	if c.local.set(j) {
		c.bytesLocal.Add(c.x.Chunk(j).Size)
	}
}

func (c *Contents) clearLocal(j int) {
	if c.local.clear(j) {
		c.bytesLocal.Add(-c.x.Chunk(j).Size)
	}
}

// becomeWhole notes that content i has its names.
func (c *Contents) becomeWhole(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.setWhole(i)
	if sc := c.staged[i]; sc != nil {
		if sc.pin != nil {
			c.s.stages.release(sc.pin)
		}
		delete(c.staged, i)
	}
}

func (c *Contents) setWhole(i int) {
	for k := range c.x.Content(i).Chunks {
		c.setLocal(c.x.ContentChunk(i, k))
	}
	if c.whole.set(i) {
		c.filesLocal.Add(1)
	}
}

// lookAgain finds out anew what is local of content i, for a reader that met
// something else than it expected.
func (c *Contents) lookAgain(i int) error {
	whole, err := c.lookAgainWhole(i)
	if whole || err != nil {
		return err
	}
	h, err := c.stage(i)
	if err != nil {
		return err
	}
	defer c.s.stages.release(h)
	if err := h.val.refresh(); err != nil {
		return err
	}
	c.agree(i, h.val)
	return nil
}

func (c *Contents) lookAgainWhole(i int) (whole bool, err error) {
	ct := c.x.Content(i)
	// The lock keeps a Put from noting a content that was named after the
	// look and before the forgetting.
	c.mu.Lock()
	defer c.mu.Unlock()
	whole, err = hasSize(c.s.contentsDir.fd, ct.Digest.Path(), ct.Size)
	if err != nil {
		return false, err
	}
	if whole {
		c.setWhole(i)
		return true, nil
	}
	if c.whole.clear(i) {
		c.filesLocal.Add(-1)
		c.s.log.Warn("a content vanished from the store", "content", ct.Digest.String())
		for k := range ct.Chunks {
			c.clearLocal(c.x.ContentChunk(i, k))
		}
	}
	if sc := c.staged[i]; sc != nil {
		sc.epoch = 0 // no stage's, so that agree looks
	}
	return false, nil
}
