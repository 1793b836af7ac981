package repository

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/errdef"
	"oras.land/oras-go/v2/registry"
	oras "oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
	"oras.land/oras-go/v2/registry/remote/errcode"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// attempts is how often a request is made that fails by the network, or that
// the registry has no time for.
const attempts = 4

// patience is how long a registry may take nothing of what is sent, and then
// until it answers: some copy a blob to another store first.
const patience = 2 * time.Minute

// A remote is a repository of a registry.
type remote struct {
	name     fetcher.Name
	endpoint *fetcher.Endpoint
	log      *slog.Logger
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc

	mu   sync.Mutex
	repo *oras.Repository // once the registry has answered
}

func openRemote(n fetcher.Name, write bool, o fetcher.Options) (*remote, error) {
	e, err := fetcher.OpenEndpoint(n, write, o)
	if err != nil {
		return nil, err
	}
	r := &remote{name: n, endpoint: e, log: o.Logger}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r, nil
}

// Close ends the requests under way.
func (r *remote) Close() error {
	r.cancel()
	return r.endpoint.Close()
}

// connect finds out how the registry is spoken to.
func (r *remote) connect(ctx context.Context) (*oras.Repository, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.repo != nil {
		return r.repo, nil
	}
	scheme, err := r.endpoint.Scheme(ctx)
	if err != nil {
		return nil, err
	}
	ref := registry.Reference{Registry: r.name.Host, Repository: r.name.Repository}
	route := &route{next: r.endpoint.Client.Transport, asked: url.URL{Scheme: scheme, Host: ref.Host()}, real: r.endpoint.Base, header: r.endpoint.Header}
	route.real.Scheme = scheme
	client := *r.endpoint.Client
	client.Transport = route
	a := &auth.Client{Client: &client, Cache: auth.NewCache(), Credential: r.credential}
	a.SetUserAgent("cfs-fuse")
	if local(r.endpoint.Base.Hostname()) {
		a.BlockedRealmPrefixes = []netip.Prefix{} // its token server may be here, too
	}
	r.repo = &oras.Repository{
		Client: a, Reference: ref, PlainHTTP: scheme == "http",
		MaxMetadataBytes: maxManifest, ReferrerListMaxPages: maxReferrers,
		SkipReferrersGC: true, // many registries delete nothing
	}
	return r.repo, nil
}

func local(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (r *remote) credential(_ context.Context, host string) (auth.Credential, error) {
	if host == (registry.Reference{Registry: r.name.Host}).Host() {
		host = r.endpoint.Base.Host // docker's config.json has the host that is really asked
	}
	user, secret, err := r.endpoint.Credentials(host)
	if err != nil || secret == "" {
		return auth.EmptyCredential, err
	}
	if user == "" {
		return auth.Credential{RefreshToken: secret}, nil
	}
	return auth.Credential{Username: user, Password: secret}, nil
}

// try makes a request until it succeeds or fails for good.
func (r *remote) try(ctx context.Context, what string, f func(context.Context, *oras.Repository) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	for n := 1; ; n++ {
		repo, err := r.connect(ctx)
		if err == nil {
			err = f(ctx, repo)
		}
		switch {
		case err == nil:
			return nil
		case r.ctx.Err() != nil:
			return fetcher.ErrClosed
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, errdef.ErrNotFound):
			return fmt.Errorf("%s: %w", what, ErrNotFound)
		case n == attempts || !passing(err):
			return r.advise(fmt.Errorf("%s: %w", what, withoutURL(err)))
		}
		r.log.Debug("a request failed and is made again", "what", what, "error", withoutURL(err))
		wait := time.Second << (n - 1)
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait/2)):
		}
	}
}

// passing reports whether time may heal the error.
func passing(err error) bool {
	if e, ok := errors.AsType[*errcode.ErrorResponse](err); ok {
		return e.StatusCode >= 500 || e.StatusCode == http.StatusTooManyRequests || e.StatusCode == http.StatusRequestTimeout
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
		return false
	}
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
}

// withoutURL drops from an error of net/http the URL, which may hold a secret.
func withoutURL(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	if e, ok := errors.AsType[*errcode.ErrorResponse](err); ok {
		if len(e.Errors) > 0 {
			return fmt.Errorf("%s: status %d: %w", e.Method, e.StatusCode, e.Errors)
		}
		return fmt.Errorf("%s: status %d %s", e.Method, e.StatusCode, http.StatusText(e.StatusCode))
	}
	return err
}

func (r *remote) advise(err error) error {
	if hint.Of(err) != "" {
		return err
	}
	text := err.Error()
	switch {
	case strings.Contains(text, "status 401"), strings.Contains(text, "status 403"), errors.Is(err, auth.ErrBasicCredentialNotFound),
		strings.Contains(text, "fetch token"):
		return hint.Wrap(err, "log in with 'docker login "+r.name.Host+"' as someone who may push to "+r.name.Repository)
	case strings.Contains(text, "status 405"):
		return hint.Wrap(err, "the registry takes nothing; it may be a mirror or read-only")
	case strings.Contains(text, "status 413"):
		return hint.Wrap(err, "the registry, or a proxy before it, limits the size of what is pushed")
	}
	return hint.Wrap(err, "check that the registry runs and takes what is pushed")
}

