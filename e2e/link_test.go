package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A link is the only way from a cfs-fuse under test to a registry: an HTTP
// proxy that counts what it passes, behind a line of limited speed and with a
// delay, which can be made to stand still or be cut.
type link struct {
	addr   string
	server *http.Server
	line   *line

	mu   sync.Mutex
	seen []*passed
}

// passed is one request and what was answered.
type passed struct {
	method, path string
	from, to     int64 // bytes of the blob that left the registry: [from, to)
	start        time.Time
}

func (p *passed) String() string {
	return fmt.Sprintf("%s %s [%d, %d)", p.method, p.path, p.from, p.to)
}

// A speed is what a link lets through.
type speed struct {
	mbit  float64       // per second, of all connections together; 0 is unlimited
	delay time.Duration // round trip
}

// wan is the link of the figures; lan does not hold anything up.
var (
	wan = speed{mbit: 200, delay: 20 * time.Millisecond}
	lan = speed{}
)

// newLink starts a link to the registry at target, until the test ends.
func newLink(t testing.TB, target string, s speed) *link {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	k := &link{addr: l.Addr().String(), line: newLine(s)}
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: target})
	proxy.FlushInterval = -1
	proxy.Transport = &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true}
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) }
	k.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p := &passed{method: r.Method, path: r.URL.Path, start: time.Now()}
		k.mu.Lock()
		k.seen = append(k.seen, p)
		k.mu.Unlock()
		defer func() {
			if err := recover(); err != nil && err != http.ErrAbortHandler {
				panic(err)
			}
		}()
		proxy.ServeHTTP(&countingWriter{ResponseWriter: w, link: k, p: p}, r)
	})}
	go k.server.Serve(&lineListener{l, k.line})
	t.Cleanup(k.cut)
	return k
}

// cut closes the link: whoever connects is refused.
func (k *link) cut() {
	k.server.Close()
	k.line.resume() // who is held up sees the closed connection
}

// stall holds up every byte to the client until resume.
func (k *link) stall()  { k.line.stall() }
func (k *link) resume() { k.line.resume() }

// bytes are those that went over the line to the client, headers included.
func (k *link) bytes() int64 {
	k.line.mu.Lock()
	defer k.line.mu.Unlock()
	return k.line.sent
}

// requests returns what has been asked so far.
func (k *link) requests() []*passed {
	k.mu.Lock()
	defer k.mu.Unlock()
	all := make([]*passed, len(k.seen))
	for i, p := range k.seen {
		c := *p
		all[i] = &c
	}
	return all
}

// twice counts the bytes of blobs that were passed more than once.
func twice(requests []*passed) (n int64) {
	blobs := map[string][]*passed{}
	for _, p := range requests {
		if p.to > p.from && strings.Contains(p.path, "/blobs/") {
			blobs[p.path] = append(blobs[p.path], p)
		}
	}
	for _, spans := range blobs {
		slices.SortFunc(spans, func(a, b *passed) int { return int(a.from - b.from) })
		end := int64(0)
		for _, s := range spans {
			n += max(0, min(s.to, end)-s.from)
			end = max(end, s.to)
		}
	}
	return n
}

// countingWriter notes which bytes of a blob an answer carries.
type countingWriter struct {
	http.ResponseWriter
	link *link
	p    *passed
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *countingWriter) WriteHeader(code int) {
	if code == http.StatusPartialContent {
		// Content-Range: bytes FROM-TO/SIZE
		_, spec, _ := strings.Cut(w.Header().Get("Content-Range"), " ")
		first, _, _ := strings.Cut(spec, "-")
		from, err := strconv.ParseInt(first, 10, 64)
		if err == nil {
			w.link.mu.Lock()
			w.p.from, w.p.to = from, from
			w.link.mu.Unlock()
		}
	}
	w.ResponseWriter.WriteHeader(code)
}

func (w *countingWriter) Write(p []byte) (int, error) {
	n, err := w.ResponseWriter.Write(p)
	w.link.mu.Lock()
	w.p.to += int64(n)
	w.link.mu.Unlock()
	return n, err
}

// A line carries the bytes of all connections of a link, one after the other.
type line struct {
	speed
	mu   sync.Mutex
	free time.Time     // when the last byte given to it will have left
	open chan struct{} // closed while bytes may pass
	sent int64
}

func newLine(s speed) *line {
	open := make(chan struct{})
	close(open)
	return &line{speed: s, open: open}
}

func (l *line) stall() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.open:
		l.open = make(chan struct{})
	default:
	}
}

