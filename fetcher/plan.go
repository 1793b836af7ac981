package fetcher

import (
	"cmp"
	"math"
	"slices"
	"time"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// A Mode is a way to bring FetchOptions.First.
type Mode string

const (
	// ModePrefetch brings the spans in their order, a batch after the other, and of
	// what lies between two of a batch only what costs less than a request.
	ModePrefetch Mode = "prefetch"
	// ModeStream brings ranges as long as fill's, with all that lies in them, the
	// one with the span that is needed first before the others. What no range
	// has is fill's, after them.
	ModeStream Mode = "stream"
)

// A Plan is how Fill brings FetchOptions.First, and why. Bytes are of blobs, so
// compressed.
type Plan struct {
	Mode Mode // "": nothing was known to be needed, or Fill has not begun
	// Measured says that Mode follows from Left and what is below it. Otherwise
	// all was local, or asked for before the link had been measured.
	Measured bool
	Needed   int64 // bytes of the spans of FetchOptions.First, local or not
	Size     int64 // of all layers
	Left     int64 // of Needed, what was neither local nor under way when Mode was chosen

	Latency        time.Duration // of the link, as measured by then
	BytesPerSecond float64

	Prefetch, Stream Estimate
}

// Density is which part of the layers' bytes is needed, 0 if nothing is known.
func (p Plan) Density() float64 {
	if p.Size <= 0 {
		return 0
	}
	return float64(p.Needed) / float64(p.Size)
}

// An Estimate is what a Mode would cost, until all that is needed is there.
type Estimate struct {
	Requests int
	Bytes    int64 // with those between what is needed
	Time     time.Duration
}

// ModeStream has to be shorter by one part in streamGain: estimates are wrong by
// as much, and it brings later what is needed first.
const streamGain = 10

// A planner has what the modes' costs follow from. Time in which programs work
// is in neither estimate.
type planner struct {
	layer   func(chunk int) int
	streams int
	latency time.Duration
	rate    float64 // bytes per second
	batch   int64   // bytes of the next batch of ModePrefetch; each has twice as many, up to maxFill
	gap     int64   // bytes between two spans of a batch that ModePrefetch receives rather than ask twice
	fill    int64   // the most bytes of a range of ModeStream, of more than one span
}

// estimate returns the cost of ranges. Streams wait for round trips side by
// side, and share the link for what comes after them: a closed network of a delay
// and a processor that is shared, whose throughput mean value analysis gives
// (Reiser, Lavenberg: Mean-Value Analysis of Closed Multichain Queuing Networks,
// JACM 27(2), 1980). At 100 Mbit/s, with 20 and 80 ms, it gave 0.83 to 1.07 times
// what 65 to 635 ranges of 10 to 100 % of a blob took; trips and transfers one
// after the other would be up to 1.6 times that.
func (p *planner) estimate(ranges []span) Estimate {
	e := Estimate{Requests: len(ranges)}
	if e.Requests == 0 {
		return e
	}
	for _, r := range ranges {
		e.Bytes += r.limit - r.off
	}
	latency, transfer := p.latency.Seconds(), float64(e.Bytes)/p.rate
	var throughput, queue float64 // requests a second; requests that share the link
	for n := range min(p.streams, e.Requests) {
		response := transfer / float64(e.Requests) * (1 + queue)
		throughput = float64(n+1) / (latency + response)
		queue = throughput * response
	}
	seconds := max(float64(e.Requests)/throughput, latency+transfer)
	e.Time = time.Duration(min(seconds*float64(time.Second), math.MaxInt64/2))
	return e
}

// merge makes ranges of spans, which it sorts by place: one of those in a layer
// with at most gap bytes between two, as long as it has at most limit bytes.
func (p *planner) merge(spans []span, gap, limit int64) []span {
	// Numbers of chunks are in the order of layers and offsets.
	slices.SortFunc(spans, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	var ranges []span
	for _, sp := range spans {
		if n := len(ranges); n > 0 {
			r := &ranges[n-1]
			if p.layer(r.first) == p.layer(sp.first) && sp.off-r.limit <= gap && sp.limit-r.off <= limit {
				r.end, r.limit = sp.end, sp.limit
				continue
			}
		}
		ranges = append(ranges, sp)
	}
	return ranges
}

// nextBatch takes spans from the front, of which those that are wanted have at
// most size bytes together, or are one.
func nextBatch(spans []span, size int64, wanted func(span) bool) (batch, rest []span) {
	for bytes := int64(0); len(spans) > 0 && (len(batch) == 0 || bytes+spans[0].limit-spans[0].off <= size); spans = spans[1:] {
		if sp := spans[0]; wanted(sp) {
			batch = append(batch, sp)
			bytes += sp.limit - sp.off
		}
	}
	return batch, spans
}

// prefetch returns the ranges that ModePrefetch asks for, to bring spans in their
// order.
func (p *planner) prefetch(spans []span) []span {
	place := slices.Clone(spans)
	slices.SortFunc(place, func(a, b span) int { return cmp.Compare(a.first, b.first) })
	at := func(chunk int) int {
		i, _ := slices.BinarySearchFunc(place, chunk, func(s span, chunk int) int { return cmp.Compare(s.first, chunk) })
		return i
	}
	brought := make([]bool, len(place)) // also as what lies between others
	var ranges, batch []span
	for size := p.batch; len(spans) > 0; size = min(2*size, maxFill) {
		batch, spans = nextBatch(spans, size, func(s span) bool { return !brought[at(s.first)] })
		for _, r := range p.merge(batch, p.gap, math.MaxInt64) {
			ranges = append(ranges, r)
			for i := at(r.first); i < len(place) && place[i].first < r.end; i++ {
				brought[i] = true
			}
		}
	}
	return ranges
}

// stream returns the ranges that ModeStream asks for, in its order.
func (p *planner) stream(spans []span) []span {
	rank := make(map[int]int, len(spans))
	for i, sp := range spans {
		rank[sp.first] = i
	}
	place := slices.Clone(spans)
	ranges := p.merge(place, math.MaxInt64, p.fill)
	first := make(map[int]int, len(ranges)) // by a range's first chunk: when something of it is needed
	for i := 0; len(place) > 0; place = place[1:] {
		if place[0].first >= ranges[i].end {
			i++
		}
		r := rank[place[0].first]
		if was, ok := first[ranges[i].first]; !ok || r < was {
			first[ranges[i].first] = r
		}
	}
	slices.SortFunc(ranges, func(a, b span) int { return cmp.Compare(first[a.first], first[b.first]) })
	return ranges
}

// plan compares the modes for spans that are all to be brought, in the order in
// which they are needed, and returns the ranges of ModeStream if that is clearly
// shorter.
func (p *planner) plan(spans []span) (Plan, []span) {
	ranges := p.stream(spans)
	d := Plan{
		Mode: ModePrefetch, Measured: true, Latency: p.latency, BytesPerSecond: p.rate,
		Prefetch: p.estimate(p.prefetch(spans)), Stream: p.estimate(ranges),
	}
	for _, sp := range spans {
		d.Left += sp.limit - sp.off
	}
	if d.Stream.Time < d.Prefetch.Time-d.Prefetch.Time/streamGain {
		d.Mode = ModeStream
		return d, ranges
	}
	return d, nil
}

// Plan returns how Fill brings FetchOptions.First, as far as that is decided.
func (f *Fetcher) Plan() Plan {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.plan
}

// planner returns one for the next batch, with a link that was measured so.
// f.mu is held.
func (p *filling) planner(latency time.Duration, rate float64) *planner {
	f := p.f
	return &planner{
		layer: func(chunk int) int { return f.x.Chunk(chunk).Layer }, streams: f.opts.Streams, latency: latency, rate: rate,
		// Requests overlap, so that bytes nobody wants cost more than latency.
		batch: p.batch, gap: f.link.ahead() / int64(f.opts.Streams), fill: f.fillSize(),
	}
}

// decide chooses a mode for what is left of the first spans, once the link has
// been measured, and reports whether it made their ranges. f.mu is held.
func (p *filling) decide() bool {
	f := p.f
	latency, rate, ok := f.link.measured()
	if p.decided || !ok {
		return false
	}
	p.decided = true
	left := slices.DeleteFunc(slices.Clone(p.first), func(sp span) bool { return !f.spanMissing(sp) || f.covered(sp) })
	if p.first = left; len(left) == 0 {
		return false
	}
	d, ranges := p.planner(latency, rate).plan(left)
	d.Needed, d.Size = f.plan.Needed, f.plan.Size
	if !f.plan.Measured {
		f.plan = d
	}
	if d.Mode == ModePrefetch {
		return false
	}
	p.first, p.ranges = nil, ranges
	return true
}

// sizeOf returns how many bytes the layers of an image have.
func sizeOf(layers []image.IndexLayer) (n int64) {
	for _, l := range layers {
		n += l.Size
	}
	return n
}
