package cache

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// ReadAt reads local bytes of a content, by its number in the index, at
// offset off. It returns fewer than len(p) bytes and a nil error if a chunk
// that is absent comes next, an *AbsentError if the byte at off lies in
// such a chunk, and io.EOF with the bytes before the end of the content. A
// whole content whose file was removed or cut short is absent from then on.
func (c *Contents) ReadAt(content int, p []byte, off int64) (n int, err error) {
	if err := c.begin(); err != nil {
		return 0, err
	}
	defer c.life.RUnlock()
	if content < 0 || content >= c.files || off < 0 {
		return 0, fmt.Errorf("read content %d of %d at %d: %w", content, c.files, off, unix.EINVAL)
	}
	ct := c.x.Content(content)
	if len(p) == 0 {
		return 0, nil
	}
	if off >= ct.Size {
		return 0, io.EOF
	}
	want := p[:min(int64(len(p)), ct.Size-off)]
	for range 3 { // each further turn after what was found changed under it
		var ok bool
		if c.whole.has(content) {
			n, ok, err = c.readWhole(ct, want, off)
		} else {
			n, ok, err = c.readStaged(content, want, off)
		}
		if ok && err == nil && off+int64(n) == ct.Size && n < len(p) {
			return n, io.EOF
		}
		if ok || err != nil {
			return n, c.readError(ct, err)
		}
		if err := c.lookAgain(content); err != nil {
			return 0, c.readError(ct, err)
		}
	}
	return 0, &AbsentError{c.x.ContentChunk(content, c.chunkAt(content, off))}
}

func (c *Contents) readError(ct image.Content, err error) error {
	if _, absent := errors.AsType[*AbsentError](err); absent || err == nil {
		return err
	}
	return fmt.Errorf("read content %s: %w", ct.Digest, err)
}

// readWhole reads all of p from a whole content. It returns false if the file
// is not there, or not as long as it should be.
func (c *Contents) readWhole(ct image.Content, p []byte, off int64) (n int, ok bool, err error) {
	h, ok, err := c.openWhole(ct)
	if !ok || err != nil {
		return 0, false, err
	}
	defer c.s.files.release(h)
	n, err = pread(h.val.fd, p, off)
	if err == nil && n < len(p) || errors.Is(err, unix.EIO) && c.s.damagedWhole(h.val, ct) {
		c.s.files.drop(h)
		return 0, false, nil
	}
	return n, true, err
}

// openWhole acquires the descriptor of a whole content. It returns false if
// there is no such file, or one of another size.
func (c *Contents) openWhole(ct image.Content) (h *handle[image.Digest, wholeFile], ok bool, err error) {
	if h = c.s.files.lookup(ct.Digest); h != nil && !h.val.named() {
		c.s.files.drop(h)
		c.s.files.release(h)
		h = nil
	}
	if h == nil {
		h, err = c.s.files.acquire(ct.Digest, c.s.openContent)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	if h.val.size != ct.Size {
		c.s.files.drop(h)
		c.s.files.release(h)
		return nil, false, nil
	}
	return h, true, nil
}

// readStaged reads from chunks of a content that is not whole. It returns
// false if the chunk at off was thought to be local and is not.
func (c *Contents) readStaged(i int, p []byte, off int64) (n int, ok bool, err error) {
	k := c.chunkAt(i, off)
	if j := c.x.ContentChunk(i, k); !c.local.has(j) {
		if c.whole.has(i) {
			return 0, false, nil
		}
		return 0, false, &AbsentError{j}
	}
	h, err := c.stage(i)
	if err != nil {
		return 0, false, err
	}
	defer c.s.stages.release(h)
	end := c.chunkAt(i, off+int64(len(p))-1) + 1
	n, ok, bad, err := h.val.readAt(p, off, k, end, c.chunksOf(i))
	if !ok && err == nil && !bad {
		// The pool has an old view of a file that another process fills, or
		// the file was replaced or cut short.
		c.s.stages.drop(h)
	}
	return n, ok, err
}

// File returns a descriptor of a whole content that is the caller's to close,
// for FUSE passthrough, say. Its file offset is shared: use ReadAt. If the content is not whole it returns an
// *AbsentError for its first missing chunk.
func (c *Contents) File(content int) (*os.File, error) {
	if err := c.begin(); err != nil {
		return nil, err
	}
	defer c.life.RUnlock()
	h, ct, err := c.acquireWhole(content)
	if err != nil {
		return nil, err
	}
	defer c.s.files.release(h)
	return dupFile(h.val.fd, ct.Digest.String())
}

// acquireWhole acquires the descriptor of content i if it is whole.
func (c *Contents) acquireWhole(i int) (h *handle[image.Digest, wholeFile], ct image.Content, err error) {
	if i < 0 || i >= c.files {
		return nil, ct, fmt.Errorf("open content %d of %d: %w", i, c.files, unix.EINVAL)
	}
	ct = c.x.Content(i)
	if c.whole.has(i) {
		h, ok, err := c.openWhole(ct)
		if err != nil {
			return nil, ct, fmt.Errorf("open content %s: %w", ct.Digest, err)
		}
		if ok {
			return h, ct, nil
		}
		if err := c.lookAgain(i); err != nil {
			return nil, ct, fmt.Errorf("open content %s: %w", ct.Digest, err)
		}
	}
	for k := range ct.Chunks {
		if j := c.x.ContentChunk(i, k); !c.local.has(j) {
			return nil, ct, &AbsentError{j}
		}
	}
	return nil, ct, &AbsentError{c.x.ContentChunk(i, 0)}
}

// Verity returns the fs-verity SHA-256 digest of a whole content, which is its
// name under Objects. A nil error promises that it has this name. The
// digest is the kernel's if the kernel has one (fs-verity is enabled on the
// way if it was not), else the one noted when the content was stored in the
// extended attribute user.cfs-fuse.verity, else computed by reading the file.
// If the content is not whole the error is an *AbsentError.
func (c *Contents) Verity(content int) (image.Digest, error) {
	if err := c.begin(); err != nil {
		return image.Digest{}, err
	}
	defer c.life.RUnlock()
	h, ct, err := c.acquireWhole(content)
	if err != nil {
		return image.Digest{}, err
	}
	defer c.s.files.release(h)
	d, err := c.s.objectDigest(h.val)
	if err == nil {
		var named bool
		if named, err = hasSize(c.s.objectsDir.fd, d.Path(), ct.Size); err == nil && !named {
			err = c.s.restoreObject(ct, d)
		}
	}
	if err != nil {
		return image.Digest{}, fmt.Errorf("fs-verity digest of content %s: %w", ct.Digest, err)
	}
	return d, nil
}
