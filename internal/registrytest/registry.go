// Package registrytest is a registry in the process, for tests and for the
// demonstration: it serves manifests and blobs from memory or files on a
// loopback address, over a link of a given latency and bandwidth if asked to,
// and misbehaves on request. It stores nothing, takes no pushes, and imports
// no testing.
//
//	GET /v2/                        200, or a challenge
//	GET /v2/NAME/manifests/TAG      what AddManifest was given
//	GET /v2/NAME/blobs/DIGEST       ranges of what Add was given; with
//	                                Options.Redirect, 307 to a second address
//	GET /token                      a bearer token for the right user
//
// (OCI distribution-spec, "Pull"; distribution, "Token Authentication".)
package registrytest

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Options of New. The zero value is an open, fast and honest registry.
type Options struct {
	Link       Link // what all of the registry's connections share
	TLS        bool // HTTPS with the certificate of Registry.CA
	HTTP2      bool // with TLS: HTTP/2, not HTTP/1.1
	ClientCert bool // with TLS: only for who has the certificate of Registry.Client
	Redirect   bool // blobs come from a second address, by signed URLs
	Auth       Auth // not zero: credentials are wanted

	// RedirectTTL is how long a signed URL is good, which it says; 0: for ever.
	RedirectTTL time.Duration

	// Fault is asked for each request, from several goroutines. Nil: no faults.
	Fault func(Request) Fault
}

// Auth is who may have a token. The zero value lets everyone in without one.
type Auth struct {
	User, Password string
	Identity       string        // a refresh token that does as well; "": none
	Basic          bool          // want user and password themselves, not a token
	TTL            time.Duration // of a token; 0: it does not expire
	Silent         bool          // do not tell the client when it expires
}

// A Request is one that the registry got.
type Request struct {
	Seq    int    // from 0
	Kind   string // "manifest", "blob", "token", "object" (a blob at the second address) or "ping"
	Name   string // of the repository
	Object string // tag or digest
	Off    int64  // the range asked for
	N      int64  // 0: no range
	Header http.Header
	Query  url.Values
	Proto  string // "HTTP/1.1" or "HTTP/2.0"
}

// A Fault is what to do wrong. The zero value is nothing.
type Fault struct {
	Kind       Kind
	At         int64         // Cut, Short, Stall, Partial, Trickle: after so many bytes of the body; Corrupt: at this one
	Status     int           // Status
	RetryAfter string        // Status: header, if not empty
	Delay      time.Duration // before the answer, with any Kind
}

// A Kind is a way to do wrong.
type Kind int

// The kinds of faults.
const (
	None       Kind = iota
	Status          // answer with a status
	Hangup          // close the connection without an answer
	Cut             // close the connection inside the body
	Short           // a body that ends early, with a Content-Length that agrees
	Stall           // stop sending inside the body, until the client goes away
	Silence         // do not answer, until the client goes away
	Corrupt         // flip a bit of the body
	Whole           // 200 and the whole blob for a range
	WrongRange      // a Content-Range of other bytes than those asked for
	NoRange         // 206 without Content-Range
	Partial         // 206 with fewer bytes than asked for, and saying so
	Trickle         // after At bytes, one every 20 ms
)

// String names the kind, for tests.
func (k Kind) String() string {
	return [...]string{"none", "status", "hangup", "cut", "short", "stall", "silence", "corrupt", "whole", "wrong range", "no range", "partial", "trickle"}[k]
}

// Counts are what the registry has done so far.
type Counts struct {
	Requests    int64 // of all kinds
	Blobs       int64 // requests for blobs that were answered, not redirected
	Tokens      int64 // given
	Connections int64
	Bytes       int64 // of bodies
}

// A Registry serves until Close.
type Registry struct {
	opts    Options
	server  *httptest.Server
	objects *httptest.Server // the second address, or nil
	link    *bottleneck
	quit    chan struct{}

	seq, requests, blobs, tokens, conns, bytes atomic.Int64

	mu        sync.Mutex
	fault     func(Request) Fault
	content   map[digest.Digest]content
	manifests map[string]manifest // by NAME:TAG, NAME@DIGEST
	issued    map[string]time.Time
	signature string
	secrets   []string // all of both that there ever were
	client    *clientCert
}

type content struct {
	r    io.ReaderAt
	size int64
}

type manifest struct {
	mediaType string
	raw       []byte
}

// New starts a registry on a free port of the loopback address.
func New(o Options) (*Registry, error) {
	r := &Registry{
		opts: o, link: newBottleneck(o.Link), quit: make(chan struct{}), fault: o.Fault,
		content: map[digest.Digest]content{}, manifests: map[string]manifest{},
		issued: map[string]time.Time{},
	}
	r.sign()
	var err error
	if o.ClientCert {
		if r.client, err = newClientCert(); err != nil {
			return nil, fmt.Errorf("registrytest: %w", err)
		}
	}
	if r.server, err = r.listen(r.serve); err != nil {
		return nil, err
	}
	if o.Redirect {
		if r.objects, err = r.listen(r.serveObject); err != nil {
			r.server.Close()
			return nil, err
		}
	}
	return r, nil
}

