package imagetest

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// An OCI is an image: a manifest with its config and layers, or (from Index)
// an index of several.
type OCI struct {
	Desc   ocispec.Descriptor       // of the manifest or index
	Raw    []byte                   // the manifest or index itself
	Config []byte                   // the config; nil for an index
	Layers []ocispec.Descriptor     // lowest first; nil for an index
	Blobs  map[digest.Digest][]byte // everything Desc leads to, itself included
}

// Image makes an image of layers, the lowest first, for Linux on this machine's
// architecture.
func Image(layers ...*Blob) (*OCI, error) {
	return ImageFor(ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, layers...)
}

// ImageFor is Image for the given platform.
func ImageFor(p ocispec.Platform, layers ...*Blob) (*OCI, error) {
	o := &OCI{Blobs: map[digest.Digest][]byte{}}
	config := ocispec.Image{Platform: p, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
		o.Layers = append(o.Layers, l.Desc)
		o.Blobs[l.Desc.Digest] = l.Data
	}
	configDesc, err := o.add(ocispec.MediaTypeImageConfig, &o.Config, config)
	if err != nil {
		return nil, fmt.Errorf("make config: %w", err)
	}
	o.Desc, err = o.add(ocispec.MediaTypeImageManifest, &o.Raw, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: configDesc, Layers: o.Layers,
	})
	if err != nil {
		return nil, fmt.Errorf("make manifest: %w", err)
	}
	o.Desc.Platform = &p
	return o, nil
}

// WithManifest is the image o with another manifest, for what Image does not
// write into one: annotations.
func WithManifest(o *OCI, m ocispec.Manifest) (*OCI, error) {
	n := *o
	n.Blobs = maps.Clone(o.Blobs)
	delete(n.Blobs, o.Desc.Digest)
	d, err := n.add(ocispec.MediaTypeImageManifest, &n.Raw, m)
	if err != nil {
		return nil, fmt.Errorf("make manifest: %w", err)
	}
	d.Platform, n.Desc = o.Desc.Platform, d
	return &n, nil
}

// Index makes an index of images made by Image or ImageFor.
func Index(images ...*OCI) (*OCI, error) {
	o := &OCI{Blobs: map[digest.Digest][]byte{}}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, im := range images {
		index.Manifests = append(index.Manifests, im.Desc)
		maps.Copy(o.Blobs, im.Blobs)
	}
	var err error
	if o.Desc, err = o.add(ocispec.MediaTypeImageIndex, &o.Raw, index); err != nil {
		return nil, fmt.Errorf("make index: %w", err)
	}
	return o, nil
}

func (o *OCI) add(mediaType string, raw *[]byte, v any) (ocispec.Descriptor, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	*raw = b
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
	o.Blobs[d.Digest] = b
	return d, nil
}

// files lists the files of an OCI image layout (image-spec, image-layout.md),
// whose index.json names the image by tag, or not at all when tag is "".
func (o *OCI) files(tag string) (map[string][]byte, error) {
	desc := o.Desc
	if tag != "" {
		desc.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{desc},
	})
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{
		ocispec.ImageLayoutFile: []byte(`{"imageLayoutVersion":"` + ocispec.ImageLayoutVersion + `"}`),
		ocispec.ImageIndexFile:  index,
	}
	for d, b := range o.Blobs {
		files[filepath.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())] = b
	}
	return files, nil
}

// WriteLayout writes the image as an OCI image layout into the folder dir,
// which it makes, under the tag (none when ""). It replaces the index.json of
// a layout that is there already, and keeps its blobs.
func (o *OCI) WriteLayout(dir, tag string) error {
	files, err := o.files(tag)
	if err != nil {
		return fmt.Errorf("write layout %s: %w", dir, err)
	}
	for name, b := range files {
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			return fmt.Errorf("write layout: %w", err)
		}
		if err := os.WriteFile(p, b, 0o644); err != nil {
			return fmt.Errorf("write layout: %w", err)
		}
	}
	return nil
}

// WriteArchive writes the same layout as a tar, which skopeo and podman call an
// oci-archive.
func (o *OCI) WriteArchive(w io.Writer, tag string) error {
	files, err := o.files(tag)
	if err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	tw := tar.NewWriter(w)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(files[name]))}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("write archive: %w", err)
		}
		if _, err := tw.Write(files[name]); err != nil {
			return fmt.Errorf("write archive: %w", err)
		}
	}
	if err := tw.Close(); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	return nil
}
