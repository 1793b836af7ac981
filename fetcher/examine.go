package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/internal/finding"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// How much is asked of a host to know its speed.
const (
	examinedBytes = 8 << 20
	examinedTime  = 3 * time.Second
	examinedPings = 5
	slowAnswer    = 200 * time.Millisecond // from here on each read that waits is felt
	slowRate      = 2 << 20                // bytes per second, likewise
)

// Examine finds out what the hosts of a registry source do with the requests
// that a mount makes, by making them: some MiB of a layer are read. Of local
// sources it says whether the image is there.
func Examine(ctx context.Context, s Source) []finding.Finding {
	l := &finding.List{Group: s.String()}
	ctx = withTally(ctx, &tally{class: metrics.Metadata})
	m, err := s.Resolve(ctx)
	if err != nil {
		l.Missing("image", scrub(err).Error(), "it cannot be mounted, unless the store has it", hint.Of(err))
		if r, ok := s.(*registry); ok {
			r.examineLogin(l)
		}
		return l.All
	}
	l.Good("image", fmt.Sprintf("%s, %d layers", m.Digest, len(m.Layers)))
	r, ok := s.(*registry)
	if !ok {
		return l.All
	}
	r.examineLogin(l)
	if len(m.Layers) == 0 {
		return l.All
	}
	layer := slices.MaxFunc(m.Layers, func(a, b ocispec.Descriptor) int { return int(min(1, max(-1, a.Size-b.Size))) })
	for _, h := range r.hosts {
		l.Group = "host " + h.name
		if h.from() == metrics.FromMirror {
			l.Group = "mirror " + h.name
		}
		if !h.can.Has(docker.HostCapabilityPull) {
			l.Degraded("capabilities", "hosts.toml does not let it be pulled from", "it is never asked for layers", "give it the capability \"pull\" in hosts.toml")
			continue
		}
		h.examine(ctx, l, layer)
	}
	return l.All
}

// examineLogin says what the registry is shown as credentials.
func (r *registry) examineLogin(l *finding.List) {
	user, secret, err := r.credentials(r.ref.host)
	switch {
	case err != nil:
		l.Degraded("login", scrub(err).Error(), "images that need one cannot be read", "mend docker's config.json, or its credential helper")
	case secret == "":
		l.Good("login", "none for "+r.ref.host+" in docker's config.json; what anybody may read can be read")
	case user == "":
		l.Good("login", "an identity token for "+r.ref.host)
	default:
		l.Good("login", "as "+user+" at "+r.ref.host)
	}
}

