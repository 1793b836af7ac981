package fetcher

import (
	"slices"
	"time"

	"github.com/cfs-fuse/cfs-fuse/image"
)

const (
	// nearMisses and nearRanges are how many misses, and ranges around them,
	// wait for a stream. Older ones are forgotten: fill comes to them in the end.
	nearMisses = 16
	nearRanges = 32
	// nearStreams is how many of the ranges are under way at once: of one miss
	// mostly what is behind it and what is in front.
	nearStreams = 2
	// nearReach is how much to either side goes first, in bytes of the blob, even
	// if a round trip is worth less.
	nearReach = 512 << 10
)

// A neighbourhood is what fill goes to before all else that it would bring in
// order: the small files around those that a program had to wait for. In a blob
// the files of a folder lie together, and who reads one of them often reads
// more; as fill brings everything in the end, no byte of it is wasted. The
// latest miss goes first. On a link of 100 Mbit/s and 20 ms a Python program
// that imports 1,100 modules waited for 1,550 files one by one, while fill
// brought others; with their neighbourhoods it waits for 135.
//
// Guarded by Fetcher.mu.
type neighbourhood struct {
	open   bool   // a Fill is under way
	misses []span // the latest is the last
	ranges []span // the one to go first is the last
}

// missed has the neighbourhood of a span brought soon, if it is of a file so
// small that it is not worth a round trip. f.mu is held.
func (f *Fetcher) missed(sp span) {
	if !f.near.open || f.x.Content(f.x.Chunk(sp.first).Content).Size > f.smallest() {
		return
	}
	f.near.misses = append(f.near.misses, sp)
	if n := len(f.near.misses); n > nearMisses {
		f.near.misses = f.near.misses[n-nearMisses:]
	}
	f.resume.Broadcast()
}

// smallest returns up to which size in bytes a file is one of many. f.mu is
// held.
func (f *Fetcher) smallest() int64 { return smallAhead * f.link.ahead() }

// around returns what is missing around a span, of small files alone: as much
// as a round trip is worth to either side. The nearest behind it is the last.
// f.mu is held.
func (f *Fetcher) around(sp span) []span {
	most, small := max(f.link.ahead(), nearReach), f.smallest()
	gap := most / int64(f.opts.Streams)
	b := f.bounds[f.x.Chunk(sp.first).Layer]
	wanted := func(s span) bool {
		return f.x.Content(f.x.Chunk(s.first).Content).Size <= small && f.spanMissing(s) && !f.covered(s)
	}
	var behind, front []span
	for first, left := sp.end, most; first < b.end && left > 0; {
		s := spanOf(f.x, first)
		if first, left = s.end, left-cost(s, small, f.x); !wanted(s) {
			continue
		}
		if n := len(behind); n > 0 && s.off-behind[n-1].limit <= gap {
			behind[n-1].end, behind[n-1].limit = s.end, s.limit
		} else {
			behind = append(behind, s)
		}
	}
	for last, left := sp.first-1, most; last >= b.first && left > 0; {
		s := spanOf(f.x, last)
		if last, left = s.first-1, left-cost(s, small, f.x); !wanted(s) {
			continue
		}
		if n := len(front); n > 0 && front[n-1].off-s.limit <= gap {
			front[n-1].first, front[n-1].off = s.first, s.off
		} else {
			front = append(front, s)
		}
	}
	slices.Reverse(front) // the far ones first
	slices.Reverse(behind)
	return append(front, behind...)
}

// cost is how much of the reach a span takes up: a large file next to no more
// than its name would, which is passed over.
func cost(s span, small int64, x *image.Index) int64 {
	if x.Content(x.Chunk(s.first).Content).Size > small {
		return 1 << 10
	}
	return s.limit - s.off
}

// nearStream does one range after another of the neighbourhood.
func (p *filling) nearStream() {
	f := p.f
	f.mu.Lock()
	defer f.mu.Unlock()
	for {
		j := p.takeNear()
		for ; j == nil; j = p.takeNear() {
			if p.done || p.fatal != nil || p.ctx.Err() != nil || f.closed {
				return
			}
			f.resume.Wait()
		}
		f.mu.Unlock()
		err := f.run(j)
		f.mu.Lock()
		f.end(j, err)
		p.note(j, err)
	}
}

// takeNear makes a job of the range of the neighbourhood that is next, or
// returns nil. f.mu is held.
func (p *filling) takeNear() *job {
	f := p.f
	if p.ctx.Err() != nil || p.fatal != nil || f.closed || p.done {
		return nil
	}
	near := &f.near
	if n := len(near.misses); n > 0 {
		near.ranges = append(near.ranges, f.around(near.misses[n-1])...)
		near.misses = near.misses[:n-1]
		if n := len(near.ranges); n > nearRanges {
			near.ranges = near.ranges[n-nearRanges:]
		}
	}
	for n := len(near.ranges); n > 0; n = len(near.ranges) {
		r := near.ranges[n-1]
		near.ranges = near.ranges[:n-1]
		layer := f.x.Chunk(r.first).Layer
		for r.first < r.end && !p.bad[layer] {
			sp := spanOf(f.x, r.first)
			if f.spanMissing(sp) && !f.covered(sp) {
				j := f.newJob(p.ctx, f.prefetch, time.Time{}, layer, span{r.first, r.end, sp.off, r.limit})
				j.near = true
				f.pressing.Store(true)
				return j
			}
			r.first = sp.end
		}
	}
	return nil
}
