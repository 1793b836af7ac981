package convert_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/convert"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	. "github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/repository"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

var formats = []convert.Format{convert.EStargz, convert.ZstdChunked}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// plain is a layer as docker makes it, with n in its contents.
func plain(n int) *Blob {
	return must(Gzip(must(Tar(Dir("usr/"), Dir("usr/bin/"), File("usr/first", fmt.Sprint("first ", n)), Random("usr/large", 300_000, uint64(n)),
		File("usr/bin/tool", fmt.Sprint("tool ", n)), File("usr/bin/other", "other"), Hardlink("usr/bin/link", "usr/bin/tool"), Symlink("bin", "usr/bin")))))
}

// layout writes an image into a new layout and returns its source name.
func layout(t *testing.T, o *OCI) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "source")
	if err := o.WriteLayout(dir, "1"); err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir + ":1"
}

func source(t *testing.T, name string) fetcher.Source {
	t.Helper()
	s, err := fetcher.OpenSource(name, fetcher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// run converts to a new layout and returns its name.
func run(t *testing.T, from string, o convert.Options) (string, ocispec.Descriptor, error) {
	t.Helper()
	name := "oci:" + filepath.Join(t.TempDir(), "dest") + ":2"
	to, err := repository.Open(name, true, fetcher.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	// What has no name yet is not there, whatever happens.
	tmp := t.TempDir()
	t.Setenv("TMPDIR", tmp)
	d, err := convert.Convert(t.Context(), source(t, from), to, "2", o)
	if left, _ := os.ReadDir(tmp); len(left) > 0 {
		t.Errorf("temporary files are left: %v", left)
	}
	return name, d, err
}

func blob(t *testing.T, s fetcher.Source, d ocispec.Descriptor) []byte {
	t.Helper()
	r, err := s.Blob(d).ReadRange(t.Context(), 0, d.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil || digest.FromBytes(b) != d.Digest {
		t.Fatalf("blob %s: %v", d.Digest, err)
	}
	return b
}

// unpacked decompresses a layer with nothing of ours.
func unpacked(t *testing.T, d ocispec.Descriptor, b []byte) []byte {
	t.Helper()
	var r io.Reader
	switch d.MediaType {
	case ocispec.MediaTypeImageLayerGzip:
		r = must(gzip.NewReader(bytes.NewReader(b)))
	case ocispec.MediaTypeImageLayerZstd:
		z := must(zstd.NewReader(bytes.NewReader(b)))
		defer z.Close()
		r = z
	default:
		t.Fatalf("media type %s", d.MediaType)
	}
	return must(io.ReadAll(r))
}

func names(t *testing.T, tarball []byte) []string {
	t.Helper()
	var all []string
	r := tar.NewReader(bytes.NewReader(tarball))
	for {
		h, err := r.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Name != estargz.TOCTarName {
			all = append(all, h.Name)
		}
	}
}

// check reads a converted image of one platform and compares all digests.
func check(t *testing.T, name, platform string) (layers []*toc.TOC, tars [][]byte, m ocispec.Manifest) {
	t.Helper()
	s, err := fetcher.OpenSource(name, fetcher.Options{Platform: platform})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	manifest, err := s.Resolve(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(must(fetcher.ReadConfig(t.Context(), s, manifest)), &config); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(manifest.Raw, &m); err != nil {
		t.Fatal(err)
	}
	for i, l := range m.Layers {
		b := blob(t, s, l)
		tarball := unpacked(t, l, b)
		if got := digest.FromBytes(tarball); got != config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d: DiffID %s, the config has %s", i, got, config.RootFS.DiffIDs[i])
		}
		names(t, tarball)
		found, err := toc.Read(bytes.NewReader(b), l.Size, toc.Options{Annotations: l.Annotations})
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		layers, tars = append(layers, found), append(tars, tarball)
	}
	return layers, tars, m
}

func TestConvert(t *testing.T) {
	for _, f := range formats {
		t.Run(string(f), func(t *testing.T) {
			a := plain(1)
			o := must(Image(a, plain(2)))
			var seen []string
			var read, found int64
			from := layout(t, o)
			name, d, err := run(t, from, convert.Options{Format: f, Progress: func(e convert.Event) {
				read, found = read+e.Read, found+e.Found
				switch {
				case e.Layer != nil:
					seen = append(seen, "layer")
				case e.Image != nil:
					seen = append(seen, "image "+e.Image.Platform)
				}
			}})
			if err != nil {
				t.Fatal(err)
			}
			if read != found || found != o.Layers[0].Size+o.Layers[1].Size {
				t.Errorf("read %d of %d", read, found)
			}
			if want := "image " + o.Desc.Platform.OS + "/" + o.Desc.Platform.Architecture; len(seen) != 3 || seen[2] != want {
				t.Errorf("events: %q, want two layers and %q", seen, want)
			}
			layers, tars, m := check(t, name, "")
			if len(layers) != 2 {
				t.Fatalf("%d layers", len(layers))
			}
			for i, l := range layers {
				if l.PrefetchEnd != 0 {
					t.Errorf("layer %d: prioritized files to %d", i, l.PrefetchEnd)
				}
			}
			if f == convert.ZstdChunked && digest.FromBytes(tars[0]) != a.DiffID {
				t.Error("the tar is not as it was")
			}
			if f == convert.EStargz {
				s := source(t, name)
				b := blob(t, s, m.Layers[0])
				r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(b), 0, int64(len(b))))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := r.VerifyTOC(digest.Digest(m.Layers[0].Annotations[estargz.TOCJSONDigestAnnotation])); err != nil {
					t.Error(err)
				}
			}
			if _, again, err := run(t, from, convert.Options{Format: f}); err != nil || again.Digest != d.Digest {
				t.Errorf("a second time: %s, want %s; %v", again.Digest, d.Digest, err)
			}
			// What was made lazy can be made so again, of the other form too.
			for _, g := range formats {
				if name, _, err := run(t, name, convert.Options{Format: g}); err != nil {
					t.Errorf("from %s to %s: %v", f, g, err)
				} else if _, tars, _ := check(t, name, ""); g == convert.ZstdChunked && slices.Contains(names(t, tars[0]), estargz.NoPrefetchLandmark) {
					t.Error("the landmark was taken over")
				}
			}
		})
	}
}

// All platforms of an index are converted, and what speaks of the source is not.
func TestIndex(t *testing.T) {
	shared := plain(0)
	arm := must(ImageFor(ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}, shared, plain(1)))
	amd := must(ImageFor(ocispec.Platform{OS: "linux", Architecture: "amd64"}, shared, plain(2)))
	attestation := must(ImageFor(ocispec.Platform{OS: "unknown", Architecture: "unknown"}, plain(3)))
	attestation.Desc.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest"}
	x := must(Index(arm, amd, attestation))
	left, layers := 0, 0
	name, d, err := run(t, layout(t, x), convert.Options{Format: convert.ZstdChunked, Progress: func(e convert.Event) {
		if e.Left != nil {
			left++
		}
		if e.Layer != nil {
			layers++
		}
	}})
	if err != nil {
		t.Fatal(err)
	}
	if left != 1 || layers != 3 {
		t.Errorf("%d left out and %d layers converted, want 1 and 3", left, layers)
	}
	if d.MediaType != ocispec.MediaTypeImageIndex {
		t.Errorf("media type %s", d.MediaType)
	}
	for _, p := range []string{"linux/arm64", "linux/amd64"} {
		check(t, name, p)
	}
	doc, err := fetcher.ReadRoot(t.Context(), source(t, name))
	if err != nil || doc.Index == nil || len(doc.Index.Manifests) != 2 || doc.Index.Manifests[0].Platform.Variant != "v8" {
		t.Errorf("%+v, %v", doc, err)
	}
}

// The files of the profile come first, in its order, before the landmark.
func TestProfile(t *testing.T) {
	for _, f := range formats {
		t.Run(string(f), func(t *testing.T) {
			access := func(text string) image.Access {
				return image.Access{Content: must(toc.ParseDigest(digest.FromString(text).String())), N: int64(len(text))}
			}
			profile := &image.Profile{Accesses: []image.Access{access("tool 1"), access("in no layer"), access("first 1"), access("tool 1")}}
			name, _, err := run(t, layout(t, must(Image(plain(1)))), convert.Options{Format: f,
				Profile: func(context.Context, digest.Digest) (*image.Profile, error) { return profile, nil }})
			if err != nil {
				t.Fatal(err)
			}
			layers, tars, _ := check(t, name, "")
			want := []string{"usr/", "usr/bin/", "usr/bin/tool", "usr/first", estargz.PrefetchLandmark, "usr/large", "usr/bin/other", "usr/bin/link", "bin"}
			if got := names(t, tars[0]); !slices.Equal(got, want) {
				t.Errorf("order %q, want %q", got, want)
			}
			if layers[0].PrefetchEnd == 0 {
				t.Error("no landmark in the TOC")
			}
		})
	}
}

// The sealed digest is in the manifest, and is of the tree, whatever the form.
func TestSeal(t *testing.T) {
	from := layout(t, must(Image(plain(1), must(Gzip(must(Tar(Whiteout("usr/bin/other"), File("usr/new", "new"))))))))
	var digests []string
	for _, f := range formats {
		name, _, err := run(t, from, convert.Options{Format: f, Seal: true})
		if err != nil {
			t.Fatal(err)
		}
		_, _, m := check(t, name, "")
		digests = append(digests, m.Annotations[mount.SealingKey])
	}
	if len(digests[0]) != 64 || digests[0] != digests[1] {
		t.Errorf("digests %q", digests)
	}
}

// What a config and a manifest have that we do not know stays; what speaks of
// bytes that are gone does not.
func TestKept(t *testing.T) {
	o := must(Image(plain(1)))
	var m ocispec.Manifest
	if err := json.Unmarshal(o.Raw, &m); err != nil {
		t.Fatal(err)
	}
	config := bytes.Replace(o.Config, []byte("{"), []byte(`{"x-odd":{"a":1},`), 1)
	m.Config.Digest, m.Config.Size = digest.FromBytes(config), int64(len(config))
	m.Annotations = map[string]string{"org.example": "stays", "composefs.merged.erofs.v1.fsverity-sha256-12": strings.Repeat("0", 64)}
	m.Layers[0].Annotations = map[string]string{"org.example": "stays", estargz.TOCJSONDigestAnnotation: "sha256:0"}
	o = must(WithManifest(o, m))
	o.Blobs[m.Config.Digest] = config
	name, _, err := run(t, layout(t, o), convert.Options{Format: convert.ZstdChunked})
	if err != nil {
		t.Fatal(err)
	}
	s := source(t, name)
	manifest := must(s.Resolve(t.Context()))
	if raw := must(fetcher.ReadConfig(t.Context(), s, manifest)); !bytes.Contains(raw, []byte(`"x-odd":{"a":1}`)) {
		t.Errorf("config %s", raw)
	}
	_, _, got := check(t, name, "")
	if len(got.Annotations) != 1 || got.Annotations["org.example"] != "stays" {
		t.Errorf("annotations of the manifest: %v", got.Annotations)
	}
	if a := got.Layers[0].Annotations; a["org.example"] != "stays" || a[estargz.TOCJSONDigestAnnotation] != "" {
		t.Errorf("annotations of the layer: %v", a)
	}
}

// With an error, nothing has a name.
func TestErrors(t *testing.T) {
	good := plain(1)
	liar := *good
	liar.DiffID = digest.FromString("something else")
	damaged := *good
	damaged.Data = bytes.Clone(good.Data)
	damaged.Data[len(damaged.Data)/2] ^= 1
	cut := *good
	cut.Data = cut.Data[:100]
	cut.Desc = ocispec.Descriptor{MediaType: good.Desc.MediaType, Digest: digest.FromBytes(cut.Data), Size: 100}
	foreign := *good
	foreign.Desc.MediaType = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
	noTar := must(Gzip([]byte(strings.Repeat("no tar", 1000))))
	for name, c := range map[string]struct {
		layer *Blob
		want  string
	}{
		"DiffID": {&liar, "DiffID"}, "damaged": {&damaged, "layer 1"}, "cut": {&cut, "EOF"},
		"foreign": {&foreign, "no layer that can be converted"}, "no tar": {noTar, "read the tar"},
	} {
		for _, f := range formats {
			t.Run(name+" "+string(f), func(t *testing.T) {
				dest, _, err := run(t, layout(t, must(Image(plain(2), c.layer))), convert.Options{Format: f})
				if err == nil || !strings.Contains(err.Error(), c.want) {
					t.Fatalf("error %v, want one with %q", err, c.want)
				}
				if _, err := source(t, dest).Resolve(t.Context()); err == nil {
					t.Error("the image is there all the same")
				}
			})
		}
	}
	if _, _, err := run(t, layout(t, must(Image(good))), convert.Options{Format: "nydus"}); err == nil {
		t.Error("format nydus: no error")
	}
}

func TestCancelled(t *testing.T) {
	stop := errors.New("stop")
	for _, f := range formats {
		ctx, cancel := context.WithCancelCause(t.Context())
		name := "oci:" + filepath.Join(t.TempDir(), "dest") + ":2"
		to, err := repository.Open(name, true, fetcher.Options{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = convert.Convert(ctx, source(t, layout(t, must(Image(plain(1), plain(2))))), to, "2", convert.Options{Format: f, Progress: func(e convert.Event) {
			if e.Read > 0 {
				cancel(stop)
			}
		}})
		if !errors.Is(err, stop) {
			t.Errorf("%s: %v", f, err)
		}
		if _, err := source(t, name).Resolve(t.Context()); err == nil {
			t.Errorf("%s: the image is there all the same", f)
		}
	}
}

// Tars of many makes come out with all that is in them.
func TestOddTars(t *testing.T) {
	var links []Item
	for i := range 3 {
		links = append(links, Hardlink(fmt.Sprint("cycle", i), fmt.Sprint("cycle", (i+1)%3)))
	}
	for name, tarball := range map[string][]byte{
		"empty":  must(Tar()),
		"no end": must(Tar(File("f", "content")))[:1024],
		"twice":  must(Tar(File("f", "old"), Dir("d/"), File("d/x", "x"), File("f", "new"), Dir("d/"))),
		"dots":   must(Tar(Dir("./"), File("./f", "content"), File("./d/g", "more"))),
		"cycle":  must(Tar(append(links, File("f", "new"))...)),
		"orphan": must(Tar(File("a/b/f", "old"), File("a/c/f", "new"))),
		"long":   must(Tar(File(strings.Repeat("long/", 60)+"f", "new"))),
	} {
		for _, f := range formats {
			t.Run(name+" "+string(f), func(t *testing.T) {
				new := must(toc.ParseDigest(digest.FromString("new").String()))
				dest, _, err := run(t, layout(t, must(Image(must(Gzip(tarball))))), convert.Options{Format: f, Profile: func(context.Context, digest.Digest) (*image.Profile, error) {
					return &image.Profile{Accesses: []image.Access{{Content: new, N: 3}}}, nil
				}})
				if err != nil {
					t.Fatal(err)
				}
				layers, _, _ := check(t, dest, "")
				if got, want := len(layers[0].Entries), len(slices.Compact(slices.Sorted(slices.Values(names(t, tarball))))); got < want {
					t.Errorf("%d entries, want %d", got, want)
				}
			})
		}
	}
}
