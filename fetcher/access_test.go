package fetcher

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// TestHTTP2 reads by many ranges at once over HTTP/2, which is one connection.
func TestHTTP2(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	var others atomic.Int64
	r := registryOf(t, registrytest.Options{TLS: true, HTTP2: true, Redirect: true, Fault: func(q registrytest.Request) registrytest.Fault {
		if q.Proto != "HTTP/2.0" {
			others.Add(1)
		}
		return registrytest.Fault{}
	}})
	o := quick()
	o.PlainHTTP, o.StallTimeout = false, 10*time.Second
	sink := newSink(m.x)
	f := m.fetch(t, open(t, m.serve(r, "a"), o), sink, FetchOptions{})
	if err := f.Fill(ctx); err != nil {
		t.Fatal(err)
	}
	sink.check(t)
	if n := r.Counts(); others.Load() > 0 || n.Connections > 4 {
		t.Errorf("%d requests were not of HTTP/2; %+v", others.Load(), n)
	}
}

// TestClientCertificate has a registry that wants one (hosts.toml: client).
func TestClientCertificate(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	r := registryOf(t, registrytest.Options{TLS: true, ClientCert: true})
	m.serve(r, "a")
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certPEM, keyPEM := r.Client()
	ca, cert, key := write("ca.crt", r.CA()), write("client.cert", certPEM), write("client.key", keyPEM)
	both := write("both.pem", append(certPEM, keyPEM...))
	for client, want := range map[string]bool{
		fmt.Sprintf("client = [[%q, %q]]", cert, key): true,
		fmt.Sprintf("client = %q", both):              true,
		"":                                            false,
	} {
		o := quick()
		o.PlainHTTP = false
		o.HostsDir = hosts(t, map[string]string{"registry.invalid": fmt.Sprintf("[host.\"https://%s\"]\nca = %q\n%s\n", r.Host(), ca, client)})
		if _, err := open(t, "registry.invalid/a:1", o).Resolve(ctx); (err == nil) != want {
			t.Errorf("%s: %v", client, err)
		}
	}
}

