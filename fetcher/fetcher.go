package fetcher

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sort"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A Sink is the store that chunks are brought into. Chunks go by their number
// in the index. It is called from several goroutines at once.
type Sink interface {
	// Missing reports whether the chunk is still wanted. It is called often
	// and must be cheap.
	Missing(chunk int) bool

	// Put stores a chunk. data have the chunk's digest and belong to the
	// caller again when Put returns; for a chunk that is Zero they are nil. A
	// nil error promises that the chunk is not Missing.
	Put(chunk int, data []byte) error
}

// FetchOptions are options of New. The zero value is right.
type FetchOptions struct {
	// Share is what this Fetcher has together with the others of the process.
	// Nil: the default's memory for itself, and no limit of its rate.
	Share *Share

	// First is what Fill brings before all else, in this order: what readers
	// will want. What is not in the image is passed over.
	First []Part

	// Link is what earlier requests to the source have told of the way to it.
	// Nil: nothing.
	Link *Link

	// Streams is how many ranges Fill receives at once. 0: 6.
	Streams int

	// Waited hears of each Need that had to wait, when it returns. Nil: nobody
	// does. It is called from several goroutines and must not take long.
	Waited func(Waited)

	// Checkpoint gives the checkpoint with which the span at an offset of a
	// layer's blob begins, and the bytes it decompresses to, for layers of
	// compression toc.GzipIndexed.
	Checkpoint func(layer int, off int64) (*inflate.Checkpoint, int64, error)

	// Metrics counts requests, bytes and failed chunks. Nil: not counted.
	Metrics *metrics.Metrics

	// Logger hears of chunks that were wrong. Nil: silence.
	Logger *slog.Logger
}

// A Part is some bytes of a content, by its number in the index.
type Part struct {
	Content int
	Off, N  int64
}

// Defaults and bounds.
const (
	// Six streams keep a lossy link full; on a fast one, two cores are busy
	// decompressing from three on (BenchmarkFill).
	defaultStreams = 6
	// demandJobs is how many demand requests may be under way. More readers
	// wait in a queue: that many requests already fill any link.
	demandJobs = 16
	// demandBytes is how long the range of one demand job may be, so that a
	// long read becomes several requests at once.
	demandBytes = 4 << 20
	// maxSequential bounds the read-ahead of a sequential reader, in bytes
	// of the file.
	maxSequential = 16 << 20
	maxReaders    = 64 // contents whose readers are remembered
	// calm is how long after the last demand Fill goes on: a program's reads
	// come in chains, and a pause shorter than this is part of one.
	calm = 100 * time.Millisecond
	// opening is how long Fill holds back at first: programs are about to
	// start, and what six streams have asked for cannot be called back.
	opening = 300 * time.Millisecond
)

// A Fetcher brings the chunks of one image into one sink. It is safe for
// concurrent use.
type Fetcher struct {
	x      *image.Index
	layers []image.IndexLayer
	blobs  []Blob
	sink   Sink
	opts   FetchOptions
	link   *Link

	demand, prefetch, fill *tally

	ctx    context.Context // ends with Close
	cancel context.CancelCauseFunc
	work   sync.WaitGroup // demand workers
	filler sync.Mutex     // held by Fill

	zeros  int           // the first Zero chunk: chunks [zeros, Chunks) are
	bounds []layerBounds // by layer: its chunks

	pressing atomic.Bool // demand is waiting, or was a moment ago

	mu       sync.Mutex
	resume   sync.Cond // of mu: something changed that a paused fill job waits for
	closed   bool
	jobs     []*job // under way or queued, in the order they were made
	queue    []*job // demand jobs without a worker
	workers  int    // demand workers
	demanded int    // Need calls that wait
	calmer   *time.Timer
	waiting  map[*waiter]struct{}
	readers  map[int]*reader // by content
	near     neighbourhood
	plan     Plan
}

type layerBounds struct{ first, end int }

