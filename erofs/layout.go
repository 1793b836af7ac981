package erofs

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
)

// maxChunks is the longest chunk map of a file (format document 2.8).
const maxChunks = 1024

// chunking returns how an external file is divided: chunks of 1<<chunkBits
// bytes, the smallest such size that takes the whole file, but 8 TiB at most.
func chunking(size uint64) (chunkBits uint, chunks uint64) {
	chunkBits = min(max(uint(bits.Len64(size-1)), blockBits), blockBits+31)
	return chunkBits, (size + 1<<chunkBits - 1) >> chunkBits
}

// layout gives every inode its form, position and blocks (2.8 and 2.9).
func (b *builder) layout() error {
	pos := uint64(superOffset + superSize)
	var blocks uint64
	for i := range b.inodes {
		ino := &b.inodes[i]
		size := b.data(ino)
		if b.fitsCompact(ino, size) {
			ino.flags |= flagCompact
		}
		pos = b.place(ino, pos)
		ino.block = uint32(blocks)
		blocks += uint64(ino.blocks)
		if blocks > math.MaxUint32 {
			return b.fault(uint32(i), errors.New("more than 2^32 data blocks"))
		}
		if ino.xattr > 0 && (ino.xattr-xattrHeaderSize)/4+1 > math.MaxUint16 {
			return b.fault(uint32(i), errors.New("more than 256 KiB of xattrs"))
		}
	}
	b.inodesEnd = roundUp(pos, slotSize)
	b.dataStart = roundUp(b.inodesEnd+b.xattrs.size, blockSize)
	b.dataBlocks = blocks
	if b.dataStart/blockSize+blocks > math.MaxUint32 {
		return fmt.Errorf("an image of %d blocks: the format counts them with 32 bits", b.dataStart/blockSize+blocks)
	}
	return nil
}

// data sets the blocks and the tail of ino as far as its kind decides them,
// and returns the size that decides on its form: the computed one of a
// directory, otherwise what the tree says, even where 0 is stored.
func (b *builder) data(ino *inode) (size uint64) {
	n := ino.node
	switch {
	case ino.typ == TypeDir:
		blocks, tail := b.packDir(ino)
		ino.blocks, ino.tail = uint32(blocks), uint16(tail)
		return blocks*blockSize + tail
	case ino.typ == TypeSymlink:
		ino.tail = uint16(len(n.Target))
		return 0
	case ino.flags&flagWhiteout != 0:
		return 0
	case ino.external():
		_, chunks := chunking(n.Size)
		ino.tail = uint16(4 * chunks)
	case ino.typ == TypeRegular && n.Size > 0:
		ino.blocks, ino.tail = uint32(n.Size/blockSize), uint16(n.Size%blockSize)
		if ino.tail > blockSize/2 {
			ino.blocks++
			ino.tail = 0
		}
	}
	return n.Size
}

// fitsCompact reports whether the 32-byte form holds everything of ino.
func (b *builder) fitsCompact(ino *inode, size uint64) bool {
	n := ino.node
	return n.MtimeSec == b.buildSec && n.MtimeNsec == b.buildNsec && b.nlink(ino) <= math.MaxUint16 &&
		n.UID <= math.MaxUint16 && n.GID <= math.MaxUint16 && size <= math.MaxUint32
}

// nlink returns the link count to store (2.6).
func (b *builder) nlink(ino *inode) uint32 {
	if ino.typ == TypeDir {
		return 2 + ino.subdirs
	}
	return ino.node.Nlink
}

// formSize returns the bytes of the inode itself.
func (ino *inode) formSize() uint64 {
	if ino.flags&flagCompact != 0 {
		return compactSize
	}
	return extendedSize
}

// place puts ino at pos or behind it, so that its tail does not cross into
// another block, and returns where the next inode may go.
func (b *builder) place(ino *inode, pos uint64) (next uint64) {
	pos = roundUp(pos, slotSize)
	head := ino.formSize() + uint64(ino.xattr)
	tail := uint64(ino.tail)
	if ino.typ == TypeSymlink {
		total := head + tail
		if total >= blockSize {
			ino.blocks, ino.tail = 1, 0
		}
		if pos/blockSize != (pos+total-1)/blockSize {
			pos = roundUp(pos, blockSize)
		}
	} else if rest := blockSize - (pos+head)%blockSize; rest < tail {
		skip := roundUp(rest, slotSize)
		if tail <= blockSize-(pos+head+skip)%blockSize {
			pos += skip
		} else {
			ino.blocks++
			ino.tail = 0
			pos = roundUp(pos, blockSize)
		}
	}
	ino.nid = pos / slotSize
	return pos + head + uint64(ino.tail)
}

// eachEntry calls fn for the entries of directory i in byte order, "." and
// ".." among them, with the number of the inode each leads to.
func (b *builder) eachEntry(ino *inode, self uint32, fn func(name string, to uint32)) {
	dots := [...]struct {
		name string
		to   uint32
	}{{".", self}, {"..", ino.parent}}
	next, dot := ino.first, 0
	for _, n := range b.children(ino.node) {
		for ; dot < len(dots) && dots[dot].name < n.Name; dot++ {
			fn(dots[dot].name, dots[dot].to)
		}
		if n.Link != nil {
			fn(n.Name, b.linked[n.Link])
		} else {
			fn(n.Name, next)
			next++
		}
	}
	for ; dot < len(dots); dot++ {
		fn(dots[dot].name, dots[dot].to)
	}
}

// packDir returns how many blocks the entries of a directory fill and how many
// bytes of them go into its tail (2.10).
func (b *builder) packDir(ino *inode) (blocks, tail uint64) {
	b.eachEntry(ino, 0, func(name string, _ uint32) {
		cost := uint64(direntSize + len(name))
		if tail += cost; tail > blockSize {
			blocks++
			tail = cost
		}
	})
	if tail > blockSize/2 {
		return blocks + 1, 0
	}
	return blocks, tail
}
