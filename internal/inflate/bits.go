package inflate

import (
	"fmt"
	"hash/crc32"
	"io"
)

// load reads more input behind what is left of it, and reports whether there is
// any.
func (z *Reader) load() bool {
	if z.inErr != nil {
		return false
	}
	if by := z.pos - 8; by > 0 { // what is in b can be given back
		copy(z.in, z.in[by:z.end])
		z.inBase += int64(by)
		z.end -= by
		z.pos = 8
	}
	for range 100 {
		n, err := z.r.Read(z.in[z.end:])
		z.end += n
		z.inErr = err
		if n > 0 || err != nil {
			return n > 0
		}
	}
	z.inErr = io.ErrNoProgress
	return false
}

// fill puts as many bits into b as there are and have room.
func (z *Reader) fill() {
	for z.nb < 56 {
		if z.pos == z.end && !z.load() {
			return
		}
		z.b |= uint64(z.in[z.pos]) << z.nb
		z.pos++
		z.nb += 8
	}
}

// unread gives whole bytes of b back to the input.
func (z *Reader) unread() {
	z.pos -= int(z.nb / 8)
	z.nb &= 7
	z.b &= 1<<z.nb - 1
}

// short returns why there are not enough bits.
func (z *Reader) short() error {
	if z.inErr == nil || z.inErr == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return z.inErr
}

// bits takes n bits, at most 32.
func (z *Reader) bits(n uint) (uint32, error) {
	if z.nb < n {
		if z.fill(); z.nb < n {
			return 0, z.short()
		}
	}
	v := uint32(z.b & (1<<n - 1))
	z.b >>= n
	z.nb -= n
	return v, nil
}

// byte takes a byte, and adds it to crc.
func (z *Reader) byte(crc *uint32) (byte, error) {
	v, err := z.bits(8)
	*crc = crc32.Update(*crc, crc32.IEEETable, []byte{byte(v)})
	return byte(v), err
}

// Flags of a member's header (RFC 1952, section 2.3.1).
const (
	flagCRC     = 1 << 1
	flagExtra   = 1 << 2
	flagName    = 1 << 3
	flagComment = 1 << 4
)

// maxField bounds a name or comment, in bytes.
const maxField = 1 << 20

// header reads a member's header, or finds the end.
func (z *Reader) header() error {
	if z.fill(); z.members > 0 && (z.nb < 16 || z.b&0xffff != 0x8b1f) {
		// The end, or what gzip(1) calls trailing garbage.
		if z.inErr != nil && z.inErr != io.EOF {
			return z.inErr
		}
		z.state = ended
		return io.EOF
	}
	var crc uint32
	var h [10]byte
	for i := range h {
		var err error
		if h[i], err = z.byte(&crc); err != nil {
			return err
		}
	}
	if h[0] != 0x1f || h[1] != 0x8b || h[2] != 8 {
		return fmt.Errorf("%w: no member begins with %x", ErrCorrupt, h[:3])
	}
	if h[3]&flagExtra != 0 {
		n, err := z.uint16(&crc)
		for ; n > 0 && err == nil; n-- {
			_, err = z.byte(&crc)
		}
		if err != nil {
			return err
		}
	}
	for _, flag := range []byte{flagName, flagComment} {
		if h[3]&flag == 0 {
			continue
		}
		for n := 0; ; n++ {
			c, err := z.byte(&crc)
			if err != nil {
				return err
			}
			if c == 0 {
				break
			}
			if n == maxField {
				return fmt.Errorf("%w: a name or comment of more than %d bytes", ErrCorrupt, maxField)
			}
		}
	}
	if h[3]&flagCRC != 0 {
		want := uint16(crc)
		got, err := z.uint16(&crc)
		if err != nil {
			return err
		}
		if got != want {
			return fmt.Errorf("%w: of a header", ErrChecksum)
		}
	}
	z.state, z.final = Block, false
	z.members++
	z.whole, z.crc, z.size, z.summed = true, 0, 0, z.w
	z.hist, z.low = z.w, z.w
	return nil
}

func (z *Reader) uint16(crc *uint32) (uint16, error) {
	lo, err := z.byte(crc)
	if err != nil {
		return 0, err
	}
	hi, err := z.byte(crc)
	return uint16(hi)<<8 | uint16(lo), err
}

// trailer reads a member's trailer.
func (z *Reader) trailer() error {
	z.bits(z.nb & 7) // the rest of the last byte
	crc, err := z.bits(32)
	if err != nil {
		return err
	}
	size, err := z.bits(32)
	if err != nil {
		return err
	}
	z.sum()
	if z.whole && (crc != z.crc || size != z.size) {
		return fmt.Errorf("%w: CRC-32 %08x and %d bytes, want %08x and %d", ErrChecksum, z.crc, z.size, crc, size)
	}
	z.settle()
	z.state = Member
	z.members++ // also of one that was not read from its beginning
	return nil
}

// blockHeader reads a block's header (RFC 1951, section 3.2.3).
func (z *Reader) blockHeader() error {
	if z.final {
		z.state = trailer
		return nil
	}
	v, err := z.bits(3)
	if err != nil {
		return err
	}
	z.final = v&1 != 0
	switch v >> 1 {
	case 0:
		z.bits(z.nb & 7)
		n, err := z.bits(16)
		if err != nil {
			return err
		}
		c, err := z.bits(16)
		if err != nil {
			return err
		}
		if n != ^c&0xffff {
			return fmt.Errorf("%w: lengths of a stored block, %04x and %04x", ErrCorrupt, n, c)
		}
		z.state, z.left = Stored, int(n)
		return nil
	case 1:
		z.state = Fixed
		z.setFixed()
		return nil
	case 2:
		z.state = Dynamic
		return z.readCodes()
	}
	return fmt.Errorf("%w: a block of the reserved type", ErrCorrupt)
}

// stored copies bytes of a stored block.
func (z *Reader) stored() error {
	z.unread()
	n := min(z.left, outSize-z.w)
	if z.opts.Span > 0 {
		n = int(min(int64(n), z.last+z.opts.Span-z.at()))
	}
	if z.limit >= 0 {
		n = int(min(int64(n), z.limit-z.at()))
	}
	if n > 0 && z.pos == z.end && !z.load() {
		return z.short()
	}
	n = copy(z.out[z.w:z.w+n], z.in[z.pos:z.end])
	z.pos += n
	z.w += n
	if z.left -= n; z.left == 0 {
		z.endBlock()
	}
	return nil
}