// TestCredentials finds user and password, or an identity token, where docker
// keeps them: in config.json and by a helper.
func TestCredentials(t *testing.T) {
	m := build(t, small()...)
	bin := t.TempDir()
	t.Setenv("PATH", bin+":"+os.Getenv("PATH"))
	helper := "#!/bin/sh\nread host\ncase $1$host in get*) printf '{\"ServerURL\":\"%s\",\"Username\":\"%s\",\"Secret\":\"%s\"}' \"$host\" \"$HELPER_USER\" \"$HELPER_SECRET\";; *) exit 1;; esac\n"
	if err := os.WriteFile(filepath.Join(bin, "docker-credential-test"), []byte(helper), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, auth := range map[string]registrytest.Auth{
		"bearer": {User: "u", Password: "p"}, "basic": {User: "u", Password: "p", Basic: true}, "identity": {User: "u", Password: "p", Identity: "refresh me"},
	} {
		for _, kept := range []string{"file", "helper", "helper of a host"} {
			t.Run(name+"/"+kept, func(t *testing.T) {
				leakFree(t)
				r := registryOf(t, registrytest.Options{Auth: auth})
				source := m.serve(r, "a")
				user, secret := auth.User, auth.Password
				entry := map[string]string{"username": user, "password": secret}
				if auth.Identity != "" {
					user, secret = "<token>", auth.Identity
					entry = map[string]string{"identitytoken": auth.Identity}
				}
				config := map[string]any{"auths": map[string]any{r.Host(): entry}}
				switch kept {
				case "helper":
					config = map[string]any{"credsStore": "test"}
				case "helper of a host":
					config = map[string]any{"credHelpers": map[string]string{r.Host(): "test"}}
				}
				if auth.Identity == "" && kept == "file" {
					login(t, r.Host(), user, secret)
				} else {
					raw, err := json.Marshal(config)
					if err != nil {
						t.Fatal(err)
					}
					t.Setenv("HELPER_USER", user)
					t.Setenv("HELPER_SECRET", secret)
					t.Setenv("DOCKER_CONFIG", t.TempDir())
					if err := os.WriteFile(filepath.Join(os.Getenv("DOCKER_CONFIG"), "config.json"), raw, 0o600); err != nil {
						t.Fatal(err)
					}
				}
				o := quick()
				o.StallTimeout = 5 * time.Second
				s := open(t, source, o)
				if _, err := s.Resolve(ctx); err != nil {
					t.Fatal(err)
				}
				if got, err := readAll(s.Blob(m.oci.Layers[0]), 7, 100); err != nil || !bytes.Equal(got, small()[0].Data[7:107]) {
					t.Fatal(err)
				}
			})
		}
	}
}

// TestRenewAhead keeps asking while tokens run out: no request is refused and
// no reader waits for a token.
func TestRenewAhead(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	r := registryOf(t, registrytest.Options{Auth: registrytest.Auth{User: "u", Password: "p", TTL: 2 * time.Second}})
	login(t, r.Host(), "u", "p")
	s := open(t, m.serve(r, "a"), quick())
	if _, err := s.Resolve(ctx); err != nil {
		t.Fatal(err)
	}
	before, reads := r.Counts(), int64(0)
	for begin := time.Now(); time.Since(begin) < 5*time.Second; time.Sleep(50 * time.Millisecond) {
		if _, err := readAll(s.Blob(m.oci.Layers[0]), 0, 10); err != nil {
			t.Fatal(err)
		}
		reads++
	}
	n := r.Counts()
	tokens := n.Tokens - before.Tokens
	if tokens < 2 || tokens > 6 {
		t.Errorf("%d tokens in five seconds, each good for two", tokens)
	}
	if refused := n.Requests - before.Requests - reads - tokens; refused > 1 { // a busy machine may be late once
		t.Errorf("%d requests were refused", refused)
	}
}

// TestOneToken has many requests refused at once, which costs one token.
func TestOneToken(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	r := registryOf(t, registrytest.Options{Auth: registrytest.Auth{User: "u", Password: "p"}})
	login(t, r.Host(), "u", "p")
	o := quick()
	o.StallTimeout = 5 * time.Second
	s := open(t, m.serve(r, "a"), o)
	if _, err := s.Resolve(ctx); err != nil {
		t.Fatal(err)
	}
	r.Revoke()
	before := r.Counts().Tokens
	var all sync.WaitGroup
	for range 20 {
		all.Go(func() {
			if _, err := readAll(s.Blob(m.oci.Layers[0]), 0, 10); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := r.Counts().Tokens - before; n != 1 {
		t.Errorf("%d tokens", n)
	}
}

func TestExpiry(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for query, want := range map[string]time.Duration{
		"":           0,
		"Expires=no": 0,
		"X-Amz-Date=20260102T030400Z&X-Amz-Expires=1200":                     1195 * time.Second,
		"X-Goog-Date=20260102T030405Z&X-Goog-Expires=60&X-Goog-Signature=ab": time.Minute,
		fmt.Sprint("Expires=", now.Add(time.Hour).Unix()):                    time.Hour,
		"se=2026-01-02T04%3A04%3A05Z&sig=x":                                  time.Hour,
		"X-Amz-Expires=1200":                                                 0,
		fmt.Sprint("Expires=", now.Add(-time.Hour).Unix()):                   0, // our clock is wrong, or theirs
	} {
		got := expiry(&url.URL{Host: "h", RawQuery: query}, now)
		if want == 0 && !got.IsZero() || want != 0 && !got.Equal(now.Add(want-expiryMargin)) {
			t.Errorf("%s: %v, want %v", query, got, want)
		}
	}
}

// TestRedirectExpires follows a redirect again when its URL is no longer good,
// without asking that first.
func TestRedirectExpires(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	var objects atomic.Int64
	r := registryOf(t, registrytest.Options{Redirect: true, RedirectTTL: expiryMargin + 2*time.Second, Fault: func(q registrytest.Request) registrytest.Fault {
		if q.Kind == "object" {
			objects.Add(1)
		}
		return registrytest.Fault{}
	}})
	s := open(t, m.serve(r, "a"), quick())
	b := s.Blob(m.oci.Layers[0])
	for i, want := range []int64{2, 1, 2} { // requests
		before, asked := r.Counts().Requests, objects.Load()
		if _, err := readAll(b, 0, 10); err != nil {
			t.Fatal(err)
		}
		if n := r.Counts().Requests - before; n != want || objects.Load()-asked != 1 {
			t.Errorf("read %d: %d requests, want %d", i, n, want)
		}
		if i == 1 {
			time.Sleep(3 * time.Second)
		}
	}
}

// TestDeadRegistry has many more readers than requests may be under way: each
// hears of it in time, not in turn.
func TestDeadRegistry(t *testing.T) {
	for name, fault := range map[string]registrytest.Fault{
		"silent": {Kind: registrytest.Silence}, "stalls": {Kind: registrytest.Stall, At: 5}, "broken": {Kind: registrytest.Status, Status: 500},
	} {
		t.Run(name, func(t *testing.T) {
			leakFree(t)
			m := build(t, spread(300, 100_000))
			r := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
				if q.Kind == "blob" {
					return fault
				}
				return registrytest.Fault{}
			}})
			f := m.fetch(t, open(t, m.serve(r, "a"), quick()), newSink(m.x), FetchOptions{})
			begin := time.Now()
			var all sync.WaitGroup
			for i := range 300 {
				all.Go(func() {
					if err := f.Need(ctx, i, 0, 1); err == nil {
						t.Error("a read from a dead registry")
					}
				})
			}
			all.Wait()
			if d := time.Since(begin); d < 2*time.Second || d > 2*time.Second+2*slack {
				t.Errorf("300 reads failed after %v, want 2 s", d)
			}
		})
	}
}

// TestReadForEver has reads wait for a registry that comes back late.
func TestReadForEver(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	var down atomic.Bool
	down.Store(true)
	r := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
		if q.Kind == "blob" && down.Load() {
			return registrytest.Fault{Kind: registrytest.Status, Status: 503, RetryAfter: "1"}
		}
		return registrytest.Fault{}
	}})
	o := quick()
	o.ReadTimeout = -1
	sink := newSink(m.x)
	f := m.fetch(t, open(t, m.serve(r, "a"), o), sink, FetchOptions{})
	done := make(chan error, 1)
	go func() { done <- f.Need(ctx, 3, 0, 10) }()
	select {
	case err := <-done:
		t.Fatal("it did not wait:", err)
	case <-time.After(4 * time.Second):
	}
	down.Store(false)
	if err := <-done; err != nil || !sink.has(3, 0) {
		t.Fatal(err)
	}
}

