// Package inflate decompresses gzip (RFC 1952) and, on the way, makes
// checkpoints from which decompressing can begin again in the middle. It knows
// nothing of what is compressed, and compresses nothing.
//
//	compressed    │ header │ block │ block │ block │ trailer │ header │ …
//	                                   ▲
//	checkpoint                         └ a bit position, what was under way there, and
//	                                     the 32 KiB of output before it that may be
//	                                     referred to
//
// A checkpoint may be anywhere between two symbols, so that the distance between
// two is bounded however long a block is; where a block ends nearby it is put
// there, which costs less. Of the 32 KiB only the bytes that the following ones
// do refer to are kept; all others are zero.
//
// What comes after a whole member and is no member is passed over, as gzip(1)
// does. Checksums and lengths are compared of each member that was read from
// its beginning.
package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
)

// Errors of a Reader, besides those of the io.Reader under it.
var (
	// ErrCorrupt says that the bytes are no gzip (RFC 1952) or deflate (RFC
	// 1951) stream, or that a checkpoint does not fit them.
	ErrCorrupt = errors.New("corrupt gzip stream")
	// ErrChecksum says that a member's output has not the CRC-32 or the length
	// of its trailer.
	ErrChecksum = errors.New("wrong gzip checksum")
	// ErrTooLarge says that there is more output than Options.MaxOutput.
	ErrTooLarge = errors.New("decompresses to too much")
)

// WindowSize is how far back a match may reach, in bytes (RFC 1951, section 2).
const WindowSize = 32 << 10

const (
	inSize   = 128 << 10
	outSize  = WindowSize + 256<<10
	maxMatch = 258 // RFC 1951, section 3.2.5
	slack    = maxMatch + 16
	// wideIn is how many bytes of input the fast loop may load or skip in one turn.
	wideIn = 24
)

var le = binary.LittleEndian

// A State says what is under way at a checkpoint.
type State uint8

// The states. The numbers are part of the index file (package layerindex).
const (
	Member  State = iota // a member's header comes next
	Block                // a block's header comes next
	Stored               // bytes of a stored block come next
	Fixed                // symbols of a block with fixed codes
	Dynamic              // symbols of a block with codes of its own

	trailer // a member's CRC-32 and length come next
	ended
)

// MaxLengths is the longest Checkpoint.Lengths: 286 codes for literals and
// lengths and 30 for distances (RFC 1951, section 3.2.7).
const MaxLengths = maxLit + maxDist

// A Checkpoint is a place to begin at.
type Checkpoint struct {
	In  int64 // offset in the compressed stream of the first byte of which nothing was used
	Out int64 // bytes of output before it

	// Of the byte before In, the upper Bits bits (0 to 7) were not used; Byte
	// has them as its lower ones.
	Bits, Byte uint8

	State   State
	Final   bool   // Stored, Fixed, Dynamic: the block is its member's last
	Left    uint16 // Stored: bytes that the block still has
	Literal uint16 // Dynamic: how many of Lengths are of literals and lengths
	Lengths []byte // Dynamic: bits of each code, 0 to 15

	// Window is the output before the checkpoint, at most WindowSize bytes, as
	// far as it belongs to the same member. Bytes that nothing refers to are 0.
	Window []byte
}

// Options of NewReader. The zero value makes no checkpoints.
type Options struct {
	// Span is at most how many bytes of output are between two checkpoints; 0:
	// make none. The smallest is 64 KiB.
	Span int64
	// Checkpoint is called with each checkpoint, in order, the one at the
	// beginning of the stream included, at the latest when the output of the
	// next one comes. The checkpoint is the callee's.
	Checkpoint func(*Checkpoint)
	// MaxOutput bounds the output. 0: no bound.
	MaxOutput int64
}

const minSpan = 64 << 10

// A Reader decompresses. It is not safe for concurrent use.
type Reader struct {
	r    io.Reader
	opts Options

	in       []byte
	pos, end int   // in[pos:end] was read and not used
	inBase   int64 // offset in the stream of in[0]
	inErr    error // of r
	b        uint64
	nb       uint // bits of b

	out     []byte
	from, w int   // out[from:w] was not given to the caller
	outBase int64 // offset in the output of out[0]
	hist    int   // the first byte of out that a match may refer to
	low     int   // as hist, but references below it are to be noted
	limit   int64 // output ends here, whatever the input says; -1: it does not
	err     error

	state   State
	final   bool
	left    int // of a stored block
	members int
	whole   bool   // the member was read from its beginning
	crc     uint32 // of the member's output before out[summed]
	summed  int
	size    uint32 // of the member's output, mod 2³²

	lengths          [MaxLengths + 2]byte // of a dynamic block
	literal, lengthN int
	lit              litTable
	dist             distTable
	fixed            bool // lit and dist are the fixed ones

	last     int64       // Out of the latest checkpoint
	cut      int64       // its Out if it is still to be told of; else -1
	pending  *Checkpoint // the latest, whose window is not known yet
	pendAt   int         // where in out it is
	window   [WindowSize]byte
	referred [WindowSize]bool
}