func (l *line) resume() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.open:
	default:
		close(l.open)
	}
}

func (l *line) gate() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// reserve takes the line for n bytes and returns when the last has left it.
func (l *line) reserve(n int) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	// A line that stood idle has no credit, but for as long as a writer may
	// have overslept.
	if idle := time.Now().Add(-5 * time.Millisecond); l.free.Before(idle) {
		l.free = idle
	}
	if l.mbit > 0 {
		l.free = l.free.Add(time.Duration(float64(n) * 8 / l.mbit * float64(time.Microsecond)))
	}
	return l.free
}

type lineListener struct {
	net.Listener
	line *line
}

func (l *lineListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	lc := &lineConn{Conn: c, line: l.line, ready: time.Now().Add(l.line.delay), queue: make(chan parcel, 64), done: make(chan struct{})}
	go lc.deliver()
	return lc, nil
}

// A parcel is on its way to the client.
type parcel struct {
	data []byte
	at   time.Time
}

// lineConn is the registry's end of one connection. Writes wait until the
// line has taken their bytes; deliver hands these over after the delay.
type lineConn struct {
	net.Conn
	line  *line
	ready time.Time // the handshake is over
	queue chan parcel
	done  chan struct{}
	once  sync.Once
}

func (c *lineConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	time.Sleep(time.Until(c.ready))
	return n, err
}

func (c *lineConn) Write(p []byte) (int, error) {
	const piece = 16 << 10
	for n := 0; n < len(p); {
		part := p[n:min(len(p), n+piece)]
		left := c.line.reserve(len(part))
		time.Sleep(time.Until(left))
		select {
		case c.queue <- parcel{slices.Clone(part), left.Add(c.line.delay)}:
			n += len(part)
		case <-c.done:
			return n, net.ErrClosed
		}
	}
	return len(p), nil
}

func (c *lineConn) deliver() {
	for {
		select {
		case q := <-c.queue:
			time.Sleep(time.Until(q.at))
			select {
			case <-c.line.gate():
			case <-c.done:
				return
			}
			n, err := c.Conn.Write(q.data)
			c.line.mu.Lock()
			c.line.sent += int64(n)
			c.line.mu.Unlock()
			if err != nil {
				c.Close()
				return
			}
		case <-c.done:
			return
		}
	}
}

// Close lets what is under way arrive first, for a moment, if nothing is held up.
func (c *lineConn) Close() error {
	c.once.Do(func() {
		for range 100 {
			if len(c.queue) == 0 {
				break
			}
			time.Sleep(time.Millisecond)
		}
		close(c.done)
	})
	return c.Conn.Close()
}

func TestLink(t *testing.T) {
	blob := strings.Repeat("0123456789abcdef", 1<<16) // 1 MiB
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	origin := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, strings.NewReader(blob))
	})}
	go origin.Serve(l)
	defer origin.Close()
	k := newLink(t, l.Addr().String(), speed{mbit: 80, delay: 30 * time.Millisecond})
	get := func(span string) (string, time.Duration, error) {
		start := time.Now()
		req, err := http.NewRequest("GET", "http://"+k.addr+"/v2/x/blobs/b", nil)
		if err != nil {
			return "", 0, err
		}
		req.Header.Set("Range", "bytes="+span)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return "", 0, err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		return string(text), time.Since(start), err
	}
	text, took, err := get("16-1048575")
	if err != nil || text != blob[16:] {
		t.Fatalf("got %d bytes, %v", len(text), err)
	}
	// 1 MiB at 80 Mbit/s takes 105 ms, after a handshake and a round trip.
	if want := 165 * time.Millisecond; took < want-20*time.Millisecond || took > 4*want {
		t.Errorf("1 MiB took %v, want about %v", took, want)
	}
	if _, _, err = get("0-31"); err != nil {
		t.Fatal(err)
	}
	if n := twice(k.requests()); n != 16 {
		t.Errorf("%d bytes passed twice, want 16: %v", n, k.requests())
	}
	if n := k.bytes(); n < 1<<20 || n > 1<<20+4096 {
		t.Errorf("counted %d bytes", n)
	}
	k.stall()
	done := make(chan error, 1)
	go func() { _, _, err := get("0-31"); done <- err }()
	select {
	case err := <-done:
		t.Errorf("an answer passed a stalled link: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	k.resume()
	if err := <-done; err != nil {
		t.Error(err)
	}
	k.cut()
	if _, _, err := get("0-31"); err == nil {
		t.Error("an answer passed a cut link")
	}
}
