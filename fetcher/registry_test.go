package fetcher

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// hosts makes a folder of hosts.toml files, by host:port.
func hosts(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for host, toml := range files {
		d := filepath.Join(dir, strings.Replace(host, ":", "_", 1))
		if strings.Contains(host, ":") {
			d += "_"
		}
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(d, "hosts.toml"), []byte(toml), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// login writes docker's config.json.
func login(t testing.TB, host, user, password string) {
	t.Helper()
	dir := t.TempDir()
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, `{"auths":{%q:{"auth":%q}}}`, host, auth), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
}

func TestResolve(t *testing.T) {
	leakFree(t)
	r := registryOf(t, registrytest.Options{})
	add := func(tag string, o *imagetest.OCI) *imagetest.OCI {
		for d, b := range o.Blobs {
			r.Add(d, bytes.NewReader(b), int64(len(b)))
			r.AddManifest("a", "", o.Desc.MediaType, b)
		}
		r.AddManifest("a", tag, o.Desc.MediaType, o.Raw)
		return o
	}
	layer := small()[0]
	amd := add("amd", imagetest.Must(imagetest.ImageFor(ocispec.Platform{OS: "linux", Architecture: "amd64"}, layer)))
	arm7 := add("arm7", imagetest.Must(imagetest.ImageFor(ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}, layer, small()[1])))
	index := add("index", imagetest.Must(imagetest.Index(amd, arm7)))
	add("nested", imagetest.Must(imagetest.Index(index)))
	r.AddManifest("a", "schema1", "application/vnd.docker.distribution.manifest.v1+json", []byte(`{"schemaVersion":1}`))
	r.AddManifest("a", "garbage", ocispec.MediaTypeImageManifest, []byte(`{`))
	r.AddManifest("a", "lying", ocispec.MediaTypeImageIndex, fmt.Appendf(nil,
		`{"schemaVersion":2,"manifests":[{"digest":%q,"size":1}]}`, zeros))
	r.AddManifest("a", "huge", ocispec.MediaTypeImageManifest, make([]byte, maxManifest+1))
	tampered := imagetest.Must(imagetest.Image(small()...))
	for _, tc := range []struct {
		ref, platform string
		want          *imagetest.OCI
		err, hint     string
	}{
		{":amd", "", amd, "", ""},
		{"@" + amd.Desc.Digest.String(), "linux/arm64", amd, "", ""}, // a digest is a digest
		{":gone@" + amd.Desc.Digest.String(), "", amd, "", ""},
		{":index", "linux/amd64", amd, "", ""},
		{":index", "linux/arm/v7", arm7, "", ""},
		{":index", "linux/arm64", arm7, "", ""}, // a newer processor runs it
		{":nested", "linux/amd64", amd, "", ""},
		{":index", "linux/s390x", nil, "no image for linux/s390x", "linux/amd64, linux/arm/v7"},
		{":none", "", nil, "404", "check the name"},
		{"@" + tampered.Desc.Digest.String(), "", nil, "404", "check the name"},
		{":schema1", "", nil, "schema 1", ""},
		{":garbage", "", nil, "unexpected end of JSON", ""},
		{":lying", "", nil, "404", ""},
		{":huge", "", nil, "more than", ""},
	} {
		t.Run(strings.ReplaceAll(tc.ref+" "+tc.platform, "/", "-"), func(t *testing.T) {
			o := quick()
			o.Platform = tc.platform
			s := open(t, r.Host()+"/a"+tc.ref, o)
			m, err := s.Resolve(ctx)
			if tc.want == nil {
				if err == nil || !strings.Contains(err.Error(), tc.err) || !strings.Contains(hint.Of(err), tc.hint) {
					t.Fatalf("%v (%s)", err, hint.Of(err))
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if m.Digest.String() != tc.want.Desc.Digest.String() || len(m.Layers) != len(tc.want.Layers) || m.LocalLayer {
				t.Fatalf("%+v", m)
			}
			config, err := ReadConfig(ctx, s, m)
			if err != nil || !bytes.Equal(config, tc.want.Config) {
				t.Fatal(config, err)
			}
		})
	}
	// One request for the manifest, no more, and two through an index.
	before := r.Counts().Requests
	if _, err := open(t, r.Host()+"/a:amd", quick()).Resolve(ctx); err != nil || r.Counts().Requests != before+1 {
		t.Fatal(err, r.Counts().Requests-before)
	}
	// A registry that gives other bytes for a digest is not believed.
	r.SetFault(func(q registrytest.Request) registrytest.Fault {
		return registrytest.Fault{Kind: registrytest.Corrupt, At: 20}
	})
	if _, err := open(t, r.Host()+"/a@"+amd.Desc.Digest.String(), quick()).Resolve(ctx); err == nil || !strings.Contains(err.Error(), "digest is") {
		t.Fatal(err)
	}
}

// TestAuth keeps a blob readable while its tokens come and go.
func TestAuth(t *testing.T) {
	for _, redirect := range []bool{false, true} {
		t.Run(fmt.Sprint("redirect=", redirect), func(t *testing.T) {
			leakFree(t)
			m := build(t, small()...)
			r := registryOf(t, registrytest.Options{Redirect: redirect, Auth: registrytest.Auth{User: "u", Password: "hunter2"}})
			source := m.serve(r, "a")
			s := open(t, source, quick())
			if _, err := s.Resolve(ctx); err == nil || !strings.Contains(hint.Of(err), "docker login "+r.Host()) {
				t.Fatal(err, hint.Of(err))
			}
			login(t, r.Host(), "u", "wrong")
			if _, err := open(t, source, quick()).Resolve(ctx); err == nil || !strings.Contains(hint.Of(err), "docker login") || strings.Contains(err.Error(), "wrong") {
				t.Fatal(err)
			}
			login(t, r.Host(), "u", "hunter2")
			s = open(t, source, quick())
			manifest, err := s.Resolve(ctx)
			if err != nil {
				t.Fatal(err)
			}
			b := s.Blob(manifest.Layers[0])
			read := func() {
				t.Helper()
				got, err := readAll(b, 10, 1000)
				if err != nil || !bytes.Equal(got, small()[0].Data[10:1010]) {
					t.Fatal(err)
				}
			}
			read()
			if n := r.Counts().Tokens; n != 1 {
				t.Errorf("%d tokens", n)
			}
			before := r.Counts().Requests
			read()
			if n := r.Counts().Requests - before; n != 1 {
				t.Errorf("the second range took %d requests", n)
			}
			r.Revoke() // tokens and signatures, while mounted
			read()
			if n := r.Counts().Tokens; n != 2 {
				t.Errorf("%d tokens", n)
			}
		})
	}
}

// TestTokenServerRecovers has the token server fail once: that must not be
// remembered.
func TestTokenServerRecovers(t *testing.T) {
	var down atomic.Bool
	r := registryOf(t, registrytest.Options{
		Auth: registrytest.Auth{User: "u", Password: "p", TTL: time.Second},
		Fault: func(q registrytest.Request) registrytest.Fault {
			if q.Kind == "token" && down.Load() {
				return registrytest.Fault{Kind: registrytest.Status, Status: 500}
			}
			return registrytest.Fault{}
		},
	})
	m := build(t, small()...)
	login(t, r.Host(), "u", "p")
	source := m.serve(r, "a")
	s := open(t, source, quick())
	if _, err := s.Resolve(ctx); err != nil {
		t.Fatal(err)
	}
	for _, h := range s.(*registry).hosts {
		h.authAt = h.authAt.Add(-authAge) // as after some time
	}
	time.Sleep(time.Second)
	down.Store(true)
	time.AfterFunc(300*time.Millisecond, func() { down.Store(false) })
	if _, err := readAll(s.Blob(m.oci.Layers[0]), 0, 10); err != nil {
		t.Fatal(err)
	}
}

func TestMirrors(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	var good, bad *registrytest.Registry
	var namespaces sync.Map
	good = registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
		namespaces.Store(q.Query.Get("ns"), true)
		if q.Header.Get("X-Mine") != "yes" {
			return registrytest.Fault{Kind: registrytest.Status, Status: 400}
		}
		return registrytest.Fault{}
	}})
	m.serve(good, "a")
	for name, fault := range map[string]registrytest.Fault{
		"not found": {},
		"broken":    {Kind: registrytest.Status, Status: 500},
		"hangup":    {Kind: registrytest.Hangup},
		"silent":    {Kind: registrytest.Silence},
	} {
		t.Run(name, func(t *testing.T) {
			bad = registryOf(t, registrytest.Options{Fault: func(registrytest.Request) registrytest.Fault { return fault }})
			o := quick()
			o.HostsDir = hosts(t, map[string]string{"registry.invalid": fmt.Sprintf(
				"[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n[host.\"http://%s\".header]\nx-mine = \"yes\"\n",
				bad.Host(), good.Host(), good.Host())})
			s := open(t, "registry.invalid/a:1", o)
			if _, err := s.Resolve(ctx); err != nil {
				t.Fatal(err)
			}
			for range 20 {
				if got, err := readAll(s.Blob(m.oci.Layers[0]), 5, 50); err != nil || !bytes.Equal(got, small()[0].Data[5:55]) {
					t.Fatal(err)
				}
			}
			n := bad.Counts().Requests
			t.Log(n, "requests to the bad mirror")
			if name != "not found" && n > breakAfter+5 {
				t.Errorf("%d requests to a dead mirror", n)
			}
		})
	}
	if _, ok := namespaces.Load("registry.invalid"); !ok {
		t.Error("the mirror was not told which registry it stands for")
	}
}