func (r *remote) push(ctx context.Context, d ocispec.Descriptor, tag string, from io.ReaderAt) error {
	what := fmt.Sprintf("push %s to %s/%s", d.Digest, r.name.Host, r.name.Repository)
	return r.try(ctx, what, func(ctx context.Context, repo *oras.Repository) error {
		body := io.NopCloser(io.NewSectionReader(from, 0, d.Size))
		if isManifest(d.MediaType) {
			ref := tag
			if ref == "" {
				ref = d.Digest.String()
			}
			return repo.Manifests().PushReference(ctx, d, body, ref)
		}
		there, err := repo.Blobs().Exists(ctx, d)
		if err != nil || there {
			return err
		}
		return repo.Blobs().Push(ctx, d, body)
	})
}

func (r *remote) open(ctx context.Context, d ocispec.Descriptor) (body io.ReadCloser, err error) {
	var repo *oras.Repository
	err = r.try(ctx, fmt.Sprintf("get %s from %s/%s", d.Digest, r.name.Host, r.name.Repository), func(_ context.Context, found *oras.Repository) error {
		repo = found
		var err error
		// The body lives longer than this attempt.
		if isManifest(d.MediaType) {
			body, err = repo.Manifests().Fetch(ctx, d)
		} else {
			body, err = repo.Blobs().Fetch(ctx, d)
		}
		return err
	})
	return body, err
}

func (r *remote) referrers(ctx context.Context, subject ocispec.Descriptor, artifactType string) (found []ocispec.Descriptor, err error) {
	err = r.try(ctx, "list referrers", func(ctx context.Context, repo *oras.Repository) error {
		found = nil
		err := repo.Referrers(ctx, subject, artifactType, func(page []ocispec.Descriptor) error {
			if found = append(found, page...); len(found) > maxReferrers {
				return fmt.Errorf("more than %d", maxReferrers)
			}
			return nil
		})
		if e, ok := errors.AsType[*errcode.ErrorResponse](err); ok && e.StatusCode == http.StatusNotFound {
			return nil // no such repository: nothing refers to anything in it
		}
		return err
	})
	return found, err
}

// A route sends requests for the registry to the host that stands for it, and
// ends those that get nowhere.
type route struct {
	next  http.RoundTripper
	asked url.URL // scheme and host of the requests
	real  url.URL // with the path that stands for /v2

	header http.Header // that the operator wants in each request for the host, and in no other
}

var errStalled = errors.New("the registry takes and sends nothing")

// RoundTrip implements http.RoundTripper.
func (t *route) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	stall := time.AfterFunc(patience, func() { cancel(errStalled) })
	out := req.Clone(ctx)
	if req.URL.Host == t.asked.Host {
		out.URL.Scheme, out.URL.Host, out.Host = t.real.Scheme, t.real.Host, ""
		if rest, ok := strings.CutPrefix(out.URL.Path, "/v2/"); ok {
			out.URL.Path = t.real.Path + "/" + rest
		}
		for k, v := range t.header {
			if k = http.CanonicalHeaderKey(k); k != "Authorization" || out.Header.Get(k) == "" {
				out.Header[k] = v
			}
		}
	}
	if req.Body != nil && req.Body != http.NoBody {
		out.Body = &watched{req.Body, func() { stall.Reset(patience) }, func() {}}
	}
	resp, err := t.next.RoundTrip(out)
	stall.Stop()
	if err != nil {
		if cause := context.Cause(ctx); cause == errStalled {
			err = cause
		}
		cancel(nil)
		return nil, err
	}
	if resp.Request == nil || req.URL.Host == t.asked.Host {
		resp.Request = req
	}
	if u, err := url.Parse(resp.Header.Get("Location")); err == nil && u.Host == t.real.Host {
		u.Scheme, u.Host = t.asked.Scheme, t.asked.Host
		if rest, ok := strings.CutPrefix(u.Path, t.real.Path+"/"); ok {
			u.Path = "/v2/" + rest
		}
		resp.Header.Set("Location", u.String())
	}
	body := stall
	body.Reset(patience)
	resp.Body = &watched{resp.Body, func() { body.Reset(patience) }, func() { body.Stop(); cancel(nil) }}
	return resp, nil
}

// watched is a body that says when it is read and closed.
type watched struct {
	io.ReadCloser
	read, closed func()
}

func (w *watched) Read(p []byte) (int, error) {
	w.read()
	return w.ReadCloser.Read(p)
}

func (w *watched) Close() error {
	w.closed()
	return w.ReadCloser.Close()
}
