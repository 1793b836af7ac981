// Package verity knows fs-verity: it computes the digest the kernel would
// compute, asks the kernel to enable verity on a file and to tell a file's
// digest. It decides nothing: what to seal, and what to do where the kernel
// cannot, is its caller's business.
//
// The digest of a file (Linux, Documentation/filesystems/fsverity.rst, "File
// digest computation", with 4096-byte blocks and no salt, as composefs uses it):
//
//	data     [ block ][ block ] … [ block, zero padded ]
//	level 1  [ hash hash … hash, zero padded ]   128 (SHA-256) or 64 (SHA-512) hashes a block
//	…
//	top      [ hash hash ]                        one block; its hash is the root hash
//
//	descriptor, 256 bytes, little endian; its hash is the digest:
//	  0 u8  version = 1         8 u64     size of the file in bytes
//	  1 u8  algorithm (1, 2)   16 [64]u8  root hash, zero padded
//	  2 u8  log2 of 4096 = 12  80 [32]u8  salt, zero
//	  3 u8  salt size = 0     112 [144]u8 zero
//	  4 u32 zero
//
// A file of one block has that block's hash as its root hash; an empty file
// has 32 or 64 zero bytes.
package verity

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"math/bits"
)

// BlockSize is the size in bytes of the blocks that are hashed.
const BlockSize = 4096

// An Algorithm is a hash algorithm by its number in the kernel's interface
// (FS_VERITY_HASH_ALG_… in linux/fsverity.h).
type Algorithm uint8

// The algorithms that fs-verity has.
const (
	SHA256 Algorithm = 1
	SHA512 Algorithm = 2
)

// String returns the name that the kernel and fsverity(1) use: "sha256" or
// "sha512".
func (a Algorithm) String() string {
	switch a {
	case SHA256:
		return "sha256"
	case SHA512:
		return "sha512"
	}
	return fmt.Sprintf("fs-verity algorithm %d", uint8(a))
}

// Size returns the bytes in a digest: 32 or 64, or 0 if a is neither SHA256
// nor SHA512.
func (a Algorithm) Size() int {
	switch a {
	case SHA256:
		return sha256.Size
	case SHA512:
		return sha512.Size
	}
	return 0
}

// maxLevels suffices for 2^63 bytes at 64 hashes a block: (63-12)/6, rounded
// up, and the data level.
const maxLevels = 10

// A level collects what is not yet a whole block of one level of the tree.
type level struct {
	buf   []byte // of a block
	n     int    // bytes in buf; below a block except inside add
	total uint64 // bytes ever added
}

// A Hash computes the digest of what is written to it. It needs a block of
// memory for each level of the tree, so about 4 KB for each factor of 128 in
// the size. It is not safe for use by several goroutines.
type Hash struct {
	alg    Algorithm
	size   int // of a block
	h      hash.Hash
	levels [maxLevels]*level // levels[0] is the data, nil above the highest in use
	sum    [sha512.Size]byte // scratch
}

// New returns a Hash of no bytes. It panics if alg is neither SHA256 nor
// SHA512.
func New(alg Algorithm) *Hash { return newHash(alg, BlockSize) }

// LargeBlock is the other size of a block in bytes for which the composefs
// sealing specification has names.
const LargeBlock = 65536

// NewLarge is New with blocks of LargeBlock bytes. The kernel has them only
// where its pages are as large.
func NewLarge(alg Algorithm) *Hash { return newHash(alg, LargeBlock) }

func newHash(alg Algorithm, size int) *Hash {
	h := &Hash{alg: alg, size: size}
	switch alg {
	case SHA256:
		h.h = sha256.New()
	case SHA512:
		h.h = sha512.New()
	default:
		panic("verity: " + alg.String())
	}
	h.levels[0] = h.newLevel()
	return h
}

func (h *Hash) newLevel() *level { return &level{buf: make([]byte, h.size)} }

// Algorithm returns what New was given.
func (h *Hash) Algorithm() Algorithm { return h.alg }

// Size returns how many bytes were written since New or Reset.
func (h *Hash) Size() int64 { return int64(h.levels[0].total) }

