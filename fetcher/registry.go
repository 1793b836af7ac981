package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/log"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"
	logrusslog "github.com/sirupsen/logrus/hooks/slog"
	"oras.land/oras-go/v2/registry/remote/credentials"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// idlePerHost is how many idle connections to one host are kept: as many as a
// Fetcher has requests under way, so that none begins with a handshake.
const idlePerHost = 32

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
	r.ctx, r.cancel = context.WithCancel(context.Background())
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
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	quiet.SetLevel(logrus.WarnLevel)
	quiet.AddHook(logrusslog.NewHook(r.opts.Logger, nil))
	o := config.HostOptions{
		HostDir:      config.HostDirFromRoot(r.opts.HostsDir),
		Credentials:  dockerCredentials,
		UpdateClient: r.adopt,
	}
	if r.opts.PlainHTTP {
		o.DefaultScheme = "http"
	}
	return config.ConfigureHosts(log.WithLogger(r.ctx, logrus.NewEntry(quiet)), o)(r.ref.host)
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

// dockerCredentials reads docker's config.json each time it is asked, so that
// a login while mounted counts. Without user name, the secret is a refresh token.
func dockerCredentials(host string) (user, secret string, err error) {
	store, err := credentials.NewStoreFromDocker(credentials.StoreOptions{})
	if err != nil {
		return "", "", fmt.Errorf("docker's config.json: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), helperTimeout)
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

// manifest gets a manifest by tag or digest. Its caller checks the digest.
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
	ctx = withTally(ctx, tallyOf(ctx, r.metadata))
	var raw []byte
	err := r.ask(ctx, q, func(h *host) error {
		a, err := h.get(ctx, q, nil)
		if err != nil {
			return err
		}
		defer a.close()
		if a.resp.StatusCode != http.StatusOK {
			return a.statusError()
		}
		raw, err = io.ReadAll(io.LimitReader(a, maxManifest+1))
		if err == nil && len(raw) > maxManifest {
			err = fmt.Errorf("more than %d bytes", maxManifest)
		}
		if err != nil {
			return fmt.Errorf("get %s from %s: %w", q.object, h.name, noEOF(err))
		}
		a.ok = true
		return nil
	})
	return raw, err
}

func (r *registry) Blob(d ocispec.Descriptor) Blob {
	return &registryBlob{r: r, desc: d, targets: make([]*url.URL, len(r.hosts))}
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

	mu      sync.Mutex
	targets []*url.URL // by host: where it last redirected to
}

func (b *registryBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	return b.ReadRangeFrom(ctx, off, n, 0)
}

// ReadRangeFrom is ReadRange beginning with another host than the first, if
// there is one: skip places further in the list.
func (b *registryBlob) ReadRangeFrom(ctx context.Context, off, n int64, skip int) (io.ReadCloser, error) {
	if err := checkDescriptor(b.desc); err != nil {
		return nil, fmt.Errorf("blob: %w", err)
	}
	if off < 0 || n <= 0 || off > b.desc.Size-n {
		return nil, fmt.Errorf("blob %s: range of %d bytes at %d of %d bytes", b.desc.Digest, n, off, b.desc.Size)
	}
	ctx, cancel := context.WithCancelCause(withTally(ctx, tallyOf(ctx, b.r.metadata)))
	stop := context.AfterFunc(b.r.ctx, func() { cancel(ErrClosed) })
	body := &registryBody{b: b, ctx: ctx, skip: skip, off: off, end: off + n,
		cancel: func() { stop(); cancel(nil) }}
	if err := body.reopen(); err != nil {
		body.cancel()
		return nil, err
	}
	return body, nil
}

func (b *registryBlob) target(h *host) *url.URL {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.targets[h.index]
}

func (b *registryBlob) remember(h *host, u *url.URL) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.targets[h.index] = u
}

// open asks one host for the bytes [off, end).
func (b *registryBlob) open(ctx context.Context, h *host, off, end int64) (*answer, error) {
	q := &query{
		object: "blob " + b.desc.Digest.String(),
		path:   "/blobs/" + b.desc.Digest.String(),
		accept: "*/*",
		ranged: fmt.Sprintf("bytes=%d-%d", off, end-1),
	}
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
	return a, nil
}

var errNoHost = errors.New("no host may be asked")
