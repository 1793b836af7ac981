package fetcher

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

func TestLayouts(t *testing.T) {
	leakFree(t)
	a := imagetest.Must(imagetest.Image(small()[0]))
	b := imagetest.Must(imagetest.Image(small()[0], small()[1]))
	both := imagetest.Must(imagetest.Index(a, imagetest.Must(imagetest.ImageFor(ocispec.Platform{OS: "linux", Architecture: "s390x"}, small()[2]))))
	dir := t.TempDir()
	write := func(name string, o *imagetest.OCI, tag string) string {
		d := filepath.Join(dir, name)
		if err := o.WriteLayout(d, tag); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(d + ".tar")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := o.WriteArchive(f, tag); err != nil {
			t.Fatal(err)
		}
		return d
	}
	one, tagged, index := write("one", a, ""), write("tagged", b, "v1"), write("index", both, "multi")
	for _, tc := range []struct {
		path, ref string
		want      *imagetest.OCI
		err, hint string
	}{
		{one, "", a, "", ""},
		{one, "@" + a.Desc.Digest.String(), a, "", ""},
		{one, ":v1", nil, `no image with the tag "v1"`, ""},
		{one, "@" + zeros, nil, "", "check the path"},
		{tagged, "", b, "", ""},
		{tagged, ":v1", b, "", ""},
		{tagged, ":v2", nil, `no image with the tag "v2"`, "v1"},
		{index, ":multi", a, "", ""},
		{index, "", a, "", ""},
		{dir + "/none", "", nil, "no such file", "check the path"},
	} {
		for _, kind := range []string{"oci:", "oci-archive:"} {
			path := tc.path
			if kind == "oci-archive:" {
				path += ".tar"
			}
			s := open(t, kind+path+tc.ref, Options{})
			m, err := s.Resolve(ctx)
			if tc.want == nil {
				if err == nil || !strings.Contains(err.Error(), tc.err) || !strings.Contains(hint.Of(err), tc.hint) {
					t.Errorf("%s: %v (%s)", s, err, hint.Of(err))
				}
				continue
			}
			if err != nil {
				t.Errorf("%s: %v", s, err)
				continue
			}
			if m.Digest.String() != tc.want.Desc.Digest.String() || !bytes.Equal(m.Raw, tc.want.Raw) || m.LocalLayer {
				t.Errorf("%s: %s, want %s", s, m.Digest, tc.want.Desc.Digest)
			}
			if config, err := ReadConfig(ctx, s, m); err != nil || !bytes.Equal(config, tc.want.Config) {
				t.Errorf("%s: config: %v", s, err)
			}
			if got, err := readAll(s.Blob(m.Layers[0]), 7, 1000); err != nil || !bytes.Equal(got, small()[0].Data[7:1007]) {
				t.Errorf("%s: %v", s, err)
			}
			if _, err := readAll(s.Blob(m.Layers[0]), m.Layers[0].Size, 1); err == nil {
				t.Errorf("%s: a range behind the end", s)
			}
			wrong := m.Layers[0]
			wrong.Size++
			if _, err := readAll(s.Blob(wrong), 0, 1); err == nil {
				t.Errorf("%s: a blob of another size", s)
			}
			canceled, cancel := context.WithCancel(ctx)
			cancel()
			if _, err := s.Blob(m.Layers[0]).ReadRange(canceled, 0, 1); !errors.Is(err, context.Canceled) {
				t.Errorf("%s: %v", s, err)
			}
			s.Close()
			if _, err := readAll(s.Blob(m.Layers[0]), 0, 1); !errors.Is(err, ErrClosed) {
				t.Errorf("%s: %v", s, err)
			}
		}
	}
	// A manifest whose bytes were changed is refused.
	p := filepath.Join(one, "blobs/sha256", a.Desc.Digest.Encoded())
	if err := os.WriteFile(p, append(a.Raw, ' '), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, "oci:"+one, Options{}).Resolve(ctx); err == nil || !strings.Contains(err.Error(), "digest is") {
		t.Error(err)
	}
}

func TestArchiveKinds(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return p
	}
	var empty bytes.Buffer
	tar.NewWriter(&empty).Close()
	for name, content := range map[string][]byte{
		"gzip":    imagetest.Must(imagetest.Gzip(empty.Bytes())).Data,
		"garbage": bytes.Repeat([]byte("x"), 2000),
	} {
		_, err := open(t, "oci-archive:"+write(name, content), Options{}).Resolve(ctx)
		if err == nil || !strings.Contains(hint.Of(err), "uncompressed") {
			t.Errorf("%s: %v (%s)", name, err, hint.Of(err))
		}
	}
	if _, err := open(t, "oci-archive:"+write("empty", empty.Bytes()), Options{}).Resolve(ctx); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

func TestLayerFile(t *testing.T) {
	dir := t.TempDir()
	for name, mediaType := range map[string]string{
		"gzip": ocispec.MediaTypeImageLayerGzip,
		"zstd": ocispec.MediaTypeImageLayerZstd,
		"tar":  ocispec.MediaTypeImageLayer,
	} {
		data := map[string][]byte{"gzip": small()[0].Data, "zstd": small()[2].Data, "tar": make([]byte, 1024)}[name]
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, data, 0o644); err != nil {
			t.Fatal(err)
		}
		s := open(t, "layer:"+p, Options{})
		m, err := s.Resolve(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if !m.LocalLayer || len(m.Layers) != 1 || m.Layers[0].Digest != digest.FromBytes(data) || m.Layers[0].MediaType != mediaType {
			t.Errorf("%+v", m)
		}
		again, err := ParseManifest(m.Raw)
		if err != nil || again.Digest != m.Digest || again.LocalLayer {
			t.Error("what the manifest says of itself must not be trusted:", again, err)
		}
		if config, err := ReadConfig(ctx, s, m); err != nil || string(config) != "{}" {
			t.Errorf("%s %v", config, err)
		}
		fresh := open(t, "layer:"+p, Options{}) // without Resolve, as on a second mount
		if got, err := readAll(fresh.Blob(m.Layers[0]), 3, 9); err != nil || !bytes.Equal(got, data[3:12]) {
			t.Error(err)
		}
		if err := os.WriteFile(p, data[1:], 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := readAll(fresh.Blob(m.Layers[0]), 3, 9); err == nil || hint.Of(err) == "" {
			t.Error("a file that has changed:", err)
		}
	}
	for _, p := range []string{dir, dir + "/none", os.DevNull} {
		if _, err := open(t, "layer:"+p, Options{}).Resolve(ctx); err == nil {
			t.Error(p, "is no layer")
		}
	}
}
