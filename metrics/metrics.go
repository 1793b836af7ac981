// Package metrics holds the Prometheus collectors of one cfs-fuse process, on
// a registry that its caller passes in. It knows no other package of ours and
// starts no server.
//
// Labels are few and closed (class, result, source, reason, state, operation): none
// names an image, a layer or a file, so the number of series is fixed.
//
// Every method works on a nil *Metrics and then does nothing, so that a
// package under test needs no collectors.
package metrics

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Classes of work that a byte or a request was fetched for.
const (
	Demand   = "demand"   // a reader waits for it
	Prefetch = "prefetch" // the image says that it will be needed early
	Fill     = "fill"     // everything else
	Metadata = "metadata" // manifests, configurations and tables of contents
)

// Results of a request to a registry or a local source.
const (
	OK     = "ok"     // answered as asked
	Failed = "failed" // no usable answer
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

// Metrics are the collectors of one process.
type Metrics struct {
	requests   *prometheus.CounterVec
	bytes      *prometheus.CounterVec
	read       *prometheus.HistogramVec
	fuse       *prometheus.CounterVec
	chunks     *prometheus.CounterVec
	state      *prometheus.GaugeVec
	files      prometheus.Gauge
	filesLocal prometheus.Gauge
	size       prometheus.Gauge
	sizeLocal  prometheus.Gauge
}

// New makes the collectors and registers them on reg. It panics, as
// prometheus.MustRegister does, when reg already has collectors of these
// names.
func New(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cfs_fuse_source_requests_total",
			Help: "Requests to the image's source, by class of work and result.",
		}, []string{"class", "result"}),
		bytes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cfs_fuse_source_bytes_total",
			Help: "Bytes received from the image's source, by class of work and result.",
		}, []string{"class", "result"}),
		read: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:                           "cfs_fuse_read_duration_seconds",
			Help:                           "Time from a read request to its answer, by where its bytes were.",
			Buckets:                        prometheus.ExponentialBuckets(10e-6, 4, 10),
			NativeHistogramBucketFactor:    1.1,
			NativeHistogramMaxBucketNumber: 100,
		}, []string{"source"}),
		fuse: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cfs_fuse_requests_total",
			Help: "Requests of the kernel to FUSE, by operation.",
		}, []string{"operation"}),
		chunks: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "cfs_fuse_chunks_failed_total",
			Help: "Chunks that were not taken into the store, by reason.",
		}, []string{"reason"}),
		state: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "cfs_fuse_state",
			Help: "1 for the state that the image is in, 0 for the others.",
		}, []string{"state"}),
		files: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cfs_fuse_files", Help: "Distinct file contents of the image.",
		}),
		filesLocal: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cfs_fuse_files_local", Help: "Distinct file contents of the image that are whole in the store.",
		}),
		size: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cfs_fuse_image_bytes", Help: "Uncompressed bytes of the image's distinct file contents.",
		}),
		sizeLocal: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "cfs_fuse_image_local_bytes", Help: "Uncompressed bytes of the image's file contents that are in the store.",
		}),
	}
	reg.MustRegister(m.requests, m.bytes, m.read, m.fuse, m.chunks, m.state, m.files, m.filesLocal, m.size, m.sizeLocal)
	for _, class := range []string{Demand, Prefetch, Fill, Metadata} {
		for _, result := range []string{OK, Failed} {
			m.requests.WithLabelValues(class, result)
			m.bytes.WithLabelValues(class, result)
		}
	}
	for _, reason := range []string{ReasonDigest, ReasonDecode, ReasonFetch, ReasonStore} {
		m.chunks.WithLabelValues(reason)
	}
	for _, source := range []string{Local, Registry} {
		m.read.WithLabelValues(source)
	}
	return m
}

// Request counts one request of a class and the n bytes of body it received.
func (m *Metrics) Request(class, result string, n int64) {
	if m == nil {
		return
	}
	m.requests.WithLabelValues(class, result).Inc()
	m.bytes.WithLabelValues(class, result).Add(float64(n))
}

// Read records how long one read took, by the source of its bytes.
func (m *Metrics) Read(source string, d time.Duration) {
	if m == nil {
		return
	}
	m.read.WithLabelValues(source).Observe(d.Seconds())
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

// State sets the gauge of state to 1 and that of every other name in all to 0.
func (m *Metrics) State(state string, all []string) {
	if m == nil {
		return
	}
	for _, s := range all {
		v := 0.0
		if s == state {
			v = 1
		}
		m.state.WithLabelValues(s).Set(v)
	}
}

// Progress sets what is local of the image: distinct contents and their bytes.
func (m *Metrics) Progress(files, filesLocal int, size, sizeLocal int64) {
	if m == nil {
		return
	}
	m.files.Set(float64(files))
	m.filesLocal.Set(float64(filesLocal))
	m.size.Set(float64(size))
	m.sizeLocal.Set(float64(sizeLocal))
}
