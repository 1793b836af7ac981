package composefs

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"hash"
	"io"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

const (
	// minParallel is the size in bytes from which on the digest of a single
	// file is computed by several goroutines.
	minParallel = 32 << 20
	// maxParallel bounds the memory for hashes: 64 MiB with SHA-256.
	maxParallel = 1 << 40
)

// largeDigest returns the fs-verity digest of the size bytes of r, which must
// be more than one block, computed by several goroutines. Each takes the data
// below one block of level 1 of the Merkle tree (package verity draws it) at a
// time and keeps that block's hash.
func largeDigest(r io.ReaderAt, size int64, alg verity.Algorithm, threads int) ([]byte, error) {
	fanout := verity.BlockSize / alg.Size()
	step := int64(fanout) * verity.BlockSize
	hashes := make([]byte, (size+step-1)/step*int64(alg.Size()))
	var next atomic.Int64
	var g errgroup.Group
	for range threads {
		g.Go(func() error {
			h := newBlockHash(alg)
			data, level1 := make([]byte, step), make([]byte, 0, verity.BlockSize)
			for {
				i := next.Add(1) - 1
				off := i * step
				if off >= size {
					return nil
				}
				n := min(step, size-off)
				if k, err := r.ReadAt(data[:n], off); int64(k) < n {
					if err == io.EOF {
						err = errChanged
					}
					return err
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
		hashes = h.level(make([]byte, 0, len(hashes)/fanout+verity.BlockSize), hashes)
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
	last [verity.BlockSize]byte
}

func newBlockHash(alg verity.Algorithm) *blockHash {
	if alg == verity.SHA512 {
		return &blockHash{Hash: sha512.New()}
	}
	return &blockHash{Hash: sha256.New()}
}

// level appends to dst the hash of each block of data, the last one padded.
func (h *blockHash) level(dst, data []byte) []byte {
	for len(data) > 0 {
		block := data[:min(len(data), verity.BlockSize)]
		data = data[len(block):]
		if len(block) < verity.BlockSize {
			clear(h.last[copy(h.last[:], block):])
			block = h.last[:]
		}
		h.Reset()
		h.Write(block)
		dst = h.Sum(dst)
	}
	return dst
}
