package fetcher

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
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

// TestRandomBytes reads single bytes at random cold places over 20 ms, one after
// the other: 250 of them, or 1,000 in the soak. Each takes its round trip and
// what its span takes to arrive, and costs at most one request. On a busy machine
// that is compared with what a bare request over such a link takes.
func TestRandomBytes(t *testing.T) {
	leakFree(t)
	reads := 250
	if os.Getenv(seedsEnv) != "" {
		reads = 1000
	}
	items := []imagetest.Item{imagetest.Dir("d")}
	for i := range 4 * reads { // so that most places are cold
		items = append(items, imagetest.Random(fmt.Sprint("d/", i), 2000+i%40*1500, uint64(i)))
	}
	items = append(items, imagetest.Random("large", 24<<20, 1))
	m := build(t, imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(items...)), imagetest.Options{ChunkSize: 128 << 10, Level: 1})))
	r := registryOf(t, registrytest.Options{Link: slowLink})
	o := quick()
	o.StallTimeout, o.ReadTimeout = 10*time.Second, time.Minute
	s := open(t, m.serve(r, "a"), o)
	bare := registryOf(t, registrytest.Options{Link: slowLink})
	url := "http://" + bare.Host() + "/v2/a/blobs/" + m.oci.Layers[0].Digest.String()
	m.serve(bare, "a")
	client := &http.Client{Transport: &http.Transport{}}
	defer client.CloseIdleConnections()
	get := func(off, end int64) {
		req, err := http.NewRequest(http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, end-1))
		resp, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if n, err := io.Copy(io.Discard, resp.Body); err != nil || n != end-off {
			t.Fatal(n, err)
		}
	}
	var p99, limit time.Duration
	for range 3 { // a busy machine may be late once
		sink := newSink(m.x)
		f := m.fetch(t, s, sink, FetchOptions{})
		rnd := rand.New(rand.NewPCG(7, 8))
		var peer, over []time.Duration // what a read took longer than its span's transfer
		before := r.Counts().Blobs
		for len(over) < reads {
			// Half of them in the large file, at any place.
			i := rnd.IntN(m.x.Contents())
			if large := largest(m.x); rnd.IntN(2) == 0 {
				i = large
			}
			off := rnd.Int64N(m.x.Content(i).Size)
			if sink.has(i, off) {
				if missing(sink) < m.x.Chunks()/4 {
					break
				}
				continue
			}
			sp := spanOf(m.x, m.x.ContentChunk(i, f.chunkAt(i, m.x.Content(i), off)))
			begin := time.Now()
			if err := f.Need(ctx, i, off, 1); err != nil {
				t.Fatal(err)
			}
			transfer := time.Duration(float64(sp.limit-sp.off) / float64(slowLink.BytesPerSecond) * float64(time.Second))
			over = append(over, time.Since(begin)-transfer)
			begin = time.Now()
			get(sp.off, sp.limit)
			peer = append(peer, time.Since(begin)-transfer)
		}
		slices.Sort(over)
		slices.Sort(peer)
		p99, limit = over[len(over)*99/100], 2*slowLink.Latency
		limit = max(limit, peer[len(peer)*99/100]*3/2)
		n := r.Counts().Blobs - before
		t.Logf("%d cold reads: %d requests; besides the transfer: median %v, p99 %v, worst %v; a bare request's: %v, %v, %v; a round trip is %v", len(over), n,
			over[len(over)/2].Round(time.Millisecond), p99.Round(time.Millisecond), over[len(over)-1].Round(time.Millisecond),
			peer[len(peer)/2].Round(time.Millisecond), peer[len(peer)*99/100].Round(time.Millisecond), peer[len(peer)-1].Round(time.Millisecond), slowLink.Latency)
		f.Close()
		if n > int64(len(over)) || n > int64(m.x.Chunks()) {
			t.Fatalf("%d requests for %d reads of %d chunks", n, len(over), m.x.Chunks())
		}
		if p99 <= limit {
			return
		}
	}
	t.Errorf("p99 is %v besides the transfer, want at most %v", p99, limit)
}

func largest(x *image.Index) (at int) {
	for i := range x.Contents() {
		if x.Content(i).Size > x.Content(at).Size {
			at = i
		}
	}
	return at
}

func missing(s *memSink) (n int) {
	for j := range s.x.Chunks() {
		if s.Missing(j) {
			n++
		}
	}
	return n
}
