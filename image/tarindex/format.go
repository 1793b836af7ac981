package tarindex

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
)

// The sizes of docs/index.md.
const (
	magic       = "cfsindex"
	version     = 1
	headerSize  = 128
	pointSize   = 40
	trailerSize = sha256.Size
)

// MaxIndex is the longest index that is read, in bytes.
const MaxIndex = 1 << 30

var le = binary.LittleEndian

// A header is what an index says of its layer.
type header struct {
	compression   toc.Compression
	blob, diffID  toc.Digest
	size, tarSize int64
	skeletonSize  int64 // uncompressed
}

// A packer compresses windows.
type packer struct{ z *zstd.Encoder }

// pack compresses a checkpoint's code lengths and window, as one piece.
func (p *packer) pack(c *inflate.Checkpoint) []byte {
	if p.z == nil {
		p.z, _ = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBestCompression),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(64<<10), zstd.WithSingleSegment(true))
	}
	if len(c.Lengths)+len(c.Window) == 0 {
		return nil
	}
	raw := append(bytes.Clone(c.Lengths), c.Window...)
	return p.z.EncodeAll(raw, nil)
}

// encode writes an index.
func encode(h *header, points []point, digests []toc.Digest, skeleton []byte) ([]byte, error) {
	windows := 0
	for _, p := range points {
		windows += len(p.packed)
	}
	n := headerSize + len(points)*pointSize + windows + len(digests)*len(toc.Digest{}) + len(skeleton) + trailerSize
	if n > MaxIndex {
		return nil, fmt.Errorf("an index of %d bytes, the limit is %d", n, MaxIndex)
	}
	b := make([]byte, headerSize, n)
	copy(b, magic)
	le.PutUint32(b[8:], version)
	b[12] = byte(h.compression)
	copy(b[16:], h.blob[:])
	le.PutUint64(b[48:], uint64(h.size))
	copy(b[56:], h.diffID[:])
	le.PutUint64(b[88:], uint64(h.tarSize))
	le.PutUint32(b[96:], uint32(len(points)))
	le.PutUint32(b[100:], uint32(len(digests)))
	le.PutUint64(b[104:], uint64(h.skeletonSize))
	le.PutUint32(b[112:], uint32(windows))
	le.PutUint32(b[116:], uint32(len(skeleton)))
	at := 0
	for _, p := range points {
		var r [pointSize]byte
		le.PutUint64(r[0:], uint64(p.in))
		le.PutUint64(r[8:], uint64(p.out))
		le.PutUint32(r[16:], uint32(at))
		le.PutUint32(r[20:], uint32(len(p.packed)))
		if c := p.gzip; c != nil {
			le.PutUint16(r[24:], uint16(p.window))
			le.PutUint16(r[26:], uint16(p.lengths))
			le.PutUint16(r[28:], c.Literal)
			le.PutUint16(r[30:], c.Left)
			r[32] = byte(c.State)
			if c.Final {
				r[33] = 1
			}
			r[34], r[35] = c.Bits, c.Byte
		}
		b = append(b, r[:]...)
		at += len(p.packed)
	}
	for _, p := range points {
		b = append(b, p.packed...)
	}
	for _, d := range digests {
		b = append(b, d[:]...)
	}
	b = append(b, skeleton...)
	sum := sha256.Sum256(b)
	return append(b, sum[:]...), nil
}

// Open reads an index from b, which must not change as long as it is used.
// Errors wrap ErrIndex. A nil error promises that the parts are where the header
// says, and that the points are in order and within the blob; what the skeleton
// holds shows when it is read.
func Open(b []byte) (*Index, error) {
	x, err := open(b)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrIndex, err)
	}
	return x, nil
}

func open(b []byte) (*Index, error) {
	if len(b) < headerSize+trailerSize || len(b) > MaxIndex {
		return nil, fmt.Errorf("%d bytes", len(b))
	}
	if string(b[:8]) != magic || le.Uint32(b[8:]) != version || le.Uint64(b[120:]) != 0 || b[13]|b[14]|b[15] != 0 {
		return nil, fmt.Errorf("its header is %x", b[:headerSize])
	}
	x := &Index{
		b: b, Compression: toc.Compression(b[12]), Blob: toc.Digest(b[16:]), Size: int64(le.Uint64(b[48:])),
		DiffID: toc.Digest(b[56:]), TarSize: int64(le.Uint64(b[88:])), skeletonSize: int64(le.Uint64(b[104:])),
	}
	points, digests := int64(le.Uint32(b[96:])), int64(le.Uint32(b[100:]))
	windows, skeleton := int64(le.Uint32(b[112:])), int64(le.Uint32(b[116:]))
	// Counts of 32 bits times small records stay far within 64 bits.
	if want := headerSize + points*pointSize + windows + digests*int64(len(toc.Digest{})) + skeleton + trailerSize; want != int64(len(b)) {
		return nil, fmt.Errorf("it has %d bytes, its header tells of %d", len(b), want)
	}
	body := b[:len(b)-trailerSize]
	if sum := sha256.Sum256(body); !bytes.Equal(sum[:], b[len(body):]) {
		return nil, fmt.Errorf("its checksum is wrong")
	}
	if x.Size < 0 || x.TarSize < 0 || x.TarSize > maxTar || x.skeletonSize < 0 || x.skeletonSize > maxSkeleton || x.skeletonSize > x.TarSize {
		return nil, fmt.Errorf("a blob of %d bytes, a tar of %d, of which headers %d", x.Size, x.TarSize, x.skeletonSize)
	}
	rest := body[headerSize:]
	cut := func(n int64) []byte {
		p := rest[:n:n]
		rest = rest[n:]
		return p
	}
	x.points, x.windows, x.digests, x.skeleton = cut(points*pointSize), cut(windows), cut(digests*int64(len(toc.Digest{}))), cut(skeleton)
	return x, x.check(points)
}

