package fetcher

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
)

const (
	// authAge is how old an Authorizer must be to be made anew when what it
	// offers is refused: younger, and the credentials are simply wrong.
	authAge = 5 * time.Second
	// defaultLife is how long a token is good whose server does not say
	// (distribution, "Token Authentication Specification", expires_in).
	defaultLife = 60 * time.Second
	maxToken    = 1 << 20 // bytes of a token server's answer
)

// tokens is what a host is shown. containerd's Authorizer asks for a token when
// one is needed and there is none, which a reader then waits for; while requests
// go on, the next one is got before that. The Authorizer also keeps for ever
// what has no expiry, and an error of the token server: then it is made anew.
type tokens struct {
	client *http.Client  // of the Authorizer
	turn   chan struct{} // held by who answers a challenge
	asking sync.Mutex    // held by who uses an Authorizer

	mu        sync.Mutex
	auth      docker.Authorizer
	authAt    time.Time      // when auth was made
	challenge *http.Response // the last one, without body
	next      time.Time      // when to get the next token; zero: not known
	expires   time.Time      // when the last token that came ends; zero: there was none that does
	renewing  bool
}

func (t *tokens) authorizer() docker.Authorizer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.auth
}

// newAuthorizer does what containerd's config.ConfigureHosts does.
func (h *host) newAuthorizer() docker.Authorizer {
	o := []docker.AuthorizerOpt{docker.WithAuthClient(h.tokens.client), docker.WithAuthCreds(h.r.credentials)}
	if len(h.header) > 0 {
		o = append(o, docker.WithAuthHeader(h.header))
	}
	return docker.NewDockerAuthorizer(o...)
}

// renew makes the host's Authorizer anew. It gives the old one back if that is
// younger than age.
func (h *host) renew(old docker.Authorizer, age time.Duration) docker.Authorizer {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.auth == old && time.Since(h.authAt) >= age {
		h.auth, h.authAt, h.next = h.newAuthorizer(), time.Now(), time.Time{}
	}
	return h.auth
}

