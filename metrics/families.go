package metrics

import (
	"fmt"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
)

//go:generate go run -tags docs ../cmd/cfs-fuse docs metrics ../docs/metrics.md

// A Kind is the type of a family.
type Kind string

// The kinds, as Prometheus calls them.
const (
	Counter   Kind = "counter"
	Gauge     Kind = "gauge"
	Histogram Kind = "histogram" // native, and with classic buckets
)

// A Rule says how a gauge of several processes becomes one of the node.
// Counters and histograms are added.
type Rule string

// The rules.
const (
	Sum Rule = "sum"
	Max Rule = "max"
	Min Rule = "min"
)

// A Label is a label's name and the values it may have; none if they are
// names of the node's own, of which there are few.
type Label struct {
	Name   string
	Values []string
	Open   string // what the values are, if Values is empty
}

// A Family is what docs/metrics.md says of a metric.
type Family struct {
	Name   string
	Kind   Kind
	Rule   Rule
	Help   string
	Labels []Label
}

func (f Family) labels() (names []string) {
	for _, l := range f.Labels {
		names = append(names, l.Name)
	}
	return names
}

var (
	classLabel   = Label{Name: "class", Values: []string{Demand, Prefetch, Fill, Metadata}}
	resultLabel  = Label{Name: "result", Values: []string{OK, Failed}}
	fromLabel    = Label{Name: "source", Values: []string{FromRegistry, FromMirror, FromFile}}
	readLabel    = Label{Name: "source", Values: []string{Local, Registry}}
	hostLabel    = Label{Name: "host", Open: "a registry or mirror, as configured"}
	storeLabel   = Label{Name: "root", Open: "the store's folder"}
	reasonLabel  = Label{Name: "reason", Values: []string{ReasonDigest, ReasonDecode, ReasonFetch, ReasonStore}}
	stateLabel   = Label{Name: "state", Values: []string{"lazy", "complete", "sealed", "swapped"}}
	backendLabel = Label{Name: "backend", Values: []string{"fuse", "hybrid", "kernel"}}
	verityLabel  = Label{Name: "verity", Values: []string{VerityEnforced, VerityNotEnforced, VerityNone}}
	opLabel      = Label{Name: "operation", Open: "a request of FUSE, as linux/fuse.h calls it, in lower case"}
	errorLabel   = Label{Name: "kind", Values: []string{ErrorAuth, ErrorMissing, ErrorLimit, ErrorServer, ErrorRefused, ErrorStall, ErrorNetwork, ErrorName, ErrorTLS, ErrorAnswer}}
	passedLabel  = Label{Name: "reason", Values: []string{PassedShared, PassedReused, PassedUnread}}
	doneLabel    = Label{Name: "milestone", Values: []string{Mounted, FirstRead, Complete, Sealed, Swapped}}
	buildLabels  = []Label{{Name: "version", Open: "of the program"}, {Name: "revision", Open: "of its source"}, {Name: "goversion", Open: "of its compiler"}}
)