// TestNoSecrets runs an image's whole life, with every fault there is, at the
// most talkative level, and looks for what nobody may read in the log, in the
// errors and in the metrics.
func TestNoSecrets(t *testing.T) {
	m := build(t, small()...)
	var seq atomic.Int64
	kinds := []registrytest.Fault{
		{}, {}, {}, {Kind: registrytest.Status, Status: 401}, {Kind: registrytest.Status, Status: 403}, {Kind: registrytest.Status, Status: 500},
		{Kind: registrytest.Hangup}, {Kind: registrytest.Cut, At: 100}, {Kind: registrytest.Short, At: 50}, {Kind: registrytest.Stall, At: 9},
		{Kind: registrytest.Silence}, {Kind: registrytest.WrongRange}, {Kind: registrytest.Corrupt, At: 30},
	}
	const password, header, identity = "hunter2-password", "header-secret", "identity-secret"
	r := registryOf(t, registrytest.Options{Redirect: true, Auth: registrytest.Auth{User: "user-name", Password: password, TTL: time.Second},
		Fault: func(registrytest.Request) registrytest.Fault { return kinds[int(seq.Add(7))%len(kinds)] }})
	m.serve(r, "a")
	var said syncBuffer
	stderr := captureStderr(t)
	for _, secret := range []string{password, "wrong-" + password, ""} {
		login(t, r.Host(), "user-name", secret)
		o := quick()
		o.StallTimeout, o.ReadTimeout = 100*time.Millisecond, 500*time.Millisecond
		o.HostsDir = hosts(t, map[string]string{"registry.invalid": fmt.Sprintf("[host.\"http://%s\"]\n[host.\"http://%s\".header]\nx-key = %q\n", r.Host(), r.Host(), header)})
		o.Logger = slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug}))
		reg := prometheus.NewRegistry()
		mt := metrics.New(reg)
		o.Metrics = mt
		s := open(t, "registry.invalid/a:1", o)
		for range 3 {
			_, err := s.Resolve(ctx)
			fmt.Fprintln(&said, err, hint.Of(err))
		}
		f := m.fetch(t, s, newSink(m.x), FetchOptions{Metrics: mt, Logger: o.Logger})
		fmt.Fprintln(&said, f.Fill(ctx))
		for i := range 4 {
			err := f.Need(ctx, i, 0, 1)
			fmt.Fprintln(&said, err, hint.Of(err))
		}
		r.Revoke()
		fmt.Fprintln(&said, f.Fill(ctx))
		f.Close()
		families, err := reg.Gather()
		fmt.Fprintln(&said, families, err)
	}
	_, err := OpenSource("docker://user-name:"+password+"@"+r.Host()+"/a:1", quick())
	fmt.Fprintln(&said, err)
	if err == nil {
		t.Error("a source with a password in it was taken")
	}
	text := said.String() + stderr()
	for _, secret := range append(r.Secrets(), password, header, identity, "user-name:", "signature=", "Bearer ", "Basic ", "dXNlci1uYW1l") {
		if strings.Contains(text, secret) {
			i := strings.Index(text, secret)
			t.Errorf("%q was told: …%s…", secret, text[max(0, i-200):min(len(text), i+100)])
		}
	}
	if !strings.Contains(text, "tried again") || len(r.Secrets()) < 4 {
		t.Errorf("little happened: %d secrets, and this was said:\n%s", len(r.Secrets()), text)
	}
}

