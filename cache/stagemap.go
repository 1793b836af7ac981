package cache

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// A staging map says which chunks of a staging file have been written. It is
// little endian and exactly mapSize(chunks) bytes long:
//
//	  0 [16]byte  mapMagic
//	 16 [32]byte  SHA-256 of the content
//	 48 [32]byte  layout: SHA-256 over the table of chunks, see layoutOf
//	 80 [16]byte  boot id of the run of the machine that wrote it
//	 96 uint64    size of the content in bytes
//	104 uint32    number of chunks, at least 1
//	108 uint32    zero
//	112 bitmap    chunk k is bit k%8 of byte k/8; bits past the last chunk are zero
const (
	mapMagic      = "cfs-fuse map 1\n\x00"
	mapHeaderSize = 112
)

// maxMapSize bounds what is read for a map; 2^31 chunks would be 256 MiB.
const maxMapSize = mapHeaderSize + 256<<20

func mapSize(chunks int) int64 { return mapHeaderSize + (int64(chunks)+7)/8 }

// A stageMap is a staging map in memory.
type stageMap struct {
	content image.Digest
	layout  layoutID
	boot    bootID
	size    int64
	chunks  int
	bits    []byte // chunks bits, as on disk
}

var errBadMap = errors.New("not a staging map")

// parseMap reads a staging map. It keeps b.
func parseMap(b []byte) (*stageMap, error) {
	if len(b) < mapHeaderSize || string(b[:16]) != mapMagic {
		return nil, errBadMap
	}
	m := &stageMap{
		content: image.Digest(b[16:48]),
		layout:  layoutID(b[48:80]),
		boot:    bootID(b[80:96]),
		bits:    b[mapHeaderSize:],
	}
	size, chunks := binary.LittleEndian.Uint64(b[96:]), binary.LittleEndian.Uint32(b[104:])
	switch {
	case size == 0 || size > 1<<62:
		return nil, fmt.Errorf("%w: size %d", errBadMap, size)
	case chunks == 0 || chunks > 1<<31-1 || uint64(chunks) > size:
		return nil, fmt.Errorf("%w: %d chunks in %d bytes", errBadMap, chunks, size)
	case binary.LittleEndian.Uint32(b[108:]) != 0:
		return nil, fmt.Errorf("%w: reserved bytes are not zero", errBadMap)
	case int64(len(b)) != mapSize(int(chunks)):
		return nil, fmt.Errorf("%w: %d bytes for %d chunks", errBadMap, len(b), chunks)
	case chunks%8 != 0 && b[len(b)-1]>>(chunks%8) != 0:
		return nil, fmt.Errorf("%w: bits past the last chunk", errBadMap)
	}
	m.size, m.chunks = int64(size), int(chunks)
	return m, nil
}

// marshal returns what parseMap reads.
func (m *stageMap) marshal() []byte {
	b := make([]byte, mapSize(m.chunks))
	copy(b, mapMagic)
	copy(b[16:], m.content[:])
	copy(b[48:], m.layout[:])
	copy(b[80:], m.boot[:])
	binary.LittleEndian.PutUint64(b[96:], uint64(m.size))
	binary.LittleEndian.PutUint32(b[104:], uint32(m.chunks))
	copy(b[mapHeaderSize:], m.bits)
	return b
}

func (m *stageMap) has(k int) bool { return m.bits[k/8]&(1<<(k%8)) != 0 }

// believed returns the set of chunks that are marked and how many are not. The
// last chunk of a content is not marked before the content has its names, so
// a map with every bit set is taken to lack its last chunk.
func (m *stageMap) believed() (have bitmap, left int) {
	have, left = newBitmap(m.chunks), m.chunks
	for i, b := range m.bits {
		left -= bits.OnesCount8(b)
		for ; b != 0; b &= b - 1 {
			have.set(8*i + bits.TrailingZeros8(b))
		}
	}
	if left == 0 {
		have.clear(m.chunks - 1)
		left = 1
	}
	return have, left
}

// A layoutID names a content together with the way it is cut into chunks. Two
// images that cut the same content differently, or promise different digests
// for a chunk of it, have different ids and never share a staging file:
// a chunk checked for one image proves nothing to the other.
type layoutID [32]byte

// layoutOf returns the id of a content's table of chunks: SHA-256 over the
// content's digest, its size, and for each chunk its offset in the file, its
// size, 1 if it is all zero else 0, and its digest (32 zero bytes if it is all
// zero). Numbers are uint64, little endian.
func layoutOf(content image.Content, chunk func(k int) image.Chunk) layoutID {
	h := sha256.New()
	var b [56]byte
	copy(b[:], content.Digest[:])
	binary.LittleEndian.PutUint64(b[32:], uint64(content.Size))
	h.Write(b[:40])
	for k := range content.Chunks {
		c := chunk(k)
		clear(b[:])
		binary.LittleEndian.PutUint64(b[0:], uint64(c.FileOffset))
		binary.LittleEndian.PutUint64(b[8:], uint64(c.Size))
		if c.Zero {
			b[16] = 1
		} else {
			copy(b[24:], c.Digest[:])
		}
		h.Write(b[:])
	}
	return layoutID(h.Sum(nil))
}

// stagingName returns the name in staging/ of a content's staging file; its
// map has mapSuffix too.
func stagingName(content image.Digest) string {
	return stagingPrefix + hexOf(content)
}

func hexOf(d image.Digest) string { return hex.EncodeToString(d[:]) }

// parseHex reads a digest as it occurs in names: 64 lower-case digits.
func parseHex(name string) (d image.Digest, ok bool) {
	if len(name) != 2*len(d) || strings.ToLower(name) != name {
		return d, false
	}
	_, err := hex.Decode(d[:], []byte(name))
	return d, err == nil
}

const (
	stagingPrefix = "sha256-"
	mapSuffix     = ".map"
)
