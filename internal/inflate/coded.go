package inflate

import (
	"fmt"
	"io"
)

// coded decodes symbols of a block until it ends, the output is full, or a
// checkpoint is due.
func (z *Reader) coded() error {
	end := outSize - slack
	if z.opts.Span > 0 {
		end = int(min(int64(end), z.last+z.opts.Span-maxMatch-z.outBase))
	}
	if z.limit >= 0 {
		end = int(min(int64(end), z.limit-z.outBase))
	}
	for z.w < outSize-slack {
		if z.end-z.pos < wideIn && z.inErr == nil {
			z.load()
		}
		if z.end-z.pos >= wideIn && z.w < end-slack {
			if done, err := z.fast(end - slack); done || err != nil {
				return err
			}
			continue
		}
		if z.w >= end {
			return nil
		}
		if done, err := z.slow(end); done || err != nil {
			return err
		}
	}
	return nil
}

// endBlock is what the end of a block means.
func (z *Reader) endBlock() {
	z.state = Block
	if z.final {
		z.state = trailer
	}
}

// slow decodes one symbol, or some literals, and looks at each bit whether it is there.
func (z *Reader) slow(end int) (done bool, err error) {
	for z.w < end {
		z.fill()
		e := z.lit.first[z.b&(1<<litBits-1)]
		used := uint(0)
		if e&isSecond != 0 && e&isSpecial != 0 && e&isLiteral == 0 {
			used = uint(e & 0xff)
			e = z.lit.second[uint64(e>>16&0x7fff)+z.b>>used&(1<<(e>>8&15)-1)]
		}
		if e&isLiteral != 0 {
			if used += uint(e & 0xff); used > z.nb {
				return false, z.short()
			}
			z.b >>= used
			z.nb -= used
			z.out[z.w] = byte(e >> 16)
			z.w++
			continue
		}
		if e&isSpecial != 0 {
			// The end's entry has the bits of its code.
			if used += uint(e & 0xff); used > z.nb || e&isEnd == 0 && z.nb < maxCode {
				return false, z.short()
			}
			if e&isEnd == 0 {
				return false, fmt.Errorf("%w: no code of a literal or length", ErrCorrupt)
			}
			z.b >>= used
			z.nb -= used
			z.endBlock()
			return true, nil
		}
		length := int(e>>16&0x7fff) + int(z.b>>used&(1<<(e&0xff)-1)>>(e>>8&15))
		used += uint(e & 0xff)
		b := z.b >> used
		d := z.dist.first[b&(1<<distBits-1)]
		if d&isSpecial != 0 && d&isSecond != 0 {
			n := uint(d & 0xff)
			used += n
			b >>= n
			d = z.dist.second[uint64(d>>16&0x7fff)+b&(1<<(d>>8&15)-1)]
		}
		if d&isSpecial != 0 {
			if used+maxCode > z.nb {
				return false, z.short()
			}
			return false, fmt.Errorf("%w: no code of a distance", ErrCorrupt)
		}
		distance := int(d>>16&0x7fff) + int(b&(1<<(d&0xff)-1)>>(d>>8&15))
		if used += uint(d & 0xff); used > z.nb {
			return false, z.short()
		}
		if distance > z.w-z.low {
			if err := z.refers(z.w, distance, length); err != nil {
				return false, err
			}
		}
		z.b >>= used
		z.nb -= used
		for range length {
			z.out[z.w] = z.out[z.w-distance]
			z.w++
		}
		if z.limit >= 0 && z.at() > z.limit {
			z.w = int(z.limit - z.outBase)
		}
		return false, nil
	}
	return false, nil
}

// fast decodes symbols while there are wideIn bytes of input and w is below end.
func (z *Reader) fast(end int) (done bool, err error) {
	in, pos, last := z.in[:z.end], z.pos, z.end-wideIn
	out, o := z.out, z.w
	b, nb := z.b, z.nb
	lit, dist := &z.lit.first, &z.dist.first
	low := z.low
loop:
	for pos <= last && o < end {
		// Afterwards b has at least 56 bits; those above nb are right, too.
		b |= le.Uint64(in[pos:]) << (nb & 63)
		pos += int((63 - nb) >> 3)
		nb |= 56
		e := lit[b&(1<<litBits-1)]
		if e&isLiteral != 0 {
			b >>= e & 63
			nb -= uint(e & 63)
			out[o] = byte(e >> 16)
			o++
			e = lit[b&(1<<litBits-1)]
			if e&isLiteral != 0 {
				b >>= e & 63
				nb -= uint(e & 63)
				out[o] = byte(e >> 16)
				o++
				e = lit[b&(1<<litBits-1)]
				if e&isLiteral != 0 {
					b >>= e & 63
					nb -= uint(e & 63)
					out[o] = byte(e >> 16)
					o++
					continue
				}
			}
			b |= le.Uint64(in[pos:]) << (nb & 63)
			pos += int((63 - nb) >> 3)
			nb |= 56
		}
		if e&isSpecial != 0 {
			if e&isSecond != 0 {
				b >>= e & 63
				nb -= uint(e & 63)
				e = z.lit.second[uint64(e>>16&0x7fff)+b&(1<<(e>>8&15)-1)]
			}
			if e&isLiteral != 0 {
				b >>= e & 63
				nb -= uint(e & 63)
				out[o] = byte(e >> 16)
				o++
				continue
			}
			if e&isSpecial != 0 {
				b >>= e & 63
				nb -= uint(e & 63)
				if e&isEnd == 0 {
					err = fmt.Errorf("%w: no code of a literal or length", ErrCorrupt)
				}
				done = true
				break
			}
		}
		length := int(e>>16) + int(b&(1<<(e&63)-1)>>(e>>8&15))
		b >>= e & 63
		nb -= uint(e & 63)
		d := dist[b&(1<<distBits-1)]
		if d&isSpecial != 0 {
			if d&isSecond != 0 {
				b >>= d & 63
				nb -= uint(d & 63)
				d = z.dist.second[uint64(d>>16&0x7fff)+b&(1<<(d>>8&15)-1)]
			}
			if d&isSpecial != 0 {
				err = fmt.Errorf("%w: no code of a distance", ErrCorrupt)
				break loop
			}
		}
		distance := int(d>>16) + int(b&(1<<(d&63)-1)>>(d>>8&15))
		b >>= d & 63
		nb -= uint(d & 63)
		if distance > o-low {
			if err = z.refers(o, distance, length); err != nil {
				break loop
			}
		}
		from, to := o-distance, o+length
		switch {
		case distance >= 16:
			for {
				p, q := out[o:o+16], out[from:from+16]
				x, y := le.Uint64(q), le.Uint64(q[8:])
				le.PutUint64(p, x)
				le.PutUint64(p[8:], y)
				if o += 16; o >= to {
					break
				}
				from += 16
			}
		case distance >= 8:
			for ; o < to; o, from = o+8, from+8 {
				le.PutUint64(out[o:], le.Uint64(out[from:]))
			}
		case distance == 1:
			x := uint64(out[from]) * 0x0101010101010101
			for ; o < to; o += 8 {
				le.PutUint64(out[o:], x)
			}
		default:
			for ; o < to; o, from = o+1, from+1 {
				out[o] = out[from]
			}
		}
		o = to
	}
	z.pos, z.w = pos, o
	z.b, z.nb = b&(1<<(nb&63)-1), nb
	if err == nil && done {
		z.endBlock()
	}
	return done, err
}

var _ io.Reader = (*Reader)(nil)
