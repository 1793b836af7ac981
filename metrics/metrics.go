// Package metrics holds the Prometheus collectors of a cfs-fuse process, and
// adds those of several processes up to a node's. It knows no other package of
// ours and starts no server.
//
// Labels are few and closed, or name what the node's configuration does (a
// registry, the store's folder): none names an image, a layer or a file, so
// the number of series is small. families.go has them all; docs/metrics.md is
// made of it.
//
// Every method works on a nil *Metrics and then does nothing, so that a
// package under test needs no collectors.
package metrics

import (
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cfs-fuse/cfs-fuse/internal/version"
)

// Classes of work that a byte or a request was fetched for.
const (
	Demand   = "demand"   // a reader waits for it
	Prefetch = "prefetch" // the image says that it will be needed early
	Fill     = "fill"     // everything else
	Metadata = "metadata" // manifests, configurations and tables of contents
)

// Results of a request to a registry or a local source, and of a mount.
const (
	OK     = "ok"     // answered as asked
	Failed = "failed" // no usable answer
)

// What answered a request.
const (
	FromRegistry = "registry"
	FromMirror   = "mirror" // another host that hosts.toml names for the registry
	FromFile     = "file"   // a local layout, archive or layer
)

// Sources of the bytes that answered a read.
const (
	Local    = "local"    // every byte was in the store when the read came
	Registry = "registry" // at least one chunk had to be fetched first
)

// Reasons why a chunk was not taken into the store.
const (
	ReasonDigest = "digest" // its bytes do not have the promised SHA-256 digest
	ReasonDecode = "decode" // its bytes are not a valid compressed stream
	ReasonFetch  = "fetch"  // its bytes could not be had
	ReasonStore  = "store"  // its bytes could not be written
)

// Kinds of failures of a request to a registry.
const (
	ErrorAuth    = "auth"    // 401, 403, or no token
	ErrorMissing = "missing" // 404, 410
	ErrorLimit   = "limit"   // 429
	ErrorServer  = "server"  // 5xx
	ErrorRefused = "refused" // any other status
	ErrorStall   = "stall"   // no answer in time, or hardly a byte
	ErrorNetwork = "network" // no connection, or one that broke
	ErrorName    = "dns"     // no address for the name
	ErrorTLS     = "tls"     // a certificate, or no TLS at all
	ErrorAnswer  = "answer"  // something else than was asked for
)

// Reasons why bytes of an image were not fetched.
const (
	PassedShared = "shared" // they were in the store when the image was mounted
	PassedReused = "reused" // they were taken from chunks of other local files
	PassedUnread = "unread" // the mount ended before they were needed
)

// Milestones of a mount.
const (
	Mounted   = "mounted"
	FirstRead = "first_read"
	Complete  = "complete"
	Sealed    = "sealed"
	Swapped   = "swapped"
)

// What fs-verity does for a mount.
const (
	VerityEnforced    = "enforced"
	VerityNotEnforced = "not_enforced"
	VerityNone        = "none" // not sealed yet
)

// Metrics are the collectors of one process.
type Metrics struct {
	own *prometheus.Registry // of these alone

	requests, bytes, passed, errors *prometheus.CounterVec
	chunks, fuse, started           *prometheus.CounterVec
	resumed, requestsFailed         *prometheus.CounterVec
	evicted, freed                  *prometheus.CounterVec
	read, milestone                 *prometheus.HistogramVec
	watched                         watched

	spooling sync.Mutex
	spool    *spoolFile // guarded by spooling; nil: none
}

// New makes the collectors and registers them on reg. It panics, as
// prometheus.MustRegister does, when reg already has collectors of these
// names.
func New(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		own:      prometheus.NewRegistry(),
		requests: requestsFamily.counter(), bytes: fetchedFamily.counter(), passed: passedFamily.counter(), errors: errorsFamily.counter(),
		chunks: chunksFamily.counter(), fuse: fuseFamily.counter(), started: startedFamily.counter(),
		resumed: resumedFamily.counter(), requestsFailed: failedFamily.counter(),
		evicted: evictedFamily.counter(), freed: freedFamily.counter(),
		read:      readFamily.histogram(10e-6, 10),
		milestone: milestoneFamily.histogram(5e-3, 12),
	}
	build := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: buildFamily.Name, Help: buildFamily.Help}, buildFamily.labels())
	v := version.Get()
	build.WithLabelValues(v.Version, v.Revision, v.Go).Set(1)
	for _, r := range []prometheus.Registerer{reg, m.own} {
		r.MustRegister(m.requests, m.bytes, m.passed, m.errors, m.chunks, m.fuse, m.started, m.resumed, m.requestsFailed,
			m.evicted, m.freed, m.read, m.milestone, &m.watched, build)
	}
	return m
}

// Request counts one request of a class and the n bytes of body it received
// from FromRegistry, FromMirror or FromFile.
func (m *Metrics) Request(class, from, result string, n int64) {
	if m == nil {
		return
	}
	m.requests.WithLabelValues(class, from, result).Inc()
	m.bytes.WithLabelValues(class, from, result).Add(float64(n))
}

// SourceError counts one failure of a kind of a request to a host.
func (m *Metrics) SourceError(kind, host string) {
	if m == nil {
		return
	}
	m.errors.WithLabelValues(kind, host).Inc()
}

// NotFetched counts n bytes of an image that were not fetched, by reason.
func (m *Metrics) NotFetched(reason string, n int64) {
	if m == nil {
		return
	}
	m.passed.WithLabelValues(reason).Add(float64(n))
}

// Read records how long one read took, by the source of its bytes.
func (m *Metrics) Read(source string, d time.Duration) {
	if m == nil {
		return
	}
	m.read.WithLabelValues(source).Observe(d.Seconds())
}

// RequestFailed counts one request of the kernel that failed.
func (m *Metrics) RequestFailed() {
	if m == nil {
		return
	}
	m.requestsFailed.WithLabelValues().Inc()
}

// FUSERequest counts one request of the kernel to FUSE, by operation in lower
// case ("lookup", "read", …).
func (m *Metrics) FUSERequest(operation string) {
	if m == nil {
		return
	}
	m.fuse.WithLabelValues(operation).Inc()
}

// ChunkFailed counts one chunk that was not taken into the store.
func (m *Metrics) ChunkFailed(reason string) {
	if m == nil {
		return
	}
	m.chunks.WithLabelValues(reason).Inc()
}

// Started counts a mount that was begun, by OK or Failed.
func (m *Metrics) Started(result string) {
	if m == nil {
		return
	}
	m.started.WithLabelValues(result).Inc()
}

// Resumed counts a session that was taken over.
func (m *Metrics) Resumed() {
	if m == nil {
		return
	}
	m.resumed.WithLabelValues().Inc()
}

// Milestone records how long after its start a mount of image reached a
// milestone. The image, its manifest's digest, becomes an exemplar.
func (m *Metrics) Milestone(milestone string, d time.Duration, image string) {
	if m == nil {
		return
	}
	h := m.milestone.WithLabelValues(milestone)
	if e, ok := h.(prometheus.ExemplarObserver); ok && image != "" {
		e.ObserveWithExemplar(d.Seconds(), prometheus.Labels{"image": image})
		return
	}
	h.Observe(d.Seconds())
}

// Evicted counts images that were evicted, and what that freed.
func (m *Metrics) Evicted(images int, bytes int64) {
	if m == nil {
		return
	}
	m.evicted.WithLabelValues().Add(float64(images))
	m.freed.WithLabelValues().Add(float64(max(0, bytes)))
}
