package inflate

import (
	"fmt"
	"math/bits"
)

// Bounds of RFC 1951, sections 3.2.5 to 3.2.7.
const (
	maxCode  = 15 // bits of a code
	maxLit   = 286
	maxDist  = 30
	codeSize = 19 // codes of code lengths
)

// What an entry of a table says. A value is a literal, or the base of a length
// or distance, to which extra bits are added.
//
//	 0- 7  bits to take, those of the code and the extra ones
//	 8-11  bits of the code
//	16-30  value
//
// An entry with the special bit is one of: the end of the block, a place in the
// second table (its value; the bits that choose there are in 8-11, those to
// take before in 0-7), or no code at all.
const (
	isLiteral = 1 << 31 // lit only
	isSpecial = 1 << 15
	isEnd     = 1 << 14
	isSecond  = 1 << 13
)

const (
	litBits  = 11
	distBits = 9
)

// A table gives for the next bits the symbol they begin with. The second tables
// of codes longer than the first one's bits follow each other in second.
type litTable struct {
	first  [1 << litBits]uint32
	second []uint32
}

type distTable struct {
	first  [1 << distBits]uint32
	second []uint32
}

var lengthBase = [29]uint16{3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258}
var lengthExtra = [29]uint8{0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0}
var distBase = [30]uint16{1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097, 6145, 8193, 12289, 16385, 24577}
var distExtra = [30]uint8{0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13}

// Entries of symbols without the bits of their codes.
var litEntry [288]uint32
var distEntry [32]uint32
var codeEntry [codeSize]uint32

// Code lengths of a block with fixed codes (RFC 1951, section 3.2.6).
var fixedLit [288]byte
var fixedDist [32]byte

func init() {
	for i := range litEntry {
		switch {
		case i < 256:
			litEntry[i] = isLiteral | uint32(i)<<16
		case i == 256:
			litEntry[i] = isSpecial | isEnd
		case i < maxLit:
			litEntry[i] = uint32(lengthBase[i-257])<<16 | uint32(lengthExtra[i-257])
		default:
			litEntry[i] = isSpecial
		}
		switch {
		case i < 144:
			fixedLit[i] = 8
		case i < 256:
			fixedLit[i] = 9
		case i < 280:
			fixedLit[i] = 7
		default:
			fixedLit[i] = 8
		}
	}
	for i := range distEntry {
		distEntry[i] = isSpecial
		if i < maxDist {
			distEntry[i] = uint32(distBase[i])<<16 | uint32(distExtra[i])
		}
		fixedDist[i] = 5
	}
	for i := range codeEntry {
		codeEntry[i] = uint32(i) << 16
	}
}

// build makes a table of code lengths: first, which has 1<<n entries, and
// second. It takes what compress/flate takes: complete codes, none at all, and
// a single code of one bit.
func build(first []uint32, n uint, second []uint32, lengths []byte, entries []uint32) ([]uint32, error) {
	second = second[:0]
	var count [maxCode + 1]int
	longest := uint(0)
	for _, l := range lengths {
		count[l]++
		if l > 0 {
			longest = max(longest, uint(l))
		}
	}
	var next [maxCode + 2]int
	code := 0
	for l := 1; l <= maxCode; l++ {
		next[l] = code
		code = (code + count[l]) << 1
		if code > 1<<(l+1) {
			return second, fmt.Errorf("%w: too many codes", ErrCorrupt)
		}
	}
	if longest > 0 && code>>1 != 1<<maxCode && !(longest == 1 && count[1] == 1) {
		return second, fmt.Errorf("%w: an incomplete set of codes", ErrCorrupt)
	}
	if longest == 0 || longest == 1 && count[1] == 1 {
		for i := range first {
			first[i] = isSpecial
		}
	}
	// The bits of the longest code with each beginning that first is too short for.
	var sub []uint8
	if longest > n {
		sub = make([]uint8, 1<<n)
		codes := next
		for _, l := range lengths {
			if l == 0 {
				continue
			}
			c := codes[l]
			codes[l]++
			if uint(l) > n {
				low := bits.Reverse16(uint16(c)) >> (16 - l) & (1<<n - 1)
				sub[low] = max(sub[low], uint8(uint(l)-n))
			}
		}
		for low, width := range sub {
			if width > 0 {
				first[low] = isSpecial | isSecond | uint32(len(second))<<16 | uint32(width)<<8 | uint32(n)
				for range 1 << width {
					second = append(second, isSpecial)
				}
			}
		}
	}
	for symbol, l := range lengths {
		if l == 0 {
			continue
		}
		c := bits.Reverse16(uint16(next[l])) >> (16 - l)
		next[l]++
		if uint(l) <= n {
			e := entries[symbol] + uint32(l) | uint32(l)<<8
			for i := int(c); i < len(first); i += 1 << l {
				first[i] = e
			}
			continue
		}
		low := c & (1<<n - 1)
		own := uint32(l) - uint32(n)
		e := entries[symbol] + own | own<<8
		start := int(first[low] >> 16 & 0x7fff)
		for i := int(c >> n); i < 1<<sub[low]; i += 1 << own {
			second[start+i] = e
		}
	}
	return second, nil
}

