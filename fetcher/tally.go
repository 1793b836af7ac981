package fetcher

import (
	"context"
	"sync/atomic"

	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// Work counts what a class of work has asked of the source.
type Work struct {
	Requests int64 // answered or not
	Bytes    int64 // of bodies, as they were received (compressed)
}

// A tally counts the requests of one class. It travels in the context, since
// only a Source knows how many requests a ReadRange took.
type tally struct {
	class           string
	metrics         *metrics.Metrics
	requests, bytes atomic.Int64
}

type tallyKey struct{}

func withTally(ctx context.Context, t *tally) context.Context {
	return context.WithValue(ctx, tallyKey{}, t)
}

// tallyOf returns ctx's tally, or other. A nil one counts nothing.
func tallyOf(ctx context.Context, other *tally) *tally {
	if t, ok := ctx.Value(tallyKey{}).(*tally); ok {
		return t
	}
	return other
}

// add counts one finished request and the n bytes of body it gave, from one of
// the kinds of sources of package metrics.
func (t *tally) add(from string, ok bool, n int64) {
	if t == nil {
		return
	}
	t.requests.Add(1)
	t.bytes.Add(n)
	result := metrics.OK
	if !ok {
		result = metrics.Failed
	}
	t.metrics.Request(t.class, from, result, n)
}

func (t *tally) work() Work { return Work{t.requests.Load(), t.bytes.Load()} }