// The families, in the order of docs/metrics.md. Names and units are as
// Prometheus' "Metric and label naming" wants them.
var (
	mountsFamily     = Family{"cfs_fuse_mounts", Gauge, Sum, "Mounts, by the state of the image and by what serves it.", []Label{stateLabel, backendLabel}}
	riskFamily       = Family{"cfs_fuse_mounts_at_risk", Gauge, Sum, "Mounts that fail their programs if the process that serves them dies: not swapped, and nothing keeps their session.", nil}
	deadFamily       = Family{"cfs_fuse_mounts_dead", Gauge, Sum, "Mounts whose process has died with nothing to go on in its place.", nil}
	blockedFamily    = Family{"cfs_fuse_mounts_blocked", Gauge, Sum, "Mounts that go no further, or for now no further, because of an error; status says which.", nil}
	silentFamily     = Family{"cfs_fuse_mounts_unreachable", Gauge, Sum, "Mounts whose process did not answer the scrape in time; the exporter has only what it counted before.", nil}
	verityFamily     = Family{"cfs_fuse_mounts_verity", Gauge, Sum, "Mounts, by what fs-verity does for them.", []Label{verityLabel}}
	startedFamily    = Family{"cfs_fuse_mounts_started_total", Counter, Sum, "Mounts that were begun, by how that ended.", []Label{resultLabel}}
	resumedFamily    = Family{"cfs_fuse_session_resumes_total", Counter, Sum, "Sessions that a process took over from another one that had died or was replaced.", nil}
	milestoneFamily  = Family{"cfs_fuse_milestone_seconds", Histogram, Sum, "Time from the start of a mount to a milestone; its exemplars name the image.", []Label{doneLabel}}
	filesFamily      = Family{"cfs_fuse_files", Gauge, Sum, "Distinct file contents of the mounted images.", nil}
	filesLocalFamily = Family{"cfs_fuse_files_local", Gauge, Sum, "Distinct file contents of the mounted images that are whole in the store.", nil}
	bytesFamily      = Family{"cfs_fuse_image_bytes", Gauge, Sum, "Uncompressed bytes of the mounted images' distinct file contents.", nil}
	bytesLocalFamily = Family{"cfs_fuse_image_local_bytes", Gauge, Sum, "Uncompressed bytes of the mounted images' file contents that are in the store.", nil}

	requestsFamily = Family{"cfs_fuse_source_requests_total", Counter, Sum, "Requests to images' sources, by class of work, kind of source and result.", []Label{classLabel, fromLabel, resultLabel}}
	fetchedFamily  = Family{"cfs_fuse_source_bytes_total", Counter, Sum, "Bytes received from images' sources, compressed, by class of work, kind of source and result.", []Label{classLabel, fromLabel, resultLabel}}
	passedFamily   = Family{"cfs_fuse_not_fetched_bytes_total", Counter, Sum, "Uncompressed bytes of images that were not fetched: shared, as they were in the store when the image was mounted; reused, from chunks of other local files; unread, when the mount ended.", []Label{passedLabel}}
	errorsFamily   = Family{"cfs_fuse_source_errors_total", Counter, Sum, "Failures of requests to a registry or mirror, by kind; most are healed by a retry.", []Label{errorLabel, hostLabel}}
	expireFamily   = Family{"cfs_fuse_credentials_expire_timestamp_seconds", Gauge, Min, "When the token expires that a host was last shown; it is renewed before that while requests go on.", []Label{hostLabel}}
	chunksFamily   = Family{"cfs_fuse_chunks_failed_total", Counter, Sum, "Chunks that were not taken into the store, by reason.", []Label{reasonLabel}}

	readFamily    = Family{"cfs_fuse_read_duration_seconds", Histogram, Sum, "Time from a read request of the kernel to its answer, by where its bytes were.", []Label{readLabel}}
	failedFamily  = Family{"cfs_fuse_requests_failed_total", Counter, Sum, "Requests of the kernel, nearly all of them reads, that failed.", nil}
	waitingFamily = Family{"cfs_fuse_reads_waiting", Gauge, Sum, "Reads that wait for bytes from a source now.", nil}
	oldestFamily  = Family{"cfs_fuse_oldest_wait_seconds", Gauge, Max, "For how long the read has waited that has waited longest; 0 when none waits.", nil}
	fuseFamily    = Family{"cfs_fuse_requests_total", Counter, Sum, "Requests of the kernel to FUSE, by operation.", []Label{opLabel}}

	storeFamily   = Family{"cfs_fuse_store_bytes", Gauge, Max, "Bytes that the store has on disk, about (docs/store.md).", []Label{storeLabel}}
	budgetFamily  = Family{"cfs_fuse_store_budget_bytes", Gauge, Max, "Bytes that the store may have (--store-size); 0: no limit.", []Label{storeLabel}}
	freeFamily    = Family{"cfs_fuse_store_free_bytes", Gauge, Min, "Free bytes of the store's filesystem.", []Label{storeLabel}}
	fullFamily    = Family{"cfs_fuse_mounts_store_full", Gauge, Sum, "Mounts for which nothing can be stored now: reads are answered from memory, filling waits.", nil}
	evictedFamily = Family{"cfs_fuse_store_evictions_total", Counter, Sum, "Images whose data were evicted to keep to the budget.", nil}
	freedFamily   = Family{"cfs_fuse_store_evicted_bytes_total", Counter, Sum, "Bytes on disk that eviction has freed.", nil}

	buildFamily = Family{"cfs_fuse_build_info", Gauge, Max, "1, with the program's version.", buildLabels}
)