func (z *Reader) setFixed() {
	if z.fixed {
		return
	}
	z.fixed = true
	z.lit.second, _ = build(z.lit.first[:], litBits, z.lit.second, fixedLit[:], litEntry[:])
	z.dist.second, _ = build(z.dist.first[:], distBits, z.dist.second, fixedDist[:], distEntry[:])
}

// setDynamic makes the tables of z.lengths.
func (z *Reader) setDynamic() (err error) {
	z.fixed = false
	if z.lit.second, err = build(z.lit.first[:], litBits, z.lit.second, z.lengths[:z.literal], litEntry[:]); err != nil {
		return err
	}
	z.dist.second, err = build(z.dist.first[:], distBits, z.dist.second, z.lengths[z.literal:z.lengthN], distEntry[:])
	return err
}

// The order in which the lengths of codes for code lengths come (RFC 1951,
// section 3.2.7).
var codeOrder = [codeSize]byte{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readCodes reads the codes of a dynamic block.
func (z *Reader) readCodes() error {
	v, err := z.bits(14)
	if err != nil {
		return err
	}
	nlit, ndist, ncode := int(v&31)+257, int(v>>5&31)+1, int(v>>10)+4
	if nlit > maxLit || ndist > maxDist {
		return fmt.Errorf("%w: %d codes of literals and %d of distances", ErrCorrupt, nlit, ndist)
	}
	var lengths [codeSize]byte
	for i := range ncode {
		l, err := z.bits(3)
		if err != nil {
			return err
		}
		lengths[codeOrder[i]] = byte(l)
	}
	var table [1 << 7]uint32
	if _, err := build(table[:], 7, nil, lengths[:], codeEntry[:]); err != nil {
		return err
	}
	for i := 0; i < nlit+ndist; {
		z.fill()
		e := table[z.b&(1<<7-1)]
		n := uint(e & 0xff)
		if e&isSpecial != 0 {
			if z.nb < 7 {
				return z.short()
			}
			return fmt.Errorf("%w: no code of a length", ErrCorrupt)
		}
		if n > z.nb {
			return z.short()
		}
		z.b >>= n
		z.nb -= n
		symbol := e >> 16 & 0x7fff
		if symbol < 16 {
			z.lengths[i] = byte(symbol)
			i++
			continue
		}
		var again byte
		var extra uint
		var least int
		switch symbol {
		case 16:
			if i == 0 {
				return fmt.Errorf("%w: a length like none before", ErrCorrupt)
			}
			again, extra, least = z.lengths[i-1], 2, 3
		case 17:
			extra, least = 3, 3
		default:
			extra, least = 7, 11
		}
		more, err := z.bits(extra)
		if err != nil {
			return err
		}
		repeat := least + int(more)
		if i+repeat > nlit+ndist {
			return fmt.Errorf("%w: more lengths than codes", ErrCorrupt)
		}
		for range repeat {
			z.lengths[i] = again
			i++
		}
	}
	z.literal, z.lengthN = nlit, nlit+ndist
	return z.setDynamic()
}