// examine tries one host with ranges of a layer.
func (h *host) examine(ctx context.Context, l *finding.List, layer ocispec.Descriptor) {
	b := h.r.Blob(layer).(*registryBlob)
	small := min(1024, layer.Size)
	ask := func(ranges string) (*answer, error) {
		q := b.query(0, small)
		q.ranged = ranges
		return h.get(ctx, q, nil)
	}
	a, err := ask(b.query(0, small).ranged)
	if err == nil && a.resp.StatusCode >= 300 {
		err = a.statusError()
		a.close()
	}
	if err != nil {
		err = advise(err, h.r.ref.host)
		l.Missing("layer", scrub(err).Error(), "nothing can be read from it; others are asked", hint.Of(err))
		return
	}
	ranges := a.resp.StatusCode == http.StatusPartialContent
	proto, redirected := a.resp.Proto, a.redirected
	err = a.accept(0, small, layer.Size)
	if ranges && err == nil {
		_, err = io.CopyN(io.Discard, a, small)
	}
	a.close()
	switch {
	case err != nil:
		l.Missing("ranges", scrub(err).Error(), "its answers are not used; others are asked", "mend the registry, or the proxy in front of it")
	case !ranges:
		l.Degraded("ranges", "it sends the whole layer whatever is asked for", "the first read of a layer waits until what is in front of it has come",
			"have the registry, or the proxy in front of it, answer Range requests")
	default:
		l.Good("ranges", "it gives the bytes that it is asked for")
	}
	if layer.Size > 300 {
		if a, err := ask("bytes=0-99,200-299"); err == nil {
			if a.resp.StatusCode == http.StatusPartialContent && strings.HasPrefix(a.resp.Header.Get("Content-Type"), "multipart/byteranges") {
				l.Good("multi-range", "it gives two ranges in one answer; cfs-fuse asks for one at a time")
			} else {
				l.Good("multi-range", "it gives one range at a time, which is how cfs-fuse asks")
			}
			a.close()
		}
	}
	if strings.HasPrefix(proto, "HTTP/2") {
		l.Good("protocol", proto+": all requests share a connection")
	} else {
		l.Degraded("protocol", proto, fmt.Sprintf("a connection for each request under way, %d at most", idlePerHost), "nothing, or HTTP/2 at the registry")
	}
	if redirected != nil {
		detail := "layers come from " + redirected.Host
		if t := expiry(redirected, time.Now()); !t.IsZero() {
			detail += fmt.Sprintf(", by URLs that are good for %v", time.Until(t.Add(expiryMargin)).Round(time.Second))
		}
		l.Good("redirect", detail)
	} else {
		l.Good("redirect", "none: it sends layers itself")
	}
	if ranges && err == nil {
		h.examineLink(ctx, l, b, layer.Size)
	}
	h.mu.Lock()
	expires, challenge := h.expires, h.challenge
	h.mu.Unlock()
	switch left := time.Until(expires); {
	case challenge == nil:
		l.Good("token", "it wants none")
	case expires.IsZero():
		l.Good("token", "it took the login itself, or a token without an end")
	default:
		l.Good("token", fmt.Sprintf("good for %v; the next one is asked for after two thirds of that", left.Round(time.Second)))
	}
}

// examineLink measures the host's latency and rate, as mounts meet them: with
// connections and redirects known.
func (h *host) examineLink(ctx context.Context, l *finding.List, b *registryBlob, size int64) {
	read := func(ctx context.Context, off, n int64) (first time.Duration, got int64, err error) {
		begin := time.Now()
		a, err := b.open(ctx, h, b.query(off, off+n), off, off+n)
		if err != nil {
			return 0, 0, err
		}
		defer a.close()
		first = time.Since(begin)
		got, err = io.CopyN(io.Discard, a, n)
		return first, got, err
	}
	var trips []time.Duration
	for i := range int64(examinedPings) {
		n := min(512, size)
		trip, _, err := read(ctx, (size-n)*i/examinedPings, n)
		if err != nil {
			l.Degraded("latency", scrub(err).Error(), "requests are repeated", "look after the registry")
			return
		}
		trips = append(trips, trip)
	}
	slices.Sort(trips)
	median := trips[len(trips)/2]
	detail := fmt.Sprintf("%v until the first byte (median of %d)", median.Round(100*time.Microsecond), examinedPings)
	if median > slowAnswer {
		l.Degraded("latency", detail, "each read that has to wait takes that long: a start that reads 50 files one after the other waits for 50 of them",
			"a mirror that is nearer (hosts.toml), or an access profile, so that they are fetched ahead (cfs-fuse profile)")
	} else {
		l.Good("latency", detail)
	}
	limited, cancel := context.WithTimeout(ctx, examinedTime)
	defer cancel()
	begin := time.Now()
	first, got, err := read(limited, 0, min(size, examinedBytes))
	if err != nil && !errors.Is(limited.Err(), context.DeadlineExceeded) {
		l.Degraded("bandwidth", scrub(err).Error(), "requests are repeated", "look after the registry")
		return
	}
	took := max(time.Since(begin)-first, time.Millisecond)
	if got < 256<<10 {
		l.Good("bandwidth", fmt.Sprintf("not known: %d bytes are too few to say", got))
		return
	}
	rate := float64(got) / took.Seconds()
	detail = fmt.Sprintf("%.1f MB/s over one connection (%.1f MB)", rate/1e6, float64(got)/1e6)
	if rate < slowRate {
		l.Degraded("bandwidth", detail, "an image is whole late; programs that read much wait", "a mirror that is nearer (hosts.toml)")
	} else {
		l.Good("bandwidth", detail)
	}
}
