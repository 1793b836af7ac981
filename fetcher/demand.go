package fetcher

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"
)

// errSkipped tells a wait that its job ended without bringing the span, for a
// reason that is none of the waiter's.
var errSkipped = errors.New("fetcher: job ended early")

// A wait is one span of one job that at least one Need waits for.
type wait struct {
	job  *job
	span span
	refs int           // Needs
	done chan struct{} // closed when the span was brought, or not
	err  error         // set before; errSkipped: ask again

	ended time.Time // set before done is closed
}

// end lets go of who waits.
func (w *wait) end(err error) {
	w.err, w.ended = err, time.Now()
	close(w.done)
}

// request finds or makes the jobs that bring the chunks, which are missing, and
// returns what to wait for. f.mu is held.
func (f *Fetcher) request(content int, off, n int64, chunks []int, since time.Time) []*wait {
	var waits []*wait
	var own []span // that no job brings
	spans := make([]span, 0, len(chunks))
	for _, j := range chunks {
		// Finding a span's ends takes as many steps as it has chunks.
		if n := len(spans); n > 0 && j >= spans[n-1].first && j < spans[n-1].end {
			continue
		}
		spans = append(spans, spanOf(f.x, j))
	}
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	spans = slices.CompactFunc(spans, func(a, b span) bool { return a.first == b.first })
	for _, sp := range spans {
		if j := f.coming(sp); j != nil {
			waits = append(waits, j.wait(sp))
		} else {
			own = append(own, sp)
		}
	}
	window := f.window(content, off, n)
	jobs := f.demandFor(own, since)
	for _, j := range jobs {
		for _, sp := range own {
			if j.has(sp) {
				waits = append(waits, j.wait(sp))
			}
		}
	}
	if len(jobs) > 0 {
		f.extend(jobs[len(jobs)-1], content)
		f.missed(own[len(own)-1])
	}
	jobs = append(jobs, f.sequential(content, off+n, window)...)
	for _, j := range jobs {
		f.launch(j)
	}
	return waits
}

// coming returns the job to wait for to get a span, or nil if a request of its
// own is faster. f.mu is held.
func (f *Fetcher) coming(sp span) *job {
	var near *job
	for _, j := range f.jobs {
		if !j.has(sp) {
			continue
		}
		if j.waits[sp.first] != nil || j.tally == f.demand || j.whole {
			return j
		}
		// The rest of a fill's range in front of the span comes at this
		// stream's part of the link; a request takes a round trip.
		if (j.started || j.urgent || j.near) && sp.off-j.pos.Load() <= f.link.ahead() {
			near = j
		}
	}
	return near
}

// covered reports whether a job brings the span in any case. f.mu is held.
func (f *Fetcher) covered(sp span) bool {
	return slices.ContainsFunc(f.jobs, func(j *job) bool { return j.has(sp) })
}

// demandFor makes jobs for spans, which are in order: one for several if the
// gap between them costs less than a request. f.mu is held.
func (f *Fetcher) demandFor(spans []span, since time.Time) []*job {
	var jobs []*job
	gap := f.link.ahead()
	for _, sp := range spans {
		layer := f.x.Chunk(sp.first).Layer
		if n := len(jobs); n > 0 {
			if j := jobs[n-1]; j.layer == layer && sp.off-j.limit <= gap && sp.limit-j.off <= demandBytes {
				j.end, j.limit = sp.end, sp.limit
				continue
			}
		}
		jobs = append(jobs, f.newJob(f.ctx, f.demand, since, layer, sp))
	}
	return jobs
}

// extend makes a job go on over missing spans of the same content: programs
// that read some of a file mostly read more of it. What lies behind it in the
// blob is rarely read next, and would only stand in the way of what is: on a
// link of 200 Mbit/s and 20 ms, python3 answered 20-30 % later with as much
// again of the neighbours. f.mu is held.
func (f *Fetcher) extend(j *job, content int) {
	budget := f.link.ahead()
	if f.x.Content(content).Size <= smallFile*budget {
		budget *= smallAhead
	} else if r := f.readers[content]; r != nil && r.jumps >= randomAfter {
		return
	}
	max := j.limit + budget
	for first := j.end; first < f.bounds[j.layer].end; {
		sp := spanOf(f.x, first)
		if sp.limit > max || f.x.Chunk(sp.first).Content != content {
			return
		}
		if f.spanMissing(sp) {
			if f.covered(sp) {
				return
			}
			j.end, j.limit = sp.end, sp.limit
		}
		first = sp.end
	}
}