// NewReader reads a gzip stream from r, from its beginning.
func NewReader(r io.Reader, o Options) *Reader {
	z := &Reader{in: make([]byte, inSize), out: make([]byte, outSize+slack)}
	z.Reset(r, o)
	return z
}

// Reset makes z what NewReader returns, with the memory it has.
func (z *Reader) Reset(r io.Reader, o Options) {
	z.reset(r)
	if o.Span > 0 {
		o.Span = max(o.Span, minSpan)
	}
	z.opts = o
	if o.Span > 0 {
		z.checkpoint()
	}
}

func (z *Reader) reset(r io.Reader) {
	z.r, z.opts = r, Options{}
	z.pos, z.end, z.inBase, z.inErr = 0, 0, 0, nil
	z.b, z.nb = 0, 0
	z.from, z.w, z.outBase, z.hist, z.low, z.limit, z.err = 0, 0, 0, 0, 0, -1, nil
	z.state, z.final, z.left, z.members, z.whole, z.summed = Member, false, 0, 0, false, 0
	z.last, z.cut, z.pending = 0, -1, nil
}

// ResetAt makes z read the size bytes of output that follow a checkpoint. r
// gives the compressed stream from c.In on, and needs to give no more than up
// to the next checkpoint's In. An error says that c cannot be a checkpoint.
func (z *Reader) ResetAt(r io.Reader, c *Checkpoint, size int64) error {
	z.reset(r)
	if c.State > Dynamic || c.Bits > 7 || c.Byte>>c.Bits != 0 || len(c.Window) > WindowSize || size < 0 {
		return fmt.Errorf("checkpoint at %d: %w", c.In, ErrCorrupt)
	}
	z.inBase = c.In
	z.b, z.nb = uint64(c.Byte), uint(c.Bits)
	z.w = copy(z.out, c.Window)
	z.from, z.summed = z.w, z.w
	z.outBase = c.Out - int64(z.w)
	z.limit = c.Out + size
	z.state, z.final, z.left = c.State, c.Final, int(c.Left)
	switch c.State {
	case Member:
		z.hist, z.low = z.w, z.w
	case Fixed:
		z.setFixed()
	case Dynamic:
		n := int(c.Literal)
		if len(c.Lengths) > MaxLengths || n > len(c.Lengths) || n > maxLit || len(c.Lengths)-n > maxDist {
			return fmt.Errorf("checkpoint at %d: %w", c.In, ErrCorrupt)
		}
		for i, l := range c.Lengths {
			if l > maxCode {
				return fmt.Errorf("checkpoint at %d: %w", c.In, ErrCorrupt)
			}
			z.lengths[i] = l
		}
		z.literal, z.lengthN = n, len(c.Lengths)
		if err := z.setDynamic(); err != nil {
			return fmt.Errorf("checkpoint at %d: %w", c.In, err)
		}
	}
	return nil
}

// Read gives the output, up to io.EOF.
func (z *Reader) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	if z.from == z.w {
		if err := z.more(); err != nil {
			return 0, err
		}
	}
	n := copy(p, z.out[z.from:z.w])
	z.from += n
	return n, nil
}

// Next gives the next piece of output, which is valid until the next call, or
// an error: io.EOF at the end. cut says that there is a checkpoint where the
// piece begins; inside a piece there is none.
func (z *Reader) Next() (p []byte, cut bool, err error) {
	if z.from == z.w {
		if err := z.more(); err != nil {
			return nil, false, err
		}
	}
	if z.cut >= 0 {
		switch at := int(z.cut - z.outBase); {
		case at == z.from:
			cut, z.cut = true, -1
		case at < z.w:
			p, z.from = z.out[z.from:at], at
			return p, false, nil
		}
	}
	p, z.from = z.out[z.from:z.w], z.w
	return p, cut, nil
}

// InputOffset returns how many bytes of the stream were used.
func (z *Reader) InputOffset() int64 { return z.inBase + int64(z.pos) - int64(z.nb/8) }

// OutputOffset returns how many bytes of output were given.
func (z *Reader) OutputOffset() int64 { return z.outBase + int64(z.from) }

