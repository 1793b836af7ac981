package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"

	"github.com/cfs-fuse/cfs-fuse/metrics"
)

const maxRedirects = 5

// A query is what to ask any host for.
type query struct {
	object string // for errors
	path   string // below the repository
	accept string
	ranged string // value of the Range header, or ""
	need   docker.HostCapabilities

	rounds   int       // over all hosts, and then any refusal is final; 0: until deadline
	deadline time.Time // when it has failed; zero: never
}

// over reports whether the query has no time left.
func (q *query) over(now time.Time) bool { return !q.deadline.IsZero() && !now.Before(q.deadline) }

// A host is one registry or mirror.
type host struct {
	r      *registry
	index  int    // in r.hosts
	name   string // host[:port]
	base   url.URL
	proxy  bool // must be told which registry it stands for
	header http.Header
	can    docker.HostCapabilities
	client *http.Client
	breaker
	tokens
}

func newHost(r *registry, index int, c docker.RegistryHost) *host {
	client := *c.Client
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &host{
		r: r, index: index, name: c.Host, client: &client, header: c.Header, can: c.Capabilities,
		base:  url.URL{Scheme: c.Scheme, Host: c.Host, Path: strings.TrimSuffix(c.Path, "/") + "/" + r.ref.name},
		proxy: c.Host != r.ref.host && !(r.ref.host == "docker.io" && c.Host == "registry-1.docker.io"),
		tokens: tokens{
			auth: c.Authorizer, authAt: time.Now(), client: c.Client, turn: make(chan struct{}, 1),
		},
	}
}

// from says what the host is, in the words of package metrics.
func (h *host) from() string {
	if h.proxy {
		return metrics.FromMirror
	}
	return metrics.FromRegistry
}

func (h *host) url(q *query) *url.URL {
	u := h.base
	u.Path += q.path
	if h.proxy {
		u.RawQuery = url.Values{"ns": {h.r.ref.host}}.Encode() // containerd, docs/hosts.md
	}
	return &u
}

// An answer is a response whose body is watched for stalls.
type answer struct {
	h          *host
	q          *query
	resp       *http.Response
	redirected *url.URL // where it came from, if not from the host itself
	ctx        context.Context
	cancel     context.CancelCauseFunc
	stall      *time.Timer
	deadline   time.Time // no read waits longer; zero: StallTimeout is all
	tally      *tally
	got        int64 // bytes of body
	ok         bool  // it was as asked, so far
	whole      bool  // the body is the whole blob
	off        int64 // where in the blob the next byte is; set by accept
	end        int64 // where it promises to end; set by accept
}

// get sends a query to a host, with authorisation, or without to the target of
// an earlier redirect. It gives an answer of any status but 401 and redirects,
// which it follows.
func (h *host) get(ctx context.Context, q *query, target *url.URL) (_ *answer, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	a := &answer{h: h, q: q, ctx: ctx, cancel: cancel, tally: tallyOf(ctx, nil)}
	if !q.over(time.Now()) {
		a.deadline = q.deadline
	}
	a.stall = time.AfterFunc(a.patience(), func() { cancel(errStalled) })
	defer func() {
		if err == nil {
			a.stall.Stop()
			return
		}
		cause := context.Cause(ctx)
		a.close()
		if cause != nil && cause != errStalled {
			err = cause
			return
		}
		if cause != nil {
			err = cause
		}
		if _, ok := errors.AsType[*StatusError](err); !ok {
			err = fmt.Errorf("get %s from %s: %w", q.object, h.name, scrub(err))
		}
	}()
	own := h.url(q)
	u, authorize := own, true
	if target != nil {
		u, authorize, a.redirected = target, false, target
	}
	auth := h.authorizer()
	var challenges []*http.Response
	for hops, tries := 0, 0; ; {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
		if err != nil {
			return nil, err
		}
		req.Header.Set("Accept", q.accept)
		req.Header.Set("Accept-Encoding", "identity") // offsets are of the blob itself
		req.Header.Set("User-Agent", "cfs-fuse")
		if q.ranged != "" {
			req.Header.Set("Range", q.ranged)
		}
		if authorize {
			for k, v := range h.header {
				req.Header[http.CanonicalHeaderKey(k)] = v
			}
			if err := h.authorizeRequest(ctx, auth, req); err != nil {
				return nil, err
			}
		}
		resp, err := h.client.Do(req)
		if err != nil {
			a.tally.add(h.from(), false, 0)
			return nil, err
		}
		a.resp = resp
		switch {
		case resp.StatusCode == http.StatusUnauthorized && authorize && tries < 3:
			a.drain()
			if tries++; tries == 2 {
				fresh := h.renew(auth, authAge)
				if fresh == auth {
					return nil, a.statusError()
				}
				auth, challenges = fresh, nil
				continue
			}
			challenges = append(challenges, resp)
			if err := h.challenged(ctx, auth, challenges, a.statusError()); err != nil {
				return nil, err
			}
		case resp.StatusCode >= 300 && resp.StatusCode < 400 && resp.Header.Get("Location") != "" && resp.StatusCode != http.StatusNotModified:
			a.drain()
			if hops++; hops > maxRedirects {
				return nil, errors.New("too many redirects")
			}
			next, err := u.Parse(resp.Header.Get("Location"))
			if err != nil || next.Scheme != "http" && next.Scheme != "https" || next.Host == "" {
				return nil, errors.New("redirect to what is no URL of HTTP")
			}
			if next.Host == own.Host && next.Scheme == own.Scheme {
				a.redirected = nil // needs authorisation each time, so it is not worth remembering
			} else {
				authorize, a.redirected = false, next
			}
			u = next
		default:
			return a, nil
		}
	}
}

