package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync/atomic"
	"time"

	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A job is one range of one layer under way: the chunks [first, end), of which
// it brings those that are missing when their bytes come by.
type job struct {
	tally   *tally // of its class
	layer   int
	ctx     context.Context
	cancel  context.CancelCauseFunc
	pos     atomic.Int64 // how far into the blob the body has been decoded
	urgent  bool         // a prefetch that does not pause
	near    bool         // of the neighbourhood
	dropped error        // set before f.end: what the spans' chunks were refused for
	clock   clock

	// Guarded by Fetcher.mu.
	first, end int
	off, limit int64         // of the blob; the end of the last span
	next       int           // the first chunk that has not come by
	started    bool          // it has a body
	whole      bool          // the body is the whole blob
	waits      map[int]*wait // by the span's first chunk
}

// newJob makes a job for a span that somebody waits for since then (zero:
// nobody), and lists it. f.mu is held.
func (f *Fetcher) newJob(ctx context.Context, t *tally, since time.Time, layer int, sp span) *job {
	j := &job{tally: t, layer: layer, first: sp.first, end: sp.end, off: sp.off, limit: sp.limit, next: sp.first}
	j.ctx, j.cancel = context.WithCancelCause(withSince(withTally(ctx, t), since))
	j.pos.Store(sp.off)
	f.jobs = append(f.jobs, j)
	return j
}

// has reports whether the span will come by. Fetcher.mu is held.
func (j *job) has(sp span) bool { return sp.first >= j.next && sp.first < j.end }

// wait adds a Need to those that wait for a span. Fetcher.mu is held.
func (j *job) wait(sp span) *wait {
	w := j.waits[sp.first]
	if w == nil {
		w = &wait{job: j, span: sp, done: make(chan struct{})}
		if j.waits == nil {
			j.waits = map[int]*wait{}
		}
		j.waits[sp.first] = w
	}
	w.refs++
	return w
}

// passed says that a span has come by, with what became of it.
func (f *Fetcher) passed(j *job, sp span, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	j.next = sp.end
	if w := j.waits[sp.first]; w != nil {
		delete(j.waits, sp.first)
		w.end(err)
	}
}

// end takes a job off the list. Who still waits for it gets err, or asks again
// if err is none of his. f.mu is held.
func (f *Fetcher) end(j *job, err error) {
	j.cancel(nil)
	f.jobs = slices.DeleteFunc(f.jobs, func(o *job) bool { return o == j })
	if j.near && f.demanded == 0 && !f.closed {
		f.calmer.Reset(calm)
	}
	if err == nil || f.ctx.Err() == nil && (errors.Is(err, context.Canceled) || errors.Is(err, errSkipped)) {
		err = errSkipped
	}
	for first, w := range j.waits {
		delete(j.waits, first)
		w.end(err)
	}
	f.resume.Broadcast()
}

// run does a job. It returns the error that ended it early, the network's, the
// disk's or the context's; chunks that were wrong end nothing, and are
// in j.dropped.
func (f *Fetcher) run(j *job) error {
	s := f.scratch()
	defer s.keep()
	j.clock.start()
	sink := &timedSink{f.sink, &j.clock}
	b := &jobBody{f: f, j: j, s: s}
	defer b.close()
	for chunk := j.first; chunk < f.jobEnd(j); {
		sp := spanOf(f.x, chunk)
		if !f.takes(j, sp) {
			f.passed(j, sp, nil)
			chunk = sp.end
			continue
		}
		restart, err := b.seek(sp)
		if err != nil {
			return err
		}
		if restart {
			chunk = j.first
			continue
		}
		r := &spanReader{r: s.body, left: sp.limit - sp.off}
		wrong, err := store(j.ctx, f.x, sp, r, s, sink, f.memoryOf(j))
		b.at = sp.limit - r.left
		if err == nil && len(wrong) > 0 {
			wrong, err = f.again(j, b.body, sp, wrong)
		}
		if err != nil {
			return f.fault(j, err)
		}
		f.passed(j, sp, f.drop(j, wrong))
		chunk = sp.end
	}
	return b.finish()
}

// jobEnd reads j.end, which grows until the job has started.
func (f *Fetcher) jobEnd(j *job) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return j.end
}

