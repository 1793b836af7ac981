package fetcher

import (
	"sync/atomic"
	"time"
)

// A Waited is a Need that had to wait, and what it waited for. What is left of
// Total besides the parts was spent on decompressing, digests and waking up. Of
// several jobs that were waited for at once, the parts are of the one that
// ended last.
type Waited struct {
	Content int
	Off, N  int64 // of the file, as asked for
	Since   time.Time
	Total   time.Duration
	Queue   time.Duration // until a worker took the job
	Network time.Duration // for the source's answer and its bytes
	Store   time.Duration // until the sink had taken the chunks
	Bytes   int64         // compressed, of the spans that were waited for
	Err     error         // what the Need returns; nil: the bytes are there
}

// A clock adds up what a job spends its time on, in nanoseconds.
type clock struct {
	begun          atomic.Int64 // when a worker took it (UnixNano), 0 before
	network, store atomic.Int64
}

// A reading is what a clock showed.
type reading struct{ network, store time.Duration }

func (c *clock) read() reading {
	return reading{time.Duration(c.network.Load()), time.Duration(c.store.Load())}
}

// start notes that a worker has taken the job.
func (c *clock) start() { c.begun.CompareAndSwap(0, time.Now().UnixNano()) }

// tick adds the time since start to one of the clock's sums.
func tick(sum *atomic.Int64, start time.Time) { sum.Add(int64(time.Since(start))) }

// timedSink is a sink whose Put counts as its job's time.
type timedSink struct {
	Sink
	clock *clock
}

func (s *timedSink) Put(chunk int, data []byte) error {
	defer tick(&s.clock.store, time.Now())
	return s.Sink.Put(chunk, data)
}

// add adds what was waited for since then: waits, of which the first done have
// ended, and whose clocks showed before.
func (t *Waited) add(since time.Time, waits []*wait, done int, before []reading) {
	if len(waits) == 0 {
		return
	}
	total := time.Since(since)
	last := min(done, len(waits)-1) // the first that has not ended
	for i, w := range waits {
		t.Bytes += w.span.limit - w.span.off
		if done == len(waits) && waits[last].ended.Before(w.ended) {
			last = i
		}
	}
	c := &waits[last].job.clock
	queue := total
	if begun := c.begun.Load(); begun != 0 {
		queue = min(total, max(0, time.Unix(0, begun).Sub(since)))
	}
	now := c.read()
	// What the job was in the midst of when the wait began counts from then.
	network := min(now.network-before[last].network, total-queue)
	t.Queue += queue
	t.Network += network
	t.Store += min(now.store-before[last].store, total-queue-network)
}
