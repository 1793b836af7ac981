package zstdchunked

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// A pipeline compresses segments side by side, each to a frame of its own, and
// writes the frames in order.
//
//	add ─┬─► work ─► workers ─┐
//	     └─► order ───────────┴─► writer ─► w
type pipeline struct {
	enc         *zstd.Encoder
	work, order chan *segment
	g           *errgroup.Group
	ctx         context.Context // ends when a part has failed
	free        chan []byte     // buffers to use again

	// Of the writer, until finish:
	w   io.Writer
	sum digest.Digester
	n   int64 // bytes written
}

// A segment is a part of the tar that becomes one frame.
type segment struct {
	content bool
	raw     []byte
	frame   []byte
	done    chan struct{} // closed once frame and digest are there

	digest      digest.Digest // of content
	offset, end int64         // of the frame in the blob; known after finish
}

func newPipeline(ctx context.Context, w io.Writer, workers int) (*pipeline, error) {
	// No frame holds more than a chunk, so a larger window would only take memory.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(workers), zstd.WithWindowSize(maxChunk), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, err
	}
	p := &pipeline{
		enc: enc, work: make(chan *segment, workers), order: make(chan *segment, 4*workers), w: w, sum: digest.SHA256.Digester(),
		free: make(chan []byte, 12*workers),
	}
	p.g, p.ctx = errgroup.WithContext(ctx)
	for range workers {
		p.g.Go(p.compress)
	}
	p.g.Go(p.write)
	return p, nil
}

// add hands on a copy of b.
func (p *pipeline) add(b []byte, content bool) (*segment, error) {
	s := &segment{content: content, raw: append(p.buffer(), b...), done: make(chan struct{})}
	for _, to := range []chan *segment{p.order, p.work} {
		select {
		case to <- s:
		case <-p.ctx.Done():
			return nil, context.Cause(p.ctx)
		}
	}
	return s, nil
}

func (p *pipeline) buffer() []byte {
	select {
	case b := <-p.free:
		return b[:0]
	default:
		return nil
	}
}

// reuse gives back a buffer.
func (p *pipeline) reuse(b []byte) {
	select {
	case p.free <- b:
	default:
	}
}

func (p *pipeline) compress() error {
	for s := range p.work {
		s.frame = p.enc.EncodeAll(s.raw, p.buffer())
		if s.content {
			s.digest = digest.FromBytes(s.raw)
		}
		p.reuse(s.raw)
		s.raw = nil
		close(s.done)
	}
	return nil
}

func (p *pipeline) write() error {
	for s := range p.order {
		select {
		case <-s.done:
		case <-p.ctx.Done():
			return context.Cause(p.ctx)
		}
		s.offset = p.n
		if err := p.emit(s.frame); err != nil {
			return err
		}
		s.end = p.n
		p.reuse(s.frame)
		s.frame, s.done = nil, nil
	}
	return nil
}

func (p *pipeline) emit(b []byte) error {
	p.sum.Hash().Write(b)
	n, err := p.w.Write(b)
	p.n += int64(n)
	return err
}

// finish waits until everything is written.
func (p *pipeline) finish() error {
	close(p.work)
	close(p.order)
	return p.g.Wait()
}

// skippable writes a skippable frame (RFC 8878, 3.1.2) that holds b, and
// returns the offset of b. It is for after finish.
func (p *pipeline) skippable(b []byte) (int64, error) {
	if len(b) > maxSkippable {
		return 0, fmt.Errorf("%d bytes, the limit of a zstd frame is %d", len(b), int64(maxSkippable))
	}
	header := binary.LittleEndian.AppendUint32(nil, 0x184d2a50)
	if err := p.emit(binary.LittleEndian.AppendUint32(header, uint32(len(b)))); err != nil {
		return 0, err
	}
	off := p.n
	return off, p.emit(b)
}
