package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	logrusslog "github.com/sirupsen/logrus/hooks/slog"
	"oras.land/oras-go/v2/registry/remote/credentials"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// idlePerHost is how many idle connections to one host are kept: as many as a
// Fetcher has requests under way, so that none begins with a handshake.
const idlePerHost = 32

// streamBuffer is how far an HTTP/2 server may send ahead of what was read of
// one body: what 100 Mbit/s carry in 80 ms.
const streamBuffer = 1 << 20

// A registry is a source behind one or more hosts: the registry itself and its
// mirrors, in the order to ask them.
type registry struct {
	ref      reference
	platform ocispec.Platform
	metadata *tally // of requests outside a Fetcher
	opts     Options
	hosts    []*host

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	work   sync.WaitGroup // authorisations under way

	mu         sync.Mutex
	closed     bool
	transports []*http.Transport // to close their idle connections
}

func newRegistry(ref reference, p ocispec.Platform, metadata *tally, o Options) (*registry, error) {
	r := &registry{ref: ref, platform: p, metadata: metadata, opts: o}
	// What containerd has to say goes to our logger.
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	quiet.SetLevel(logrus.WarnLevel)
	quiet.AddHook(logrusslog.NewHook(o.Logger, nil))
	r.ctx, r.cancel = context.WithCancel(log.WithLogger(context.Background(), logrus.NewEntry(quiet)))
	hosts, err := r.configure()
	if err != nil {
		r.Close()
		return nil, hint.Wrap(fmt.Errorf("source %s: hosts of %s: %w", ref, ref.host, err), "check the files in "+o.HostsDir)
	}
	for i, c := range hosts {
		r.hosts = append(r.hosts, newHost(r, i, c))
	}
	if len(r.hosts) == 0 {
		r.Close()
		return nil, hint.Wrap(fmt.Errorf("source %s: no host serves %s", ref, ref.host), "name one in hosts.toml in "+o.HostsDir)
	}
	return r, nil
}

// configure reads hosts.toml as containerd does. It does no request.
func (r *registry) configure() ([]docker.RegistryHost, error) {
	o := config.HostOptions{
		HostDir:      config.HostDirFromRoot(r.opts.HostsDir),
		Credentials:  r.credentials,
		UpdateClient: r.adopt,
	}
	if r.opts.PlainHTTP {
		o.DefaultScheme = "http"
	}
	return config.ConfigureHosts(r.ctx, o)(r.ref.host)
}

// adopt prepares a client that containerd has made, perhaps more than once.
func (r *registry) adopt(c *http.Client) error {
	t, ok := c.Transport.(*http.Transport)
	if !ok {
		return nil
	}
	t.MaxIdleConns = 2 * idlePerHost
	t.MaxIdleConnsPerHost = idlePerHost
	t.IdleConnTimeout = time.Minute
	t.ReadBufferSize = 64 << 10
	// containerd's transport speaks HTTP/1.1 only, by what Go makes of its
	// fields. With HTTP/2 all requests share a connection: that it is dead
	// shows by pings, and what lies in wait for a body that is not read is
	// small enough not to stand in the way of others.
	t.ForceAttemptHTTP2 = true
	t.HTTP2 = &http.HTTP2Config{
		SendPingTimeout: r.opts.StallTimeout / 2, PingTimeout: r.opts.StallTimeout / 2,
		MaxReceiveBufferPerStream: streamBuffer,
	}
	c.Transport = tokenWatch{t}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Contains(r.transports, t) {
		r.transports = append(r.transports, t)
	}
	return nil
}

// helperTimeout bounds how long a credential helper may take. Its callers hold
// the authorizer's lock, so that a helper that hangs would hold up every
// request to its host.
const helperTimeout = 15 * time.Second

// credentials reads docker's config.json each time it is asked, so that
// a login while mounted counts. Without user name, the secret is a refresh token.
func (r *registry) credentials(host string) (user, secret string, err error) {
	if r.opts.Credentials != nil {
		if user, secret, ok := r.opts.Credentials(r.ref.String(), host); ok {
			return user, secret, nil
		}
	}
	store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return "", "", fmt.Errorf("docker's config.json: %w", err)
	}
	ctx, cancel := context.WithTimeout(r.ctx, helperTimeout)
	defer cancel()
	c, err := store.Get(ctx, credentials.ServerAddressFromHostname(host))
	if err != nil {
		return "", "", fmt.Errorf("credentials for %s: %w", host, err)
	}
	if c.RefreshToken != "" {
		return "", c.RefreshToken, nil
	}
	return c.Username, c.Password, nil
}

func (r *registry) String() string { return r.ref.String() }