// takes decides, when a span comes by, whether the job decodes it: it is
// missing, and no other job was given it after this one came too slowly.
func (f *Fetcher) takes(j *job, sp span) bool {
	if !f.spanMissing(sp) {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if j.waits[sp.first] != nil || j.tally == f.demand {
		return true
	}
	return !slices.ContainsFunc(f.jobs, func(o *job) bool { return o != j && o.tally == f.demand && o.has(sp) })
}

// memoryOf returns the memory that a job's chunks count against.
func (f *Fetcher) memoryOf(j *job) chunkMemory {
	if j.tally == f.demand {
		return f.opts.Share.demand
	}
	return fillMemory{f, f.opts.Share}
}

// fillMemory keeps a job from pausing with memory that another waits for.
type fillMemory struct {
	f *Fetcher
	s *Share
}

func (m fillMemory) acquire(ctx context.Context, n int64) (int64, error) {
	n = min(n, m.s.fill.size)
	if m.s.fill.TryAcquire(n) {
		return n, nil
	}
	m.f.mu.Lock()
	m.s.starved.Add(1)
	m.f.resume.Broadcast()
	m.f.mu.Unlock()
	defer m.s.starved.Add(-1)
	return m.s.fill.acquire(ctx, n)
}

func (m fillMemory) release(n int64) { m.s.fill.release(n) }

// again asks for a span with wrong chunks, which came from a body, once more,
// elsewhere if it can be had elsewhere, and returns what is still wrong.
func (f *Fetcher) again(j *job, came io.ReadCloser, sp span, wrong map[int]error) (map[int]error, error) {
	for _, err := range wrong {
		f.opts.Logger.Debug("wrong bytes came and are asked for again", "error", err)
		break
	}
	blob := f.blobs[j.layer]
	var body io.ReadCloser
	var err error
	other, ok := blob.(interface {
		ReadRangeAvoiding(ctx context.Context, off, n int64, host int) (io.ReadCloser, error)
	})
	from, ok2 := came.(interface{ From() int })
	if ok && ok2 {
		body, err = other.ReadRangeAvoiding(j.ctx, sp.off, sp.limit-sp.off, from.From())
	} else {
		body, err = blob.ReadRange(j.ctx, sp.off, sp.limit-sp.off)
	}
	if err != nil {
		return wrong, err
	}
	defer body.Close()
	s := f.scratch()
	defer s.keep()
	s.body.Reset(body)
	s.wide = true // a later frame of the span may have a larger window than the first
	return store(j.ctx, f.x, sp, &spanReader{r: s.body, left: sp.limit - sp.off}, s, f.sink, f.memoryOf(j))
}

// drop counts the chunks that are wrong for good, and returns the error of the
// first.
func (f *Fetcher) drop(j *job, wrong map[int]error) error {
	first := -1
	for chunk, err := range wrong {
		reason := metrics.ReasonDigest
		if _, ok := errors.AsType[*DecodeError](err); ok {
			reason = metrics.ReasonDecode
		}
		f.opts.Metrics.ChunkFailed(reason)
		if first < 0 || chunk < first {
			first = chunk
		}
	}
	if first < 0 {
		return nil
	}
	if j.dropped == nil {
		j.dropped = wrong[first]
	}
	return wrong[first]
}

// fault counts what ended a job early, and returns it.
func (f *Fetcher) fault(j *job, err error) error {
	if cause := context.Cause(j.ctx); cause != nil {
		return cause
	}
	if _, ok := errors.AsType[*StoreError](err); ok {
		f.opts.Metrics.ChunkFailed(metrics.ReasonStore)
		return err
	}
	f.opts.Metrics.ChunkFailed(metrics.ReasonFetch)
	return fmt.Errorf("layer %d (%s): %w", j.layer, f.layers[j.layer].Digest, err)
}

// A jobBody is the body of a job's range, opened when the first span is taken.
type jobBody struct {
	f    *Fetcher
	j    *job
	s    *scratch
	body io.ReadCloser
	src  io.Reader // of body
	at   int64     // where in the blob s.body stands
	link bool      // counted as receiving
}

// seek makes s.body stand at the beginning of a span. It reports restart if the
// server gives the whole blob: the job is then all of the layer, from its
// first chunk.
func (b *jobBody) seek(sp span) (restart bool, err error) {
	if b.body != nil && sp.off-b.at > max(minAhead, 2*b.f.link.ahead()) && sp.off-b.at > int64(b.s.body.Buffered()) && !b.j.whole {
		b.close() // what lies between is not worth receiving
	}
	if b.body == nil {
		if err := b.open(sp); err != nil {
			return false, b.f.fault(b.j, err)
		}
		if w, ok := b.body.(interface{ Whole() io.Reader }); ok && !b.j.whole {
			if r := w.Whole(); r != nil {
				b.src, b.at = r, 0
				return true, b.f.becomeWhole(b.j)
			}
		}
	}
	for b.at < sp.off {
		n, err := b.s.body.Discard(int(min(sp.off-b.at, 1<<20)))
		b.at += int64(n)
		if err != nil {
			return false, b.f.fault(b.j, noEOF(err))
		}
	}
	b.j.pos.Store(b.at)
	return false, nil
}

func (b *jobBody) open(sp span) error {
	b.f.mu.Lock()
	limit := b.j.limit
	b.f.mu.Unlock()
	start := time.Now()
	body, err := b.f.blobs[b.j.layer].ReadRange(b.j.ctx, sp.off, limit-sp.off)
	tick(&b.j.clock.network, start)
	if err != nil {
		return err
	}
	b.f.link.answered(time.Since(start))
	b.body, b.src, b.at = body, body, sp.off
	b.s.body.Reset(b)
	b.receive(true)
	b.f.mu.Lock()
	b.j.started = true
	b.f.mu.Unlock()
	return nil
}

// Read reads the body for s.body, after a pause if others go first.
func (b *jobBody) Read(p []byte) (int, error) {
	if b.f.pressing.Load() && b.j.tally != b.f.demand {
		b.receive(false)
		if err := b.f.pause(b.j); err != nil {
			return 0, err
		}
		b.receive(true)
	}
	limit := b.f.opts.Share.rate
	if limit != nil {
		p = p[:min(len(p), limit.slice())]
	}
	defer tick(&b.j.clock.network, time.Now())
	n, err := b.src.Read(p)
	b.f.link.received(n)
	if limit != nil && n > 0 {
		limit.take(b.j.ctx, n, b.f.awaited(b.j))
	}
	return n, err
}

// awaited reports whether a reader waits for the job.
func (f *Fetcher) awaited(j *job) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return j.tally == f.demand || len(j.waits) > 0
}

