package metrics

import (
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
)

// A sum is metric families by name, with which others can be merged.
type sum map[string]*dto.MetricFamily

// rules are those of gauges that are not summed.
var rules = func() map[string]Rule {
	all := map[string]Rule{}
	for _, f := range Families() {
		all[f.Name] = f.Rule
	}
	return all
}()

// add merges families; gauges, which are true only now, if gauges is set. It
// takes the families over.
func (s sum) add(families []*dto.MetricFamily, gauges bool) {
	for _, f := range families {
		if !gauges && f.GetType() == dto.MetricType_GAUGE {
			continue
		}
		have := s[f.GetName()]
		if have == nil {
			s[f.GetName()] = f
			continue
		}
		if have.GetType() != f.GetType() {
			continue // of another version of the program
		}
		byLabels := map[string]*dto.Metric{}
		for _, m := range have.Metric {
			byLabels[labelKey(m)] = m
		}
		for _, m := range f.Metric {
			if old := byLabels[labelKey(m)]; old != nil {
				addMetric(old, m, rules[f.GetName()])
			} else {
				have.Metric = append(have.Metric, m)
			}
		}
	}
}

// families returns the sum, in the order of names.
func (s sum) families() []*dto.MetricFamily {
	all := make([]*dto.MetricFamily, 0, len(s))
	for _, f := range s {
		slices.SortFunc(f.Metric, func(a, b *dto.Metric) int { return strings.Compare(labelKey(a), labelKey(b)) })
		all = append(all, f)
	}
	slices.SortFunc(all, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return all
}

func labelKey(m *dto.Metric) string {
	var b strings.Builder
	for _, l := range m.Label {
		b.WriteString(l.GetName() + "\x00" + l.GetValue() + "\x00")
	}
	return b.String()
}

func addMetric(to, m *dto.Metric, rule Rule) {
	switch {
	case to.Counter != nil && m.Counter != nil:
		*to.Counter.Value += m.Counter.GetValue()
		to.Counter.CreatedTimestamp = nil // of neither
	case to.Gauge != nil && m.Gauge != nil:
		v := m.Gauge.GetValue()
		switch rule {
		case Max:
			v = max(v, to.Gauge.GetValue())
		case Min:
			v = min(v, to.Gauge.GetValue())
		default:
			v += to.Gauge.GetValue()
		}
		to.Gauge.Value = &v
	case to.Histogram != nil && m.Histogram != nil:
		addHistogram(to.Histogram, m.Histogram)
	}
}

// addHistogram adds the classic buckets that both have, and the native ones in
// the coarser of the two resolutions.
func addHistogram(to, h *dto.Histogram) {
	to.CreatedTimestamp = nil
	count, total := to.GetSampleCount()+h.GetSampleCount(), to.GetSampleSum()+h.GetSampleSum()
	to.SampleCount, to.SampleSum = &count, &total
	var both []*dto.Bucket
	for _, b := range to.Bucket {
		i := slices.IndexFunc(h.Bucket, func(o *dto.Bucket) bool { return o.GetUpperBound() == b.GetUpperBound() })
		if i < 0 {
			continue
		}
		n := b.GetCumulativeCount() + h.Bucket[i].GetCumulativeCount()
		b.CumulativeCount = &n
		if b.Exemplar == nil || h.Bucket[i].Exemplar.GetTimestamp().AsTime().After(b.Exemplar.GetTimestamp().AsTime()) {
			if e := h.Bucket[i].Exemplar; e != nil {
				b.Exemplar = e
			}
		}
		both = append(both, b)
	}
	to.Bucket = both
	to.Exemplars = append(to.Exemplars, h.Exemplars...)
	if n := len(to.Exemplars); n > maxExemplars {
		to.Exemplars = to.Exemplars[n-maxExemplars:]
	}
	if to.Schema == nil || h.Schema == nil || to.GetZeroThreshold() != h.GetZeroThreshold() {
		to.Schema, to.ZeroThreshold, to.ZeroCount, to.PositiveSpan, to.PositiveDelta = nil, nil, nil, nil, nil
		return
	}
	schema := min(to.GetSchema(), h.GetSchema())
	buckets := map[int32]int64{}
	for _, one := range []*dto.Histogram{to, h} {
		for i, n := range native(one) {
			buckets[coarser(i, one.GetSchema()-schema)] += n
		}
	}
	zero := to.GetZeroCount() + h.GetZeroCount()
	to.Schema, to.ZeroCount = &schema, &zero
	to.PositiveSpan, to.PositiveDelta = spans(buckets)
}

const (
	maxExemplars = 10
	maxNative    = 1 << 16 // buckets of one histogram that are believed in
)

// native returns the native buckets of a histogram by index (client_model's
// metrics.proto: spans of buckets, each with the difference to the one before).
func native(h *dto.Histogram) map[int32]int64 {
	buckets := map[int32]int64{}
	var index int32
	var n int64
	deltas := h.PositiveDelta
	for _, s := range h.PositiveSpan {
		index += s.GetOffset()
		for range s.GetLength() {
			if len(deltas) == 0 || len(buckets) > maxNative {
				return buckets
			}
			n += deltas[0]
			deltas = deltas[1:]
			if n > 0 {
				buckets[index] = n
			}
			index++
		}
	}
	return buckets
}

// coarser returns the index of the bucket that holds bucket index when the
// schema is less by n: two become one each time. Bucket i ends at base^i.
func coarser(index, n int32) int32 { return ((index - 1) >> n) + 1 }

// spans is the opposite of native. Without buckets it has one empty span, which
// is how a native histogram says that it is one.
func spans(buckets map[int32]int64) (all []*dto.BucketSpan, deltas []int64) {
	indexes := make([]int32, 0, len(buckets))
	for i := range buckets {
		indexes = append(indexes, i)
	}
	slices.Sort(indexes)
	var next int32 // behind the last span
	var before int64
	for k, i := range indexes {
		if k == 0 || i != next {
			offset, length := i-next, uint32(0)
			all = append(all, &dto.BucketSpan{Offset: &offset, Length: &length})
		}
		*all[len(all)-1].Length++
		deltas = append(deltas, buckets[i]-before)
		before, next = buckets[i], i+1
	}
	if all == nil {
		offset, length := int32(0), uint32(0)
		all = []*dto.BucketSpan{{Offset: &offset, Length: &length}}
	}
	return all, deltas
}
