package metrics

import (
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// An Observation is what is true of one mount at the time of a scrape. Words
// are those of the labels in families.go; others are not shown.
type Observation struct {
	State, Backend, Verity           string
	AtRisk, Dead, Blocked, StoreFull bool
	Unreachable                      bool // nothing else is known
	Files, FilesLocal                int  // distinct contents
	Bytes, BytesLocal                int64
	Waiting                          int           // reads
	OldestWait                       time.Duration // of them
	Store                            StoreLevel
	Credentials                      map[string]time.Time // by host: when the token expires
}

// A StoreLevel is how full a store is, in bytes. With an empty Root nothing is
// known.
type StoreLevel struct {
	Root                string
	Bytes, Budget, Free int64
}

// watched is what is asked at each scrape, as a prometheus.Collector.
type watched struct {
	mu   sync.Mutex
	all  map[int]func() Observation
	next int
}

// Watch has every scrape ask for an observation of a mount until the function
// that it returns is called. observe must not block for long.
func (m *Metrics) Watch(observe func() Observation) (stop func()) {
	if m == nil {
		return func() {}
	}
	w := &m.watched
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.all == nil {
		w.all = map[int]func() Observation{}
	}
	id := w.next
	w.next++
	w.all[id] = observe
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.all, id)
	}
}

// plain are the gauges without labels, with what a mount adds to each; oldest
// waits are not added up.
var plain = []struct {
	family Family
	value  func(Observation) float64
}{
	{riskFamily, func(o Observation) float64 { return one(o.AtRisk) }},
	{deadFamily, func(o Observation) float64 { return one(o.Dead) }},
	{blockedFamily, func(o Observation) float64 { return one(o.Blocked) }},
	{silentFamily, func(o Observation) float64 { return one(o.Unreachable) }},
	{fullFamily, func(o Observation) float64 { return one(o.StoreFull) }},
	{filesFamily, func(o Observation) float64 { return float64(o.Files) }},
	{filesLocalFamily, func(o Observation) float64 { return float64(o.FilesLocal) }},
	{bytesFamily, func(o Observation) float64 { return float64(o.Bytes) }},
	{bytesLocalFamily, func(o Observation) float64 { return float64(o.BytesLocal) }},
	{waitingFamily, func(o Observation) float64 { return float64(o.Waiting) }},
	{oldestFamily, func(o Observation) float64 { return o.OldestWait.Seconds() }},
}

func one(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// Describe makes watched a prometheus.Collector.
func (w *watched) Describe(ch chan<- *prometheus.Desc) {
	for _, p := range plain {
		ch <- p.family.desc()
	}
	for _, f := range []Family{mountsFamily, verityFamily, storeFamily, budgetFamily, freeFamily, expireFamily} {
		ch <- f.desc()
	}
}

// Collect makes watched a prometheus.Collector.
func (w *watched) Collect(ch chan<- prometheus.Metric) {
	w.mu.Lock()
	asked := make([]func() Observation, 0, len(w.all))
	for _, observe := range w.all {
		asked = append(asked, observe)
	}
	w.mu.Unlock()
	sums := make([]float64, len(plain))
	mounts, verities := map[[2]string]int{}, map[string]int{}
	stores, tokens := map[string]StoreLevel{}, map[string]time.Time{}
	for _, observe := range asked {
		o := observe()
		for i, p := range plain {
			if p.family.Rule == Max {
				sums[i] = max(sums[i], p.value(o))
			} else {
				sums[i] += p.value(o)
			}
		}
		mounts[[2]string{o.State, o.Backend}]++
		verities[o.Verity]++
		if o.Store.Root != "" {
			stores[o.Store.Root] = o.Store
		}
		for host, t := range o.Credentials {
			if have, ok := tokens[host]; !ok || t.Before(have) {
				tokens[host] = t
			}
		}
	}
	gauge := func(f Family, v float64, labels ...string) {
		for i, l := range labels {
			labels[i] = strings.ToValidUTF8(l, "\ufffd") // paths may hold anything, labels not
		}
		ch <- prometheus.MustNewConstMetric(f.desc(), prometheus.GaugeValue, v, labels...)
	}
	for i, p := range plain {
		gauge(p.family, sums[i])
	}
	mountsFamily.each(func(v []string) { gauge(mountsFamily, float64(mounts[[2]string{v[0], v[1]}]), v...) })
	verityFamily.each(func(v []string) { gauge(verityFamily, float64(verities[v[0]]), v...) })
	for root, s := range stores {
		gauge(storeFamily, float64(s.Bytes), root)
		gauge(budgetFamily, float64(s.Budget), root)
		gauge(freeFamily, float64(s.Free), root)
	}
	for host, t := range tokens {
		gauge(expireFamily, float64(t.UnixMilli())/1000, host)
	}
}
