package fetcher

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// The link of the performance tests.
var slowLink = registrytest.Link{Latency: 20 * time.Millisecond, BytesPerSecond: 12.5e6}

// TestFillRate fills over an emulated link of 100 Mbit/s and 20 ms.
func TestFillRate(t *testing.T) {
	leakFree(t)
	m := build(t, spread(200, 100_000))
	r := registryOf(t, registrytest.Options{Link: slowLink})
	s := open(t, m.serve(r, "a"), quick())
	ideal := time.Duration(float64(m.oci.Layers[0].Size) / float64(slowLink.BytesPerSecond) * float64(time.Second))
	var took time.Duration
	for range 3 { // a busy machine may be late once
		sink := newSink(m.x)
		f := m.fetch(t, s, sink, FetchOptions{})
		begin := time.Now()
		if err := f.Fill(ctx); err != nil {
			t.Fatal(err)
		}
		took = time.Since(begin)
		latency, rate := f.Link()
		t.Logf("%d bytes in %v, the link needs %v (%.0f %%), %d requests; measured %v, %.1f MB/s", m.oci.Layers[0].Size, took, ideal,
			100*ideal.Seconds()/took.Seconds(), f.Stats()[metrics.Fill].Requests, latency, rate/1e6)
		f.Close()
		sink.check(t)
		if took.Seconds()*0.9 <= ideal.Seconds() {
			return
		}
	}
	t.Errorf("filling took %v, the link needs %v", took, ideal)
}

// demandLatency reads the first byte of n contents in random order, and
// returns the median and the worst of the times.
func demandLatency(t *testing.T, f *Fetcher, sink *memSink, n int) (median, worst time.Duration) {
	var took []time.Duration
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(f.x.Contents()) {
		if len(took) == n {
			break
		}
		if !sink.Missing(f.x.ContentChunk(i, 0)) {
			continue
		}
		begin := time.Now()
		if err := f.Need(ctx, i, 0, 1); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(begin))
		time.Sleep(5 * time.Millisecond) // what a program does between reads
	}
	slices.Sort(took)
	return took[len(took)/2], took[len(took)-1]
}

// TestDemandUnderFill reads at cold places while the rest of the image arrives.
func TestDemandUnderFill(t *testing.T) {
	leakFree(t)
	m := build(t, spread(400, 60_000))
	r := registryOf(t, registrytest.Options{Link: slowLink})
	s := open(t, m.serve(r, "a"), quick())
	var idle, busy time.Duration
	for range 3 { // a busy machine may be late once
		sink := newSink(m.x)
		f := m.fetch(t, s, sink, FetchOptions{})
		idle, worstIdle := demandLatency(t, f, sink, 15)
		requests := f.Stats()[metrics.Demand].Requests
		f.Close()

		sink = newSink(m.x)
		f = m.fetch(t, s, sink, FetchOptions{})
		fctx, cancel := context.WithCancel(ctx)
		done := make(chan error)
		go func() { done <- f.Fill(fctx) }()
		time.Sleep(100 * time.Millisecond)
		busy, worstBusy := demandLatency(t, f, sink, 15)
		cancel()
		<-done
		t.Logf("idle: median %v, worst %v, %d requests; under fill: median %v, worst %v, %+v", idle, worstIdle, requests, busy, worstBusy, f.Stats())
		f.Close()
		if requests > 15 {
			t.Errorf("%d requests for 15 chunks", requests)
		}
		if busy <= 2*idle {
			return
		}
	}
	t.Errorf("demand takes %v under fill, %v without", busy, idle)
}
