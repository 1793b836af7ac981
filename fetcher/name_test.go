package fetcher

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestParseName(t *testing.T) {
	d := digest.FromString("x")
	for _, c := range []struct {
		in   string
		want Name
		out  string
	}{
		{"debian", Name{Kind: "docker", Host: "docker.io", Repository: "library/debian", Tag: "latest"}, "docker://docker.io/library/debian:latest"},
		{"docker://r.example.com:5000/a/b@" + d.String(), Name{Kind: "docker", Host: "r.example.com:5000", Repository: "a/b", Digest: d}, ""},
		{"oci:dir:1", Name{Kind: "oci", Path: "dir", Tag: "1"}, ""},
		{"oci:dir", Name{Kind: "oci", Path: "dir"}, ""},
		{"oci-archive:a.tar@" + d.String(), Name{Kind: "oci-archive", Path: "a.tar", Digest: d}, ""},
		{"layer:x", Name{Kind: "layer", Path: "x"}, ""},
	} {
		got, err := ParseName(c.in)
		if c.out == "" {
			c.out = c.in
		}
		if err != nil || got != c.want || got.String() != c.out {
			t.Errorf("%s: %+v (%s), %v", c.in, got, got, err)
		}
	}
	if _, err := ParseName("ftp://x"); err == nil {
		t.Error("ftp: no error")
	}
}

// An artifact beside the one image of a layout is not another image.
func TestLayoutWithArtifact(t *testing.T) {
	dir := t.TempDir()
	manifest := []byte(`{"schemaVersion":2,"config":{"mediaType":"x","digest":"` + digest.FromString("").String() + `","size":0},"layers":[]}`)
	x := ocispec.Index{Versioned: schema2, Manifests: []ocispec.Descriptor{
		{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("artifact"), Size: 8, ArtifactType: "application/vnd.example"},
		{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(manifest), Size: int64(len(manifest))},
	}}
	raw, err := json.Marshal(x)
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{"index.json": raw, blobPath(digest.FromBytes(manifest)): manifest} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	s, err := OpenSource("oci:"+dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	m, err := s.Resolve(t.Context())
	if err != nil || m.Digest != digestOf(manifest) {
		t.Errorf("%v, %v", m, err)
	}
}

// TestSchemeRedirect has a registry of HTTPS send who asks to HTTP: what it
// speaks itself counts.
func TestSchemeRedirect(t *testing.T) {
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	secure := httptest.NewTLSServer(http.RedirectHandler(plain.URL, http.StatusFound))
	defer secure.Close()
	u, err := url.Parse(secure.URL + "/v2")
	if err != nil {
		t.Fatal(err)
	}
	e := &Endpoint{Base: *u, Client: secure.Client()}
	if got, err := e.Scheme(ctx); err != nil || got != "https" {
		t.Errorf("%q, %v", got, err)
	}
}