func (b *jobBody) receive(on bool) {
	if on != b.link {
		b.link = on
		if on {
			b.f.link.receive(1)
		} else {
			b.f.link.receive(-1)
		}
	}
}

// finish reads what is left of the range, if it is little, so that the
// connection can be used again.
func (b *jobBody) finish() error {
	if b.body == nil || b.j.whole {
		return nil
	}
	if left := b.j.limit - b.at; left < b.f.link.ahead() {
		if n, err := b.s.body.Discard(int(left)); err == nil && n == int(left) {
			b.s.body.Discard(1) // meets the end
		}
	}
	return nil
}

func (b *jobBody) close() {
	b.receive(false)
	if b.body != nil {
		b.body.Close()
		b.body = nil
	}
}

// becomeWhole widens a job to all of its layer, whose server sends no less,
// unless another job is doing that and has not come to this one's spans.
func (f *Fetcher) becomeWhole(j *job) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, o := range f.jobs {
		if o != j && o.whole && o.layer == j.layer && o.next <= j.first {
			return errSkipped
		}
	}
	j.whole = true
	j.first, j.end = f.bounds[j.layer].first, f.bounds[j.layer].end
	j.next = j.first
	return nil
}

// pause waits while demand goes first and j is not the job that may go on.
func (f *Fetcher) pause(j *job) error {
	stop := context.AfterFunc(j.ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.resume.Broadcast()
	})
	defer stop()
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.yields(j) && j.ctx.Err() == nil {
		f.resume.Wait()
	}
	return context.Cause(j.ctx)
}

// yields reports whether j, or a fill job yet to be made (nil), has to pause:
// what goes before it is being received, or demand is waiting, though not for
// j, and j is neither near it nor the oldest. f.mu is held.
func (f *Fetcher) yields(j *job) bool {
	if !f.pressing.Load() || f.opts.Share.starved.Load() > 0 || j != nil && (j.urgent || len(j.waits) > 0) {
		return false
	}
	if f.receives(j) {
		return true
	}
	if j != nil && j.near {
		return false
	}
	free := 1
	if latency, _ := f.link.estimate(); latency < fastLatency {
		free = fastStreams
	}
	for _, o := range f.jobs {
		if o.tally == f.demand || o.urgent || o.near {
			continue
		}
		if o == j {
			return false
		}
		if free--; free == 0 {
			return true
		}
	}
	return false
}

// Of a source that answers within fastLatency, processors are what work waits
// for, and fastStreams streams go on while somebody waits.
const (
	fastLatency = 3 * time.Millisecond
	fastStreams = 2
)

const muchTime = 2500 * time.Microsecond // of the link

// receives reports whether a body with so much left comes in that goes before
// j's that sharing the link with j would make it late: what somebody waits for,
// or, before fill, what is near that. A few milliseconds' worth is there before
// j has paused, and its round trip is j's to use. f.mu is held.
func (f *Fetcher) receives(j *job) bool {
	_, rate := f.link.estimate()
	much := int64(rate * muchTime.Seconds())
	return slices.ContainsFunc(f.jobs, func(o *job) bool {
		first := o.tally == f.demand || len(o.waits) > 0 || (o.urgent || o.near) && (j == nil || !j.near)
		return first && o != j && o.started && o.limit-o.pos.Load() > much
	})
}
