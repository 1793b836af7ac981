package mount

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

func digestOf(s string) image.Digest { return sha256.Sum256([]byte(s)) }

// serveImage has a registry serve an eStargz image of one layer.
func serveImage(t *testing.T, r *registrytest.Registry, tag string, items ...imagetest.Item) string {
	t.Helper()
	oci := imagetest.Must(imagetest.Image(imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(items...)), imagetest.Options{ChunkSize: 64 << 10}))))
	for d, b := range oci.Blobs {
		r.Add(d, bytes.NewReader(b), int64(len(b)))
	}
	r.AddManifest("app", tag, ocispec.MediaTypeImageManifest, oci.Raw)
	return "docker://" + r.Host() + "/app:" + tag
}

// TestProfile records what is read of an image, exports it, and has a cold start
// of the same image elsewhere, and of a newer one, prefetch it.
func TestProfile(t *testing.T) {
	r := imagetest.Must(registrytest.New(registrytest.Options{}))
	t.Cleanup(r.Close)
	items := []imagetest.Item{
		imagetest.File("first", "read first"), imagetest.File("second", "read second"), imagetest.File("never", "not read"),
		imagetest.Random("big", 1<<20, 1), imagetest.Random("ballast", 1<<20, 3),
	}
	source := serveImage(t, r, "1", items...)
	newer := serveImage(t, r, "2", append(items, imagetest.File("new", "only in the newer"))...)
	o := Options{
		Root: filepath.Join(t.TempDir(), "root"), Runtime: t.TempDir(), Swap: Never, NoFill: true,
		Source: fetcher.Options{PlainHTTP: true, HostsDir: t.TempDir()},
	}
	m, mnt := start(t, source, o)
	if _, err := ExportProfile(t.Context(), source, o); err == nil || !strings.Contains(hint.Of(err), "run the program") {
		t.Errorf("exported before anything was read: %v", err)
	}
	control, err := NewControl(m)
	if err != nil {
		t.Fatal(err)
	}
	read := func(name string) {
		t.Helper()
		if _, err := os.ReadFile(filepath.Join(mnt, name)); err != nil {
			t.Fatal(err)
		}
	}
	read("second")
	f, err := os.Open(filepath.Join(mnt, "big"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, 10), 700_000); err != nil {
		t.Fatal(err)
	}
	f.Close()
	read("first")
	read("second")

	// From the process that serves, at once.
	raw, err := ExportProfile(t.Context(), mnt, o)
	if err != nil {
		t.Fatal(err)
	}
	p, err := image.ParseProfile(raw)
	if err != nil || p.Image != m.image.digest || p.Repository != "docker://"+r.Host()+"/app" {
		t.Fatalf("%+v, %v", p, err)
	}
	big := string(imagetest.RandomBytes(1<<20, 1))
	var order []image.Digest
	for _, a := range p.Accesses {
		if len(order) == 0 || order[len(order)-1] != a.Content {
			order = append(order, a.Content)
		}
		if a.Content == digestOf(big) && (a.Off > 700_000 || a.Off == 0 || a.Off%(64<<10) != 0) {
			t.Errorf("of the big file: %+v", a)
		}
	}
	if len(order) != 3 || order[0] != digestOf("read second") || order[1] != digestOf(big) || order[2] != digestOf("read first") {
		t.Errorf("%v", p.Accesses)
	}
	end(t, m, mnt)
	control.Close()

	// From the store, the same, with the image's folder and without it.
	again, err := ExportProfile(t.Context(), source, o)
	if err != nil || !bytes.Equal(again, raw) {
		t.Errorf("%s, %v", again, err)
	}
	if err := os.RemoveAll(filepath.Join(o.Root, "images", hex.EncodeToString(p.Image[:]))); err != nil {
		t.Fatal(err)
	}
	if again, err = ExportProfile(t.Context(), source, o); err != nil || !bytes.Equal(again, raw) {
		t.Errorf("%s, %v", again, err)
	}

	// A newer image of the repository, in the same store but for its bytes.
	wantPrefetch := func(what, source string, o Options, want int) *Mount {
		t.Helper()
		for _, dir := range []string{"objects", "contents", "staging"} {
			os.RemoveAll(filepath.Join(o.Root, dir))
		}
		o.NoFill = false
		m, mnt := start(t, source, o)
		waitFor(t, m, Sealed)
		if n := m.Status().Fetched["prefetch"]; (n.Requests > 0) != (want > 0) || len(m.startProfile()) != want {
			t.Errorf("%s: prefetched by %+v", what, n)
		}
		end(t, m, mnt)
		return m
	}
	wantPrefetch("newer", newer, o, len(p.Accesses))

	// Of what was prefetched a hybrid is not asked, and it stays known all the same.
	if os.Geteuid() == 0 {
		for _, dir := range []string{"objects", "contents", "staging"} {
			os.RemoveAll(filepath.Join(o.Root, dir))
		}
		h := o
		h.Backend = Hybrid
		m, mnt := start(t, newer, h)
		own, err := os.ReadFile(filepath.Join(mnt, "new"))
		if err != nil {
			t.Fatal(err)
		}
		m.started = m.started.Add(-2 * settled)
		got, noted := m.profile()
		if noted != 1 || len(got.Accesses) != 1+len(p.Accesses) || got.Accesses[0].Content != digestOf(string(own)) {
			t.Errorf("a hybrid's profile, of which %d noted: %+v", noted, got.Accesses)
		}
		end(t, m, mnt)
	}

	// The same image elsewhere: with nothing known, and with the profile.
	o.Root = filepath.Join(t.TempDir(), "elsewhere")
	if got, err := ImportProfile(o.Root, raw); err != nil || len(got.Accesses) != len(p.Accesses) {
		t.Fatal(err)
	}
	wantPrefetch("imported", source, o, len(p.Accesses))
	o.Root = filepath.Join(t.TempDir(), "nothing")
	wantPrefetch("unknown", source, o, 0)

	// What is no profile changes nothing, and is passed over.
	if _, err := ImportProfile(o.Root, raw[:100]); err == nil || !strings.Contains(hint.Of(err), "profile export") {
		t.Error(err)
	}
	if err := os.MkdirAll(filepath.Join(o.Root, profilesDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(o.Root, profilesDir, repositoryKey(p.Repository)+".json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantPrefetch("damaged", source, o, 0)
}

func TestRepository(t *testing.T) {
	for source, want := range map[string]string{
		"docker://host:5000/a/b:1":                            "docker://host:5000/a/b",
		"docker://host:5000/a/b":                              "docker://host:5000/a/b",
		"docker://host/a:1@sha256:" + strings.Repeat("a", 64): "docker://host/a",
		"oci:/x/y:tag":                                        "oci:/x/y",
		"oci:/x/y@sha256:" + strings.Repeat("a", 64):          "oci:/x/y",
		"oci-archive:/x/y.tar":                                "oci-archive:/x/y.tar",
		"layer:/x":                                            "layer:/x",
	} {
		if got := repository(source); got != want {
			t.Errorf("%s: %s, want %s", source, got, want)
		}
	}
}

// BenchmarkNote is what recording costs a read, of which nothing is new.
func BenchmarkNote(b *testing.B) {
	tc := imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.Random("big", 8<<20, 1), imagetest.File("small", "s"))), imagetest.Options{ChunkSize: 64 << 10}))
	x := indexOf(b, tc)
	for name, content := range map[string]image.Digest{"small": digestOf("s"), "big": digestOf(string(imagetest.RandomBytes(8<<20, 1)))} {
		b.Run(name, func(b *testing.B) {
			r := newRecorder(x, nil)
			i, ok := x.Find(content)
			if !ok {
				b.Fatal("no such content")
			}
			b.ReportAllocs()
			for b.Loop() {
				r.note(i, 0, 128<<10)
			}
		})
	}
}

func indexOf(t testing.TB, b *imagetest.Blob) *image.Index {
	t.Helper()
	tc, err := toc.Read(bytes.NewReader(b.Data), b.Desc.Size, toc.Options{Annotations: b.Desc.Annotations})
	if err != nil {
		t.Fatal(err)
	}
	layers := []image.Layer{{Digest: image.Digest{1}, Size: b.Desc.Size, TOC: tc}}
	tree, err := image.Merge(layers)
	if err != nil {
		t.Fatal(err)
	}
	var raw bytes.Buffer
	if err := image.WriteIndex(&raw, tree, layers); err != nil {
		t.Fatal(err)
	}
	x, err := image.OpenIndex(raw.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return x
}
