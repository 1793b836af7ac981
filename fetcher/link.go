package fetcher

import (
	"context"
	"io"
	"sync"
	"time"
)

// What is assumed of a link before it was measured, and how much of a
// measurement counts. A wrong start costs one request or some kilobytes.
const (
	firstLatency = 20 * time.Millisecond
	firstRate    = 12.5e6 // bytes per second: 100 Mbit/s
	sampleBytes  = 256 << 10
	sampleTime   = 50 * time.Millisecond
)

// Bounds of what is fetched ahead for the price of a round trip, in bytes.
const (
	minAhead = 64 << 10
	maxAhead = 1 << 20
)

// A file of at most smallFile round trips' worth is read ahead by smallAhead of
// them, a larger one by one, since it may be read at random.
const (
	smallFile  = 16
	smallAhead = 4
	// randomAfter is how many reads of a larger file in a row must be somewhere
	// else than where the last one ended, to read nothing ahead of the next.
	randomAfter = 3
)

// A Link estimates latency and bandwidth of the way to the source, as our own
// requests see it: a Fetcher's, and those of its ReaderAt. The cost model: a request costs one latency; in that time
// the link carries rate × latency bytes, so that fewer bytes than these, wanted
// or not, are cheaper received than asked for anew.
type Link struct {
	mu      sync.Mutex
	latency time.Duration // from request to first byte; leans to the shortest, since load lengthens it
	rate    float64       // bytes per second of all bodies together

	active int // bodies that receive
	since  time.Time
	busy   time.Duration // with active > 0, of the sample
	bytes  int64         // of the sample

	samples     int64 // bytes of all samples
	samplesBusy time.Duration
}

// NewLink makes a Link of which nothing is known.
func NewLink() *Link { return &Link{rate: firstRate} }

// ReaderAt is the function ReaderAt with requests that are measured. l may be nil.
func (l *Link) ReaderAt(ctx context.Context, b Blob, size int64) io.ReaderAt {
	return &readerAt{ctx, b, size, l}
}

// A linkReader counts what is read of a body.
type linkReader struct {
	r    io.Reader
	link *Link
}

func (r linkReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	r.link.received(n)
	return n, err
}

// answered records how long a request took until its first byte.
func (l *Link) answered(d time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.latency == 0 || d < l.latency {
		l.latency = max(d, time.Microsecond)
	} else {
		l.latency += (d - l.latency) / 16
	}
}

// receive counts one body more (1) or less (-1) that receives.
func (l *Link) receive(by int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if l.active > 0 {
		l.busy += now.Sub(l.since)
	}
	l.since = now
	l.active += by
}

// received counts n bytes of body.
func (l *Link) received(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes += int64(n)
	if l.bytes < sampleBytes {
		return
	}
	now := time.Now()
	busy := l.busy
	if l.active > 0 {
		busy += now.Sub(l.since)
	}
	if busy < sampleTime {
		return
	}
	l.samples += l.bytes
	l.samplesBusy += busy
	l.rate += (float64(l.bytes)/busy.Seconds() - l.rate) * 0.3
	l.bytes, l.busy, l.since = 0, 0, now
}

// estimate returns the latency, and the bandwidth in bytes per second.
func (l *Link) estimate() (time.Duration, float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.latency == 0 {
		return firstLatency, l.rate
	}
	return l.latency, l.rate
}

// measured is estimate without what was assumed at first: the bandwidth is that
// of all samples. It reports false if there is none.
func (l *Link) measured() (time.Duration, float64, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.latency == 0 || l.samplesBusy <= 0 {
		return 0, 0, false
	}
	return l.latency, float64(l.samples) / l.samplesBusy.Seconds(), true
}

// ahead returns how many bytes one round trip is worth.
func (l *Link) ahead() int64 {
	latency, rate := l.estimate()
	return min(maxAhead, max(minAhead, int64(rate*latency.Seconds())))
}
