package images

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A recipe says how one layer is converted by the estargz package.
type recipe struct {
	options   []estargz.Option
	mediaType string
	metadata  map[string]string // annotations the compressor fills in; nil for gzip
}

// estargz converts images, each layer with another layout of TOC:
// plain, with prioritised files before a prefetch landmark, and with several
// files in one gzip member (innerOffset).
func (b *builder) estargz(ctx context.Context) error {
	recipeOf := func(layer int) recipe {
		r := recipe{mediaType: ocispec.MediaTypeImageLayerGzip}
		r.options = []estargz.Option{estargz.WithCompressionLevel(6)}
		switch layer {
		case 1:
			r.options = append(r.options, estargz.WithPrioritizedFiles([]string{"usr/bin/python3.11", "usr/sbin/nginx"}),
				estargz.WithAllowPrioritizeNotFound(new([]string))) // python's name changes with the release
		case 2:
			r.options = append(r.options, estargz.WithMinChunkSize(64<<10))
		}
		return r
	}
	for _, name := range []string{Debian, Small} {
		if err := b.convert(ctx, EStargz, name, recipeOf); err != nil {
			return err
		}
	}
	return nil
}

// zstdStargz converts the Debian image to zstd:chunked as stargz-snapshotter
// writes it.
func (b *builder) zstdStargz(ctx context.Context) error {
	return b.convert(ctx, ZstdStargz, Debian, func(int) recipe {
		metadata := map[string]string{}
		return recipe{mediaType: ocispec.MediaTypeImageLayerZstd, metadata: metadata,
			options: []estargz.Option{estargz.WithCompression(&zstdCompression{
				Compressor: &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: metadata}})}}
	})
}

// zstdCompression is both halves that estargz.WithCompression wants.
type zstdCompression struct {
	*zstdchunked.Compressor
	*zstdchunked.Decompressor
}

// convert adds an image to the layout form, every layer rebuilt by its recipe,
// and config and manifest saying so.
func (b *builder) convert(ctx context.Context, form, name string, recipeOf func(layer int) recipe) error {
	src, dst := b.path(Plain), b.path(form)
	m, _, err := readManifest(src, name)
	if err != nil {
		return err
	}
	var config ocispec.Image
	if err := readJSON(blobPath(src, m.Config), &config); err != nil {
		return err
	}
	for i, l := range m.Layers {
		desc, diffID, err := convertLayer(ctx, blobPath(src, l), dst, recipeOf(i))
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		m.Layers[i], config.RootFS.DiffIDs[i] = desc, diffID
	}
	return WriteImage(dst, name, config, m.Layers)
}

// WriteImage adds an image to the OCI layout dir, made when it is not there:
// its configuration, its manifest and the tag. The blobs of the layers must be
// there already (PutBlob).
func WriteImage(dir, tag string, config ocispec.Image, layers []ocispec.Descriptor) error {
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: layers}
	var err error
	if m.Config, err = putJSON(dir, ocispec.MediaTypeImageConfig, config); err != nil {
		return err
	}
	desc, err := putJSON(dir, ocispec.MediaTypeImageManifest, m)
	if err != nil {
		return err
	}
	desc.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	path := filepath.Join(dir, ocispec.ImageIndexFile)
	if err := readJSON(path, &index); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	index.Manifests = append(index.Manifests, desc)
	if err := writeJSON(path, index); err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, ocispec.ImageLayoutFile), ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
}