func TestTLS(t *testing.T) {
	leakFree(t)
	m := build(t, small()...)
	r := registryOf(t, registrytest.Options{TLS: true})
	m.serve(r, "a")
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, r.CA(), 0o644); err != nil {
		t.Fatal(err)
	}
	for toml, want := range map[string]bool{
		fmt.Sprintf("server = \"https://%s\"\nca = %q\n", r.Host(), ca):                        true,
		fmt.Sprintf("[host.\"https://%s\"]\nskip_verify = true\n", r.Host()):                   true,
		fmt.Sprintf("server = \"https://%s\"\n", r.Host()):                                     false,
		fmt.Sprintf("server = \"https://%s/x/v2\"\nca = %q\n", r.Host(), ca):                   false,
		fmt.Sprintf("[host.\"https://%s/v2\"]\nca = %q\noverride_path = true\n", r.Host(), ca): true,
	} {
		o := quick()
		o.PlainHTTP = false
		o.HostsDir = hosts(t, map[string]string{"registry.invalid": toml})
		_, err := open(t, "registry.invalid/a:1", o).Resolve(ctx)
		if (err == nil) != want {
			t.Errorf("%s: %v", toml, err)
		}
	}
	// Without configuration, a loopback registry is tried both ways, unverified.
	plain := registryOf(t, registrytest.Options{})
	m.serve(plain, "a")
	for _, host := range []string{r.Host(), plain.Host()} {
		o := quick()
		o.PlainHTTP = false
		if _, err := open(t, host+"/a:1", o).Resolve(ctx); err != nil {
			t.Error(err)
		}
	}
}

