package fetcher

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// TestWaited has readers wait for a link with a round trip, and says where
// their time went.
func TestWaited(t *testing.T) {
	leakFree(t)
	const trip = 30 * time.Millisecond
	m := build(t, small()...)
	r := registryOf(t, registrytest.Options{})
	src := open(t, m.serve(r, "a"), quick())
	if _, err := src.Resolve(ctx); err != nil {
		t.Fatal(err)
	}
	r.SetLink(registrytest.Link{Latency: trip})
	var mu sync.Mutex
	var all []Waited
	f := m.fetch(t, src, newSink(m.x), FetchOptions{Waited: func(w Waited) {
		mu.Lock()
		defer mu.Unlock()
		all = append(all, w)
	}})
	began := time.Now()
	if err := f.Need(ctx, 3, 0, 1); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	if err := f.Need(ctx, 3, 0, 1); err != nil { // it is there
		t.Fatal(err)
	}
	if len(all) != 1 {
		t.Fatalf("%d Needs waited, want 1: %+v", len(all), all)
	}
	w := all[0]
	if w.Content != 3 || w.Off != 0 || w.N != 1 || w.Bytes <= 0 || w.Err != nil || w.Since.Before(began) {
		t.Errorf("%+v", w)
	}
	if w.Network < trip || w.Total < w.Network || w.Total > took || w.Queue+w.Network+w.Store > w.Total {
		t.Errorf("of %v: %+v", took, w)
	}

	// More readers than workers: some wait in the queue, for a round trip.
	all = nil
	var readers sync.WaitGroup
	for i := range m.x.Contents() {
		readers.Go(func() { f.Need(ctx, i, 0, m.x.Content(i).Size) })
	}
	readers.Wait()
	for _, w := range all {
		if w.Queue < 0 || w.Network < 0 || w.Store < 0 || w.Queue+w.Network+w.Store > w.Total {
			t.Errorf("%+v", w)
		}
	}

	// A reader that leaves is told of too.
	all = nil
	gone, cancel := context.WithTimeout(ctx, trip/3)
	defer cancel()
	f = m.fetch(t, src, newSink(m.x), f.opts)
	if err := f.Need(gone, 4, 0, 1); err == nil {
		t.Fatal("no error")
	}
	if len(all) != 1 || all[0].Err == nil || all[0].Total < trip/3 {
		t.Errorf("%+v", all)
	}
}
