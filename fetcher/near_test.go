package fetcher

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// An orderSink remembers in which order the contents came.
type orderSink struct {
	*memSink
	mu    sync.Mutex
	order []int
	begun chan struct{} // closed with the first
}

func (s *orderSink) Put(chunk int, data []byte) error {
	s.mu.Lock()
	if s.order = append(s.order, s.x.Chunk(chunk).Content); len(s.order) == 1 {
		close(s.begun)
	}
	s.mu.Unlock()
	return s.memSink.Put(chunk, data)
}

// While all is filled in order, a reader in the middle has its neighbourhood
// brought before what lies far away, and every chunk still comes once.
func TestNeighbourhood(t *testing.T) {
	leakFree(t)
	const files, at = 600, 400
	m := build(t, spread(files, 20_000))
	byPlace := make([]int, files) // contents in the order of the blob
	for j := range byPlace {
		byPlace[j] = m.x.Chunk(j).Content
	}
	r := registryOf(t, registrytest.Options{Link: slowLink})
	source := m.serve(r, "a")
	var why string
	for range 3 { // a busy machine may come to the read too late
		sink := &orderSink{memSink: newSink(m.x), begun: make(chan struct{})}
		f := m.fetch(t, open(t, source, quick()), sink, FetchOptions{})
		var filling sync.WaitGroup
		var err error
		filling.Go(func() { err = f.Fill(ctx) })
		<-sink.begun
		if err := f.Need(ctx, byPlace[at], 0, 1); err != nil {
			t.Fatal(err)
		}
		filling.Wait()
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		sink.check(t)
		when := func(place int) int { return slices.Index(sink.order, byPlace[place]) }
		why = ""
		for _, near := range []int{at - 5, at - 1, at + 1, at + 5} {
			for _, far := range []int{at - 150, at + 150} {
				if when(near) > when(far) {
					why = "file came after one far away"
					t.Logf("file %d came as number %d, file %d as number %d", near, when(near), far, when(far))
				}
			}
		}
		if n := f.Stats()[metrics.Prefetch].Requests; n == 0 || n > 4 {
			t.Errorf("%d requests for the neighbourhood of one file", n)
		}
		if why == "" {
			return
		}
	}
	t.Error(why)
}

// The ranges around a file leave out large files, what is local and what is on
// its way, and reach as far as nearReach where a round trip is worth less.
func TestAround(t *testing.T) {
	m := build(t, spread(200, 10_000))
	sink := newSink(m.x)
	f := New(m.x, []Blob{memBlob(nil)}, sink, FetchOptions{})
	defer f.Close()
	f.link.latency = 20 * time.Millisecond
	f.link.rate = 5e6 // 100 kB a round trip
	sink.local[101].Store(true)
	f.mu.Lock()
	defer f.mu.Unlock()
	j := f.newJob(ctx, f.demand, time.Time{}, 0, spanOf(m.x, 99))
	got := f.around(spanOf(m.x, 100))
	f.end(j, nil)
	if len(got) != 2 {
		t.Fatalf("around: %+v, want a range to either side", got)
	}
	front, behind := got[0], got[1]
	if behind.first != 102 || behind.end < 145 || behind.end > 155 {
		t.Errorf("behind: chunks %d to %d, want those from 102 on, fifty or so", behind.first, behind.end)
	}
	if front.end != 99 || front.first < 45 || front.first > 55 {
		t.Errorf("in front: chunks %d to %d, want those up to 98, fifty or so", front.first, front.end)
	}
}