// TestFaultTable does each fault to the first requests of several ranges: every
// byte must be right all the same.
func TestFaultTable(t *testing.T) {
	data := imagetest.RandomBytes(400_000, 7)
	faults := []registrytest.Fault{
		{Kind: registrytest.Hangup},
		{Kind: registrytest.Status, Status: 500},
		{Kind: registrytest.Status, Status: 503, RetryAfter: "1"},
		{Kind: registrytest.Status, Status: 429},
		{Kind: registrytest.Cut},
		{Kind: registrytest.Short},
		{Kind: registrytest.Stall},
		{Kind: registrytest.Silence},
		{Kind: registrytest.Whole},
		{Kind: registrytest.WrongRange},
		{Kind: registrytest.NoRange},
		{Kind: registrytest.Partial},
	}
	for _, fault := range faults {
		for _, mirror := range []bool{false, true} {
			for seed := range uint64(3) {
				t.Run(fmt.Sprintf("%v%d/mirror=%v/%d", fault.Kind, fault.Status, mirror, seed), func(t *testing.T) {
					t.Parallel()
					fault := fault
					fault.At = int64(seed * 30_000)
					var n atomic.Int64
					bad := registryOf(t, registrytest.Options{Fault: func(q registrytest.Request) registrytest.Fault {
						if n.Add(1) <= int64(seed+1) || mirror || fault.Kind == registrytest.Whole || fault.Kind == registrytest.Partial && seed > 0 {
							return fault
						}
						return registrytest.Fault{}
					}})
					o := quick()
					o.ReadTimeout = 10 * time.Second
					desc := bad.AddBytes("x", data)
					name := bad.Host() + "/a"
					if mirror {
						good := registryOf(t, registrytest.Options{})
						good.AddBytes("x", data)
						name = "registry.invalid/a"
						o.HostsDir = hosts(t, map[string]string{"registry.invalid": fmt.Sprintf("server = \"http://%s\"\n[host.\"http://%s\"]\n", good.Host(), bad.Host())})
					}
					s := open(t, name, o)
					var all sync.WaitGroup
					for i := range 4 {
						all.Go(func() {
							off := int64(i) * 90_000
							got, err := readAll(s.Blob(desc), off, 100_000)
							if err != nil || !bytes.Equal(got, data[off:off+100_000]) {
								t.Errorf("range at %d: %d bytes, %v", off, len(got), err)
							}
						})
					}
					all.Wait()
				})
			}
		}
	}
}

