package fetcher

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"
)

// Bounds of a fill's range, in bytes of the blob: what a tenth of a second of the
// link carries, so that a wait for one is short on a slow link, and requests
// are few on a fast one.
const (
	minFill  = 1 << 20
	maxFill  = 8 << 20
	fillTime = 100 * time.Millisecond
)

// A filling is one call of Fill.
type filling struct {
	f   *Fetcher
	ctx context.Context

	// Guarded by Fetcher.mu.
	done    bool         // nothing is left to take
	first   []span       // of FetchOptions.First, in its order, that no range was made for
	decided bool         // how first is brought
	batch   int64        // bytes of the next ranges from first
	ranges  []span       // prefetch, in order
	urgent  bool         // ranges are from first
	marked  bool         // ranges of the prioritized files were made
	next    int          // the first chunk that no range was made for
	bad     map[int]bool // layers whose blob could not be had
	errs    []error      // of chunks and layers
	fatal   error        // of the disk
}

// Fill brings everything that is missing: first FetchOptions.First, then the
// layers' prioritized files, then all the rest in order. A nil error promises that nothing is missing. Of
// a layer whose blob cannot be had, and of chunks that are wrong, it brings
// what it can, and returns the first error of each kind in the end. Several
// calls at once take turns.
func (f *Fetcher) Fill(ctx context.Context) error {
	f.filler.Lock()
	defer f.filler.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := context.AfterFunc(f.ctx, func() { cancel(ErrClosed) })
	defer stop()
	left := f.countMissing()
	f.hold(opening)
	for {
		if err := f.ended(ctx); err != nil {
			return err
		}
		if left == 0 {
			return nil
		}
		err := f.pass(ctx)
		if cause := f.ended(ctx); cause != nil {
			return cause
		}
		if err != nil {
			return err
		}
		was := left
		if left = f.countMissing(); left >= was {
			return fmt.Errorf("fill: %d chunks are still missing after they were stored", left)
		}
	}
}

// hold lets one stream go on and no more, until d after the last demand.
func (f *Fetcher) hold(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.closed {
		f.pressing.Store(true)
		f.calmer.Reset(d)
	}
}

// ended returns why a Fill under ctx has to end, or nil.
func (f *Fetcher) ended(ctx context.Context) error {
	if err := context.Cause(f.ctx); err != nil {
		return err
	}
	return context.Cause(ctx)
}

func (f *Fetcher) countMissing() int {
	n := 0
	for j := range f.x.Chunks() {
		if f.sink.Missing(j) {
			n++
		}
	}
	return n
}

// pass goes over all chunks once.
func (f *Fetcher) pass(ctx context.Context) error {
	first, needed := f.firstSpans()
	p := &filling{f: f, ctx: ctx, bad: map[int]bool{}, first: first, batch: 4 * f.link.ahead()}
	stop := context.AfterFunc(ctx, func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.resume.Broadcast()
	})
	defer stop()
	f.mu.Lock()
	f.near = neighbourhood{open: true}
	if needed > 0 && f.plan.Mode == "" {
		f.plan = Plan{Mode: ModePrefetch, Needed: needed, Size: sizeOf(f.layers)}
	}
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.near = neighbourhood{}
	}()
	var streams sync.WaitGroup
	for range f.opts.Streams {
		streams.Go(p.stream)
	}
	for range nearStreams {
		streams.Go(p.nearStream)
	}
	streams.Go(p.zeros)
	streams.Wait()
	p.settle()
	if p.fatal != nil {
		return p.fatal
	}
	return joined(p.errs)
}

// firstSpans returns the missing spans of FetchOptions.First, in its order, and
// how many bytes those have that are in the image, missing or not.
func (f *Fetcher) firstSpans() (spans []span, needed int64) {
	seen := map[int]bool{}
	for _, part := range f.opts.First {
		if part.Content < 0 || part.Content >= f.x.Contents() || part.Off < 0 {
			continue
		}
		c := f.x.Content(part.Content)
		for k := f.chunkAt(part.Content, c, part.Off); k < c.Chunks; k++ {
			j := f.x.ContentChunk(part.Content, k)
			ch := f.x.Chunk(j)
			if ch.FileOffset-part.Off >= part.N {
				break
			}
			if ch.Zero {
				continue
			}
			sp := spanOf(f.x, j)
			was, ok := seen[sp.first]
			if !ok {
				needed += sp.limit - sp.off
			}
			if missing := f.sink.Missing(j); missing && !was {
				spans = append(spans, sp)
				seen[sp.first] = true
			} else if !ok {
				seen[sp.first] = false
			}
		}
	}
	return spans, needed
}

// more makes the next ranges to prefetch, and reports whether there are any:
// from the first spans so many that they come together in a moment, and of
// those one range for what lies side by side, or all of them in the ranges of
// ModeStream; then the prioritized files. f.mu is held.
func (p *filling) more() bool {
	f := p.f
	if len(p.first) > 0 {
		p.urgent = true
		if p.decide() {
			return true
		}
		var batch []span
		batch, p.first = nextBatch(p.first, p.batch, func(sp span) bool { return f.spanMissing(sp) && !f.covered(sp) })
		pl := p.planner(f.link.estimate())
		p.ranges = pl.merge(batch, pl.gap, math.MaxInt64)
		p.batch = min(2*p.batch, maxFill)
		return true
	}
	if p.urgent = false; !p.marked {
		p.marked = true
		for i, l := range f.layers {
			p.ranges = append(p.ranges, f.prefetchRanges(i, l.PrefetchEnd)...)
		}
		return true
	}
	return false
}