// A waiter is a Need that waits.
type waiter struct {
	since  time.Time
	waited Waited
}

// A reader remembers where in a content the last Need ended.
type reader struct {
	next, window int64 // in bytes of the file
	jumps        int   // Needs in a row that did not go on there
}

// New makes a Fetcher for the image of x, whose i-th layer is blobs[i]. It does
// no request and starts nothing yet.
func New(x *image.Index, blobs []Blob, sink Sink, o FetchOptions) *Fetcher {
	if o.Share == nil {
		o.Share = NewShare(0, 0)
	}
	if o.Streams <= 0 {
		o.Streams = defaultStreams
	}
	if o.Link == nil {
		o.Link = NewLink()
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	f := &Fetcher{
		x: x, layers: x.Layers(), blobs: blobs, sink: sink, opts: o, link: o.Link,
		demand:   &tally{class: metrics.Demand, metrics: o.Metrics},
		prefetch: &tally{class: metrics.Prefetch, metrics: o.Metrics},
		fill:     &tally{class: metrics.Fill, metrics: o.Metrics},
		waiting:  map[*waiter]struct{}{},
		readers:  map[int]*reader{},
	}
	f.resume.L = &f.mu
	f.ctx, f.cancel = context.WithCancelCause(context.Background())
	f.calmer = time.AfterFunc(time.Hour, f.calmDown)
	f.calmer.Stop()
	// Chunks are in the order of layers, those of zeros last: of a million few are
	// looked at, and few pages of the index are read to mount.
	from := func(layer int) int {
		return sort.Search(x.Chunks(), func(j int) bool { c := x.Chunk(j); return c.Zero || c.Layer >= layer })
	}
	f.zeros = from(len(f.layers))
	f.bounds = make([]layerBounds, len(f.layers))
	for layer := range f.bounds {
		if first, end := from(layer), from(layer+1); first < end {
			f.bounds[layer] = layerBounds{first, end}
		}
	}
	return f
}

// Close ends all requests and waits for what the Fetcher started; waiting
// Needs and Fills return ErrClosed. The sink is not used after it.
func (f *Fetcher) Close() {
	f.mu.Lock()
	f.closed = true
	f.cancel(ErrClosed)
	for _, j := range f.queue {
		f.end(j, ErrClosed)
	}
	f.queue = nil
	f.resume.Broadcast()
	f.mu.Unlock()
	f.work.Wait()
	f.filler.Lock() // Fill has ended
	f.calmer.Stop()
	f.filler.Unlock()
}

// Stats returns what each class has asked of the source so far. The classes
// are the words of package metrics: demand, prefetch and fill.
func (f *Fetcher) Stats() map[string]Work {
	return map[string]Work{
		metrics.Demand:   f.demand.work(),
		metrics.Prefetch: f.prefetch.work(),
		metrics.Fill:     f.fill.work(),
	}
}

// Link returns the latency of a request and the bandwidth in bytes per second
// that the cost model counts with.
func (f *Fetcher) Link() (latency time.Duration, bytesPerSecond float64) { return f.link.estimate() }

// Waiting returns how many Needs wait now.
func (f *Fetcher) Waiting() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.waiting)
}

// OldestWait returns for how long the Need that has waited longest has waited;
// 0 when none waits.
func (f *Fetcher) OldestWait() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	var oldest time.Duration
	for w := range f.waiting {
		oldest = max(oldest, time.Since(w.since))
	}
	return oldest
}