// TestFinalErrors has hosts fail for good: the error comes in time, says what
// was asked of whom, and holds no secret.
func TestFinalErrors(t *testing.T) {
	for _, tc := range []struct {
		fault     registrytest.Fault
		err, hint string
	}{
		{registrytest.Fault{Kind: registrytest.Status, Status: 404}, "404", "check the name"},
		{registrytest.Fault{Kind: registrytest.Status, Status: 403}, "403", "docker login"},
		{registrytest.Fault{Kind: registrytest.Status, Status: 502}, "502", "in trouble"},
		{registrytest.Fault{Kind: registrytest.Status, Status: 429, RetryAfter: "3600"}, "429", "limits requests"},
		{registrytest.Fault{Kind: registrytest.Hangup}, "EOF", ""},
		{registrytest.Fault{Kind: registrytest.Silence}, "no answer", "network"},
		{registrytest.Fault{Kind: registrytest.Stall, At: 3}, "no answer", "network"},
		{registrytest.Fault{Kind: registrytest.NoRange}, "Content-Range", ""},
	} {
		t.Run(fmt.Sprint(tc.fault.Kind, tc.fault.Status), func(t *testing.T) {
			t.Parallel()
			r := registryOf(t, registrytest.Options{Redirect: true, Fault: func(q registrytest.Request) registrytest.Fault {
				if q.Kind == "object" {
					return tc.fault
				}
				return registrytest.Fault{}
			}})
			desc := r.AddBytes("x", make([]byte, 1000))
			var logged syncBuffer
			o := quick()
			o.ReadTimeout = time.Second
			o.Logger = slog.New(slog.NewTextHandler(&logged, &slog.HandlerOptions{Level: slog.LevelDebug}))
			s := open(t, r.Host()+"/a", o)
			begin := time.Now()
			_, err := readAll(s.Blob(desc), 0, 1000)
			if err == nil || !strings.Contains(err.Error(), tc.err) || !strings.Contains(err.Error(), desc.Digest.String()) ||
				!strings.Contains(err.Error(), "127.0.0.1:") || !strings.Contains(hint.Of(err), tc.hint) {
				t.Errorf("%v (%s)", err, hint.Of(err))
			}
			if strings.Contains(err.Error()+logged.String(), "signature=") {
				t.Errorf("a signed URL was told: %v\n%s", err, logged.String())
			}
			if d := time.Since(begin); d > 3*time.Second {
				t.Errorf("it took %v", d)
			}
		})
	}
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// TestBreaker has many readers meet a dead registry.
func TestBreaker(t *testing.T) {
	r := registryOf(t, registrytest.Options{Fault: func(registrytest.Request) registrytest.Fault {
		return registrytest.Fault{Kind: registrytest.Status, Status: 500}
	}})
	desc := r.AddBytes("x", make([]byte, 1000))
	s := open(t, r.Host()+"/a", quick())
	var all sync.WaitGroup
	for range 100 {
		all.Go(func() {
			if _, err := readAll(s.Blob(desc), 0, 1000); err == nil {
				t.Error("no error")
			}
		})
	}
	all.Wait()
	// All of the first hundred may be out before the first has failed.
	if n := r.Counts().Requests; n > 115 {
		t.Errorf("%d requests in two seconds", n)
	}
}

func TestCancelRange(t *testing.T) {
	leakFree(t)
	r := registryOf(t, registrytest.Options{Fault: func(registrytest.Request) registrytest.Fault {
		return registrytest.Fault{Kind: registrytest.Silence}
	}})
	desc := r.AddBytes("x", make([]byte, 1000))
	o := quick()
	o.StallTimeout = time.Minute
	s := open(t, r.Host()+"/a", o)
	errs := make(chan error, 1)
	go func() {
		_, err := readAll(s.Blob(desc), 0, 1000)
		errs <- err
	}()
	time.Sleep(20 * time.Millisecond)
	begin := time.Now()
	s.Close()
	if err := <-errs; !errors.Is(err, ErrClosed) || time.Since(begin) > time.Second {
		t.Fatal(err, time.Since(begin))
	}
}

func TestParseContentRange(t *testing.T) {
	for in, want := range map[string]string{
		"bytes 0-0/1":                    "0 0 1",
		"bytes 5-9/*":                    "5 9 -1",
		"bytes 5-9/10":                   "5 9 10",
		"bytes 5-9/9":                    "",
		"bytes 9-5/20":                   "",
		"bytes -5-9/20":                  "",
		"bytes */20":                     "",
		"bytes=5-9/20":                   "",
		"bytes 5-9":                      "",
		"bytes 5-9/-1":                   "",
		"":                               "",
		"bytes 5-9/20, 0":                "",
		"bytes 99999999999999999999-5/6": "",
	} {
		first, last, total, err := parseContentRange(in)
		if got := fmt.Sprint(first, last, total); err == nil && got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %s, %v, want %q", in, got, err, want)
		}
	}
}