// accept checks that an answer gives the bytes [off, end) of a blob of size
// bytes, or the first of them, or all of the blob (RFC 9110, section 14).
func (a *answer) accept(off, end, size int64) error {
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("get %s from %s: %s", a.q.object, a.h.name, fmt.Sprintf(format, args...))
	}
	switch a.resp.StatusCode {
	case http.StatusPartialContent:
		first, last, total, err := parseContentRange(a.resp.Header.Get("Content-Range"))
		if err != nil {
			return wrong("%v", err)
		}
		if first != off || last >= end || total >= 0 && total != size {
			return wrong("asked for bytes %d-%d of %d, got Content-Range %d-%d of %d", off, end-1, size, first, last, total)
		}
		a.off, a.end = off, last+1
	case http.StatusOK:
		if n := a.resp.ContentLength; n >= 0 && n != size {
			return wrong("it has %d bytes, the manifest says %d", n, size)
		}
		a.whole, a.end = end-off < size, size
	default:
		return a.statusError()
	}
	a.ok = true
	return nil
}

// parseContentRange reads "bytes FIRST-LAST/TOTAL", where TOTAL may be "*",
// which gives -1 (RFC 9110, section 14.4).
func parseContentRange(s string) (first, last, total int64, err error) {
	bad := func() (int64, int64, int64, error) {
		return 0, 0, 0, fmt.Errorf("206 with Content-Range %.100q", s)
	}
	rest, ok := strings.CutPrefix(s, "bytes ")
	span, of, ok2 := strings.Cut(rest, "/")
	lo, hi, ok3 := strings.Cut(span, "-")
	if !ok || !ok2 || !ok3 {
		return bad()
	}
	total = -1
	var err1, err2, err3 error
	first, err1 = strconv.ParseInt(lo, 10, 64)
	last, err2 = strconv.ParseInt(hi, 10, 64)
	if of != "*" {
		total, err3 = strconv.ParseInt(of, 10, 64)
	}
	if err1 != nil || err2 != nil || err3 != nil || first < 0 || last < first || total >= 0 && last >= total || of != "*" && total < 0 {
		return bad()
	}
	return first, last, total, nil
}

func (a *answer) statusError() *StatusError {
	a.ok = false
	e := &StatusError{Host: a.h.name, Object: a.q.object, Status: a.resp.StatusCode}
	if a.redirected != nil {
		e.Host = a.redirected.Host
	}
	if s := a.resp.Header.Get("Retry-After"); s != "" {
		if n, err := strconv.Atoi(s); err == nil && n > 0 {
			e.RetryAfter = time.Duration(min(n, 3600)) * time.Second
		} else if t, err := http.ParseTime(s); err == nil {
			e.RetryAfter = max(0, time.Until(t))
		}
	}
	return e
}

// patience returns how long the host may send nothing from now on.
func (a *answer) patience() time.Duration {
	d := a.h.r.opts.StallTimeout
	if !a.deadline.IsZero() {
		d = max(time.Millisecond, min(d, time.Until(a.deadline)))
	}
	return d
}

// Read reads the body. A stall is an error, and so is an end before
// Content-Length.
func (a *answer) Read(p []byte) (int, error) {
	a.stall.Reset(a.patience())
	n, err := a.resp.Body.Read(p)
	a.stall.Stop()
	a.got += int64(n)
	a.off += int64(n)
	if err != nil && err != io.EOF {
		a.ok = false
		if cause := context.Cause(a.ctx); cause != nil {
			err = cause
		}
		err = scrub(err)
	}
	return n, err
}

// drain throws away the small body of an answer that only leads on, so that
// its connection can be used again, and counts the request.
func (a *answer) drain() {
	n, _ := io.Copy(io.Discard, io.LimitReader(a.resp.Body, 16<<10))
	a.resp.Body.Close()
	a.tally.add(a.h.from(), true, n)
}

// close ends the request and counts it.
func (a *answer) close() {
	a.stall.Stop()
	if a.resp != nil && a.tally != nil {
		a.resp.Body.Close()
		a.tally.add(a.h.from(), a.ok, a.got)
		a.tally = nil
	}
	a.cancel(nil)
}
