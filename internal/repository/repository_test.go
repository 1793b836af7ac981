package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
)

// A taker is a registry that takes pushes into memory (distribution-spec,
// "Push"), with or without the referrers API.
type taker struct {
	referrers bool
	busy      int    // uploads to refuse with 503
	token     string // wanted, if not empty

	mu        sync.Mutex
	blobs     map[string][]byte
	manifests map[string][]byte // by tag and digest
	types     map[string]string
	server    *httptest.Server
}

func newTaker(t *testing.T) *taker {
	k := &taker{blobs: map[string][]byte{}, manifests: map[string][]byte{}, types: map[string]string{}}
	k.server = httptest.NewServer(k)
	t.Cleanup(k.server.Close)
	return k
}

func (k *taker) host() string { return strings.TrimPrefix(k.server.URL, "http://") }

func (k *taker) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	k.mu.Lock()
	defer k.mu.Unlock()
	path := req.URL.Path
	if path == "/token" {
		if user, pass, _ := req.BasicAuth(); user == "me" && pass == "secret" && strings.Contains(req.URL.Query().Get("scope"), "push") {
			fmt.Fprintf(w, `{"token": %q}`, k.token)
			return
		}
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if k.token != "" && path != "/v2/" && req.Header.Get("Authorization") != "Bearer "+k.token {
		w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="s",scope="repository:a/b:pull,push"`, k.server.URL))
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	if path == "/v2/" {
		return
	}
	kind, object := filepath.Base(filepath.Dir(path)), filepath.Base(path)
	if strings.HasSuffix(path, "/uploads/") {
		if k.busy > 0 {
			k.busy--
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Location", "/v2/a/b/blobs/uploads/1?state=x")
		w.WriteHeader(http.StatusAccepted)
		return
	}
	switch {
	case req.Method == http.MethodPut && kind == "uploads":
		raw, _ := io.ReadAll(req.Body)
		d := req.URL.Query().Get("digest")
		if digest.FromBytes(raw).String() != d {
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		k.blobs[d] = raw
		w.WriteHeader(http.StatusCreated)
	case req.Method == http.MethodPut && kind == "manifests":
		raw, _ := io.ReadAll(req.Body)
		d := digest.FromBytes(raw).String()
		var m ocispec.Manifest
		json.Unmarshal(raw, &m)
		for _, l := range m.Layers {
			if k.blobs[l.Digest.String()] == nil {
				w.WriteHeader(http.StatusBadRequest)
				return
			}
		}
		for _, name := range []string{d, object} {
			k.manifests[name], k.types[name] = raw, req.Header.Get("Content-Type")
		}
		if k.referrers && m.Subject != nil {
			w.Header().Set("OCI-Subject", m.Subject.Digest.String())
		}
		w.WriteHeader(http.StatusCreated)
	case kind == "referrers" && k.referrers:
		x := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex}
		for name, raw := range k.manifests {
			var m ocispec.Manifest
			json.Unmarshal(raw, &m)
			if strings.HasPrefix(name, "sha256:") && m.Subject != nil && m.Subject.Digest.String() == object {
				x.Manifests = append(x.Manifests, ocispec.Descriptor{MediaType: k.types[name], Digest: digest.Digest(name), Size: int64(len(raw)), ArtifactType: m.ArtifactType})
			}
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		json.NewEncoder(w).Encode(x)
	case kind == "blobs" || kind == "manifests":
		raw, ok := k.blobs[object]
		if kind == "manifests" {
			raw, ok = k.manifests[object]
			w.Header().Set("Content-Type", k.types[object])
			w.Header().Set("Docker-Content-Digest", digest.FromBytes(raw).String())
		}
		if !ok {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(raw)))
		if req.Method == http.MethodGet {
			w.Write(raw)
		}
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

func open(t *testing.T, name string) *Repository {
	t.Helper()
	r, err := Open(name, true, fetcher.Options{HostsDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	return r
}

// each runs a test with every kind of repository.
func each(t *testing.T, f func(t *testing.T, r *Repository)) {
	for _, referrers := range []bool{false, true} {
		t.Run(fmt.Sprintf("registry, referrers %v", referrers), func(t *testing.T) {
			k := newTaker(t)
			k.referrers = referrers
			f(t, open(t, "docker://"+k.host()+"/a/b:1"))
		})
	}
	t.Run("layout", func(t *testing.T) { f(t, open(t, "oci:"+filepath.Join(t.TempDir(), "new")+":1")) })
}

func TestArtifacts(t *testing.T) {
	const kind = "application/vnd.example.thing"
	each(t, func(t *testing.T, r *Repository) {
		ctx := t.Context()
		layer := []byte("what it is about")
		subject := describe("application/x", layer)
		if err := r.Put(ctx, subject, bytes.NewReader(layer)); err != nil {
			t.Fatal(err)
		}
		if found, err := r.Artifacts(ctx, subject.Digest, kind); err != nil || len(found) != 0 {
			t.Fatalf("before: %v, %v", found, err)
		}
		attach := func(kind, text, created string) ocispec.Descriptor {
			t.Helper()
			d, err := r.Attach(ctx, subject, kind, map[string]string{ocispec.AnnotationCreated: created},
				File{MediaType: "text/plain", Size: int64(len(text)), From: strings.NewReader(text)})
			if err != nil {
				t.Fatal(err)
			}
			return d
		}
		attach(kind, "old", "2026-01-01T00:00:00Z")
		newest := attach(kind, "new", "2026-01-02T00:00:00Z")
		attach("application/vnd.example.other", "other", "2026-01-03T00:00:00Z")
		if again := attach(kind, "new", "2026-01-02T00:00:00Z"); again.Digest != newest.Digest {
			t.Errorf("the same artifact has another digest")
		}
		found, err := r.Artifacts(ctx, subject.Digest, kind)
		if err != nil || len(found) != 2 {
			t.Fatalf("found %d, %v", len(found), err)
		}
		if found[0].Desc.Digest != newest.Digest {
			t.Error("the newest is not the first")
		}
		raw, err := r.Read(ctx, found[0].Manifest.Layers[0], 100)
		if err != nil || string(raw) != "new" {
			t.Errorf("read %q, %v", raw, err)
		}
		if _, err := r.Read(ctx, found[0].Manifest.Layers[0], 2); err == nil {
			t.Error("read more than the limit")
		}
		if found, err := r.Artifacts(ctx, digest.FromString("nothing"), kind); err != nil || len(found) != 0 {
			t.Errorf("of another subject: %v, %v", found, err)
		}
	})
}

func TestTag(t *testing.T) {
	each(t, func(t *testing.T, r *Repository) {
		raw := []byte(`{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}`)
		d, err := r.PutManifest(t.Context(), ocispec.MediaTypeImageIndex, raw, "1")
		if err != nil {
			t.Fatal(err)
		}
		got, err := r.Read(t.Context(), d, 1000)
		if err != nil || !bytes.Equal(got, raw) {
			t.Errorf("read %s, %v", got, err)
		}
		raw = append(raw, ' ')
		if _, err = r.PutManifest(t.Context(), ocispec.MediaTypeImageIndex, raw, "1"); err != nil {
			t.Fatal(err)
		}
		l, ok := r.b.(*layout)
		if !ok {
			return
		}
		x, err := l.index()
		if err != nil || len(x.Manifests) != 1 || x.Manifests[0].Digest != digest.FromBytes(raw) || x.Manifests[0].Annotations[ocispec.AnnotationRefName] != "1" {
			t.Errorf("index.json: %+v, %v", x, err)
		}
		if names, _ := os.ReadDir(filepath.Join(l.dir, "blobs/sha256")); len(names) != 2 {
			t.Errorf("blobs: %v", names)
		}
	})
}

func TestWrongBlob(t *testing.T) {
	each(t, func(t *testing.T, r *Repository) {
		d := describe("application/x", []byte("one thing"))
		if err := r.Put(t.Context(), d, strings.NewReader("two thing")); err == nil {
			t.Fatal("a blob with another digest was taken")
		}
		if _, err := r.Read(t.Context(), d, 100); err == nil {
			t.Error("and is there")
		}
	})
}

func TestBusy(t *testing.T) {
	k := newTaker(t)
	k.busy = 2
	r := open(t, "docker://"+k.host()+"/a/b:1")
	blob := []byte("x")
	if err := r.Put(t.Context(), describe("", blob), bytes.NewReader(blob)); err != nil {
		t.Fatal(err)
	}
}

// The client asks for a token with the right to push.
func TestLogin(t *testing.T) {
	k := newTaker(t)
	k.token = "let me in"
	config := t.TempDir()
	t.Setenv("DOCKER_CONFIG", config)
	r := open(t, "docker://"+k.host()+"/a/b:1")
	blob := []byte("x")
	err := r.Put(t.Context(), describe("", blob), bytes.NewReader(blob))
	if err == nil || strings.Contains(err.Error(), k.token) {
		t.Fatalf("without login: %v", err)
	}
	text := fmt.Sprintf(`{"auths": {%q: {"username": "me", "password": "secret"}}}`, k.host())
	if err := os.WriteFile(filepath.Join(config, "config.json"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.Put(t.Context(), describe("", blob), bytes.NewReader(blob)); err != nil {
		t.Fatal(err)
	}
}

// A host in hosts.toml stands for the registry, with another path.
func TestHosts(t *testing.T) {
	k := newTaker(t)
	hosts := t.TempDir()
	dir := filepath.Join(hosts, "registry.example.com")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	text := fmt.Sprintf("[host.%q]\n capabilities = [\"pull\", \"resolve\", \"push\"]\n", k.server.URL)
	if err := os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	r, err := Open("docker://registry.example.com/a/b:1", true, fetcher.Options{HostsDir: hosts})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	blob := []byte("x")
	if err := r.Put(t.Context(), describe("", blob), bytes.NewReader(blob)); err != nil {
		t.Fatal(err)
	}
	if len(k.blobs) != 1 {
		t.Error("the mirror has nothing")
	}
}

// What the operator has in each request for a host is in no other.
func TestHostHeader(t *testing.T) {
	k := newTaker(t)
	k.token = "let me in"
	var mu sync.Mutex
	with, without := 0, 0
	k.server.Config.Handler = http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		mu.Lock()
		if has := req.Header.Get("X-Key") == "mine"; has && req.URL.Path != "/v2/" {
			with++
			if req.URL.Path == "/token" {
				t.Error("the token server was given the host's header")
			}
		} else if req.URL.Path != "/v2/" && req.URL.Path != "/token" {
			without++
		}
		mu.Unlock()
		k.ServeHTTP(w, req)
	})
	hosts, config := t.TempDir(), t.TempDir()
	t.Setenv("DOCKER_CONFIG", config)
	for path, text := range map[string]string{
		filepath.Join(hosts, "registry.example.com", "hosts.toml"): fmt.Sprintf(
			"[host.%q]\n capabilities = [\"pull\", \"resolve\", \"push\"]\n [host.%q.header]\n  x-key = \"mine\"\n", k.server.URL, k.server.URL),
		filepath.Join(config, "config.json"): fmt.Sprintf(`{"auths": {%q: {"username": "me", "password": "secret"}}}`, k.host()),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, err := Open("docker://registry.example.com/a/b:1", true, fetcher.Options{HostsDir: hosts})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	blob := []byte("x")
	if err := r.Put(t.Context(), describe("", blob), bytes.NewReader(blob)); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if with == 0 || without > 0 {
		t.Errorf("%d requests for the host with its header, %d without", with, without)
	}
}

func TestCancelled(t *testing.T) {
	each(t, func(t *testing.T, r *Repository) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := r.Put(ctx, describe("", []byte("x")), strings.NewReader("x")); err == nil {
			t.Error("no error")
		}
	})
}

func TestWhatCannotBeWritten(t *testing.T) {
	for _, name := range []string{"layer:x", "oci-archive:x.tar:1", "docker:x", "oci:"} {
		if r, err := Open(name, true, fetcher.Options{}); err == nil {
			r.Close()
			t.Errorf("%s: no error", name)
		}
	}
	if _, err := Open("oci:"+t.TempDir()+"/none:1", false, fetcher.Options{}); err == nil {
		t.Error("a layout that is not there was opened for reading")
	}
}
