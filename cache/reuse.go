package cache

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"sort"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// Bounds of a search for chunks in other files.
const (
	reuseChunks = 1 << 20 // chunks that are looked for at once: 16 bytes each
	reuseImages = 64      // indexes that are looked through, the latest used first
	reuseRead   = 64 << 20
)

// A Reused says what Reuse did.
type Reused struct {
	Chunks int   // that were found in another file
	Bytes  int64 // of them
	Cloned int64 // of those, bytes that share their blocks
}

// Reuse takes chunks that are missing from whole files of the store that other
// images know to have the same chunk, at whatever offset, and from whole files
// that are the chunk. Each is compared with its digest before it is put.
// Blocks are shared where the filesystem can and both offsets allow it
// (FICLONERANGE); else the bytes are copied.
//
// The indexes of the images in the store are the index of what is where: they
// are read once, in pieces, against a sorted list of the digests wanted. It
// costs a fetch nothing to have asked, so errors of single files are none; what
// ends Reuse early is ctx, or that nothing can be stored.
func (c *Contents) Reuse(ctx context.Context) (r Reused, err error) {
	if err := c.begin(); err != nil {
		return r, err
	}
	defer c.life.RUnlock()
	w := c.wantedChunks()
	if len(w) == 0 {
		return r, nil
	}
	u := &reuser{c: c, wanted: w, res: &r}
	if err := u.wholeFiles(ctx); err != nil {
		return r, err
	}
	digests, err := c.s.recentImages()
	if err != nil {
		return r, err
	}
	for _, d := range digests[:min(len(digests), reuseImages)] {
		if err := u.image(ctx, d); err != nil {
			return r, err
		}
	}
	return r, nil
}

// A wantedChunk is a missing chunk by the first bytes of its digest, so that a
// million of them are 16 MB.
type wantedChunk struct {
	head  uint64
	chunk int32
}

func head(d image.Digest) uint64 { return binary.BigEndian.Uint64(d[:]) }

// wantedChunks lists what is missing of contents of several chunks: a content of
// one chunk is found by its own digest.
func (c *Contents) wantedChunks() (all []wantedChunk) {
	for j := range c.cut {
		if c.local.has(j) {
			continue
		}
		ch := c.x.Chunk(j)
		if ch.Zero || c.x.Content(ch.Content).Chunks == 1 {
			continue
		}
		if all = append(all, wantedChunk{head(ch.Digest), int32(j)}); len(all) == reuseChunks {
			break
		}
	}
	slices.SortFunc(all, func(a, b wantedChunk) int { return cmp.Or(cmp.Compare(a.head, b.head), cmp.Compare(a.chunk, b.chunk)) })
	return all
}

type reuser struct {
	c      *Contents
	wanted []wantedChunk
	buf    []byte
	src    wholeFile // the file that was read last
	of     image.Digest
	res    *Reused
}

// find returns the chunks that are wanted with this digest and size.
func (u *reuser) find(d image.Digest, size int64) (js []int) {
	h := head(d)
	i := sort.Search(len(u.wanted), func(i int) bool { return u.wanted[i].head >= h })
	for ; i < len(u.wanted) && u.wanted[i].head == h; i++ {
		j := int(u.wanted[i].chunk)
		if ch := u.c.x.Chunk(j); ch.Digest == d && ch.Size == size && !u.c.local.has(j) {
			js = append(js, j)
		}
	}
	return js
}

// wholeFiles takes chunks that are all of some file.
func (u *reuser) wholeFiles(ctx context.Context) error {
	for _, w := range u.wanted {
		if err := ctx.Err(); err != nil {
			return err
		}
		ch := u.c.x.Chunk(int(w.chunk))
		if ok, _ := hasSize(u.c.s.contentsDir.fd, ch.Digest.Path(), ch.Size); !ok {
			continue
		}
		if err := u.take(ch.Digest, ch.Size, 0, []int{int(w.chunk)}); err != nil {
			return err
		}
	}
	return nil
}

// image takes chunks that an image's index knows in other contents.
func (u *reuser) image(ctx context.Context, d image.Digest) error {
	f, err := os.Open(u.c.s.ImageDir(d) + "/" + ChunksName)
	if err != nil {
		return nil // evicted meanwhile
	}
	defer f.Close()
	defer u.closeSource()
	fi, err := f.Stat()
	if err != nil {
		return nil
	}
	t, err := image.OpenDigests(f, fi.Size())
	if err != nil {
		return nil
	}
	var stop error
	t.EachChunk(func(p image.Place) bool {
		js := u.find(p.Digest, p.Size)
		if len(js) == 0 {
			return true
		}
		ct, err := t.Content(p.Content)
		if err == nil {
			stop = cmp.Or(ctx.Err(), u.take(ct.Digest, ct.Size, p.Offset, js))
		}
		return stop == nil
	})
	return stop
}

// take puts chunks, which are all the same bytes, from offset off of a whole
// content, if it is there and has them.
func (u *reuser) take(content image.Digest, size, off int64, js []int) error {
	if u.of != content {
		u.closeSource()
		w, err := u.c.s.openContent(content)
		if err != nil {
			return nil
		}
		u.src, u.of = w, content
	}
	ch := u.c.x.Chunk(js[0])
	if u.src.size != size || ch.Size > reuseRead {
		return nil
	}
	if int64(cap(u.buf)) < ch.Size {
		u.buf = make([]byte, ch.Size)
	}
	b := u.buf[:ch.Size]
	if n, err := pread(u.src.fd, b, off); err != nil || n < len(b) || image.Digest(sha256.Sum256(b)) != ch.Digest {
		return nil
	}
	for _, j := range js {
		cloned, err := u.c.putFrom(j, b, &extent{u.src.fd, off})
		if err != nil {
			if _, wrong := errors.AsType[*DigestError](err); wrong {
				continue // who reads it will hear of it
			}
			return err
		}
		u.res.Chunks++
		u.res.Bytes += ch.Size
		if cloned {
			u.res.Cloned += ch.Size
		}
	}
	return nil
}

func (u *reuser) closeSource() {
	if !u.of.IsZero() {
		u.src.close()
		u.of = image.Digest{}
	}
}

// An extent is where bytes lie in another file of the store.
type extent struct {
	fd  int
	off int64
}

// cloneAlign is what filesystems with FICLONERANGE want offsets to be multiples
// of, save for the end of the file: their block size, or more than it.
const cloneAlign = 4096

// clone makes the n bytes at off of dst share the blocks of the extent. It
// reports false if that cannot be.
func (e *extent) clone(dst int, off, n int64) bool {
	if e == nil || e.off%cloneAlign != 0 || off%cloneAlign != 0 {
		return false
	}
	return unix.IoctlFileCloneRange(dst, &unix.FileCloneRange{
		Src_fd: int64(e.fd), Src_offset: uint64(e.off), Src_length: uint64(n), Dest_offset: uint64(off),
	}) == nil
}

// recentImages lists the images of the store, the latest used first.
func (s *Store) recentImages() ([]image.Digest, error) {
	all, err := s.ImageDigests()
	if err != nil {
		return nil, err
	}
	used := map[image.Digest]int64{}
	for _, d := range all {
		if fi, err := os.Stat(s.leasePath(d)); err == nil {
			used[d] = fi.ModTime().UnixNano()
		}
	}
	slices.SortFunc(all, func(a, b image.Digest) int {
		return cmp.Or(cmp.Compare(used[b], used[a]), bytes.Compare(a[:], b[:]))
	})
	return all, nil
}
