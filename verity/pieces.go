package verity

import (
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"sync/atomic"
)

// ErrUnaligned says that a piece does not begin at a block, or ends inside one
// that the file goes on in.
var ErrUnaligned = errors.New("piece is not aligned to blocks")

// Pieces computes the digest of a file whose bytes come in any order, in pieces
// of whole blocks. It keeps the hash of each block, 32 or 64 bytes per 4096 of
// the file. Its methods may be called from several goroutines, which then
// share the work.
type Pieces struct {
	alg    Algorithm
	size   int64
	leaves []byte          // hashes of the blocks, in order
	have   []atomic.Uint64 // a bit for each block that was written
	left   atomic.Int64    // blocks that were not
	hashes sync.Pool       // of *Hash
}

// NewPieces returns a Pieces for a file of size bytes. It panics if alg is
// neither SHA256 nor SHA512, or size is negative. It allocates for the size at
// once: the caller has to know that the size is no lie.
func NewPieces(size int64, alg Algorithm) *Pieces {
	if size < 0 {
		panic(fmt.Sprintf("verity: size %d", size))
	}
	blocks := (size + BlockSize - 1) / BlockSize
	p := &Pieces{alg: alg, size: size, leaves: make([]byte, blocks*int64(New(alg).alg.Size())), have: make([]atomic.Uint64, (blocks+63)/64)}
	p.left.Store(blocks)
	p.hashes.New = func() any { return New(alg) }
	return p
}

// WriteAt hashes the bytes b at offset off of the file. Both ends have to lie
// between blocks or at the file's end, else nothing is taken and the error
// wraps ErrUnaligned. A block that is written twice counts as it was first.
func (p *Pieces) WriteAt(b []byte, off int64) (int, error) {
	end := off + int64(len(b))
	if off < 0 || end > p.size || off%BlockSize != 0 || end%BlockSize != 0 && end != p.size {
		return 0, fmt.Errorf("fs-verity digest: %w: bytes %d to %d of %d", ErrUnaligned, off, end, p.size)
	}
	h := p.hashes.Get().(*Hash)
	defer p.hashes.Put(h)
	size := int64(p.alg.Size())
	var last [BlockSize]byte
	for i := off / BlockSize; len(b) > 0; i++ {
		block := b[:min(len(b), BlockSize)]
		b = b[len(block):]
		word, bit := &p.have[i/64], uint64(1)<<(i%64)
		if word.Load()&bit != 0 {
			continue
		}
		if len(block) < BlockSize {
			copy(last[:], block)
			block = last[:]
		}
		sum := h.block(block)
		// The first to mark the block writes its hash; Sum waits for left.
		if word.Or(bit)&bit == 0 {
			copy(p.leaves[i*size:], sum)
			p.left.Add(-1)
		}
	}
	return int(end - off), nil
}

// Missing returns the offset of the first block that was not written, or -1.
func (p *Pieces) Missing() int64 {
	if p.left.Load() == 0 {
		return -1
	}
	for i := range p.have {
		if w := p.have[i].Load(); w != ^uint64(0) {
			off := (int64(i)*64 + int64(bits.TrailingZeros64(^w))) * BlockSize
			if off < p.size {
				return off
			}
		}
	}
	return -1
}

// Sum returns the digest of the whole file. It fails while blocks are missing
// or still being written.
func (p *Pieces) Sum() ([]byte, error) {
	if left := p.left.Load(); left != 0 {
		return nil, fmt.Errorf("fs-verity digest: %d blocks are missing, the first at %d", left, p.Missing())
	}
	h := New(p.alg)
	h.levels[0].total = uint64(p.size)
	for b := p.leaves; len(b) > 0; b = b[p.alg.Size():] {
		h.add(1, b[:p.alg.Size()])
	}
	return h.Sum(), nil
}
