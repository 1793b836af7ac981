package fetcher

import (
	"context"
	"io"

	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A Stream reads whole blobs, from their first byte to their last, for an image
// whose chunks are not known yet. What it asks for counts as fill, and keeps to
// the limits of a Share.
type Stream struct {
	share *Share
	tally *tally
}

// NewStream makes a Stream. Both arguments may be nil.
func NewStream(s *Share, m *metrics.Metrics) *Stream {
	return &Stream{s, &tally{class: metrics.Fill, metrics: m}}
}

// Open starts to read a blob of size bytes, at least one. The body gives exactly
// these, or an error other than io.EOF; nothing has been compared with a
// digest. Cancelling ctx ends it too.
func (s *Stream) Open(ctx context.Context, b Blob, size int64) (io.ReadCloser, error) {
	ctx = withTally(ctx, s.tally)
	body, err := b.ReadRange(ctx, 0, size)
	if err != nil {
		return nil, err
	}
	if s.share == nil || s.share.rate == nil {
		return body, nil
	}
	return &slowBody{body, ctx, s.share.rate}, nil
}

// Work returns what was asked of the source so far.
func (s *Stream) Work() Work { return s.tally.work() }

// A slowBody keeps to a rate.
type slowBody struct {
	io.ReadCloser
	ctx  context.Context
	rate *rate
}

func (b *slowBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), b.rate.slice())])
	if n > 0 {
		b.rate.take(b.ctx, n, false)
	}
	return n, err
}