// hurries reports whether the next job will be of what readers are known to
// want: it waits for no demand, which it is the next of. f.mu is held.
func (p *filling) hurries() bool {
	return len(p.first) > 0 || p.urgent && len(p.ranges) > 0
}

// prefetchRanges returns the chunks of a layer's prioritized files, which end
// at end of the blob: one range, unless that is very long.
func (f *Fetcher) prefetchRanges(layer int, end int64) []span {
	b := f.bounds[layer]
	var ranges []span
	for j := b.first; j < b.end; {
		sp := spanOf(f.x, j)
		if sp.limit > end {
			break
		}
		if n := len(ranges); f.spanMissing(sp) {
			if n == 0 || sp.limit-ranges[n-1].off > maxFill {
				ranges = append(ranges, sp)
			} else {
				ranges[n-1].end, ranges[n-1].limit = sp.end, sp.limit
			}
		}
		j = sp.end
	}
	return ranges
}

// stream does one range after another.
func (p *filling) stream() {
	f := p.f
	for {
		f.mu.Lock()
		for !p.done && p.ctx.Err() == nil && !p.hurries() && (f.yields(nil) || p.holds()) {
			f.resume.Wait()
		}
		j := p.take()
		if j == nil {
			p.done = true
			f.resume.Broadcast()
			f.mu.Unlock()
			return
		}
		f.mu.Unlock()
		err := f.run(j)
		f.mu.Lock()
		f.end(j, err)
		p.note(j, err)
		f.mu.Unlock()
	}
}

// holds reports whether fill has to wait for prefetch. f.mu is held.
func (p *filling) holds() bool {
	return len(p.ranges) == 0 && p.marked && slices.ContainsFunc(p.f.jobs, func(j *job) bool { return j.tally == p.f.prefetch })
}

// zeros puts the chunks that need no request, when no reader waits.
func (p *filling) zeros() {
	f := p.f
	for j := f.zeros; j < f.x.Chunks(); j++ {
		if !f.sink.Missing(j) {
			continue
		}
		f.mu.Lock()
		for f.pressing.Load() && p.ctx.Err() == nil {
			f.resume.Wait()
		}
		stop := p.ctx.Err() != nil || p.fatal != nil || f.closed
		f.mu.Unlock()
		if stop {
			return
		}
		if err := f.putZero(j); err != nil {
			f.mu.Lock()
			p.fatal = err
			f.mu.Unlock()
			return
		}
	}
}

// note keeps a job's errors. f.mu is held.
func (p *filling) note(j *job, err error) {
	if j.dropped != nil && len(p.errs) < 8 {
		p.errs = append(p.errs, j.dropped)
	}
	if err == nil || errors.Is(err, errSkipped) || p.ctx.Err() != nil {
		return
	}
	if _, ok := errors.AsType[*StoreError](err); ok {
		if p.fatal == nil {
			p.fatal = err
		}
		return
	}
	if !p.bad[j.layer] {
		p.bad[j.layer] = true
		p.errs = append(p.errs, err)
	}
}

// take makes the next job, or returns nil at the end. f.mu is held.
func (p *filling) take() *job {
	f := p.f
	if p.ctx.Err() != nil || p.fatal != nil || f.closed {
		return nil
	}
	for len(p.ranges) > 0 || p.more() {
		if len(p.ranges) == 0 {
			continue
		}
		r := p.ranges[0]
		p.ranges = p.ranges[1:]
		layer := f.x.Chunk(r.first).Layer
		if !p.bad[layer] {
			j := f.newJob(p.ctx, f.prefetch, time.Time{}, layer, r)
			j.urgent = p.urgent
			return j
		}
	}
	size, gap := f.fillSize(), f.link.ahead()
	var j *job
	for p.next < f.zeros {
		sp := spanOf(f.x, p.next)
		layer := f.x.Chunk(sp.first).Layer
		if j != nil && (layer != j.layer || sp.limit-j.off > size || sp.off-j.limit > gap) {
			break
		}
		if p.bad[layer] || !f.spanMissing(sp) || f.covered(sp) {
			p.next = sp.end
			continue
		}
		if j == nil {
			j = f.newJob(p.ctx, f.fill, time.Time{}, layer, sp)
		} else {
			j.end, j.limit = sp.end, sp.limit
		}
		p.next = sp.end
	}
	return j
}

// fillSize returns how long a range of fill may be, in bytes of the blob.
func (f *Fetcher) fillSize() int64 {
	_, rate := f.link.estimate()
	return min(maxFill, max(minFill, int64(rate*fillTime.Seconds())))
}

// settle waits for the demand jobs that a pass left chunks to.
func (p *filling) settle() {
	f := p.f
	f.mu.Lock()
	defer f.mu.Unlock()
	for p.ctx.Err() == nil && slices.ContainsFunc(f.jobs, func(j *job) bool { return j.tally == f.demand }) {
		f.resume.Wait()
	}
}