func TestScrub(t *testing.T) {
	for in, want := range map[string]string{
		`Get "https://u:p@h.example/x?sig=abc": EOF`: `Get "https://h.example/x EOF`,
		"no address in it":                           "no address in it",
		"see https://h/a?b and http://h/c":           "see https://h/a and http://h/c",
	} {
		if got := scrub(errors.New(in)).Error(); got != want {
			t.Errorf("%q became %q", in, got)
		}
	}
	_, err := http.Get("http://127.0.0.1:1/x?secret")
	if got := scrub(err); strings.Contains(got.Error(), "secret") {
		t.Error(got)
	}
}

func TestReaderAt(t *testing.T) {
	r := registryOf(t, registrytest.Options{})
	data := imagetest.RandomBytes(1000, 1)
	desc := r.AddBytes("x", data)
	s := open(t, r.Host()+"/a", quick())
	at := ReaderAt(ctx, s.Blob(desc), desc.Size)
	p := make([]byte, 100)
	if n, err := at.ReadAt(p, 900); n != 100 || err != nil || !bytes.Equal(p, data[900:]) {
		t.Error(n, err)
	}
	if n, err := at.ReadAt(p, 950); n != 50 || err == nil || !bytes.Equal(p[:50], data[950:]) {
		t.Error(n, err)
	}
	if n, err := at.ReadAt(p, 1000); n != 0 || err == nil {
		t.Error(n, err)
	}
	if n, err := at.ReadAt(p, -1); n != 0 || err == nil {
		t.Error(n, err)
	}
	gone := ocispec.Descriptor{Digest: digest.FromString("gone"), Size: 10}
	if n, err := ReaderAt(ctx, s.Blob(gone), 10).ReadAt(p, 0); n != 0 || err == nil {
		t.Error(n, err)
	}
}
