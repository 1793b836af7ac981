package erofs

import (
	"bufio"
	"fmt"
	"math"
)

// An output counts what is written and keeps the first error.
type output struct {
	w    *bufio.Writer
	pos  uint64
	err  error
	head [extendedSize]byte // scratch for one structure at a time
	buf  []byte             // scratch
}

func (o *output) write(b []byte) {
	if _, err := o.w.Write(b); err != nil {
		o.err = err
	}
	o.pos += uint64(len(b))
}

func (o *output) writeString(s string) {
	if _, err := o.w.WriteString(s); err != nil {
		o.err = err
	}
	o.pos += uint64(len(s))
}

// scratch returns n zero bytes, valid until the next call.
func (o *output) scratch(n int) []byte {
	clear(o.head[:n])
	return o.head[:n]
}

var zeros [blockSize]byte

// padTo writes zeros up to position pos.
func (o *output) padTo(pos uint64) {
	for o.pos < pos {
		o.write(zeros[:min(pos-o.pos, blockSize)])
	}
}

// encode writes the planned image.
func (b *builder) encode(o *output) error {
	rootNID := b.inodes[0].nid
	if rootNID >= math.MaxUint16 {
		return fmt.Errorf("the root directory's nid is %d, which the superblock cannot hold", rootNID)
	}
	b.writeHeader(o)
	d := &dirEncoder{b: b, o: o}
	for i := range b.inodes {
		if err := b.writeInode(o, d, uint32(i)); err != nil {
			return err
		}
	}
	o.padTo(b.inodesEnd)
	for _, x := range b.xattrs.shared {
		o.writeXattr(x.Xattr)
	}
	o.padTo(b.dataStart)
	for i := range b.inodes {
		b.writeBlocks(o, d, uint32(i))
		if o.err != nil {
			return o.err
		}
	}
	if want := b.dataStart + b.dataBlocks*blockSize; o.pos != want {
		return fmt.Errorf("the image came out as %d bytes, planned were %d", o.pos, want)
	}
	return o.w.Flush()
}

// writeHeader writes the composefs header and the superblock (2.2, 2.4).
func (b *builder) writeHeader(o *output) {
	var h [superOffset + superSize]byte
	le.PutUint32(h[0:], headerMagic)
	le.PutUint32(h[4:], headerVersion)
	if b.hasACL {
		le.PutUint32(h[8:], flagHasACL)
	}
	le.PutUint32(h[12:], b.version)

	s := h[superOffset:]
	le.PutUint32(s[0:], superMagic)
	le.PutUint32(s[8:], compatMtime|compatFilter)
	s[12] = blockBits
	le.PutUint16(s[14:], uint16(b.inodes[0].nid))
	le.PutUint64(s[16:], uint64(len(b.inodes)))
	le.PutUint64(s[24:], uint64(b.buildSec))
	le.PutUint32(s[32:], b.buildNsec)
	le.PutUint32(s[36:], uint32(b.dataStart/blockSize+b.dataBlocks))
	le.PutUint32(s[44:], uint32(b.inodesEnd/blockSize))
	o.write(h[:])
}

// writeInode writes inode i with its xattrs and its tail, at its position.
func (b *builder) writeInode(o *output, d *dirEncoder, i uint32) error {
	ino := &b.inodes[i]
	n := ino.node
	o.padTo(ino.nid * slotSize)
	if o.pos != ino.nid*slotSize {
		return fmt.Errorf("%s: inode at byte %d, planned was %d", b.path(i), o.pos, ino.nid*slotSize)
	}

	layout, size, u := uint16(layoutPlain), uint64(0), uint32(0)
	if ino.tail > 0 {
		layout = layoutInline
	}
	firstBlock := uint32(0)
	if ino.blocks > 0 {
		firstBlock = uint32(b.dataStart/blockSize) + ino.block
	}
	mode := uint16(n.Mode)
	switch {
	case ino.flags&flagWhiteout != 0:
		mode = mode&^modeType | modeRegular
	case ino.typ == TypeDir:
		size, u = uint64(ino.blocks)*blockSize+uint64(ino.tail), firstBlock
	case ino.typ == TypeSymlink:
		size, u = uint64(len(n.Target)), firstBlock
	case ino.external():
		chunkBits, _ := chunking(n.Size)
		// The block number of a map that did not fit behind the inode leaves
		// its low half to the chunk format, as the C library has it.
		layout, size, u = layoutChunked, n.Size, firstBlock&0xffff0000|uint32(chunkBits-blockBits)
	case ino.typ == TypeRegular:
		size, u = n.Size, firstBlock
	case ino.typ == TypeChar || ino.typ == TypeBlock:
		u = n.Rdev
	}
	var icount uint16
	if ino.xattr > 0 {
		icount = uint16((ino.xattr-xattrHeaderSize)/4 + 1)
	}

	h := o.scratch(extendedSize)
	le.PutUint16(h[0:], layout<<1)
	le.PutUint16(h[2:], icount)
	le.PutUint16(h[4:], mode)
	le.PutUint32(h[16:], u)
	le.PutUint32(h[20:], i)
	if ino.flags&flagCompact != 0 {
		le.PutUint16(h[6:], uint16(b.nlink(ino)))
		le.PutUint32(h[8:], uint32(size))
		le.PutUint16(h[24:], uint16(n.UID))
		le.PutUint16(h[26:], uint16(n.GID))
	} else {
		h[0] |= 1
		le.PutUint64(h[8:], size)
		le.PutUint32(h[24:], n.UID)
		le.PutUint32(h[28:], n.GID)
		le.PutUint64(h[32:], uint64(n.MtimeSec))
		le.PutUint32(h[40:], n.MtimeNsec)
		le.PutUint32(h[44:], b.nlink(ino))
	}
	o.write(h[:ino.formSize()])
	if ino.xattr > 0 {
		b.writeXattrs(o, ino, i == 0)
	}
	if ino.tail > 0 {
		b.writeTail(o, d, i)
	}
	return o.err
}