// check checks the points.
func (x *Index) check(points int64) error {
	switch x.Compression {
	case toc.None:
		if points != 0 || x.Size != x.TarSize {
			return fmt.Errorf("%d points in a tar of %d bytes and a blob of %d", points, x.TarSize, x.Size)
		}
		return nil
	case toc.GzipIndexed, toc.Zstd:
	default:
		return fmt.Errorf("compression %d", x.Compression)
	}
	if points > maxPoints || points == 0 && x.TarSize > 0 {
		return fmt.Errorf("%d points", points)
	}
	var last point
	for i := range int(points) {
		p := x.point(i)
		r := x.points[i*pointSize:][:pointSize]
		off, n := int64(le.Uint32(r[16:])), int64(le.Uint32(r[20:]))
		if i == 0 && p.out != 0 || i > 0 && (p.in <= last.in || p.out <= last.out) || p.in < 0 || p.in >= x.Size || p.out > x.TarSize ||
			i > 0 && p.out >= x.TarSize || off+n > int64(len(x.windows)) || le.Uint16(r[24:]) > inflate.WindowSize || le.Uint16(r[26:]) > inflate.MaxLengths {
			return fmt.Errorf("point %d is %x after %+v", i, r, last)
		}
		last = p
	}
	return nil
}

// point returns where point i is.
func (x *Index) point(i int) point {
	r := x.points[i*pointSize:]
	return point{in: int64(le.Uint64(r)), out: int64(le.Uint64(r[8:]))}
}

func (x *Index) pointCount() int { return len(x.points) / pointSize }

// Bytes returns the index as it is stored. The caller must not change them.
func (x *Index) Bytes() []byte { return x.b }

// Spans returns how many places there are at which decompressing can begin.
func (x *Index) Spans() int { return x.pointCount() }

var unpacker, _ = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(1<<20), zstd.WithDecoderLowmem(true))

// Checkpoint returns the checkpoint of a gzip layer's span, by its offset in the
// blob, and how many bytes of the tar the span has.
func (x *Index) Checkpoint(blobOffset int64) (*inflate.Checkpoint, int64, error) {
	lo, hi := 0, x.pointCount()
	for lo < hi {
		if mid := (lo + hi) / 2; x.point(mid).in < blobOffset {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if x.Compression != toc.GzipIndexed || lo == x.pointCount() || x.point(lo).in != blobOffset {
		return nil, 0, fmt.Errorf("%w: layer %s has no checkpoint at %d", ErrIndex, x.Blob, blobOffset)
	}
	end := x.TarSize
	if lo+1 < x.pointCount() {
		end = x.point(lo + 1).out
	}
	p := x.point(lo)
	r := x.points[lo*pointSize:][:pointSize]
	c := &inflate.Checkpoint{
		In: p.in, Out: p.out, Literal: le.Uint16(r[28:]), Left: le.Uint16(r[30:]),
		State: inflate.State(r[32]), Final: r[33] != 0, Bits: r[34], Byte: r[35],
	}
	window, lengths := int(le.Uint16(r[24:])), int(le.Uint16(r[26:]))
	if n := le.Uint32(r[20:]); n > 0 || window+lengths > 0 {
		raw, err := unpacker.DecodeAll(x.windows[le.Uint32(r[16:]):][:n], make([]byte, 0, window+lengths))
		if err == nil && len(raw) != window+lengths {
			err = fmt.Errorf("%d bytes, want %d", len(raw), window+lengths)
		}
		if err != nil {
			return nil, 0, fmt.Errorf("%w: window of the checkpoint at %d: %w", ErrIndex, blobOffset, err)
		}
		c.Lengths, c.Window = raw[:lengths:lengths], raw[lengths:]
	}
	return c, end - p.out, nil
}
