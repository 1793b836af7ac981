package tarindex

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// Magic numbers of frames, and of the sixteen kinds of skippable ones (RFC
// 8878, sections 3.1.1 and 3.1.2).
const (
	zstdMagic = 0xfd2fb528
	skipMagic = 0x184d2a50
)

// frames gives the zstd frames of a stream one by one: next goes to the next
// one, and Read reads it up to io.EOF.
type frames struct {
	r    *bufio.Reader
	pos  int64 // in the stream
	left int64 // of the header, block or checksum under way
	last bool  // no block follows
	sum  int64 // bytes of the checksum
	open bool
}

func newBuffered(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, 128<<10) }

// next goes to the next frame that is not skippable, and returns where it is.
func (f *frames) next() (int64, error) {
	if f.open {
		return 0, fmt.Errorf("%w: zstd frame before byte %d was not read to its end", ErrLayer, f.pos)
	}
	for {
		raw, err := f.r.Peek(zstd.HeaderMaxSize)
		if len(raw) == 0 {
			return 0, err
		}
		if err != nil && err != io.EOF {
			return 0, err
		}
		var h zstd.Header
		if err := h.Decode(raw); err != nil {
			return 0, fmt.Errorf("%w: zstd frame at byte %d: %w", ErrLayer, f.pos, err)
		}
		if h.Skippable {
			n := int64(h.SkippableSize) + 8
			m, err := io.CopyN(io.Discard, f.r, n)
			f.pos += m
			if err != nil {
				return 0, noEOF(err)
			}
			continue
		}
		f.left, f.last, f.open, f.sum = int64(h.HeaderSize), false, true, 0
		if h.HasCheckSum {
			f.sum = 4
		}
		return f.pos, nil
	}
}

func (f *frames) Read(p []byte) (int, error) {
	if f.left == 0 && f.open {
		if err := f.block(); err != nil {
			return 0, err
		}
	}
	if !f.open {
		return 0, io.EOF
	}
	n, err := f.r.Read(p[:min(int64(len(p)), f.left)])
	f.pos += int64(n)
	f.left -= int64(n)
	if f.left == 0 && f.last && f.sum == 0 {
		f.open = false
	}
	return n, noEOF(err)
}

// block finds out how long the next part of the frame is (RFC 8878, section
// 3.1.1.2): a block with its header of three bytes, or the checksum.
func (f *frames) block() error {
	if f.last {
		f.left, f.sum = f.sum, 0
		if f.left == 0 {
			f.open = false
		}
		return nil
	}
	raw, err := f.r.Peek(3)
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	h := uint32(binary.LittleEndian.Uint16(raw)) | uint32(raw[2])<<16
	f.last = h&1 != 0
	f.left = 3 + int64(h>>3)
	if h>>1&3 == 1 { // RLE: one byte
		f.left = 4
	}
	return nil
}