func (r *Registry) listen(h http.HandlerFunc) (*httptest.Server, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("registrytest: %w", err)
	}
	s := &httptest.Server{
		Listener: &listener{l, r},
		Config:   &http.Server{Handler: h, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: time.Minute},
	}
	if r.opts.TLS {
		s.TLS = &tls.Config{NextProtos: []string{"http/1.1"}}
		if r.opts.HTTP2 {
			s.EnableHTTP2, s.TLS.NextProtos = true, []string{"h2"}
		}
		if r.client != nil {
			s.TLS.ClientAuth, s.TLS.ClientCAs = tls.RequireAndVerifyClientCert, r.client.pool
		}
		s.StartTLS()
	} else {
		s.Start()
	}
	return s, nil
}

// Host returns the registry's address, host:port, as it stands in references.
func (r *Registry) Host() string { return r.server.Listener.Addr().String() }

// CA returns the certificate that HTTPS is served with, in PEM, or nil.
func (r *Registry) CA() []byte {
	if !r.opts.TLS {
		return nil
	}
	return pemOf(r.server.Certificate().Raw)
}

// Close stops the registry, and cuts every connection it has.
func (r *Registry) Close() {
	close(r.quit)
	for _, s := range []*httptest.Server{r.server, r.objects} {
		if s != nil {
			s.CloseClientConnections()
			s.Close()
		}
	}
}

// SetFault replaces Options.Fault.
func (r *Registry) SetFault(f func(Request) Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = f
}

// SetLink replaces Options.Link, for requests and bytes from now on.
func (r *Registry) SetLink(l Link) { r.link.set(l) }

// Add serves size bytes of b, from off 0, as the blob with the digest d, which
// is not checked.
func (r *Registry) Add(d digest.Digest, b io.ReaderAt, size int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.content[d] = content{b, size}
}

// AddBytes serves b as a blob, and returns its descriptor.
func (r *Registry) AddBytes(mediaType string, b []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	r.Add(d.Digest, bytes.NewReader(b), d.Size)
	return d
}

// AddManifest serves a manifest or index by its digest and, if tag is not
// empty, by that.
func (r *Registry) AddManifest(name, tag, mediaType string, raw []byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := manifest{mediaType, raw}
	r.manifests[name+"@"+digest.FromBytes(raw).String()] = m
	if tag != "" {
		r.manifests[name+":"+tag] = m
	}
}

// Counts returns what the registry has done so far.
func (r *Registry) Counts() Counts {
	return Counts{r.requests.Load(), r.blobs.Load(), r.tokens.Load(), r.conns.Load(), r.bytes.Load()}
}

// Revoke makes every token and every redirect that was given out invalid.
func (r *Registry) Revoke() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.issued)
	r.sign()
}

// sign makes a new signature of URLs. r.mu is held, or r is new.
func (r *Registry) sign() {
	r.signature = rand.Text()
	r.secrets = append(r.secrets, r.signature)
}

// Secrets returns all tokens and signatures that were ever given out.
func (r *Registry) Secrets() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.secrets)
}

// handle counts a request, and does the faults that need no body. It returns
// false if there is nothing more to do.
func (r *Registry) handle(w http.ResponseWriter, req *http.Request, q Request) (Fault, bool) {
	q.Seq = int(r.seq.Add(1) - 1)
	q.Header, q.Query, q.Proto = req.Header, req.URL.Query(), req.Proto
	r.requests.Add(1)
	r.mu.Lock()
	fault := r.fault
	r.mu.Unlock()
	var f Fault
	if fault != nil {
		f = fault(q)
	}
	if f.Delay > 0 && !r.wait(req, f.Delay) {
		return f, false
	}
	switch f.Kind {
	case Status:
		if f.RetryAfter != "" {
			w.Header().Set("Retry-After", f.RetryAfter)
		}
		http.Error(w, "as you wish", f.Status)
		return f, false
	case Hangup:
		panic(http.ErrAbortHandler)
	case Silence:
		r.wait(req, time.Hour)
		panic(http.ErrAbortHandler)
	}
	return f, true
}