func (r *registry) Resolve(ctx context.Context) (*Manifest, error) {
	raw, err := r.manifest(ctx, r.ref.object())
	if err == nil && r.ref.digest != "" {
		err = checkDigest(r.ref.digest, raw)
	}
	var m *Manifest
	if err == nil {
		m, err = resolve(raw, r.platform, func(d ocispec.Descriptor) ([]byte, error) {
			return r.manifest(ctx, d.Digest.String())
		})
	}
	if err != nil {
		return nil, advise(fmt.Errorf("resolve %s: %w", r, err), r.ref.host)
	}
	return m, nil
}

// resolveRounds is how often all hosts are asked for a manifest: someone waits
// at a prompt, and wants to hear of a wrong name soon.
const resolveRounds = 4

// manifest gets a manifest by tag or digest. A host whose answer has another
// digest than it was asked for, or than it says itself, has failed.
func (r *registry) manifest(ctx context.Context, object string) ([]byte, error) {
	q := &query{
		object: "manifest " + object,
		path:   "/manifests/" + object,
		accept: manifestTypes,
		need:   docker.HostCapabilityPull,
		rounds: resolveRounds,
	}
	if object == r.ref.tag {
		q.need = docker.HostCapabilityResolve
	}
	q.deadline = r.deadline(time.Now())
	ctx = withTally(ctx, tallyOf(ctx, r.metadata))
	var raw []byte
	err := r.ask(ctx, q, 0, -1, func(h *host) error {
		a, err := h.get(ctx, q, nil)
		if err != nil {
			return err
		}
		defer a.close()
		if a.resp.StatusCode != http.StatusOK {
			return a.statusError()
		}
		if limit := r.opts.ReadTimeout / 3; limit > 0 { // for one that trickles
			until := time.Now().Add(limit)
			if a.deadline.IsZero() || until.Before(a.deadline) {
				a.deadline = until
			}
		}
		raw, err = io.ReadAll(io.LimitReader(a, maxManifest+1))
		if err == nil && len(raw) > maxManifest {
			err = fmt.Errorf("more than %d bytes", maxManifest)
		}
		if want := manifestDigest(object, a.resp.Header); err == nil && want != "" {
			err = checkDigest(want, raw)
		}
		if err != nil {
			return fmt.Errorf("get %s from %s: %w", q.object, h.name, noEOF(err))
		}
		a.ok = true
		h.worked(time.Now())
		return nil
	})
	return raw, err
}

// manifestDigest returns which digest an answer for a manifest must have, or "".
// What docker signed once has a digest of its own making.
func manifestDigest(object string, h http.Header) digest.Digest {
	d := digest.Digest(h.Get("Docker-Content-Digest"))
	if strings.Contains(object, ":") {
		d = digest.Digest(object)
	}
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 || strings.Contains(h.Get("Content-Type"), "v1+prettyjws") {
		return ""
	}
	return d
}

func (r *registry) Blob(d ocispec.Descriptor) Blob {
	return &registryBlob{r: r, desc: d, targets: make([]target, len(r.hosts))}
}

// Close ends all requests and waits for what it started.
func (r *registry) Close() error {
	r.cancel()
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.work.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, t := range r.transports {
		t.CloseIdleConnections()
	}
	return nil
}

// start runs f in a goroutine that Close waits for.
func (r *registry) start(f func()) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return ErrClosed
	}
	r.work.Go(f)
	return nil
}

// A registryBlob reads a blob from the first host that gives it.
type registryBlob struct {
	r    *registry
	desc ocispec.Descriptor

	from atomic.Int32 // the host that last gave bytes

	mu      sync.Mutex
	targets []target // by host: where it last redirected to
}

// A target is where a redirect led; its URL is signed.
type target struct {
	url     *url.URL
	expires time.Time // zero: not known
}

func (b *registryBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return b.readRange(ctx, off, n, -1)
}

// ReadRangeAvoiding is ReadRange from another host than the one of that number,
// if any other has the blob.
func (b *registryBlob) ReadRangeAvoiding(ctx context.Context, off, n int64, host int) (io.ReadCloser, error) {
	return b.readRange(ctx, off, n, host)
}

