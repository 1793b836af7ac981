package mount

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// find returns the links whose text begins with what.
func (l *Link) find(what string) (all []*Link) {
	if strings.HasPrefix(l.What, what) {
		all = append(all, l)
	}
	for _, c := range l.Links {
		all = append(all, c.find(what)...)
	}
	return all
}

func verify(t *testing.T, source string, o VerifyOptions) *Link {
	t.Helper()
	top, err := Verify(t.Context(), source, o)
	if err != nil {
		t.Fatal(err)
	}
	return top
}

// wants compares the findings of the links that begin with what.
func wants(t *testing.T, top *Link, what string, want ...Finding) {
	t.Helper()
	var got []Finding
	for _, l := range top.find(what) {
		got = append(got, l.Finding)
	}
	if !slices.Equal(got, want) {
		text, _ := json.MarshalIndent(top, "", " ")
		t.Errorf("%s: %v, want %v\n%s", what, got, want, text)
	}
}

// Of a sealed image everything is proven that a kernel without fs-verity
// leaves to be proven; and each kind of damage is wrong where it lies.
func TestVerify(t *testing.T) {
	source, root := twoLayers(t), filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Root: root, Swap: Never})
	waitFor(t, m, Sealed)
	o := VerifyOptions{Options: Options{Root: root}, Mountpoint: mnt}
	top := verify(t, source, o)
	if n := top.Count(Wrong); n > 0 {
		t.Errorf("%d links of a good image are wrong", n)
	}
	for _, what := range []string{"reference", "manifest", "config", "tree of", "sealed image"} {
		wants(t, top, what, Proven)
	}
	wants(t, top, "table of contents", Proven, Proven)
	wants(t, top, "blob", Proven, Proven)
	wants(t, top, "DiffID", Proven, Proven)
	wants(t, top, "mount", Unproven) // FUSE
	dir := m.image.dir
	v, err := m.contents.Verity(0)
	if err != nil {
		t.Fatal(err)
	}
	content := m.image.index.Content(0).Digest
	end(t, m, mnt)
	o.Mountpoint = ""

	// Others are put in the files' places: verity files cannot be written.
	damage := func(path string, change func(b []byte) []byte) (undo func()) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path, path+".kept"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, change(slices.Clone(b)), 0o644); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.Rename(path+".kept", path); err != nil {
				t.Fatal(err)
			}
		}
	}
	flip := func(b []byte) []byte { b[len(b)/2] ^= 1; return b }
	for _, c := range []struct {
		path, what string
		change     func([]byte) []byte
	}{
		{filepath.Join(root, "contents/sha256", content.Path()), "content " + content.String(), flip},
		{filepath.Join(root, "objects", v.Path()), "content " + content.String(), flip},
		{filepath.Join(root, "objects", v.Path()), "content " + content.String(), func(b []byte) []byte { return b[1:] }},
		{filepath.Join(dir, lazyName), "tree of", func(b []byte) []byte { b[len(b)-1] ^= 1; return b }},
		{filepath.Join(dir, sealedName), "sealed image", flip},
		{filepath.Join(dir, recordName), "sealed image", func(b []byte) []byte { return b[1:] }},
	} {
		undo := damage(c.path, c.change)
		wants(t, verify(t, source, o), c.what, Wrong)
		undo()
	}
	// A content that is not there is not wrong.
	undo := damage(filepath.Join(root, "contents/sha256", content.Path()), flip)
	os.Remove(filepath.Join(root, "contents/sha256", content.Path()))
	top = verify(t, source, o)
	wants(t, top, "1 contents", Unproven)
	wants(t, top, "sealed image", Unproven)
	undo()
	// Neither is a source that is gone, or was not given.
	path := strings.TrimSuffix(strings.TrimPrefix(source, "oci:"), ":latest")
	if err := os.Rename(path, path+".away"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{source, m.Status().ManifestDigest} {
		top = verify(t, name, o)
		wants(t, top, "tree of", Unproven)
		wants(t, top, "sealed image", Proven)
	}
	if _, err := Verify(t.Context(), "oci:/nowhere:t", o); err == nil || !strings.Contains(err.Error(), "no image of oci:/nowhere:t") {
		t.Errorf("of an image that was never mounted: %v", err)
	}
	if _, err := Verify(t.Context(), source, VerifyOptions{Options: Options{Root: t.TempDir()}}); err == nil {
		t.Error("no error without a store")
	}
}

// A layer that is not what the config says has a wrong DiffID, and the manifest's
// annotation is held against the sealed image.
func TestVerifyClaims(t *testing.T) {
	blob := imagetest.Must(imagetest.ContainersZstdChunked(imagetest.Must(imagetest.Tar(imagetest.File("a", "1"))), imagetest.Options{}))
	blob.DiffID = imagetest.Must(imagetest.Gzip([]byte("another"))).DiffID
	im := imagetest.Must(imagetest.Image(blob))
	layout, root := filepath.Join(t.TempDir(), "layout"), filepath.Join(t.TempDir(), "root")
	if err := im.WriteLayout(layout, "t"); err != nil {
		t.Fatal(err)
	}
	source := "oci:" + layout + ":t"
	m, mnt := start(t, source, Options{Root: root, Swap: Never})
	waitFor(t, m, Sealed)
	digest := m.Status().ComposefsDigest
	end(t, m, mnt)
	o := VerifyOptions{Options: Options{Root: root}}
	top := verify(t, source, o)
	wants(t, top, "blob", Proven)
	wants(t, top, "DiffID", Wrong)
	wants(t, top, "annotation")

	for _, c := range []struct {
		annotation string
		sealed     bool
	}{{digest, true}, {strings.Repeat("ab", 32), false}} {
		// The same image, sealed by its author.
		var manifest ocispec.Manifest
		if err := json.Unmarshal(im.Raw, &manifest); err != nil {
			t.Fatal(err)
		}
		manifest.Annotations = map[string]string{sealingKey: c.annotation}
		author, err := imagetest.WithManifest(im, manifest)
		if err != nil {
			t.Fatal(err)
		}
		if err := author.WriteLayout(layout, "t"); err != nil {
			t.Fatal(err)
		}
		m, mnt := start(t, source, Options{Root: root})
		err = m.WaitFor(t.Context(), Sealed)
		if (err == nil) != c.sealed || !c.sealed && !strings.Contains(err.Error(), "annotation "+sealingKey) {
			t.Errorf("annotation %s: sealed with %v", c.annotation, err)
		}
		end(t, m, mnt)
		if c.sealed {
			wants(t, verify(t, source, o), "annotation", Proven)
			continue
		}
		// Who asks for the digest knows better than the author.
		var d hexDigest
		if err := d.UnmarshalText([]byte(digest)); err != nil {
			t.Fatal(err)
		}
		m, mnt = start(t, source, Options{Root: root, Digest: image.Digest(d)})
		waitFor(t, m, Sealed)
		end(t, m, mnt)
		wants(t, verify(t, source, o), "annotation", Wrong)
	}
}
