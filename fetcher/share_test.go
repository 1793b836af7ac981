package fetcher

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A slowSink counts how much it is given at once, and takes its time.
type slowSink struct {
	*memSink
	now, most atomic.Int64
}

func (s *slowSink) Put(chunk int, data []byte) error {
	n := s.now.Add(int64(len(data)))
	for {
		most := s.most.Load()
		if n <= most || s.most.CompareAndSwap(most, n) {
			break
		}
	}
	time.Sleep(2 * time.Millisecond)
	s.now.Add(-int64(len(data)))
	return s.memSink.Put(chunk, data)
}

// TestMemory has two images filled under one Share, into a slow store: what is
// held stays within it, also when a chunk alone is larger.
func TestMemory(t *testing.T) {
	leakFree(t)
	items := []imagetest.Item{imagetest.Dir("d")}
	for i := range 60 {
		items = append(items, imagetest.Random(fmt.Sprintf("d/%d", i), 200_000, uint64(i)))
	}
	m := build(t, imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(items...)), imagetest.Options{Level: 1})))
	r := registryOf(t, registrytest.Options{})
	o := quick()
	o.StallTimeout = 10 * time.Second
	s := open(t, m.serve(r, "a"), o)
	for _, memory := range []int64{1, 300_000, 1_000_000} {
		share := NewShare(memory, 0)
		var sinks []*slowSink
		var all sync.WaitGroup
		for range 2 {
			sink := &slowSink{memSink: newSink(m.x)}
			sinks = append(sinks, sink)
			f := m.fetch(t, s, sink, FetchOptions{Share: share})
			all.Go(func() {
				if err := f.Fill(ctx); err != nil {
					t.Error(err)
				}
			})
			all.Go(func() {
				for i := range 10 {
					if err := f.Need(ctx, 5*i, 0, 1); err != nil {
						t.Error(err)
					}
				}
			})
		}
		all.Wait()
		for _, sink := range sinks {
			sink.check(t)
			if most := sink.most.Load(); most > max(memory, 2*200_000) { // one of demand, one of fill
				t.Errorf("%d bytes were held, the limit is %d", most, memory)
			}
		}
	}
}

// TestRate keeps to a limit, in which a reader goes first.
func TestRate(t *testing.T) {
	leakFree(t)
	m := build(t, spread(100, 20_000))
	r := registryOf(t, registrytest.Options{})
	s := open(t, m.serve(r, "a"), quick())
	sink := newSink(m.x)
	f := m.fetch(t, s, sink, FetchOptions{Share: NewShare(0, 1e6)})
	done := make(chan error, 1)
	begin := time.Now()
	go func() { done <- f.Fill(ctx) }()
	time.Sleep(500 * time.Millisecond)
	asked := time.Now()
	if err := f.Need(ctx, 50, 0, 1); err != nil {
		t.Fatal(err)
	}
	wait := time.Since(asked)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	took, size := time.Since(begin), m.oci.Layers[0].Size
	t.Logf("%d bytes in %v at 1 MB/s; a read took %v; %+v", size, took, wait, f.Stats())
	if least := time.Duration(size) * time.Microsecond * 9 / 10; took < least {
		t.Errorf("%d bytes came in %v", size, took)
	}
	if wait > time.Second { // in its turn it would have been more
		t.Errorf("a read took %v", wait)
	}
	sink.mu.Lock()
	clear(sink.puts)
	sink.mu.Unlock()
	sink.check(t)
}

// TestZstdBomb has frames that say they need gigabytes.
func TestZstdBomb(t *testing.T) {
	single := []byte{0x28, 0xb5, 0x2f, 0xfd, 0xe0} // one segment, 8 bytes of size
	single = binary.LittleEndian.AppendUint64(single, 16<<30)
	single = append(single, 0x03, 0, 0, 'a') // the last block, run length
	window := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xa8, 0x03, 0, 0, 'a'}
	for name, data := range map[string][]byte{"segment": single, "window": window} {
		x, err := spanIndex(t, toc.Zstd, int64(len(data)), nil, []piece{{0, 1000}})
		if err != nil {
			t.Fatal(err)
		}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if wrong, err := storeSpan(x, data, newSink(x)); err != nil || len(wrong) != 1 {
			t.Fatal(name, wrong, err)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
			t.Errorf("%s: %d bytes were allocated", name, n)
		}
	}
}

// TestLaterWindow has a span whose second frame needs a larger window than the
// first: it is decoded with every window allowed when it is asked for again.
func TestLaterWindow(t *testing.T) {
	text := []byte(words(3<<20, 5))
	var frames bytes.Buffer
	frames.Write(zstdOf(text[:1000]))
	w := imagetest.Must(zstd.NewWriter(&frames, zstd.WithWindowSize(16<<20)))
	for p := text[1000:]; len(p) > 0; { // in pieces: the size is not known at the beginning
		n := min(len(p), 1<<20)
		w.Write(p[:n])
		p = p[n:]
	}
	w.Close()
	data := frames.Bytes()
	x, err := spanIndex(t, toc.Zstd, int64(len(data)), text, []piece{{0, 500}, {2 << 20, 1000}})
	if err != nil {
		t.Fatal(err)
	}
	sink := newSink(x)
	f := New(x, []Blob{memBlob(data)}, sink, FetchOptions{})
	defer f.Close()
	if err := f.Fill(context.Background()); err != nil {
		t.Fatal(err)
	}
}

// TestFirst has Fill bring what it is told, in that order and in few requests,
// before all else, and takes no notice of what makes no sense.
func TestFirst(t *testing.T) {
	leakFree(t)
	m := build(t, spread(400, 30_000))
	r := registryOf(t, registrytest.Options{Link: registrytest.Link{Latency: 20 * time.Millisecond, BytesPerSecond: 12.5e6}})
	var order []Part
	for i := range 60 {
		order = append(order, Part{Content: i * 97 % 400, Off: 0, N: 30_000})
	}
	nonsense := []Part{{-1, 0, 1}, {1 << 30, 0, 1}, {0, -5, 1}, {0, 1 << 40, 1}, {5, 0, 0}}
	o := quick()
	o.StallTimeout = 5 * time.Second
	sink := newSink(m.x)
	f := m.fetch(t, open(t, m.serve(r, "a"), o), sink, FetchOptions{First: append(nonsense, order...)})
	fctx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	begin := time.Now()
	go func() { done <- f.Fill(fctx) }()
	// A program that reads just these, in this order.
	for _, p := range order {
		if err := f.Need(ctx, p.Content, p.Off, p.N); err != nil {
			t.Fatal(err)
		}
	}
	took := time.Since(begin)
	n := f.Stats()
	t.Logf("60 files of 30 kB in %v; the link needs 144 ms; %+v", took, n)
	if n[metrics.Demand].Requests > 20 || n[metrics.Prefetch].Requests > 60 {
		t.Errorf("%+v", n)
	}
	if took > 600*time.Millisecond { // one after the other it would be 60 round trips, 1.3 s
		t.Errorf("it took %v", took)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
