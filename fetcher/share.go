package fetcher

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
)

// A Share is what all Fetchers of a process have together: the memory of the
// chunks that are on their way into a store, and the rate at which they come.
type Share struct {
	demand, fill *memory
	starved      atomic.Int32 // fill jobs that wait for memory
	rate         *rate        // nil: no limit
}

// DefaultMemory is what NewShare is given when nobody says otherwise, in bytes.
const DefaultMemory = 256 << 20

// NewShare makes a Share. memory, in bytes, bounds the chunks that are held at
// once, and the windows of their decompressors; jobs wait for it. One that
// needs more than its class's part (a quarter for demand, the rest for fill) is
// alone. bytesPerSecond bounds what is received, as it is received; what a
// reader waits for goes before the rest. 0 or less: the default, no limit.
func NewShare(memory, bytesPerSecond int64) *Share {
	if memory <= 0 {
		memory = DefaultMemory
	}
	s := &Share{demand: newMemory(max(1, memory/4)), fill: newMemory(max(1, memory-memory/4))}
	if bytesPerSecond > 0 {
		s.rate = &rate{perSecond: float64(bytesPerSecond)}
	}
	return s
}

// chunkMemory is what store takes the bytes of chunks from.
type chunkMemory interface {
	acquire(ctx context.Context, n int64) (int64, error)
	release(n int64)
}

// A memory bounds the bytes that are held at once.
type memory struct {
	size int64
	*semaphore.Weighted
}

func newMemory(size int64) *memory { return &memory{size, semaphore.NewWeighted(size)} }

// acquire waits for n bytes; what is more than all of it counts as all.
func (m *memory) acquire(ctx context.Context, n int64) (int64, error) {
	n = min(n, m.size)
	return n, m.Acquire(ctx, n)
}

func (m *memory) release(n int64) { m.Release(n) }

// rateSlice is how much time's worth of bytes a job takes at once under a
// limit, and how much it may catch up after a pause.
const rateSlice = 50 * time.Millisecond

// A rate gives bytes times at which they may have come: demand's after each
// other, and all others' after demand's and each other.
type rate struct {
	perSecond float64

	mu           sync.Mutex
	demand, rest time.Time // when what was taken so far may have come
}

// slice bounds one read, in bytes.
func (r *rate) slice() int { return max(1<<10, int(r.perSecond*rateSlice.Seconds())) }

// take waits until n bytes more may have come, or ctx ends.
func (r *rate) take(ctx context.Context, n int, demand bool) {
	d := time.Duration(float64(n) / r.perSecond * float64(time.Second))
	now := time.Now()
	floor := now.Add(-rateSlice)
	r.mu.Lock()
	if r.rest.Before(floor) {
		r.rest = floor
	}
	r.rest = r.rest.Add(d)
	until := r.rest
	if demand {
		if r.demand.Before(floor) {
			r.demand = floor
		}
		r.demand = r.demand.Add(d)
		until = r.demand
	}
	r.mu.Unlock()
	if wait := until.Sub(now); wait > 0 {
		pause(ctx, wait)
	}
}