func (b *registryBlob) readRange(ctx context.Context, off, n int64, avoid int) (io.ReadCloser, error) {
	if err := checkDescriptor(b.desc); err != nil {
		return nil, fmt.Errorf("blob: %w", err)
	}
	if off < 0 || n <= 0 || off > b.desc.Size-n {
		return nil, fmt.Errorf("blob %s: range of %d bytes at %d of %d bytes", b.desc.Digest, n, off, b.desc.Size)
	}
	ctx, cancel := context.WithCancelCause(withTally(ctx, tallyOf(ctx, b.r.metadata)))
	stop := context.AfterFunc(b.r.ctx, func() { cancel(ErrClosed) })
	body := &registryBody{b: b, ctx: ctx, skip: avoid + 1, avoid: avoid, off: off, end: off + n, gained: sinceOf(ctx),
		cancel: func() { stop(); cancel(nil) }}
	if err := body.reopen(); err != nil {
		body.cancel()
		return nil, err
	}
	return body, nil
}

// target returns where the host last redirected to, if that may still be good.
func (b *registryBlob) target(h *host) *url.URL {
	b.mu.Lock()
	defer b.mu.Unlock()
	t := &b.targets[h.index]
	if !t.expires.IsZero() && time.Now().After(t.expires) {
		*t = target{}
	}
	return t.url
}

func (b *registryBlob) remember(h *host, u *url.URL) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.targets[h.index] = target{u, expiry(u, time.Now())}
}

// expiryMargin is how long before its end a signed URL is no longer used: the
// clocks of two machines differ, and a request takes a while.
const expiryMargin = 10 * time.Second

// expiry returns until when a signed URL may be used, zero if it does not say:
// X-Amz-Date and X-Amz-Expires (AWS Signature Version 4, "Query parameters";
// Google's X-Goog- the same), se (Azure, "Create a service SAS"), Expires
// (CloudFront and older S3: seconds since 1970).
func expiry(u *url.URL, now time.Time) time.Time {
	if u == nil {
		return time.Time{}
	}
	q := u.Query()
	end := time.Time{}
	for _, vendor := range []string{"X-Amz-", "X-Goog-"} {
		begin, err := time.Parse("20060102T150405Z", q.Get(vendor+"Date"))
		n, err2 := strconv.ParseInt(q.Get(vendor+"Expires"), 10, 32)
		if err == nil && err2 == nil {
			end = begin.Add(time.Duration(n) * time.Second)
		}
	}
	if t, err := time.Parse(time.RFC3339, q.Get("se")); err == nil {
		end = t
	}
	if n, err := strconv.ParseInt(q.Get("Expires"), 10, 64); err == nil && n > 0 && n < 1<<40 {
		end = time.Unix(n, 0)
	}
	if end.IsZero() || end.Before(now) { // the clocks do not agree
		return time.Time{}
	}
	return end.Add(-expiryMargin)
}

// query asks for the bytes [off, end).
func (b *registryBlob) query(off, end int64) *query {
	return &query{
		object: "blob " + b.desc.Digest.String(),
		path:   "/blobs/" + b.desc.Digest.String(),
		accept: "*/*",
		ranged: fmt.Sprintf("bytes=%d-%d", off, end-1),
		need:   docker.HostCapabilityPull,
	}
}

// open asks one host for the bytes [off, end).
func (b *registryBlob) open(ctx context.Context, h *host, q *query, off, end int64) (*answer, error) {
	target := b.target(h)
	a, err := h.get(ctx, q, target)
	if target != nil && (err != nil || a.resp.StatusCode >= 300) && ctx.Err() == nil {
		if err == nil {
			a.close()
		}
		b.remember(h, nil) // expired, or gone
		a, err = h.get(ctx, q, nil)
	}
	if err != nil {
		return nil, err
	}
	if err := a.accept(off, end, b.desc.Size); err != nil {
		a.close()
		return nil, err
	}
	if a.redirected != nil {
		b.remember(h, a.redirected)
	}
	b.from.Store(int32(h.index))
	return a, nil
}

// Elsewhere returns the blob as it is read from another host than the one that
// last gave bytes of it, if there is one, for bytes that were wrong. It reports
// false for a blob that is a file here: that would only be read again.
func Elsewhere(b Blob) (Blob, bool) {
	if r, ok := b.(*registryBlob); ok {
		return &elsewhere{r, int(r.from.Load())}, true
	}
	return b, false
}

type elsewhere struct {
	*registryBlob
	avoid int
}

func (e *elsewhere) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return e.readRange(ctx, off, n, e.avoid)
}

type sinceKey struct{}

// withSince tells a Source since when somebody has waited for what is asked
// for under ctx: ReadTimeout counts from then. Zero: nobody does.
func withSince(ctx context.Context, t time.Time) context.Context {
	if t.IsZero() {
		return ctx
	}
	return context.WithValue(ctx, sinceKey{}, t)
}

func sinceOf(ctx context.Context) time.Time {
	if t, ok := ctx.Value(sinceKey{}).(time.Time); ok {
		return t
	}
	return time.Now()
}

var errNoHost = errors.New("no host may be asked")