// more makes output, at least a byte, or returns why there is none.
func (z *Reader) more() error {
	if z.err != nil {
		return z.err
	}
	z.slide()
	for z.err == nil && z.w < outSize-slack && (z.cut < 0 || z.w == z.from) {
		if z.limit >= 0 && z.at() >= z.limit {
			z.err = io.EOF
			break
		}
		z.err = z.step()
		if z.pending != nil && z.w-z.pendAt >= WindowSize {
			z.settle()
		}
	}
	if z.err == nil || z.w > z.from {
		z.sum()
		if z.opts.MaxOutput > 0 && z.at() > z.opts.MaxOutput {
			z.err = fmt.Errorf("%w: more than %d bytes", ErrTooLarge, z.opts.MaxOutput)
			z.from = z.w
			return z.err
		}
	}
	if z.err != nil {
		z.settle()
		if errors.Is(z.err, ErrCorrupt) || errors.Is(z.err, ErrChecksum) {
			z.from = z.w // of what is corrupt nothing is given
		}
	}
	if z.w > z.from {
		return nil
	}
	return z.err
}

// at returns the offset in the output of what comes next.
func (z *Reader) at() int64 { return z.outBase + int64(z.w) }

// slide moves the window to the beginning of out. Everything was given.
func (z *Reader) slide() {
	if z.w <= WindowSize {
		return
	}
	by := z.w - WindowSize
	copy(z.out, z.out[by:z.w])
	z.w -= by
	z.from, z.summed = z.w, z.w
	z.outBase += int64(by)
	z.hist, z.low = max(0, z.hist-by), max(0, z.low-by)
	z.pendAt -= by
}

// sum adds what was not summed yet to the member's checksum.
func (z *Reader) sum() {
	if z.whole && z.summed < z.w {
		z.crc = crc32.Update(z.crc, crc32.IEEETable, z.out[z.summed:z.w])
		z.size += uint32(z.w - z.summed)
	}
	z.summed = z.w
}

// step goes on until the state changes, the output is full or a checkpoint was
// made.
func (z *Reader) step() error {
	switch z.state {
	case Member:
		if z.due(z.opts.Span / 2) {
			z.checkpoint()
			return nil
		}
		return z.header()
	case Block:
		if z.due(z.opts.Span - z.opts.Span/16) {
			z.checkpoint()
			return nil
		}
		return z.blockHeader()
	case Stored:
		if z.due(z.opts.Span) {
			z.checkpoint()
			return nil
		}
		return z.stored()
	case Fixed, Dynamic:
		if z.due(z.opts.Span - maxMatch) {
			z.checkpoint()
			return nil
		}
		return z.coded()
	case trailer:
		return z.trailer()
	}
	return io.EOF
}

// due reports whether the latest checkpoint is at least n bytes behind.
func (z *Reader) due(n int64) bool {
	return z.opts.Span > 0 && z.at()-z.last >= n && z.at() > z.last
}

// checkpoint makes one.
func (z *Reader) checkpoint() {
	z.settle()
	z.unread()
	c := &Checkpoint{
		In: z.inBase + int64(z.pos), Out: z.at(), Bits: uint8(z.nb), Byte: uint8(z.b),
		State: z.state, Final: z.final && z.state > Block,
	}
	switch z.state {
	case Stored:
		c.Left = uint16(z.left)
	case Dynamic:
		c.Literal = uint16(z.literal)
		c.Lengths = append([]byte(nil), z.lengths[:z.lengthN]...)
	}
	z.last, z.cut = c.Out, c.Out
	if z.state != Member {
		first := max(z.hist, z.w-WindowSize)
		c.Window = z.window[:copy(z.window[:], z.out[first:z.w])]
	}
	z.pending, z.pendAt, z.low = c, z.w, z.w
	if z.state == Member {
		z.settle()
	}
}

// settle gives away the latest checkpoint, all of whose window that is
// referred to is known.
func (z *Reader) settle() {
	c := z.pending
	if c == nil {
		return
	}
	z.pending, z.low = nil, z.hist
	if n := len(c.Window); n > 0 {
		kept := make([]byte, n)
		any := false
		for i, used := range z.referred[WindowSize-n:] {
			if used {
				kept[i], any = c.Window[i], true
			}
		}
		c.Window = kept
		if any {
			clear(z.referred[:])
		}
	}
	if z.opts.Checkpoint != nil {
		z.opts.Checkpoint(c)
	}
}

// refers notes a match that reaches below low, and fails if it reaches below
// what there is.
func (z *Reader) refers(o, distance, length int) error {
	if distance > o-z.hist {
		return fmt.Errorf("%w: a match reaches %d bytes back, of %d", ErrCorrupt, distance, o-z.hist)
	}
	if z.pending != nil {
		if before := z.pendAt - (o - distance); before > 0 && before <= WindowSize {
			first := WindowSize - before
			for i := first; i < min(first+length, WindowSize); i++ {
				z.referred[i] = true
			}
		}
	}
	return nil
}