func (f *Fetcher) spanMissing(sp span) bool {
	for j := sp.first; j < sp.end; j++ {
		if f.sink.Missing(j) {
			return true
		}
	}
	return false
}

// window returns how many bytes of the file to fetch ahead of a reader: it
// doubles with each Need that goes on where the last one ended. f.mu is held.
func (f *Fetcher) window(content int, off, n int64) int64 {
	r := f.readers[content]
	if r == nil {
		for other := range f.readers {
			if len(f.readers) < maxReaders {
				break
			}
			delete(f.readers, other)
		}
		r = &reader{next: -1}
		if off == 0 {
			r.next = 0
		}
		f.readers[content] = r
	}
	// Readers of the same file, and the kernel's read-ahead, come a little
	// out of order.
	slack := min(max(n, r.window/2), maxSequential)
	switch {
	case r.next < 0 || off > r.next+slack || off+slack < r.next:
		r.window = 0
		r.jumps++
	case r.window == 0:
		r.window, r.jumps = 2*n, 0
	case off+n > r.next:
		r.window = min(2*r.window, maxSequential)
	}
	r.next = max(off+n, r.next)
	if r.window == 0 {
		r.next = off + n
	}
	return r.window
}

// sequential makes jobs for what is missing of the window bytes of a content
// from off on, once half of it is. f.mu is held.
func (f *Fetcher) sequential(content int, off, window int64) []*job {
	c := f.x.Content(content)
	if window == 0 || off >= c.Size {
		return nil
	}
	var spans []span
	var bytes int64
	for k := f.chunkAt(content, c, off); k < c.Chunks; k++ {
		j := f.x.ContentChunk(content, k)
		ch := f.x.Chunk(j)
		if ch.FileOffset >= off+window {
			break
		}
		if ch.Zero || !f.sink.Missing(j) {
			continue
		}
		if sp := spanOf(f.x, j); !f.covered(sp) && (len(spans) == 0 || spans[len(spans)-1].first < sp.first) {
			spans = append(spans, sp)
			bytes += ch.Size
		}
	}
	if bytes < min(window, c.Size-off)/2 {
		return nil
	}
	return f.demandFor(spans, time.Now())
}

// launch gives a demand job to a worker. f.mu is held.
func (f *Fetcher) launch(j *job) {
	if f.workers >= demandJobs {
		f.queue = append(f.queue, j)
		return
	}
	f.workers++
	f.work.Go(func() { f.demandWorker(j) })
}

// demandWorker runs demand jobs until none is queued.
func (f *Fetcher) demandWorker(j *job) {
	for j != nil {
		err := f.run(j)
		f.mu.Lock()
		f.end(j, err)
		j = nil
		if len(f.queue) > 0 && !f.closed {
			j, f.queue = f.queue[0], f.queue[1:]
		} else {
			f.workers--
		}
		f.mu.Unlock()
	}
}

// leave takes a Need out of a wait. A demand job that nobody waits for any
// more, with its work not done, is given up. f.mu is held.
func (f *Fetcher) leave(w *wait) {
	if w.refs--; w.refs > 0 {
		return
	}
	j := w.job
	if j.waits[w.span.first] != w {
		return // it is done
	}
	delete(j.waits, w.span.first)
	if j.tally == f.demand && !j.whole && len(j.waits) == 0 {
		f.abandon(j)
	}
}

// abandon gives a job up: nothing waits for it. f.mu is held.
func (f *Fetcher) abandon(j *job) {
	j.cancel(context.Canceled)
	f.jobs = slices.DeleteFunc(f.jobs, func(o *job) bool { return o == j })
	f.queue = slices.DeleteFunc(f.queue, func(o *job) bool { return o == j })
}
