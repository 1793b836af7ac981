package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// Every kind of source, in every form, shows through each backend and through
// the kernel the tree that umoci unpacks, in everything treediff compares.
func TestTrees(t *testing.T) {
	small, desc, err := set.Manifest(images.EStargz, images.Small)
	if err != nil || len(small.Layers) != 1 {
		t.Fatalf("image small: %v, %d layers", err, len(small.Layers))
	}
	docker := func(form, name string) func(*testing.T) string {
		return func(t *testing.T) string {
			return "docker://" + newLink(t, registry.Addr, lan).addr + "/" + name + ":" + form
		}
	}
	local := func(source string) func(*testing.T) string { return func(*testing.T) string { return source } }
	for _, c := range []struct {
		name   string
		source func(*testing.T) string
		image  string
	}{
		{"docker eStargz", docker(images.EStargz, images.Debian), images.Debian},
		{"docker zstd chunked", docker(images.ZstdChunked, images.Debian), images.Debian},
		{"docker zstd chunked of nanoseconds and opaque folders", docker(images.ZstdChunked, images.Odd), images.Odd},
		{"docker by digest", func(t *testing.T) string {
			return newLink(t, registry.Addr, lan).addr + "/" + images.Small + "@" + desc.Digest.String()
		}, images.Small},
		{"oci of stargz's zstd chunked", local("oci:" + set.Layout(images.ZstdStargz) + ":" + images.Debian), images.Debian},
		{"docker gzip", docker(images.Plain, images.Odd), images.Odd},
		{"oci by digest", local("oci:" + set.Layout(images.EStargz) + "@" + desc.Digest.String()), images.Small},
		{"oci-archive", local("oci-archive:" + set.Archive()), images.Debian},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			source, reference := c.source(t), set.Reference(c.image)
			for _, b.backend = range []string{fuseBackend, hybridBackend} {
				b.root = filepath.Join(b.dir, "root-"+b.backend)
				point := b.mount(source, "--swap", "never")
				b.isServed(point)
				sameTree(t, reference, point, treediff.Options{}) // while bytes arrive
				b.waitFor("sealed", point)
				b.isServed(point)
				sameTree(t, reference, point, treediff.Options{})
				if s := b.status(point); s.State != "sealed" || s.FilesLocal != s.Files || s.BytesLocal != s.Bytes || s.Files == 0 {
					t.Errorf("status of a sealed mount of the %s backend: %+v", b.backend, s)
				}
				b.must("umount", point)
				noProcess(t, point)
			}
			point := b.mount(source)
			isKernel(t, point)
			sameTree(t, reference, point, treediff.Options{})
			b.must("umount", point)
		})
	}
}

// A single layer, by itself, is what tar unpacks from it.
func TestLayerSource(t *testing.T) {
	b := newBench(t)
	plain, _, err := set.Manifest(images.Plain, images.Debian)
	if err != nil {
		t.Fatal(err)
	}
	star, _, err := set.Manifest(images.EStargz, images.Debian)
	if err != nil {
		t.Fatal(err)
	}
	blob := func(form string, hex string) string { return filepath.Join(set.Layout(form), "blobs", "sha256", hex) }
	reference := filepath.Join(b.dir, "reference")
	if err := os.Mkdir(reference, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("tar", "--extract", "--gzip", "--preserve-permissions", "--numeric-owner", "--same-owner", "--delay-directory-restore", "--xattrs", "--xattrs-include=*",
		"--directory", reference, "--file", blob(images.Plain, plain.Layers[0].Digest.Encoded())).CombinedOutput()
	if err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	source := "layer:" + blob(images.EStargz, star.Layers[0].Digest.Encoded())
	point := b.mount(source)
	sameTree(t, reference, point, treediff.Options{})
	b.waitFor("swapped", point)
	sameTree(t, reference, point, treediff.Options{})
}

// The sealed image and the objects are an ordinary composefs: FUSE serves
// them with nothing else of the store.
func TestComposefsSource(t *testing.T) {
	b := newBench(t)
	point := b.mount("oci:" + set.Layout(images.ZstdChunked) + ":" + images.Odd)
	b.waitFor("swapped", point)
	b.must("umount", point)
	sealed, err := filepath.Glob(filepath.Join(b.root, "images", "*", "sealed.erofs"))
	if err != nil || len(sealed) != 1 {
		t.Fatalf("sealed images: %q, %v", sealed, err)
	}
	b.backend = fuseBackend
	point = b.mount("composefs:"+sealed[0], "--objects", filepath.Join(b.root, "objects"))
	b.isServed(point)
	sameTree(t, set.Reference(images.Odd), point, treediff.Options{})
	b.must("umount", point)
	noProcess(t, point)
}
