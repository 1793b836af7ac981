package cache

import (
	"bytes"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// PutContent stores data, which are all of the content d: the caller has computed
// that. It is for contents that no index of chunks knows yet; nothing keeps
// them from being evicted until the folder of an image that needs them is
// there. An empty content is not stored.
func (s *Store) PutContent(d image.Digest, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	have, err := hasSize(s.contentsDir.fd, d.Path(), int64(len(data)))
	if err == nil && !have {
		if err = s.meter.admit(int64(len(data))); err == nil {
			err = s.storeSmall(d, data)
		}
	}
	if err != nil {
		return fmt.Errorf("put content %s: %w", d, err)
	}
	return nil
}

// An Incoming is a content whose bytes come in order, and whose digest is known
// when all have come. It must be ended by Commit or Abort, and is not safe for
// concurrent use.
type Incoming struct {
	s       *Store
	t       temp
	h       *verity.Hash
	n       int64 // bytes so far
	err     error // the first
	pending int64 // of the bytes so far, not admitted yet
}

// Incoming begins to take a content.
func (s *Store) Incoming() (*Incoming, error) {
	t, err := s.temp()
	if err != nil {
		return nil, fmt.Errorf("take a content: %w", err)
	}
	in := &Incoming{s: s, t: t, h: hashes.Get().(*verity.Hash)}
	in.h.Reset()
	return in, nil
}

// admitted is after how many bytes the store's budget is asked again.
const admitted = 4 << 20

// zeroBlock is compared with what is written: what is all zero stays a hole.
var zeroBlock [64 << 10]byte

// Write takes the next bytes. After an error it does nothing but return it.
func (in *Incoming) Write(p []byte) (int, error) {
	if in.err != nil {
		return 0, in.err
	}
	n := len(p)
	in.h.Write(p)
	if in.pending += int64(n); in.pending >= admitted {
		in.err = in.s.meter.admit(in.pending)
		in.pending = 0
	}
	for len(p) > 0 && in.err == nil {
		part := p[:min(len(p), len(zeroBlock))]
		if !bytes.Equal(part, zeroBlock[:len(part)]) {
			in.err = pwrite(in.t.fd, part, in.n)
		}
		in.n += int64(len(part))
		p = p[len(part):]
	}
	if in.err != nil {
		return 0, in.err
	}
	return n, nil
}

// Commit stores what was written, which the caller knows to be the content d.
func (in *Incoming) Commit(d image.Digest) error {
	defer in.Abort()
	if in.err == nil {
		in.err = in.commit(d)
	}
	if in.err != nil {
		return fmt.Errorf("put content %s: %w", d, in.err)
	}
	return nil
}

func (in *Incoming) commit(d image.Digest) error {
	have, err := hasSize(in.s.contentsDir.fd, d.Path(), in.n)
	if have || err != nil {
		return err
	}
	if err := in.s.meter.admit(in.pending); err != nil {
		return err
	}
	if err := unix.Ftruncate(in.t.fd, in.n); err != nil { // it may end in a hole
		return err
	}
	return in.s.storeTemp(&in.t, d, image.Digest(in.h.Sum()), in.n)
}

// Abort forgets what was written. After Commit it does nothing.
func (in *Incoming) Abort() {
	if in.h == nil {
		return
	}
	in.s.discard(in.t)
	hashes.Put(in.h)
	in.h = nil
}
