package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// TestFetchUnderFaults fills and reads an image while a third of the answers
// are wrong in every way there is.
func TestFetchUnderFaults(t *testing.T) {
	kinds := []registrytest.Fault{
		{Kind: registrytest.Hangup}, {Kind: registrytest.Status, Status: 503}, {Kind: registrytest.Cut, At: 1000},
		{Kind: registrytest.Short, At: 5000}, {Kind: registrytest.WrongRange}, {Kind: registrytest.NoRange},
		{Kind: registrytest.Whole}, {Kind: registrytest.Stall, At: 20_000},
	}
	m := build(t, small()...)
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			leakFree(t)
			var mu sync.Mutex
			rnd := rand.New(rand.NewPCG(seed, 0))
			r := registryOf(t, registrytest.Options{Redirect: seed%2 == 0, Fault: func(q registrytest.Request) registrytest.Fault {
				mu.Lock()
				defer mu.Unlock()
				if rnd.IntN(3) == 0 {
					return kinds[rnd.IntN(len(kinds))]
				}
				return registrytest.Fault{Delay: time.Duration(rnd.IntN(5)) * time.Millisecond}
			}})
			o := quick()
			o.ReadTimeout, o.StallTimeout = 20*time.Second, 100*time.Millisecond
			sink := newSink(m.x)
			f := m.fetch(t, open(t, m.serve(r, "a"), o), sink, FetchOptions{})
			var all sync.WaitGroup
			for w := range uint64(4) {
				all.Go(func() {
					rnd := rand.New(rand.NewPCG(seed, w+1))
					for range 30 {
						i := rnd.IntN(m.x.Contents())
						off := rnd.Int64N(m.x.Content(i).Size)
						if err := f.Need(ctx, i, off, 1+rnd.Int64N(100_000)); err != nil {
							t.Error(err)
						}
						if !sink.has(i, off) {
							t.Error("Need returned without the chunk")
						}
					}
				})
			}
			if err := f.Fill(ctx); err != nil {
				t.Error(err)
			}
			all.Wait()
			sink.mu.Lock()
			clear(sink.puts) // a chunk that two jobs had in hand may be put twice
			sink.mu.Unlock()
			sink.check(t)
		})
	}
}

func (s *memSink) has(content int, off int64) bool {
	c := s.x.Content(content)
	for k := range c.Chunks {
		j := s.x.ContentChunk(content, k)
		if ch := s.x.Chunk(j); off >= ch.FileOffset && off < ch.FileOffset+ch.Size {
			return !s.Missing(j)
		}
	}
	return false
}

// TestCorrupt has a byte of one blob wrong, in the first answers or in all.
func TestCorrupt(t *testing.T) {
	m := build(t, small()...)
	victim := m.oci.Layers[1]
	for _, times := range []int{1, 1 << 30} {
		for _, mirror := range []bool{false, true} {
			t.Run(fmt.Sprintf("times=%d/mirror=%v", times, mirror), func(t *testing.T) {
				leakFree(t)
				var mu sync.Mutex
				left := times
				// A byte inside the random file, wherever the range begins.
				at := victim.Size / 2
				r := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
					mu.Lock()
					defer mu.Unlock()
					if q.Object == victim.Digest.String() && q.Off <= at && at < q.Off+q.N && left > 0 {
						left--
						return registrytest.Fault{Kind: registrytest.Corrupt, At: at - q.Off}
					}
					return registrytest.Fault{}
				}})
				source := m.serve(r, "a")
				o := quick()
				if mirror {
					good := registryOf(t, registrytest.Options{})
					m.serve(good, "a")
					o.HostsDir = hosts(t, map[string]string{"registry.invalid": fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", good.Host(), r.Host())})
					source = "registry.invalid/a:1"
				}
				reg := prometheus.NewRegistry()
				mt := metrics.New(reg)
				sink := newSink(m.x)
				f := m.fetch(t, open(t, source, o), sink, FetchOptions{Metrics: mt})
				err := f.Fill(ctx)
				if times == 1 || mirror {
					if err != nil {
						t.Fatal(err)
					}
					sink.check(t)
					return
				}
				var wrong *DigestError
				var decode *DecodeError
				if !errors.As(err, &wrong) && !errors.As(err, &decode) {
					t.Fatal(err)
				}
				bad := -1
				for j := range m.x.Chunks() {
					if c := m.x.Chunk(j); sink.Missing(j) && (c.Layer != 1 || at < c.BlobOffset || at >= c.BlobEnd) {
						t.Errorf("chunk %d was not filled", j)
					} else if sink.Missing(j) {
						bad = j
					}
				}
				if bad < 0 {
					t.Fatal("the wrong chunk was stored")
				}
				c := m.x.Chunk(bad)
				if err := f.Need(ctx, c.Content, c.FileOffset, 1); !errors.As(err, &wrong) && !errors.As(err, &decode) {
					t.Error(err)
				}
				if wrong != nil && (wrong.Layer != 1 || wrong.LayerDigest.String() != victim.Digest.String() || wrong.Want == wrong.Got) {
					t.Errorf("%+v", wrong)
				}
				if n := sum(t, reg, "cfs_fuse_chunks_failed_total"); n != 2 {
					t.Errorf("%v failed chunks counted, want one of Fill and one of Need", n)
				}
			})
		}
	}
}

