package registrytest

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func start(t testing.TB, o Options) *Registry {
	t.Helper()
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// get does one request with a Range header, if it is not empty.
func get(t testing.TB, c *http.Client, u, ranged string) (*http.Response, []byte, error) {
	t.Helper()
	req, err := http.NewRequest(http.MethodGet, u, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ranged != "" {
		req.Header.Set("Range", ranged)
	}
	resp, err := c.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, b, err
}

var alphabet = []byte("abcdefghijklmnopqrstuvwxyz")

func TestFaults(t *testing.T) {
	for _, tc := range []struct {
		fault  Fault
		status int
		body   string
		cr     string // Content-Range
		err    bool
	}{
		{Fault{}, 206, "cdef", "bytes 2-5/26", false},
		{Fault{Kind: Status, Status: 503, RetryAfter: "7"}, 503, "as you wish\n", "", false},
		{Fault{Kind: Hangup}, 0, "", "", true},
		{Fault{Kind: Cut, At: 1}, 206, "c", "bytes 2-5/26", true},
		{Fault{Kind: Short, At: 2}, 206, "cd", "bytes 2-5/26", false},
		{Fault{Kind: Stall, At: 1}, 206, "c", "bytes 2-5/26", true},
		{Fault{Kind: Silence}, 0, "", "", true},
		{Fault{Kind: Corrupt, At: 1}, 206, "ctef", "bytes 2-5/26", false},
		{Fault{Kind: Whole}, 200, string(alphabet), "", false},
		{Fault{Kind: WrongRange}, 206, "cdef", "bytes 3-6/26", false},
		{Fault{Kind: NoRange}, 206, "cdef", "", false},
		{Fault{Kind: Partial, At: 2}, 206, "cd", "bytes 2-3/26", false},
	} {
		t.Run(tc.fault.Kind.String(), func(t *testing.T) {
			t.Parallel()
			r := start(t, Options{Fault: func(Request) Fault { return tc.fault }})
			d := r.AddBytes("text/plain", alphabet)
			c := &http.Client{Timeout: 300 * time.Millisecond}
			defer c.CloseIdleConnections()
			resp, b, err := get(t, c, fmt.Sprintf("http://%s/v2/x/blobs/%s", r.Host(), d.Digest), "bytes=2-5")
			if (err != nil) != tc.err || string(b) != tc.body {
				t.Fatalf("got %q, %v", b, err)
			}
			if resp != nil && (resp.StatusCode != tc.status || resp.Header.Get("Content-Range") != tc.cr || resp.Header.Get("Retry-After") != tc.fault.RetryAfter) {
				t.Fatalf("got %d %v", resp.StatusCode, resp.Header)
			}
		})
	}
}

func TestRangeBeyondEnd(t *testing.T) {
	r := start(t, Options{})
	d := r.AddBytes("text/plain", alphabet)
	u := fmt.Sprintf("http://%s/v2/x/blobs/%s", r.Host(), d.Digest)
	for ranged, want := range map[string]int{"": 200, "bytes=0-25": 206, "bytes=20-99": 206, "bytes=26-30": 416} {
		if resp, _, err := get(t, http.DefaultClient, u, ranged); err != nil || resp.StatusCode != want {
			t.Errorf("%q: %v, %v, want %d", ranged, resp, err, want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestManifests(t *testing.T) {
	r := start(t, Options{})
	r.AddManifest("a/b", "1", ocispec.MediaTypeImageManifest, []byte("{}"))
	for _, tc := range []struct {
		path   string
		status int
	}{
		{"a/b/manifests/1", 200},
		{"a/b/manifests/sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", 200},
		{"a/b/manifests/2", 404},
		{"a/c/manifests/1", 404},
		{"a/b/blobs/sha256:0", 404},
	} {
		resp, _, err := get(t, http.DefaultClient, "http://"+r.Host()+"/v2/"+tc.path, "")
		if err != nil || resp.StatusCode != tc.status {
			t.Errorf("%s: %v, %v", tc.path, resp, err)
		}
	}
	http.DefaultClient.CloseIdleConnections()
}

func TestTLSAuthRedirect(t *testing.T) {
	r := start(t, Options{TLS: true, Redirect: true, Auth: Auth{User: "u", Password: "p", TTL: time.Hour}})
	d := r.AddBytes("text/plain", alphabet)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(r.CA())
	c := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
	defer c.CloseIdleConnections()
	u := fmt.Sprintf("https://%s/v2/x/blobs/%s", r.Host(), d.Digest)
	resp, _, err := get(t, c, u, "")
	if err != nil || resp.StatusCode != 401 || !strings.Contains(resp.Header.Get("WWW-Authenticate"), `scope="repository:x:pull"`) {
		t.Fatal(resp, err)
	}
	tokenAt := "https://" + r.Host() + "/token"
	if resp, _, _ := get(t, c, strings.Replace(tokenAt, "//", "//u:wrong@", 1), ""); resp.StatusCode != 401 {
		t.Fatal("a wrong password has a token")
	}
	resp, err = c.PostForm(tokenAt, url.Values{"username": {"u"}, "password": {"p"}})
	if err != nil || resp.StatusCode != 200 {
		t.Fatal(resp, err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	answer := int64(len(b))
	_, token, _ := strings.Cut(string(b), `"token":"`)
	token, _, _ = strings.Cut(token, `"`)
	req, _ := http.NewRequest("GET", u, nil)
	req.Header.Set("Authorization", "Bearer "+token)
	c.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err = c.Do(req)
	if err != nil || resp.StatusCode != 307 {
		t.Fatal(resp, err)
	}
	resp.Body.Close()
	target := resp.Header.Get("Location")
	if resp, b, err := get(t, c, target, "bytes=0-2"); err != nil || resp.StatusCode != 206 || string(b) != "abc" {
		t.Fatal(resp, b, err)
	}
	r.Revoke()
	if resp, _, _ := get(t, c, target, ""); resp.StatusCode != 403 {
		t.Fatal("a revoked redirect works")
	}
	if n := r.Counts(); n.Tokens != 1 || n.Blobs != 1 || n.Bytes != answer+3 || n.Requests != 6 {
		t.Fatalf("%+v", n)
	}
}

// TestLink has eight connections share 200 Mbit/s: the rate is never exceeded,
// is reached within what a busy machine loses, and is shared fairly. A request
// on an idle link takes the latency.
func TestLink(t *testing.T) {
	const rate, size, conns, tries = 25e6, 2 << 20, 8, 10
	r := start(t, Options{Link: Link{Latency: 20 * time.Millisecond, BytesPerSecond: rate}})
	big := r.AddBytes("x", bytes.Repeat(alphabet, size/26+1)[:size])
	small := r.AddBytes("x", alphabet)
	c := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: conns}}
	defer c.CloseIdleConnections()
	path := "http://" + r.Host() + "/v2/x/blobs/"
	// Never early; a busy machine may be late, but not each time.
	ask := func(want time.Duration, prepare func()) {
		t.Helper()
		var took []time.Duration
		for range tries {
			prepare()
			begin := time.Now()
			if _, _, err := get(t, c, path+small.Digest.String(), ""); err != nil {
				t.Fatal(err)
			}
			d := time.Since(begin)
			if d < want {
				t.Fatalf("a request took %v, want %v", d, want)
			}
			if d < want+15*time.Millisecond {
				return
			}
			took = append(took, d)
		}
		t.Errorf("requests took %v, want %v", took, want)
	}
	ask(40*time.Millisecond, c.CloseIdleConnections) // a connection, and a request
	ask(20*time.Millisecond, func() {})

	var got float64
	for range tries {
		ends := make([]time.Duration, conns)
		begin := time.Now()
		var all sync.WaitGroup
		for i := range conns {
			all.Go(func() {
				if _, _, err := get(t, c, path+big.Digest.String(), ""); err != nil {
					t.Error(err)
				}
				ends[i] = time.Since(begin)
			})
		}
		all.Wait()
		first, last := slices.Min(ends), slices.Max(ends)
		got = conns * size / (last - 20*time.Millisecond).Seconds()
		t.Logf("%.2f MB/s of %.0f, connections ended at %v to %v", got/1e6, rate/1e6, first, last)
		if got > 1.05*rate {
			t.Fatalf("%.2f MB/s, want %.0f at most", got/1e6, rate/1e6)
		}
		if got > 0.8*rate && first > last*6/10 { // 0.97 on an idle machine
			return
		}
	}
	t.Errorf("%.2f MB/s, want %.0f, fairly shared", got/1e6, rate/1e6)
}