// convertLayer writes the layer at path into the layout dst.
func convertLayer(ctx context.Context, path, dst string, r recipe) (desc ocispec.Descriptor, diffID digest.Digest, err error) {
	f, err := os.Open(path)
	if err != nil {
		return desc, "", err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return desc, "", err
	}
	blob, err := estargz.Build(io.NewSectionReader(f, 0, st.Size()), append(r.options, estargz.WithContext(ctx))...)
	if err != nil {
		return desc, "", err
	}
	desc, err = PutBlob(dst, r.mediaType, blob)
	if cerr := blob.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return desc, "", err
	}
	size, err := blob.UncompressedSize()
	if err != nil {
		return desc, "", err
	}
	desc.Annotations = map[string]string{
		estargz.TOCJSONDigestAnnotation:         blob.TOCDigest().String(),
		estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(size, 10),
	}
	for k, v := range r.metadata {
		desc.Annotations[k] = v
	}
	return desc, blob.DiffID(), nil
}

// PutBlob writes what r gives into the OCI layout under its digest, and
// returns its descriptor. The layout is made when it is not there.
func PutBlob(layout, mediaType string, r io.Reader) (ocispec.Descriptor, error) {
	if err := os.MkdirAll(filepath.Join(layout, "blobs", "sha256"), 0o755); err != nil {
		return ocispec.Descriptor{}, err
	}
	f, err := os.CreateTemp(layout, "blob-*")
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := digest.SHA256.Digester()
	n, err := io.Copy(io.MultiWriter(f, d.Hash()), r)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: d.Digest(), Size: n}
	return desc, os.Rename(f.Name(), blobPath(layout, desc))
}

func putJSON(layout, mediaType string, v any) (ocispec.Descriptor, error) {
	text, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return PutBlob(layout, mediaType, bytes.NewReader(text))
}

func writeJSON(path string, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o644)
}

// archive keeps the eStargz image as one tar file too.
func (b *builder) archive(ctx context.Context) error {
	return b.run(ctx, "skopeo", "copy", "oci:"+b.path(EStargz)+":"+Debian, "oci-archive:"+b.path("estargz.tar")+":"+Debian)
}

// zstdChunked has skopeo compress all images again. Version 1.9 names its
// annotations io.containers.zstd-chunked.*, later ones
// io.github.containers.zstd-chunked.*.
func (b *builder) zstdChunked(ctx context.Context) error {
	for _, name := range []string{Debian, Odd, Small} {
		err := b.run(ctx, "skopeo", "copy", "--dest-compress-format", "zstd:chunked",
			"oci:"+b.path(Plain)+":"+name, "oci:"+b.path(ZstdChunked)+":"+name)
		if err != nil {
			return err
		}
		m, _, err := readManifest(b.path(ZstdChunked), name)
		if err != nil {
			return err
		}
		for i, l := range m.Layers {
			if len(l.Annotations) == 0 {
				return fmt.Errorf("skopeo wrote layer %d of %s without annotations: this version does not know zstd:chunked", i, name)
			}
		}
	}
	return nil
}

// fillRegistry pushes every image in every form, as it is.
func (b *builder) fillRegistry(ctx context.Context) error {
	r, err := StartRegistry(ctx, RegistryOptions{Storage: b.path("registry"), Dir: b.dir})
	if err != nil {
		return err
	}
	defer r.Close()
	for _, push := range [][2]string{{EStargz, Debian}, {ZstdChunked, Debian}, {ZstdStargz, Debian}, {ZstdChunked, Odd}, {Plain, Odd}, {EStargz, Small}, {ZstdChunked, Small}} {
		if err := Push(ctx, b.path(push[0]), push[1], r.Addr, push[0]); err != nil {
			return err
		}
	}
	return r.Close()
}

// Push copies an image from an OCI layout, byte for byte, to the registry at
// addr (HTTP), as repository name with the given tag.
func Push(ctx context.Context, layout, name, addr, tag string) error {
	out, err := exec.CommandContext(ctx, "skopeo", "copy", "--preserve-digests", "--dest-tls-verify=false",
		"oci:"+layout+":"+name, "docker://"+addr+"/"+name+":"+tag).CombinedOutput()
	if err != nil {
		return fmt.Errorf("push %s:%s: %w: %s", name, tag, err, bytes.TrimSpace(out))
	}
	return nil
}
