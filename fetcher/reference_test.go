package fetcher

import (
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

const (
	zeros   = "sha256:0000000000000000000000000000000000000000000000000000000000000000"
	docker_ = "docker://docker.io/library/"
)

func TestOpenSource(t *testing.T) {
	for _, tc := range []struct{ in, want string }{
		{"debian", docker_ + "debian:latest"},
		{"debian:13", docker_ + "debian:13"},
		{"docker://debian", docker_ + "debian:latest"},
		{"docker.io/debian", docker_ + "debian:latest"},
		{"index.docker.io/a/b", "docker://docker.io/a/b:latest"},
		{"user/name:1", "docker://docker.io/user/name:1"},
		{"localhost/a", "docker://localhost/a:latest"},
		{"localhost:5000/a/b/c:x", "docker://localhost:5000/a/b/c:x"},
		{"[::1]:5000/a", "docker://[::1]:5000/a:latest"},
		{"[::1]/a", "docker://[::1]/a:latest"},
		{"Host/a", "docker://Host/a:latest"},
		{"r.example/a@" + zeros, "docker://r.example/a@" + zeros},
		{"r.example/a:t@" + zeros, "docker://r.example/a:t@" + zeros},
		{"r.example:80/a.b_c__d--e/f0:T_.-", "docker://r.example:80/a.b_c__d--e/f0:T_.-"},
		{"oci:dir", "oci:dir"},
		{"oci:/a b/dir:tag", "oci:/a b/dir:tag"},
		{"oci:dir@" + zeros, "oci:dir@" + zeros},
		{"oci:a:b/c", "oci:a:b/c"},
		{"oci-archive:f.tar:1", "oci-archive:f.tar:1"},
		{"layer:f:g@h", "layer:f:g@h"},
		{"", ""},
		{"docker://", ""},
		{"docker:debian", ""},
		{"http://r.example/a", ""},
		{"oci:", ""},
		{"oci::tag", ""},
		{"oci:dir@sha256:12", ""},
		{"layer:", ""},
		{"Debian", ""},
		{"r.example/", ""},
		{"r.example//a", ""},
		{"r.example/a/", ""},
		{"r.example/../a", ""},
		{"r.example/a___b", ""},
		{"r.example/-a", ""},
		{"r.example/a_", ""},
		{"r.example/a:", ""},
		{"r.example/a:.x", ""},
		{"r.example/a:" + strings.Repeat("t", 129), ""},
		{"r.example/" + strings.Repeat("a", 256), ""},
		{"r.example/a@sha512:00", ""},
		{"r.example/a@" + strings.ToUpper(zeros), ""},
		{"r.example:0/a", ""},
		{"r.example:99999/a", ""},
		{"r.example:x/a", ""},
		{"-r.example/a", ""},
		{"r..example/a", ""},
		{"[1.2.3.4]/a", ""},
		{"r.example?x/a", ""},
		{"user:secret@r.example/a", ""},
	} {
		s, err := OpenSource(tc.in, quick())
		if (err == nil) != (tc.want != "") {
			t.Errorf("%q: %v, %v", tc.in, s, err)
		}
		if err == nil {
			if s.String() != tc.want {
				t.Errorf("%q is %q, want %q", tc.in, s, tc.want)
			}
			s.Close()
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%q: the error has the password: %v", tc.in, err)
		}
	}
	if _, err := OpenSource("debian", Options{Platform: "linux"}); err == nil || hint.Of(err) == "" {
		t.Error("a platform without architecture:", err)
	}
}

func FuzzParseReference(f *testing.F) {
	for _, s := range []string{"debian", "a.b/c:d@" + zeros, "[::1]:5000/a", "localhost:1/a__b/c--d:latest", "a@b/c", "A/b", ":", "/", "@", "a:b:c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := parseReference(s)
		if err != nil {
			return
		}
		if r.host == "" || r.name == "" || r.tag == "" && r.digest == "" {
			t.Fatalf("%q: %+v", s, r)
		}
		// The full form means the same.
		again, err := parseReference(strings.TrimPrefix(r.String(), "docker://"))
		if err != nil || again != r {
			t.Fatalf("%q is %+v, and that is %+v, %v", s, r, again, err)
		}
		// It makes a URL that keeps to its host and repository.
		for c := range strings.SplitSeq(r.name, "/") {
			if c == "" || strings.Trim(c, ".") == "" || strings.ContainsAny(c, "?#%@:\\ ") {
				t.Fatalf("%q: component %q", s, c)
			}
		}
		if strings.ContainsAny(r.host, "/?#@% ") || strings.ContainsAny(r.tag, "/?#@%:") {
			t.Fatalf("%q: %+v", s, r)
		}
	})
}

func FuzzParseManifest(f *testing.F) {
	f.Add([]byte(`{"schemaVersion":2,"config":{"digest":"` + zeros + `","size":2},"layers":[{"digest":"` + zeros + `","size":9}]}`))
	f.Add([]byte(`{"schemaVersion":2,"manifests":[]}`))
	f.Add([]byte(`{"schemaVersion":1}`))
	f.Add([]byte(`[]`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, ok := isIndex(raw); ok {
			if _, err := ParseManifest(raw); err == nil {
				t.Fatal("both an index and a manifest")
			}
		}
		m, err := ParseManifest(raw)
		if err != nil {
			return
		}
		for _, d := range append(m.Layers, m.Config) {
			if checkDescriptor(d) != nil {
				t.Fatal(d)
			}
		}
	})
}