// challenged answers the last of challenges, unless another request, that was
// refused too, has got a new token meanwhile.
func (h *host) challenged(ctx context.Context, auth docker.Authorizer, challenges []*http.Response, refusal error) error {
	select {
	case h.turn <- struct{}{}:
		defer func() { <-h.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	refused := challenges[len(challenges)-1]
	if shown := refused.Request.Header.Get("Authorization"); shown != "" {
		again := refused.Request.Clone(ctx)
		if err := h.authorizeRequest(ctx, auth, again); err == nil && again.Header.Get("Authorization") != shown {
			return nil
		}
	}
	h.mu.Lock()
	h.challenge = &http.Response{StatusCode: refused.StatusCode, Header: refused.Header, Request: refused.Request}
	h.mu.Unlock()
	err := auth.AddResponses(docker.ContextWithAppendPullRepositoryScope(ctx, h.r.ref.name), challenges)
	if err != nil {
		return fmt.Errorf("%w: %w", refusal, scrub(err))
	}
	return h.authorizeRequest(ctx, auth, refused.Request.Clone(ctx)) // others that were refused find it
}

// authorizeRequest adds a token to req. That may need a request of its own,
// whose answer others wait for too, so that it does not end with ctx.
func (h *host) authorizeRequest(ctx context.Context, auth docker.Authorizer, req *http.Request) error {
	if auth == nil {
		return nil
	}
	done := make(chan error, 1)
	err := h.r.start(func() {
		err := h.authorize(auth, req)
		if err == nil {
			h.renewAhead(auth)
		}
		done <- err
	})
	if err != nil {
		return err
	}
	select {
	case err := <-done:
		if err == nil {
			return nil
		}
		h.renew(auth, 0)
		if e, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
			name := h.name
			if u, perr := url.Parse(e.RequestURL); perr == nil && u.Host != "" {
				name = u.Host
			}
			return &StatusError{Host: name, Object: "token for " + h.r.ref.name, Status: e.StatusCode}
		}
		return fmt.Errorf("get token: %w", err)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// authorize has auth add a token to req, and notes how long it is good if it is
// a new one.
func (h *host) authorize(auth docker.Authorizer, req *http.Request) error {
	// One at a time, as all would wait for the same token: containerd reads
	// without its lock what it writes when a token comes.
	h.asking.Lock()
	defer h.asking.Unlock()
	ctx, cancel := context.WithTimeoutCause(h.r.ctx, h.r.opts.StallTimeout, errStalled)
	defer cancel()
	life := &tokenLife{}
	ctx = context.WithValue(docker.ContextWithAppendPullRepositoryScope(ctx, h.r.ref.name), lifeKey{}, life)
	err := auth.Authorize(ctx, req)
	if err != nil && (context.Cause(ctx) == errStalled || errors.Is(err, context.DeadlineExceeded)) {
		return errStalled // ours, or that of the request that several wait for
	}
	if err == nil && life.d > 0 {
		h.mu.Lock()
		h.next, h.expires = time.Now().Add(life.d*2/3), time.Now().Add(life.d)
		h.mu.Unlock()
	}
	return err
}

// renewAhead gets a new token, with an Authorizer of its own that then takes
// auth's place, when the one there is soon expires.
func (h *host) renewAhead(auth docker.Authorizer) {
	h.mu.Lock()
	challenge := h.challenge
	due := h.auth == auth && challenge != nil && !h.renewing && !h.next.IsZero() && time.Now().After(h.next)
	if due {
		h.renewing = true
	}
	h.mu.Unlock()
	if !due {
		return
	}
	h.r.start(func() {
		fresh := h.newAuthorizer()
		ctx := docker.ContextWithAppendPullRepositoryScope(h.r.ctx, h.r.ref.name)
		h.mu.Lock()
		h.next = time.Now().Add(authAge) // to try again, should this fail
		h.mu.Unlock()
		err := fresh.AddResponses(ctx, []*http.Response{challenge})
		if err == nil {
			err = h.authorize(fresh, challenge.Request.Clone(ctx))
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.renewing = false
		if err != nil {
			h.r.opts.Logger.Debug("no new token before the old one expires", "host", h.name, "error", scrub(err))
		} else if h.auth == auth {
			h.auth, h.authAt = fresh, time.Now()
		}
	})
}

// CredentialsExpire returns, by host, when the token ends that a registry source
// was last given for it. Hosts that want none, and local sources, are not in it.
func CredentialsExpire(s Source) map[string]time.Time {
	r, ok := s.(*registry)
	if !ok {
		return nil
	}
	all := map[string]time.Time{}
	for _, h := range r.hosts {
		h.mu.Lock()
		if !h.expires.IsZero() {
			all[h.name] = h.expires
		}
		h.mu.Unlock()
	}
	return all
}

// A tokenLife receives, by way of a request's context, how long the token is
// good that the request got.
type tokenLife struct{ d time.Duration }

type lifeKey struct{}

// A tokenWatch reads in the answers of token servers what containerd's
// Authorizer keeps to itself.
type tokenWatch struct{ http.RoundTripper }

func (w tokenWatch) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := w.RoundTripper.RoundTrip(req)
	life, ok := req.Context().Value(lifeKey{}).(*tokenLife)
	if !ok || err != nil || resp.StatusCode != http.StatusOK {
		return resp, err
	}
	raw, err := io.ReadAll(io.LimitReader(resp.Body, maxToken+1))
	resp.Body.Close()
	if err != nil {
		return nil, err
	}
	if len(raw) > maxToken {
		return nil, fmt.Errorf("a token of more than %d bytes", maxToken)
	}
	var token struct {
		ExpiresIn int64 `json:"expires_in"`
	}
	if json.Unmarshal(raw, &token) == nil {
		life.d = defaultLife
		if n := token.ExpiresIn; n > 0 {
			life.d = time.Duration(min(n, 1<<31)) * time.Second
		}
	}
	resp.Body = io.NopCloser(bytes.NewReader(raw))
	return resp, nil
}
