package zstdchunked

import (
	"bytes"
	"io"
)

// Sizes of chunks in bytes: about 64 KiB, as containers/storage cuts them.
const (
	minChunk = 16 << 10
	maxChunk = 1 << 20
	cutBits  = 16
)

// minZeros is the shortest run of zero bytes, at a chunk's beginning, that
// becomes a chunk of its own, of which readers need nothing.
const minZeros = 16 << 10

// A cutter cuts content where the content says so, so that a file of which a
// little changed has most of its chunks as before: at bytes where a rolling
// hash of the last 64 has its upper bits zero ("gear" hash; Xia et al., FastCDC, 2016).
type cutter struct {
	r    io.Reader
	buf  []byte // 4 maxChunk, made once
	data []byte // of buf: read, and not given yet
	eof  bool
}

func (c *cutter) reset(r io.Reader) {
	if c.buf == nil {
		c.buf = make([]byte, 4*maxChunk)
	}
	c.r, c.data, c.eof = r, c.buf[:0], false
}

// next returns the next chunk, which is good until the following call, and
// whether it is all zeros. At the end it returns io.EOF.
func (c *cutter) next() (chunk []byte, zeros bool, err error) {
	if err := c.fill(); err != nil {
		return nil, false, err
	}
	if len(c.data) == 0 {
		return nil, false, io.EOF
	}
	n := leadingZeros(c.data[:min(len(c.data), maxChunk)])
	if zeros = n >= minZeros; !zeros {
		n = cut(c.data[:min(len(c.data), maxChunk)])
	}
	chunk, c.data = c.data[:n], c.data[n:]
	return chunk, zeros, nil
}

// fill sees to it that a chunk of any size is at hand, unless the end is.
func (c *cutter) fill() error {
	if c.eof || len(c.data) >= maxChunk {
		return nil
	}
	n := copy(c.buf, c.data)
	for n < len(c.buf) {
		m, err := c.r.Read(c.buf[n:])
		n += m
		if err == io.EOF {
			c.eof = true
			break
		}
		if err != nil {
			return err
		}
	}
	c.data = c.buf[:n]
	return nil
}

// cut returns where the first chunk of data ends.
func cut(data []byte) int {
	if len(data) <= minChunk {
		return len(data)
	}
	h := uint64(0)
	for i, b := range data[minChunk-64:] {
		h = h<<1 + gear[b]
		if i >= 64 && h>>(64-cutBits) == 0 {
			return minChunk - 64 + i + 1
		}
	}
	return len(data)
}

var zeroPage [4096]byte

func leadingZeros(data []byte) int {
	n := 0
	for len(data)-n >= len(zeroPage) && bytes.Equal(data[n:n+len(zeroPage)], zeroPage[:]) {
		n += len(zeroPage)
	}
	for n < len(data) && data[n] == 0 {
		n++
	}
	return n
}

// gear has a random number for each byte (splitmix64 from 0; Vigna, 2015). It
// is part of the format in that another table cuts in other places.
var gear = func() (t [256]uint64) {
	x := uint64(0)
	for i := range t {
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		t[i] = z ^ z>>31
	}
	return t
}()