// sum adds up all counters of a name.
func sum(t testing.TB, reg *prometheus.Registry, name string) (n float64) {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				n += m.GetCounter().GetValue()
			}
		}
	}
	return n
}

// TestStoreError has a full disk told from a lost network.
func TestStoreError(t *testing.T) {
	m := build(t, small()...)
	full := errors.New("no space left")
	sink := newSink(m.x)
	sink.fail = full
	f := m.fetch(t, open(t, "oci:"+layoutOf(t, m), Options{}), sink, FetchOptions{})
	var store *StoreError
	if err := f.Need(ctx, 0, 0, 1); !errors.Is(err, full) || !errors.As(err, &store) {
		t.Error(err)
	}
	if err := f.Fill(ctx); !errors.Is(err, full) || !errors.As(err, &store) {
		t.Error(err)
	}
	sink.mu.Lock()
	sink.fail = nil
	sink.mu.Unlock()
	if err := f.Fill(ctx); err != nil {
		t.Error(err)
	}
	sink.check(t)
}

// TestMissingLayer has one blob gone: all others are filled.
func TestMissingLayer(t *testing.T) {
	m := build(t, small()...)
	gone := m.oci.Layers[2].Digest.String()
	r := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
		if q.Object == gone {
			return registrytest.Fault{Kind: registrytest.Status, Status: 404}
		}
		return registrytest.Fault{}
	}})
	sink := newSink(m.x)
	f := m.fetch(t, open(t, m.serve(r, "a"), quick()), sink, FetchOptions{})
	err := f.Fill(ctx)
	var status *StatusError
	if !errors.As(err, &status) || status.Status != 404 || !strings.Contains(err.Error(), gone) {
		t.Fatal(err)
	}
	for j := range m.x.Chunks() {
		if sink.Missing(j) != (m.x.Chunk(j).Layer == 2) {
			t.Errorf("chunk %d of layer %d: missing is %v", j, m.x.Chunk(j).Layer, sink.Missing(j))
		}
	}
}

// TestNoRanges has a server that only ever sends whole blobs: each is used as a
// stream, not asked for again and again.
func TestNoRanges(t *testing.T) {
	leakFree(t)
	m := build(t, spread(100, 30_000))
	r := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
		return registrytest.Fault{Kind: registrytest.Whole}
	}, Link: registrytest.Link{BytesPerSecond: 5e6}})
	sink := newSink(m.x)
	f := m.fetch(t, open(t, m.serve(r, "a"), quick()), sink, FetchOptions{})
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			if err := f.Need(ctx, i*9, 0, 1); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if err := f.Fill(ctx); err != nil {
		t.Fatal(err)
	}
	sink.mu.Lock()
	clear(sink.puts)
	sink.mu.Unlock()
	sink.check(t)
	if c := r.Counts(); c.Bytes > 3*m.oci.Layers[0].Size {
		t.Errorf("%d bytes in %d requests for a blob of %d", c.Bytes, c.Requests, m.oci.Layers[0].Size)
	}
}

