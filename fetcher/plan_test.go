package fetcher

import (
	"bytes"
	"context"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// The layers of the arithmetic's tests have chunks of 10 kB side by side,
// a thousand each.
const planChunk = 10_000

func planSpan(chunk int) span {
	off := int64(chunk%1000) * planChunk
	return span{chunk, chunk + 1, off, off + planChunk}
}

func planSpans(chunks ...int) (spans []span) {
	for _, c := range chunks {
		spans = append(spans, planSpan(c))
	}
	return spans
}

// every returns count chunks from first on, step apart, shuffled if seed is not 0.
func every(first, step, count int, seed uint64) (chunks []int) {
	for i := range count {
		chunks = append(chunks, first+i*step)
	}
	if seed != 0 {
		rand.New(rand.NewPCG(seed, 1)).Shuffle(count, func(i, j int) { chunks[i], chunks[j] = chunks[j], chunks[i] })
	}
	return chunks
}

func planner1(latency time.Duration, rate float64) *planner {
	ahead := min(maxAhead, max(minAhead, int64(rate*latency.Seconds())))
	return &planner{
		layer: func(chunk int) int { return chunk / 1000 }, streams: 6, latency: latency, rate: rate,
		batch: 4 * ahead, gap: ahead / 6, fill: min(maxFill, max(minFill, int64(rate*fillTime.Seconds()))),
	}
}

func TestPlan(t *testing.T) {
	const ms = time.Millisecond
	for _, c := range []struct {
		name             string
		latency          time.Duration
		rate             float64
		spans            []span
		prefetch, stream Estimate
		mode             Mode
	}{
		{"nothing", 20 * ms, 12.5e6, nil, Estimate{}, Estimate{}, ModePrefetch},
		{"one span", 20 * ms, 10e6, planSpans(7), Estimate{1, 10_000, 21 * ms}, Estimate{1, 10_000, 21 * ms}, ModePrefetch},
		// As many trips at once as there are streams.
		{"six far apart", 20 * ms, 10e6, planSpans(0, 150, 300, 450, 600, 750), Estimate{6, 60_000, 26 * ms}, Estimate{6, 60_000, 26 * ms}, ModePrefetch},
		// 3.3 trips of 20 ms, of which each shares the link a little; or most of 1.91 MB in two ranges.
		{"sparse", 20 * ms, 10e6, planSpans(every(0, 10, 20, 0)...), Estimate{20, 200_000, 70*ms + 957_000}, Estimate{2, 1_820_000, 202 * ms}, ModePrefetch},
		// What is needed lies side by side: both ask for the same.
		{"a run", 20 * ms, 10e6, planSpans(every(0, 1, 80, 0)...), Estimate{1, 800_000, 100 * ms}, Estimate{1, 800_000, 100 * ms}, ModePrefetch},
		// The gap is 33 kB: what lies between costs less than a request.
		{"with little between", 20 * ms, 10e6, planSpans(every(0, 3, 20, 0)...), Estimate{1, 580_000, 78 * ms}, Estimate{1, 580_000, 78 * ms}, ModePrefetch},
		// A range ends with its layer.
		{"two layers", 20 * ms, 10e6, planSpans(999, 1000), Estimate{2, 20_000, 22 * ms}, Estimate{2, 20_000, 22 * ms}, ModePrefetch},
		// Bytes cost next to nothing, round trips much.
		{"a long way, wide", 300 * ms, 100e6, planSpans(every(0, 30, 33, 0)...), Estimate{33, 330_000, 1650*ms + 551_000}, Estimate{2, 9_320_000, 393*ms + 200_000}, ModeStream},
		// The same over a narrow link.
		{"a long way, narrow", 300 * ms, 1e6, planSpans(every(0, 30, 33, 0)...), Estimate{33, 330_000, 1715*ms + 83_000}, Estimate{9, 7_290_000, 7590 * ms}, ModePrefetch},
	} {
		p := planner1(c.latency, c.rate)
		d, ranges := p.plan(c.spans)
		if d.Mode != c.mode || (d.Mode == ModeStream) != (ranges != nil) || !d.Measured || d.Latency != c.latency || d.BytesPerSecond != c.rate {
			t.Errorf("%s: %+v, %d ranges", c.name, d, len(ranges))
		}
		near := func(a, b Estimate) bool { a.Time, b.Time = a.Time.Round(10_000), b.Time.Round(10_000); return a == b }
		if !near(d.Prefetch, c.prefetch) || !near(d.Stream, c.stream) {
			t.Errorf("%s: prefetch %+v, stream %+v, want %+v and %+v", c.name, d.Prefetch, d.Stream, c.prefetch, c.stream)
		}
		if want := int64(len(c.spans)) * planChunk; d.Left != want {
			t.Errorf("%s: %d bytes left, want %d", c.name, d.Left, want)
		}
	}
}

// The denser a profile in no order of the blob is, the more there is for
// streaming, and from some density on it stays so; in the blob's order there is
// never anything for it.
func TestPlanDensity(t *testing.T) {
	p := planner1(20*time.Millisecond, 12.5e6)
	p.layer = func(int) int { return 0 }
	at := func(i int) span { off := int64(i) * 20_000; return span{i, i + 1, off, off + 20_000} }
	modes := ""
	for _, step := range []int{50, 20, 10, 5, 2, 1} {
		var spans []span
		for _, i := range every(0, step, 3000/step, 5) {
			spans = append(spans, at(i))
		}
		d, _ := p.plan(spans)
		t.Logf("one in %d: %s: %+v, %+v", step, d.Mode, d.Prefetch, d.Stream)
		modes += string(d.Mode[:1])
		slices.SortFunc(spans, func(a, b span) int { return a.first - b.first })
		if d, _ := p.plan(spans); d.Mode != ModePrefetch {
			t.Errorf("one in %d, in order: %+v", step, d)
		}
	}
	if i := bytes.IndexByte([]byte(modes), 's'); i < 1 || bytes.Contains([]byte(modes[i:]), []byte("p")) {
		t.Errorf("from sparse to dense: %s", modes)
	}
}

// The ranges of a plan, whatever is needed: each mode's have all of it, no range
// of Stream is longer than fill's, and they come in the order of need.
func TestPlanRanges(t *testing.T) {
	rnd := rand.New(rand.NewPCG(3, 4))
	for range 300 {
		spans := planSpans(rnd.Perm(3000)[:1+rnd.IntN(500)]...)
		p := planner1(time.Duration(1+rnd.IntN(200))*time.Millisecond, 1e6+rnd.Float64()*50e6)
		for mode, ranges := range map[Mode][]span{ModePrefetch: p.prefetch(spans), ModeStream: p.stream(slices.Clone(spans))} {
			when := make([]int, len(ranges))
			for i, r := range ranges {
				when[i] = math.MaxInt
				if p.layer(r.first) != p.layer(r.end-1) || mode == ModeStream && r.limit-r.off > p.fill || r.limit-r.off != int64(r.end-r.first)*planChunk {
					t.Fatalf("%s: range %+v", mode, r)
				}
			}
			for k, sp := range spans {
				i := slices.IndexFunc(ranges, func(r span) bool { return r.first <= sp.first && sp.end <= r.end })
				if i < 0 {
					t.Fatalf("%s: no range has %+v", mode, sp)
				}
				when[i] = min(when[i], k)
			}
			if mode == ModeStream && (!slices.IsSorted(when) || slices.Contains(when, math.MaxInt)) {
				t.Fatalf("ranges are needed at %v", when)
			}
		}
	}
}

// A rangesBlob is a blob in memory that notes what prefetch asks for.
type rangesBlob struct {
	memBlob
	mu     sync.Mutex
	ranges [][2]int64 // offset, length
}

func (b *rangesBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if tallyOf(ctx, nil).class == metrics.Prefetch {
		b.mu.Lock()
		b.ranges = append(b.ranges, [2]int64{off, n})
		b.mu.Unlock()
	}
	return b.memBlob.ReadRange(ctx, off, n)
}

// knownLink is one that was measured.
func knownLink(latency time.Duration, rate float64) *Link {
	l := NewLink()
	l.latency, l.rate, l.samples, l.samplesBusy = latency, rate, int64(rate), time.Second
	return l
}

// Each mode asks for what it should: few parts of an image by themselves and
// nothing else, many of them in long ranges, the one that is needed first first.
func TestModes(t *testing.T) {
	leakFree(t)
	const files = 600
	m := build(t, spread(files, 20_000))
	data := memBlob(m.oci.Blobs[m.oci.Layers[0].Digest])
	place := make([]int, files) // of contents in the blob
	for j := range place {
		place[m.x.Chunk(j).Content] = j
	}
	contentAt := func(j int) int { return m.x.Chunk(j).Content }
	for _, c := range []struct {
		step int
		link *Link
		mode Mode
	}{
		{20, knownLink(20*time.Millisecond, 12.5e6), ModePrefetch},
		{1, knownLink(20*time.Millisecond, 12.5e6), ModeStream},
		{100, nil, ModePrefetch}, // nothing was measured, and one batch has it all
	} {
		var first []Part
		for _, j := range every(0, c.step, files/c.step, 9) {
			first = append(first, Part{contentAt(j), 0, 20_000})
		}
		blob := &rangesBlob{memBlob: data}
		sink := &orderSink{memSink: newSink(m.x), begun: make(chan struct{})}
		f := New(m.x, []Blob{blob}, sink, FetchOptions{First: first, Link: c.link})
		if p := f.Plan(); p != (Plan{}) {
			t.Errorf("before Fill: %+v", p)
		}
		if err := f.Fill(ctx); err != nil {
			t.Fatal(err)
		}
		f.Close()
		sink.check(t)
		p := f.Plan()
		var needed, got int64
		for _, part := range first {
			sp := spanOf(m.x, place[part.Content])
			needed += sp.limit - sp.off
		}
		for _, r := range blob.ranges {
			got += r[1]
		}
		t.Logf("one in %d: %d requests for %d bytes; %+v", c.step, len(blob.ranges), got, p)
		if p.Mode != c.mode || p.Needed != needed || p.Size != m.oci.Layers[0].Size || math.Abs(p.Density()-1/float64(c.step)) > 0.1/float64(c.step) {
			t.Errorf("one in %d: %+v, want %s of %d bytes", c.step, p, c.mode, needed)
		}
		switch {
		case c.link == nil:
			if p.Measured || got != needed || len(blob.ranges) != len(first) {
				t.Errorf("of a link that was not measured: %d requests for %d bytes, %+v", len(blob.ranges), got, p)
			}
		case c.mode == ModePrefetch:
			if len(blob.ranges) != len(first) || got != needed || p.Prefetch.Requests != len(first) || p.Prefetch.Bytes != needed || p.Left != needed {
				t.Errorf("%d requests for %d bytes; needed are %d bytes in %d parts: %+v", len(blob.ranges), got, needed, len(first), p)
			}
		default:
			if len(blob.ranges) != p.Stream.Requests || got != p.Stream.Bytes || len(blob.ranges) > 11 || got < p.Size*9/10 {
				t.Errorf("%d requests for %d bytes of %d: %+v", len(blob.ranges), got, p.Size, p)
			}
			sp := spanOf(m.x, place[first[0].Content])
			has := func(r [2]int64) bool { return sp.off >= r[0] && sp.limit <= r[0]+r[1] }
			if !slices.ContainsFunc(blob.ranges[:min(defaultStreams, len(blob.ranges))], has) {
				t.Errorf("bytes %d to %d are needed first, and %v is asked for first", sp.off, sp.limit, blob.ranges)
			}
		}
	}
}

// What was local before is needed too, and is not asked for.
func TestPlanLocal(t *testing.T) {
	m := build(t, spread(20, 20_000))
	sink := newSink(m.x)
	f := New(m.x, []Blob{memBlob(m.oci.Blobs[m.oci.Layers[0].Digest])}, sink, FetchOptions{First: []Part{{3, 0, 1}, {4, 0, 1}}, Link: knownLink(time.Millisecond, 1e6)})
	defer f.Close()
	for _, i := range []int{3, 4} {
		if err := f.Need(ctx, i, 0, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Fill(ctx); err != nil {
		t.Fatal(err)
	}
	if p := f.Plan(); p.Mode != ModePrefetch || p.Measured || p.Needed < 40_000 || p.Left != 0 {
		t.Errorf("%+v", p)
	}
}

// A Link learns from its ReaderAt, and knows nothing before.
func TestLinkReaderAt(t *testing.T) {
	leakFree(t)
	m := build(t, spread(30, 100_000))
	r := registryOf(t, registrytest.Options{Link: slowLink})
	desc := m.oci.Layers[0]
	blob := open(t, m.serve(r, "a"), quick()).Blob(desc)
	l := NewLink()
	if _, _, ok := l.measured(); ok {
		t.Error("a new link has been measured")
	}
	buf := make([]byte, desc.Size)
	if _, err := l.ReaderAt(ctx, blob, desc.Size).ReadAt(buf, 0); err != nil || !bytes.Equal(buf, m.oci.Blobs[desc.Digest]) {
		t.Fatal(err)
	}
	latency, rate, ok := l.measured()
	t.Logf("%v, %.1f MB/s", latency, rate/1e6)
	if !ok || latency < slowLink.Latency || rate <= 0 || rate > 2*float64(slowLink.BytesPerSecond) {
		t.Errorf("%v, %v bytes a second, %v", latency, rate, ok)
	}
}

// BenchmarkPlan decides for as many accesses as a profile has: readers wait so
// long once.
func BenchmarkPlan(b *testing.B) {
	p := planner1(20*time.Millisecond, 12.5e6)
	p.layer = func(int) int { return 0 }
	var spans []span
	for _, i := range every(0, 3, image.MaxAccesses, 5) {
		off := int64(i) * planChunk
		spans = append(spans, span{i, i + 1, off, off + planChunk})
	}
	for b.Loop() {
		p.plan(spans)
	}
}
