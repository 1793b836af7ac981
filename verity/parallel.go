package verity

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

const (
	// minParallel is the size in bytes from which on several goroutines share
	// the work; below, they cost more than they give.
	minParallel = 32 << 20
	// maxParallel bounds the memory for hashes: 64 MiB with SHA-256.
	maxParallel = 1 << 40
)

// DigestAt returns the fs-verity digest of the first size bytes of r. Large
// files are read and hashed by as many goroutines as threads says, which have
// ended when it returns; each needs about 600 KB. The error wraps
// io.ErrUnexpectedEOF if r has less than size bytes. DigestAt panics if alg is
// neither SHA256 nor SHA512.
func DigestAt(r io.ReaderAt, size int64, alg Algorithm, threads int) ([]byte, error) {
	if size >= minParallel && size <= maxParallel && threads > 1 {
		return parallelDigest(r, size, alg, threads)
	}
	h := New(alg)
	n, err := io.CopyBuffer(h, struct{ io.Reader }{io.NewSectionReader(r, 0, size)}, make([]byte, 64*BlockSize))
	if err == nil && n < size {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, fmt.Errorf("fs-verity digest: %w", err)
	}
	return h.Sum(), nil
}

// parallelDigest is DigestAt for more than one block. Each goroutine takes the
// data below one block of level 1 of the Merkle tree (the package comment
// draws it) at a time and keeps that block's hash.
func parallelDigest(r io.ReaderAt, size int64, alg Algorithm, threads int) ([]byte, error) {
	fanout := BlockSize / alg.Size()
	step := int64(fanout) * BlockSize
	hashes := make([]byte, (size+step-1)/step*int64(alg.Size()))
	var next atomic.Int64
	var g errgroup.Group
	for range threads {
		g.Go(func() error {
			h := newBlockHash(alg)
			data, level1 := make([]byte, step), make([]byte, 0, BlockSize)
			for {
				i := next.Add(1) - 1
				off := i * step
				if off >= size {
					return nil
				}
				n := min(step, size-off)
				if k, err := r.ReadAt(data[:n], off); int64(k) < n {
					if err == io.EOF {
						err = io.ErrUnexpectedEOF
					}
					return fmt.Errorf("fs-verity digest: %w", err)
				}
				level1 = h.level(level1[:0], data[:n])
				h.level(hashes[i*int64(alg.Size()):][:0], level1)
			}
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	h := newBlockHash(alg)
	for len(hashes) > alg.Size() {
		hashes = h.level(make([]byte, 0, len(hashes)/fanout+BlockSize), hashes)
	}
	desc := [256]byte{0: 1, 1: byte(alg), 2: 12}
	binary.LittleEndian.PutUint64(desc[8:], uint64(size))
	copy(desc[16:], hashes)
	h.Reset()
	h.Write(desc[:])
	return h.Sum(nil), nil
}

// A blockHash hashes blocks.
type blockHash struct {
	hash.Hash
	last [BlockSize]byte
}

func newBlockHash(alg Algorithm) *blockHash {
	switch alg {
	case SHA256:
		return &blockHash{Hash: sha256.New()}
	case SHA512:
		return &blockHash{Hash: sha512.New()}
	}
	panic("verity: " + alg.String())
}

// level appends to dst the hash of each block of data, the last one padded.
func (h *blockHash) level(dst, data []byte) []byte {
	for len(data) > 0 {
		block := data[:min(len(data), BlockSize)]
		data = data[len(block):]
		if len(block) < BlockSize {
			clear(h.last[copy(h.last[:], block):])
			block = h.last[:]
		}
		h.Reset()
		h.Write(block)
		dst = h.Sum(dst)
	}
	return dst
}