// wait waits for d, the client's leaving or Close.
func (r *Registry) wait(req *http.Request, d time.Duration) bool {
	select {
	case <-req.Context().Done():
	case <-r.quit:
	case <-time.After(d):
		return true
	}
	return false
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	path := req.URL.Path
	if path == "/token" {
		r.serveToken(w, req)
		return
	}
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok || req.Method != http.MethodGet && req.Method != http.MethodHead {
		http.NotFound(w, req)
		return
	}
	q := Request{Kind: "ping"}
	for _, kind := range []string{"manifest", "blob"} {
		if name, object, ok := strings.Cut(rest, "/"+kind+"s/"); ok {
			q.Kind, q.Name, q.Object = kind, name, object
		}
	}
	q.Off, q.N = parseRange(req.Header.Get("Range"))
	f, ok := r.handle(w, req, q)
	if !ok {
		return
	}
	if !r.authorized(req) {
		scheme := "http"
		if r.opts.TLS {
			scheme = "https"
		}
		challenge := fmt.Sprintf(`Bearer realm="%s://%s/token",service="registrytest"`, scheme, r.Host())
		if q.Name != "" {
			challenge += fmt.Sprintf(`,scope="repository:%s:pull"`, q.Name)
		}
		if req.Header.Get("Authorization") != "" {
			challenge += `,error="invalid_token"`
		}
		if r.opts.Auth.Basic {
			challenge = `Basic realm="registrytest"`
		}
		w.Header().Set("WWW-Authenticate", challenge)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
		return
	}
	switch q.Kind {
	case "ping":
		w.WriteHeader(http.StatusOK)
	case "manifest":
		r.serveManifest(w, req, q, f)
	case "blob":
		r.serveBlob(w, req, q, f)
	}
}

