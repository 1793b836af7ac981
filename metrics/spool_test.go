package metrics

import (
	"bytes"
	"context"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// gathered returns a family as text.
func gathered(from prometheus.Gatherer, name string) (string, error) {
	all, err := from.Gather()
	var b bytes.Buffer
	b.WriteByte('\n')
	for _, f := range all {
		if f.GetName() == name {
			if _, err := expfmt.MetricFamilyToText(&b, f); err != nil {
				return "", err
			}
		}
	}
	return b.String(), err
}

// A node is several Metrics with one spool, as if each were of a process.
type node struct {
	t   *testing.T
	dir string
	all []*Metrics
}

func (n *node) start() *Metrics {
	n.t.Helper()
	m := New(prometheus.NewRegistry())
	if err := m.Spool(n.dir); err != nil {
		n.t.Fatal(err)
	}
	n.all = append(n.all, m)
	return m
}

// kill ends a process that could not write anything more.
func (n *node) kill(m *Metrics) {
	m.spool.lock.Close()
	m.spool = nil
}

// Gather is a scrape that silent ones do not answer.
func (n *node) gather(silent ...*Metrics) prometheus.Gatherer {
	return prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		return Node(context.Background(), n.dir, func() (map[string][]byte, []*dto.MetricFamily, error) {
			answers := map[string][]byte{}
			for _, m := range n.all {
				if m.spool == nil || len(silent) > 0 && silent[0] == m {
					continue
				}
				id, data, err := m.Snapshot()
				if err != nil {
					return nil, nil, err
				}
				answers[id] = data
			}
			return answers, nil, nil
		})
	})
}

func (n *node) want(from prometheus.Gatherer, lines ...string) {
	n.t.Helper()
	for _, line := range lines {
		name := strings.TrimSuffix(line[:strings.IndexAny(line, "{ ")], "_count")
		got, err := gathered(from, name)
		if err != nil || !strings.Contains(got, "\n"+line+"\n") {
			n.t.Errorf("no %q (%v) in:%s", line, err, got)
		}
	}
}

// Counters of a node never go down: not when a process ends, is killed, or does
// not answer; gauges are of those that live.
func TestNode(t *testing.T) {
	n := &node{t: t, dir: filepath.Join(t.TempDir(), "spool")}
	a, b := n.start(), n.start()
	a.ChunkFailed(ReasonDigest)
	b.ChunkFailed(ReasonDigest)
	b.Read(Local, time.Second)
	a.Read(Local, time.Second)
	lazy := func() Observation { return Observation{State: "lazy", Backend: "fuse", OldestWait: time.Second} }
	a.Watch(lazy)
	b.Watch(lazy)
	two := []string{`cfs_fuse_chunks_failed_total{reason="digest"} 2`, `cfs_fuse_read_duration_seconds_count{source="local"} 2`}
	n.want(n.gather(), append(two, `cfs_fuse_mounts{backend="fuse",state="lazy"} 2`, `cfs_fuse_oldest_wait_seconds 1`)...)
	n.want(n.gather(b), append(two, `cfs_fuse_mounts{backend="fuse",state="lazy"} 1`)...)
	b.ChunkFailed(ReasonDigest)
	if err := b.Retire(); err != nil {
		t.Fatal(err)
	}
	three := []string{`cfs_fuse_chunks_failed_total{reason="digest"} 3`, `cfs_fuse_read_duration_seconds_count{source="local"} 2`, `cfs_fuse_mounts{backend="fuse",state="lazy"} 1`}
	n.want(n.gather(), three...)
	n.want(n.gather(), three...)
	n.kill(a)
	n.want(n.gather(), append(three[:2:2], `cfs_fuse_chunks_failed_total{reason="store"} 0`)...)
	c := n.start()
	c.ChunkFailed(ReasonDigest)
	n.want(n.gather(), `cfs_fuse_chunks_failed_total{reason="digest"} 4`)
	if err := c.Retire(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(n.dir)
	if err != nil || len(left) != 2 {
		t.Errorf("left in the spool: %v (%v), want total.lock and total.pb", left, err)
	}
}

// Two histograms added are the histogram of both's observations, in native and
// in classic buckets.
func TestAddHistogram(t *testing.T) {
	one := func(observations []float64) *dto.Histogram {
		h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "h", Buckets: []float64{0.1, 1, 10}, NativeHistogramBucketFactor: 1.1})
		for _, v := range observations {
			h.Observe(v)
		}
		var m dto.Metric
		if err := h.Write(&m); err != nil {
			t.Fatal(err)
		}
		return m.Histogram
	}
	for _, sizes := range [][2]int{{0, 0}, {0, 1}, {1, 0}, {1, 1}, {100, 50}} {
		var a, b []float64
		for range sizes[0] {
			a = append(a, rand.ExpFloat64())
		}
		for range sizes[1] {
			b = append(b, 100*rand.ExpFloat64())
		}
		got, want := one(a), one(append(append([]float64{}, a...), b...))
		addHistogram(got, one(b))
		if got.GetSampleCount() != want.GetSampleCount() || got.GetSchema() != want.GetSchema() || got.GetZeroCount() != want.GetZeroCount() ||
			!maps.Equal(native(got), native(want)) || len(got.PositiveSpan) == 0 {
			t.Errorf("%v: got %v, want %v", sizes, got, want)
		}
		for i, bucket := range want.Bucket {
			if got.Bucket[i].GetCumulativeCount() != bucket.GetCumulativeCount() {
				t.Errorf("%v: bucket %v has %d, want %d", sizes, bucket.GetUpperBound(), got.Bucket[i].GetCumulativeCount(), bucket.GetCumulativeCount())
			}
		}
	}
	// Of different resolutions the coarser one counts: bucket i of schema 3
	// covers (2^((i-1)/8), 2^(i/8)], of schema 0 (2^(i-1), 2^i].
	for fine, coarse := range map[int32]int32{-8: -1, -7: 0, 0: 0, 1: 1, 8: 1, 9: 2} {
		if got := coarser(fine, 3); got != coarse {
			t.Errorf("bucket %d of schema 3 is in %d of schema 0, want %d", fine, got, coarse)
		}
	}
	// A bucket list that claims more than it has.
	huge, offset := uint32(1<<32-1), int32(0)
	liar := &dto.Histogram{PositiveSpan: []*dto.BucketSpan{{Offset: &offset, Length: &huge}}, PositiveDelta: []int64{1}}
	if n := native(liar); len(n) != 1 {
		t.Errorf("%d buckets", len(n))
	}
}