// captureStderr has what is written to standard error come to us: libraries log
// there.
func captureStderr(t *testing.T) (text func() string) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	kept := os.Stderr
	os.Stderr = w
	all := make(chan string, 1)
	go func() {
		b, _ := io.ReadAll(r)
		all <- string(b)
	}()
	return sync.OnceValue(func() string {
		os.Stderr = kept
		w.Close()
		defer r.Close()
		return <-all
	})
}

// TestWrongManifest has a mirror give another manifest than its digest says:
// the next host is asked.
func TestWrongManifest(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	bad := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
		return registrytest.Fault{Kind: registrytest.Corrupt, At: 20}
	}})
	good := registryOf(t, registrytest.Options{})
	m.serve(bad, "a")
	m.serve(good, "a")
	o := quick()
	o.HostsDir = hosts(t, map[string]string{"registry.invalid": fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", good.Host(), bad.Host())})
	for _, ref := range []string{":1", "@" + m.oci.Desc.Digest.String()} {
		s := open(t, "registry.invalid/a"+ref, o)
		got, err := s.Resolve(ctx)
		if err != nil || !bytes.Equal(got.Raw, m.oci.Raw) {
			t.Fatalf("%s: %v", ref, err)
		}
		if config, err := ReadConfig(ctx, s, got); err != nil || !bytes.Equal(config, m.oci.Config) {
			t.Errorf("config: %v", err)
		}
		// The same for who reads a blob himself.
		b := s.Blob(m.oci.Layers[0])
		if raw, err := readAll(b, 0, 100); err != nil || bytes.Equal(raw, small()[0].Data[:100]) {
			t.Fatal("the mirror should have been asked", err)
		}
		other, ok := Elsewhere(b)
		if raw, err := readAll(other, 0, 100); err != nil || !ok || !bytes.Equal(raw, small()[0].Data[:100]) {
			t.Error(err)
		}
	}
	if _, err := open(t, bad.Host()+"/a:1", quick()).Resolve(ctx); !errors.Is(err, errDigest) {
		t.Error(err)
	}
}
