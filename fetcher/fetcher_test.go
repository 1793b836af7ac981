package fetcher

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// TestNeedAndFill brings images of every format from a registry and from a
// layout, by reads and by Fill.
func TestNeedAndFill(t *testing.T) {
	m := build(t, small()...)
	r := registryOf(t, registrytest.Options{})
	for name, source := range map[string]string{"registry": m.serve(r, "a/b"), "layout": "oci:" + layoutOf(t, m) + ":1"} {
		t.Run(name+"/need", func(t *testing.T) {
			leakFree(t)
			sink := newSink(m.x)
			f := m.fetch(t, open(t, source, quick()), sink, FetchOptions{})
			for i := m.x.Contents() - 1; i >= 0; i-- {
				if err := f.Need(ctx, i, 0, m.x.Content(i).Size+99); err != nil {
					t.Fatal(err)
				}
			}
			sink.check(t)
			if n := f.Stats()[metrics.Demand].Requests; n == 0 || n > int64(m.x.Chunks()) {
				t.Errorf("%d requests for %d chunks", n, m.x.Chunks())
			}
			if err := f.Need(ctx, 0, m.x.Content(0).Size, 10); err != nil {
				t.Error("behind the end:", err)
			}
			if err := f.Need(ctx, 0, -1, 10); err == nil {
				t.Error("no error for a negative offset")
			}
		})
		t.Run(name+"/fill", func(t *testing.T) {
			leakFree(t)
			sink := newSink(m.x)
			f := m.fetch(t, open(t, source, quick()), sink, FetchOptions{})
			if err := f.Fill(ctx); err != nil {
				t.Fatal(err)
			}
			sink.check(t)
			s := f.Stats()
			if s[metrics.Prefetch].Requests != 2 {
				t.Errorf("%d prefetch requests, want one for each layer with prioritized files", s[metrics.Prefetch].Requests)
			}
			before := s[metrics.Fill]
			if err := f.Fill(ctx); err != nil || f.Stats()[metrics.Fill] != before {
				t.Error("filling what is full:", err, f.Stats())
			}
		})
	}
}

func TestClose(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	r := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
		if q.Kind == "blob" {
			return registrytest.Fault{Kind: registrytest.Stall, At: 10}
		}
		return registrytest.Fault{}
	}})
	o := quick()
	o.StallTimeout = time.Minute
	f := m.fetch(t, open(t, m.serve(r, "a"), o), newSink(m.x), FetchOptions{})
	errs := make(chan error)
	go func() { errs <- f.Fill(ctx) }()
	for i := range 20 {
		go func() { errs <- f.Need(ctx, i, 0, 1) }()
	}
	for f.OldestWait() == 0 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	f.Close()
	for range 21 {
		if err := <-errs; !errors.Is(err, ErrClosed) {
			t.Error(err)
		}
	}
	if err := f.Need(ctx, 0, 0, 1); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := f.Fill(ctx); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	f.Close()
}

// TestCancel has one of two readers of a chunk leave, and then the other.
func TestCancel(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	release := make(chan struct{})
	gone := make(chan struct{}, 9)
	r := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
		if q.Kind == "blob" {
			<-release
			gone <- struct{}{}
		}
		return registrytest.Fault{}
	}})
	o := quick()
	o.StallTimeout = time.Minute
	sink := newSink(m.x)
	f := m.fetch(t, open(t, m.serve(r, "a"), o), sink, FetchOptions{})
	need := func() (context.CancelFunc, chan error) {
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		waiting := func() int {
			f.mu.Lock()
			defer f.mu.Unlock()
			return len(f.waiting)
		}
		was := waiting()
		go func() { done <- f.Need(ctx, 5, 0, 1) }()
		for waiting() == was {
			time.Sleep(time.Millisecond)
		}
		return cancel, done
	}
	cancel1, done1 := need()
	cancel2, done2 := need()
	begin := time.Now()
	cancel1()
	if err := <-done1; !errors.Is(err, context.Canceled) || time.Since(begin) > time.Second {
		t.Fatal(err, time.Since(begin))
	}
	close(release)
	if err := <-done2; err != nil {
		t.Fatal(err)
	}
	cancel2()
	if n := r.Counts().Blobs; n != 1 {
		t.Errorf("%d requests for one chunk with two readers", n)
	}
}