// Reset forgets what was written.
func (h *Hash) Reset() {
	for _, l := range h.levels {
		if l != nil {
			l.n, l.total = 0, 0
		}
	}
}

// Write adds p to the bytes that are hashed. It never fails and does not
// keep p.
func (h *Hash) Write(p []byte) (int, error) {
	written := len(p)
	l := h.levels[0]
	l.total += uint64(written)
	if l.n > 0 {
		k := copy(l.buf[l.n:], p)
		l.n += k
		p = p[k:]
		if l.n < h.size {
			return written, nil
		}
		h.add(1, h.block(l.buf))
		l.n = 0
	}
	for len(p) >= h.size {
		h.add(1, h.block(p[:h.size]))
		p = p[h.size:]
	}
	l.n = copy(l.buf, p)
	return written, nil
}

// block returns the hash of one block, valid until the next call.
func (h *Hash) block(b []byte) []byte {
	h.h.Reset()
	h.h.Write(b)
	return h.h.Sum(h.sum[:0])
}

// add appends a hash to level k and passes full blocks upwards.
func (h *Hash) add(k int, sum []byte) {
	for ; ; k++ {
		if h.levels[k] == nil {
			h.levels[k] = h.newLevel()
		}
		l := h.levels[k]
		l.n += copy(l.buf[l.n:], sum)
		l.total += uint64(len(sum))
		if l.n < h.size {
			return
		}
		sum = h.block(l.buf)
		l.n = 0
	}
}

// Sum returns the digest of what was written so far, in a new slice. Writing
// may go on afterwards.
func (h *Hash) Sum() []byte {
	var desc [256]byte
	desc[0] = 1
	desc[1] = byte(h.alg)
	desc[2] = byte(bits.TrailingZeros(uint(h.size)))
	binary.LittleEndian.PutUint64(desc[8:], h.levels[0].total)
	h.root(desc[16:80])
	h.h.Reset()
	h.h.Write(desc[:])
	return h.h.Sum(nil)
}

// root writes the root hash to dst. It works on one spare block, so that the
// levels stay as they are: carry is the hash of the padded last block of the
// level below, which that level has not passed up.
func (h *Hash) root(dst []byte) {
	size := uint64(h.alg.Size())
	var small [BlockSize]byte
	spare := small[:]
	if h.size > len(spare) {
		spare = make([]byte, h.size)
	}
	var carry []byte
	for k, l := range h.levels {
		total, n := uint64(0), 0
		if l != nil {
			total, n = l.total, copy(spare, l.buf[:l.n])
		}
		n += copy(spare[n:], carry)
		total += uint64(len(carry))
		switch {
		case k == 0 && total == 0:
			return
		case k > 0 && total == size:
			copy(dst, spare[:size])
			return
		case n == 0:
			carry = nil
		default:
			clear(spare[n:])
			carry = h.block(spare)
		}
	}
}

// Digest returns the fs-verity digest of everything r gives. A nil error
// promises that r was read to its end.
func Digest(r io.Reader, alg Algorithm) ([]byte, error) {
	h := New(alg)
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{r}, make([]byte, 64*BlockSize)); err != nil {
		return nil, fmt.Errorf("fs-verity digest: %w", err)
	}
	return h.Sum(), nil
}

// A MismatchError says that an object does not have the fs-verity digest it
// should have.
type MismatchError struct {
	Object    string // what was checked, as its user knows it: a path, say
	Algorithm Algorithm
	Want, Got []byte
}

// Error names the object and both digests in hexadecimal.
func (e *MismatchError) Error() string {
	return fmt.Sprintf("%s: fs-verity digest is %s:%s, want %s:%s", e.Object,
		e.Algorithm, hex.EncodeToString(e.Got), e.Algorithm, hex.EncodeToString(e.Want))
}

// Compare returns nil if the two digests are equal, else a *MismatchError
// about object.
func Compare(object string, alg Algorithm, want, got []byte) error {
	if bytes.Equal(want, got) {
		return nil
	}
	return &MismatchError{Object: object, Algorithm: alg, Want: bytes.Clone(want), Got: bytes.Clone(got)}
}