func (r *Registry) serveManifest(w http.ResponseWriter, req *http.Request, q Request, f Fault) {
	sep := ":"
	if strings.Contains(q.Object, ":") {
		sep = "@"
	}
	r.mu.Lock()
	m, ok := r.manifests[q.Name+sep+q.Object]
	r.mu.Unlock()
	if !ok {
		http.Error(w, `{"errors":[{"code":"MANIFEST_UNKNOWN"}]}`, http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", m.mediaType)
	w.Header().Set("Docker-Content-Digest", digest.FromBytes(m.raw).String())
	if req.Method == http.MethodHead { // as containerd resolves a tag
		w.Header().Set("Content-Length", strconv.Itoa(len(m.raw)))
		return
	}
	r.send(w, req, f, http.StatusOK, content{bytes.NewReader(m.raw), int64(len(m.raw))}, 0, int64(len(m.raw)))
}

func (r *Registry) serveBlob(w http.ResponseWriter, req *http.Request, q Request, f Fault) {
	r.mu.Lock()
	c, ok := r.content[digest.Digest(q.Object)]
	signature := r.signature
	r.mu.Unlock()
	if !ok {
		http.Error(w, `{"errors":[{"code":"BLOB_UNKNOWN"}]}`, http.StatusNotFound)
		return
	}
	if r.objects != nil {
		to := r.objects.URL + "/" + q.Object + "?signature=" + signature
		if ttl := r.opts.RedirectTTL; ttl > 0 {
			to += fmt.Sprintf("&Expires=%d", time.Now().Add(ttl).Unix())
		}
		http.Redirect(w, req, to, http.StatusTemporaryRedirect)
		return
	}
	r.sendRange(w, req, q, f, c)
}

// serveObject is the second address: as object stores do, it wants a
// signature and nothing else.
func (r *Registry) serveObject(w http.ResponseWriter, req *http.Request) {
	q := Request{Kind: "object", Object: strings.TrimPrefix(req.URL.Path, "/")}
	q.Off, q.N = parseRange(req.Header.Get("Range"))
	f, ok := r.handle(w, req, q)
	if !ok {
		return
	}
	r.mu.Lock()
	c, ok := r.content[digest.Digest(q.Object)]
	signature := r.signature
	r.mu.Unlock()
	switch {
	case req.Header.Get("Authorization") != "":
		http.Error(w, "only one authentication mechanism is allowed", http.StatusBadRequest)
	case req.URL.Query().Get("signature") != signature, expired(req.URL.Query().Get("Expires")):
		http.Error(w, "the signature has expired", http.StatusForbidden)
	case !ok:
		http.NotFound(w, req)
	default:
		r.sendRange(w, req, q, f, c)
	}
}

// expired reads a time in seconds since 1970; an empty one is never over.
func expired(at string) bool {
	n, err := strconv.ParseInt(at, 10, 64)
	return err == nil && time.Now().Unix() >= n
}

// parseRange reads "bytes=FIRST-LAST"; other forms count as no range.
func parseRange(s string) (off, n int64) {
	lo, hi, ok := strings.Cut(strings.TrimPrefix(s, "bytes="), "-")
	first, err1 := strconv.ParseInt(lo, 10, 64)
	last, err2 := strconv.ParseInt(hi, 10, 64)
	if !ok || err1 != nil || err2 != nil || last < first {
		return 0, 0
	}
	return first, last - first + 1
}

func (r *Registry) sendRange(w http.ResponseWriter, req *http.Request, q Request, f Fault, c content) {
	r.blobs.Add(1)
	off, n := q.Off, q.N
	if n == 0 || f.Kind == Whole {
		r.send(w, req, f, http.StatusOK, c, 0, c.size)
		return
	}
	if off >= c.size {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", c.size))
		http.Error(w, "", http.StatusRequestedRangeNotSatisfiable)
		return
	}
	n = min(n, c.size-off)
	if f.Kind == Partial {
		n = min(n, max(1, f.At))
	}
	first := off
	if f.Kind == WrongRange {
		first++
	}
	if f.Kind != NoRange {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", first, first+n-1, c.size))
	}
	r.send(w, req, f, http.StatusPartialContent, c, off, n)
}

// send sends a body, with the faults that bodies can have.
func (r *Registry) send(w http.ResponseWriter, req *http.Request, f Fault, status int, c content, off, n int64) {
	var body io.Reader = io.NewSectionReader(c.r, off, n)
	length := n
	switch f.Kind {
	case Trickle:
		body = &trickler{body, f.At, r, req}
	case Cut, Stall:
		body = io.LimitReader(body, min(f.At, n-1))
	case Short:
		length = min(f.At, n-1)
		body = io.LimitReader(body, length)
	case Corrupt:
		body = &flipper{body, min(f.At, n-1)}
	}
	w.Header().Set("Content-Length", strconv.FormatInt(length, 10))
	w.WriteHeader(status)
	to := io.Writer(struct{ io.Writer }{w})
	if f.Kind == Trickle {
		to = flusher{w}
	}
	m, _ := io.CopyBuffer(to, body, make([]byte, 32<<10))
	r.bytes.Add(m)
	switch f.Kind {
	case Stall:
		http.NewResponseController(w).Flush()
		r.wait(req, time.Hour)
		panic(http.ErrAbortHandler)
	case Cut:
		http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	}
}

// A flipper flips a bit of the byte at.
type flipper struct {
	r  io.Reader
	at int64
}

func (f *flipper) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if f.at >= 0 && f.at < int64(n) {
		p[f.at] ^= 0x10
	}
	f.at -= int64(n)
	return n, err
}

// A trickler gives a byte at a time, after the first ones.
type trickler struct {
	r    io.Reader
	left int64
	reg  *Registry
	req  *http.Request
}

func (t *trickler) Read(p []byte) (int, error) {
	if t.left > 0 {
		p = p[:min(int64(len(p)), t.left)]
	} else {
		if p = p[:1]; !t.reg.wait(t.req, 20*time.Millisecond) {
			return 0, io.ErrUnexpectedEOF
		}
	}
	n, err := t.r.Read(p)
	t.left -= int64(n)
	return n, err
}

// A flusher sends what it is given at once.
type flusher struct{ w http.ResponseWriter }

func (f flusher) Write(p []byte) (int, error) {
	n, err := f.w.Write(p)
	if err == nil {
		err = http.NewResponseController(f.w).Flush()
	}
	return n, err
}

func (r *Registry) authorized(req *http.Request) bool {
	a := r.opts.Auth
	if a == (Auth{}) {
		return true
	}
	if a.Basic {
		user, password, _ := req.BasicAuth()
		return user == a.User && password == a.Password
	}
	token, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	if !ok {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	expires, ok := r.issued[token]
	return ok && (expires.IsZero() || time.Now().Before(expires))
}

// serveToken answers the token requests of both kinds: GET with basic
// authentication, POST with an OAuth2 password grant.
func (r *Registry) serveToken(w http.ResponseWriter, req *http.Request) {
	f, ok := r.handle(w, req, Request{Kind: "token"})
	if !ok {
		return
	}
	user, password, _ := req.BasicAuth()
	if req.Method == http.MethodPost {
		user, password = req.PostFormValue("username"), req.PostFormValue("password")
	}
	a := r.opts.Auth
	identity := req.PostFormValue("refresh_token")
	if (user != a.User || password != a.Password) && (a.Identity == "" || identity != a.Identity) {
		http.Error(w, "wrong user or password", http.StatusUnauthorized)
		return
	}
	token := rand.Text()
	var expires time.Time
	answer := map[string]any{"token": token, "access_token": token}
	if a.TTL > 0 {
		expires = time.Now().Add(a.TTL)
		if !a.Silent {
			answer["expires_in"] = int(a.TTL.Seconds())
		}
	}
	r.mu.Lock()
	r.issued[token] = expires
	r.secrets = append(r.secrets, token)
	r.mu.Unlock()
	r.tokens.Add(1)
	raw, err := json.Marshal(answer)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	r.send(w, req, f, http.StatusOK, content{bytes.NewReader(raw), int64(len(raw))}, 0, int64(len(raw)))
}