// writeXattrs writes the xattrs that follow an inode (2.7).
func (b *builder) writeXattrs(o *output, ino *inode, root bool) {
	list, _ := b.xattrsOf(ino, root) // no error: shareXattrs met none
	base := uint32(b.inodesEnd % blockSize)
	present, refs := uint32(0), 0
	o.buf = o.buf[:0]
	inline := list[:0] // those that stay, moved to the front
	for _, x := range list {
		present |= filterBit(splitXattr(x.Name))
		if ino.flags&flagShares != 0 && refs < maxShared {
			if s := b.xattrs.find(x); s != nil {
				o.buf = le.AppendUint32(o.buf, (base+s.offset)/4)
				refs++
				continue
			}
		}
		inline = append(inline, x)
	}
	h := o.scratch(xattrHeaderSize)
	le.PutUint32(h[0:], ^present)
	h[4] = uint8(refs)
	o.write(h)
	o.write(o.buf)
	for _, x := range inline {
		o.writeXattr(x)
	}
}

// writeXattr writes one entry, padded to a multiple of 4 bytes.
func (o *output) writeXattr(x Xattr) {
	index, suffix := splitXattr(x.Name)
	h := o.scratch(xattrEntrySize)
	h[0], h[1] = byte(len(suffix)), index
	le.PutUint16(h[2:], uint16(len(x.Value)))
	o.write(h)
	o.writeString(suffix)
	o.write(x.Value)
	o.padTo(roundUp(o.pos, 4))
}

var holes = func() (b [blockSize]byte) {
	for i := range b {
		b[i] = 0xff
	}
	return b
}()

// writeTail writes the inline data of inode i.
func (b *builder) writeTail(o *output, d *dirEncoder, i uint32) {
	ino := &b.inodes[i]
	switch n := ino.node; {
	case ino.typ == TypeDir:
		d.encode(i, false)
	case ino.typ == TypeSymlink:
		o.writeString(n.Target)
	case ino.external():
		o.write(holes[:ino.tail])
	default:
		o.write(n.Content[len(n.Content)-int(ino.tail):])
	}
}

// writeBlocks writes the data blocks of inode i, if it has any.
func (b *builder) writeBlocks(o *output, d *dirEncoder, i uint32) {
	ino := &b.inodes[i]
	if ino.blocks == 0 {
		return
	}
	switch n := ino.node; {
	case ino.typ == TypeDir:
		d.encode(i, true)
	case ino.typ == TypeSymlink:
		o.writeString(n.Target)
	case ino.external():
		o.write(holes[:])
	default:
		o.write(n.Content[:min(len(n.Content), blockSize)])
	}
	o.padTo(roundUp(o.pos, blockSize))
}

// A dirEncoder writes directory blocks and tails (2.10).
type dirEncoder struct {
	b       *builder
	o       *output
	entries []dirent // of the block being collected
	size    int      // what they take
}

type dirent struct {
	name string
	to   uint32
}

// encode writes the blocks of directory i, or else its tail.
func (d *dirEncoder) encode(i uint32, blocks bool) {
	ino := &d.b.inodes[i]
	d.entries, d.size = d.entries[:0], 0
	left := ino.blocks
	flush := func() {
		if (left > 0) == blocks {
			d.writeEntries(blocks)
		}
		if left > 0 {
			left--
		}
		d.entries, d.size = d.entries[:0], 0
	}
	d.b.eachEntry(ino, i, func(name string, to uint32) {
		if d.size+direntSize+len(name) > blockSize {
			flush()
		}
		d.entries = append(d.entries, dirent{name, to})
		d.size += direntSize + len(name)
	})
	flush()
}

// writeEntries writes the collected entries, then their names.
func (d *dirEncoder) writeEntries(pad bool) {
	o := d.o
	nameOff := direntSize * len(d.entries)
	for _, e := range d.entries {
		to := &d.b.inodes[e.to]
		h := o.scratch(direntSize)
		le.PutUint64(h[0:], to.nid)
		le.PutUint16(h[8:], uint16(nameOff))
		h[10] = to.typ
		o.write(h)
		nameOff += len(e.name)
	}
	for _, e := range d.entries {
		o.writeString(e.name)
	}
	if pad {
		o.padTo(roundUp(o.pos, blockSize))
	}
}