// TestRequests reads one byte at many cold places, by many readers.
func TestRequests(t *testing.T) {
	leakFree(t)
	m := build(t, spread(300, 5000))
	r := registryOf(t, registrytest.Options{Link: registrytest.Link{Latency: 20 * time.Millisecond}})
	sink := newSink(m.x)
	f := m.fetch(t, open(t, m.serve(r, "a"), quick()), sink, FetchOptions{})
	var all sync.WaitGroup
	for w := range uint64(8) {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(w, 0))
			for range 40 {
				i := rnd.IntN(m.x.Contents())
				if err := f.Need(ctx, i, rnd.Int64N(m.x.Content(i).Size), 1); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	n := r.Counts()
	t.Logf("%d requests, %d bytes for 320 reads of %d chunks in %d bytes", n.Blobs, n.Bytes, m.x.Chunks(), m.oci.Layers[0].Size)
	if n.Blobs > int64(m.x.Chunks()) {
		t.Errorf("%d requests for %d chunks", n.Blobs, m.x.Chunks())
	}
	for j, n := range sink.puts {
		if n != 1 {
			t.Errorf("chunk %d came %d times", j, n)
		}
	}
}

// TestSequential reads a large file from its beginning to its end: the
// read-ahead grows, so that requests are few and the link is busy.
func TestSequential(t *testing.T) {
	leakFree(t)
	const size = 8 << 20
	m := build(t, imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.Random("big", size, 1))), imagetest.Options{ChunkSize: 64 << 10, Level: 1})))
	link := registrytest.Link{Latency: 20 * time.Millisecond, BytesPerSecond: 12.5e6}
	r := registryOf(t, registrytest.Options{Link: link})
	s := open(t, m.serve(r, "a"), quick())
	ideal := time.Duration(float64(size) / float64(link.BytesPerSecond) * float64(time.Second))
	var took time.Duration
	for range 3 { // a busy machine may be late once
		sink := newSink(m.x)
		f := m.fetch(t, s, sink, FetchOptions{})
		begin := time.Now()
		for off := int64(0); off < size; off += 128 << 10 {
			if err := f.Need(ctx, 0, off, 128<<10); err != nil {
				t.Fatal(err)
			}
		}
		took = time.Since(begin)
		n := f.Stats()[metrics.Demand].Requests
		t.Logf("%v, the link needs %v; %d requests for %d chunks", took, ideal, n, m.x.Chunks())
		f.Close()
		sink.check(t)
		if took < ideal*13/10 && n < 40 {
			return
		}
	}
	t.Errorf("reading took %v, the link needs %v", took, ideal)
}

// A heldBlob answers when told.
type heldBlob struct {
	Blob
	hold chan struct{}
}

func (b heldBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	select {
	case <-b.hold:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return b.Blob.ReadRange(ctx, off, n)
}

// TestOnce has many readers of one chunk, while Fill has it in hand too.
func TestOnce(t *testing.T) {
	leakFree(t)
	m := build(t, spread(10, 1000))
	r := registryOf(t, registrytest.Options{})
	s := open(t, m.serve(r, "a"), quick())
	sink := newSink(m.x)
	hold := make(chan struct{})
	f := New(m.x, []Blob{heldBlob{s.Blob(m.oci.Layers[0]), hold}}, sink, FetchOptions{})
	defer f.Close()
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			if err := f.Need(ctx, 3, 0, 1000); err != nil {
				t.Error(err)
			}
		})
	}
	for f.OldestWait() < 10*time.Millisecond {
		time.Sleep(time.Millisecond)
	}
	close(hold)
	all.Wait()
	if n := r.Counts().Blobs; n != 1 {
		t.Errorf("%d requests", n)
	}
	if f.OldestWait() != 0 {
		t.Error("nobody waits")
	}
	if err := f.Fill(ctx); err != nil {
		t.Error(err)
	}
	sink.check(t)
}