// Families returns all families, in the order of the documentation.
func Families() []Family {
	return []Family{
		mountsFamily, riskFamily, deadFamily, blockedFamily, silentFamily, verityFamily, startedFamily, resumedFamily, milestoneFamily,
		filesFamily, filesLocalFamily, bytesFamily, bytesLocalFamily,
		requestsFamily, fetchedFamily, passedFamily, errorsFamily, expireFamily, chunksFamily,
		readFamily, failedFamily, waitingFamily, oldestFamily, fuseFamily,
		storeFamily, budgetFamily, freeFamily, fullFamily, evictedFamily, freedFamily, buildFamily,
	}
}

func (f Family) counter() *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: f.Name, Help: f.Help}, f.labels())
	// So that a rate is 0, not absent, before the first event.
	f.each(func(values []string) { c.WithLabelValues(values...) })
	return c
}

// histogram has as classic buckets n that begin at first, each four times the
// one before, and native ones besides.
func (f Family) histogram(first float64, n int) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: f.Name, Help: f.Help,
		Buckets:                        prometheus.ExponentialBuckets(first, 4, n),
		NativeHistogramBucketFactor:    1.1,
		NativeHistogramMaxBucketNumber: 100,
	}, f.labels())
	f.each(func(values []string) { h.WithLabelValues(values...) })
	return h
}

// each calls do with every combination of the labels' values, if those are
// known.
func (f Family) each(do func(values []string)) {
	all := [][]string{nil}
	for _, l := range f.Labels {
		var next [][]string
		for _, head := range all {
			for _, v := range l.Values {
				next = append(next, append(head[:len(head):len(head)], v))
			}
		}
		all = next
	}
	for _, values := range all {
		do(values)
	}
}

func (f Family) desc() *prometheus.Desc {
	return prometheus.NewDesc(f.Name, f.Help, f.labels(), nil)
}

const markdownHead = `# Metrics

Generated from the code by ` + "`make docs`" + `; a test holds both equal. Histograms are native histograms and have classic buckets too.

## One endpoint for a node

Each mount that is not swapped has a process of its own. ` + "`cfs-fuse exporter`" + ` serves what all of them know at one address, and is what Prometheus should scrape,
once a node (the Debian package has a unit, ` + "`cfs-fuse-exporter.service`" + `, at 127.0.0.1:9750). It asks each process through the runtime folder, and adds mounts that the kernel serves
alone. Counters of processes that have ended are kept, in a file of the runtime folder, so that a sum never goes down before the machine is started anew: a process
leaves what it has counted when it ends, and before it answers a scrape. One that is killed loses what it counted since the last scrape.

` + "`cfs-fuse mount --metrics ADDRESS`" + ` serves the same families for that one mount, for as long as its process lives: for a container that has one mount, or a look by hand.
Do not scrape both. ` + "`cfs-fuse snapshotter --metrics ADDRESS`" + ` serves all images of containerd's containers, which are of that one process, and which the exporter does not have:
scrape it besides, with the same job name.

Labels are few, and no label names an image, a layer or a file. Exemplars of ` + "`cfs_fuse_milestone_seconds`" + ` name the image.

## Families

| name | type | of a node | labels | what |
|---|---|---|---|---|
`

const markdownFoot = `
## To look at and to be woken by

* [deploy/grafana/cfs-fuse.json](../deploy/grafana/cfs-fuse.json): a dashboard, to be imported; it asks for the data source.
* [deploy/prometheus/alerts.yaml](../deploy/prometheus/alerts.yaml): alert rules; each has a runbook line, and [failure-modes.md](failure-modes.md) has the rest.
* [deploy/prometheus/scrape.yaml](../deploy/prometheus/scrape.yaml): the piece of prometheus.yml.
`

// Markdown returns docs/metrics.md.
func Markdown() string {
	var b strings.Builder
	b.WriteString(markdownHead)
	for _, f := range Families() {
		var labels []string
		for _, l := range f.Labels {
			what := l.Open
			if len(l.Values) > 0 {
				what = "`" + strings.Join(l.Values, "`, `") + "`"
			}
			labels = append(labels, "`"+l.Name+"`: "+what)
		}
		if labels == nil {
			labels = []string{"–"}
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s | %s |\n", f.Name, f.Kind, f.Rule, strings.Join(labels, "; "), f.Help)
	}
	b.WriteString(markdownFoot)
	return b.String()
}