// Need brings the chunks under the n bytes from off on of a content, by its
// number in the index. A nil error promises that each of them was Put. The
// range is cut at the content's end. Errors are those of the package comment,
// and ctx's own as soon as that ends.
func (f *Fetcher) Need(ctx context.Context, content int, off, n int64) (err error) {
	c := f.x.Content(content)
	if off < 0 || n < 0 {
		return fmt.Errorf("need %d bytes at %d of content %s: negative", n, off, c.Digest)
	}
	n = min(n, c.Size-off)
	if n <= 0 {
		return nil
	}
	w := &waiter{since: time.Now()}
	defer func() {
		if w.waited.Bytes > 0 && f.opts.Waited != nil {
			w.waited.Content, w.waited.Off, w.waited.N = content, off, n
			w.waited.Since, w.waited.Total, w.waited.Err = w.since, time.Since(w.since), err
			f.opts.Waited(w.waited)
		}
	}()
	for {
		if err := context.Cause(f.ctx); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		missing, err := f.missing(content, c, off, n)
		if err != nil || len(missing) == 0 {
			return err
		}
		if again, err := f.await(ctx, w, content, off, n, missing); !again || err != nil {
			return err
		}
	}
}

// missing returns the missing chunks under a range of a content, in the order
// of the file. Those that are all zero it brings at once.
func (f *Fetcher) missing(content int, c image.Content, off, n int64) ([]int, error) {
	var chunks []int
	for k := f.chunkAt(content, c, off); k < c.Chunks; k++ {
		j := f.x.ContentChunk(content, k)
		ch := f.x.Chunk(j)
		if ch.FileOffset >= off+n {
			break
		}
		if !f.sink.Missing(j) {
			continue
		}
		if !ch.Zero {
			chunks = append(chunks, j)
		} else if err := f.putZero(j); err != nil {
			return nil, err
		}
	}
	return chunks, nil
}

// chunkAt returns which of a content's chunks holds the byte at off.
func (f *Fetcher) chunkAt(content int, c image.Content, off int64) int {
	lo, hi := 0, c.Chunks-1
	for lo < hi {
		mid := (lo + hi + 1) / 2
		if f.x.Chunk(f.x.ContentChunk(content, mid)).FileOffset <= off {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return lo
}

func (f *Fetcher) putZero(chunk int) error {
	if err := f.sink.Put(chunk, nil); err != nil {
		f.opts.Metrics.ChunkFailed(metrics.ReasonStore)
		return &StoreError{chunk, err}
	}
	return nil
}

// await has the missing chunks brought and waits for them. It reports again
// when a job that was to bring one ended without.
func (f *Fetcher) await(ctx context.Context, w *waiter, content int, off, n int64, missing []int) (again bool, err error) {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return false, ErrClosed
	}
	waits := f.request(content, off, n, missing, w.since)
	f.waiting[w] = struct{}{}
	f.demanded++
	f.pressing.Store(true)
	f.resume.Broadcast() // a job with waits does not pause
	since, before := time.Now(), make([]reading, len(waits))
	for i, wt := range waits {
		before[i] = wt.job.clock.read()
	}
	f.mu.Unlock()

	left := waits
	for len(left) > 0 && err == nil {
		select {
		case <-left[0].done:
			left = left[1:]
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	f.mu.Lock()
	delete(f.waiting, w)
	if f.demanded--; f.demanded == 0 && !f.closed {
		f.calmer.Reset(calm)
	}
	for _, wt := range left {
		f.leave(wt)
	}
	f.mu.Unlock()
	w.waited.add(since, waits, len(waits)-len(left), before)
	if err != nil {
		return false, err
	}
	for _, wt := range waits {
		switch {
		case wt.err == nil:
		case wt.err == errSkipped:
			again = true
		case f.anyMissing(missing, wt.span):
			return false, wt.err
		}
	}
	return again, nil
}

func (f *Fetcher) anyMissing(chunks []int, sp span) bool {
	for _, j := range chunks {
		if j >= sp.first && j < sp.end && f.sink.Missing(j) {
			return true
		}
	}
	return false
}

// calmDown lets fill jobs go on, when no Need waits.
func (f *Fetcher) calmDown() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.demanded == 0 && !slices.ContainsFunc(f.jobs, func(j *job) bool { return j.near }) {
		f.pressing.Store(false)
		f.resume.Broadcast()
	}
}
