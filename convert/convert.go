// Package convert makes images of ordinary layers lazy: the same trees and
// configs, with eStargz or zstd:chunked layers, for all platforms of an index.
// It reads from a Source and writes to a Target; nothing of the source changes,
// and it mounts nothing.
//
//	blob ─► decompress ─► tar on disk ─► eStargz │ zstd:chunked ─► blob on disk ─► Target.Put
//	          │ digest and DiffID compared        │ read again by package toc
//	manifest, index: written when all they list is there; the tag last
//
// The same source with the same options gives the same bytes: nothing of the time,
// of the machine or of the number of threads is in the result. Layers are
// converted side by side; of each there is its tar and its new blob in
// temporary files without names ($TMPDIR), which an end of any kind removes.
package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// A Format is what the layers are made.
type Format string

// The formats.
const (
	EStargz     Format = "estargz"
	ZstdChunked Format = "zstd:chunked"
)

// Options of Convert. The zero value makes eStargz layers without prioritized
// files.
type Options struct {
	Format Format

	// Profile gives the access profile for an image of the source, nil if
	// there is none, by its manifest. The files that it names come first in
	// each layer. Nil: there are none.
	Profile func(ctx context.Context, manifest digest.Digest) (*image.Profile, error)

	// Seal computes the composefs digest of each image and notes it in
	// the manifest's annotations (mount.SealingKey).
	Seal bool

	// Progress hears what happens, one call at a time. Nil: nobody does.
	Progress func(Event)
}

// An Event is a step of Convert. Exactly one field is not zero.
type Event struct {
	Found int64    // so many more bytes of layers are to be read
	Read  int64    // so many more have been
	Layer *Layer   // this one is at the target
	Image *Image   // so is this one
	Left  *Skipped // this one of the index is not converted
}

// A Layer is one that was converted.
type Layer struct {
	Source, Result ocispec.Descriptor
	DiffID         digest.Digest // of Result
	Prioritized    int           // files that come first
}

// An Image is one that was converted.
type Image struct {
	Platform       string // "linux/amd64", "" if the source does not say
	Source, Result ocispec.Descriptor
	Layers         int
	Read, Written  int64  // bytes of the layers
	Composefs      string // the sealed image's fs-verity digest, with Seal
}

// Skipped is something in an index that is no image.
type Skipped struct {
	Desc ocispec.Descriptor
	Why  string
}

// A Target is where the result goes. Blobs are put before the manifests that
// list them, and only the last manifest has a tag.
type Target interface {
	Put(ctx context.Context, d ocispec.Descriptor, from io.ReaderAt) error
	PutManifest(ctx context.Context, mediaType string, raw []byte, tag string) (ocispec.Descriptor, error)
}

// maxNesting bounds indexes inside indexes, maxImages how many manifests of one
// are worked on at once.
const (
	maxNesting = 4
	maxImages  = 16
)

type converter struct {
	src   fetcher.Source
	to    Target
	o     Options
	slots chan struct{} // one for each layer that is worked on

	mu     sync.Mutex // of calls of Progress, and:
	layers map[layerKey]*layerJob
}

// Convert converts what src names, an image or an index of several, and writes
// it to the target under the tag. A nil error promises that all of it is there.
// With an error there may be blobs that nothing names, and no tag has changed.
func Convert(ctx context.Context, src fetcher.Source, to Target, tag string, o Options) (ocispec.Descriptor, error) {
	if o.Format == "" {
		o.Format = EStargz
	}
	if o.Format != EStargz && o.Format != ZstdChunked {
		return ocispec.Descriptor{}, fmt.Errorf("convert %s: format %q is not known, only %s and %s", src, o.Format, EStargz, ZstdChunked)
	}
	c := &converter{
		src: src, to: to, o: o, layers: map[layerKey]*layerJob{},
		// Each layer keeps about two processors busy, and waits for its source besides.
		slots: make(chan struct{}, max(2, runtime.GOMAXPROCS(0))),
	}
	root, err := fetcher.ReadRoot(ctx, src)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := c.document(ctx, root, nil, tag, 0)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && errors.Is(err, context.Canceled) {
			err = cause
		}
		return d, fmt.Errorf("convert %s: %w", src, err)
	}
	return d, nil
}

func (c *converter) tell(e Event) {
	if c.o.Progress == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.o.Progress(e)
}

// document converts a manifest, or an index with all it lists.
func (c *converter) document(ctx context.Context, d *fetcher.Document, p *ocispec.Platform, tag string, depth int) (ocispec.Descriptor, error) {
	if d.Index == nil {
		return c.image(ctx, d, p, tag)
	}
	if depth == maxNesting {
		return ocispec.Descriptor{}, errors.New("indexes inside indexes: too many")
	}
	found := make([]*ocispec.Descriptor, len(d.Index.Manifests))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(maxImages)
	for i, e := range d.Index.Manifests {
		if why := noImage(e); why != "" {
			c.tell(Event{Left: &Skipped{e, why}})
			continue
		}
		g.Go(func() error {
			inner, err := fetcher.ReadDocument(gctx, c.src, e)
			if err != nil {
				return err
			}
			n, err := c.document(gctx, inner, e.Platform, "", depth+1)
			if err != nil {
				return err
			}
			n.Platform, n.Annotations = e.Platform, kept(e.Annotations)
			delete(n.Annotations, ocispec.AnnotationRefName)
			found[i] = &n
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return ocispec.Descriptor{}, err
	}
	x := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{}, Annotations: kept(d.Index.Annotations),
	}
	for _, n := range found {
		if n != nil {
			x.Manifests = append(x.Manifests, *n)
		}
	}
	if len(x.Manifests) == 0 {
		return ocispec.Descriptor{}, errors.New("the index has no image")
	}
	raw, err := json.Marshal(x)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return c.to.PutManifest(ctx, x.MediaType, raw, tag)
}

// noImage says why an entry of an index is not converted, "" if it is. BuildKit
// puts attestations there, which speak of the source's digests (BuildKit,
// docs/attestations/attestation-storage.md).
func noImage(d ocispec.Descriptor) string {
	switch {
	case d.Annotations["vnd.docker.reference.type"] != "":
		return "an " + strings.ReplaceAll(d.Annotations["vnd.docker.reference.type"], "-", " ") + " about the source image"
	case d.ArtifactType != "":
		return "an artifact of type " + d.ArtifactType
	}
	return ""
}

// image converts an image of one platform.
func (c *converter) image(ctx context.Context, doc *fetcher.Document, p *ocispec.Platform, tag string) (ocispec.Descriptor, error) {
	m, err := fetcher.ParseManifest(doc.Raw)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	im := &Image{Source: ocispec.Descriptor{MediaType: doc.MediaType, Digest: digest.FromBytes(doc.Raw), Size: int64(len(doc.Raw))}, Layers: len(m.Layers)}
	d, err := c.convertImage(ctx, m, doc.Raw, p, tag, im)
	if err != nil {
		name := m.Digest.String()
		if p != nil {
			name = platforms.Format(*p) + " (" + name + ")"
		}
		return d, fmt.Errorf("image %s: %w", name, err)
	}
	im.Result = d
	c.tell(Event{Image: im})
	return d, nil
}

func (c *converter) convertImage(ctx context.Context, m *fetcher.Manifest, raw []byte, p *ocispec.Platform, tag string, im *Image) (ocispec.Descriptor, error) {
	var none ocispec.Descriptor
	var old ocispec.Manifest
	if err := json.Unmarshal(raw, &old); err != nil {
		return none, err
	}
	if old.ArtifactType != "" || len(m.Layers) > 0 && !isLayer(m.Layers[0].MediaType) {
		return none, hint.Wrap(errors.New("not a container image but an artifact"), "only images can be converted")
	}
	rawConfig, err := fetcher.ReadConfig(ctx, c.src, m)
	if err != nil {
		return none, err
	}
	var config ocispec.Image
	if err := json.Unmarshal(rawConfig, &config); err != nil {
		return none, fmt.Errorf("config: %w", err)
	}
	if n := len(config.RootFS.DiffIDs); n != len(m.Layers) {
		return none, fmt.Errorf("the config has %d DiffIDs for %d layers", n, len(m.Layers))
	}
	if p == nil && config.Architecture != "" {
		p = &ocispec.Platform{OS: config.OS, Architecture: config.Architecture, Variant: config.Variant}
	}
	if p != nil {
		im.Platform = platforms.Format(*p)
	}
	var profile *image.Profile
	if c.o.Profile != nil {
		if profile, err = c.o.Profile(ctx, im.Source.Digest); err != nil {
			return none, err
		}
	}
	layers := make([]*layerResult, len(m.Layers))
	g, gctx := errgroup.WithContext(ctx)
	for i, l := range m.Layers {
		g.Go(func() (err error) {
			if layers[i], err = c.layer(gctx, l, config.RootFS.DiffIDs[i], profile); err != nil {
				err = fmt.Errorf("layer %d (%s, %s): %w", i, l.Digest, l.MediaType, err)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return none, err
	}
	next := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Annotations: kept(old.Annotations),
	}
	diffIDs := make([]digest.Digest, len(layers))
	for i, l := range layers {
		desc := l.desc
		desc.Annotations = kept(m.Layers[i].Annotations)
		if desc.Annotations == nil {
			desc.Annotations = map[string]string{}
		}
		maps.Copy(desc.Annotations, l.desc.Annotations)
		next.Layers = append(next.Layers, desc)
		diffIDs[i] = l.diffID
		im.Read, im.Written = im.Read+m.Layers[i].Size, im.Written+desc.Size
	}
	if next.Layers == nil {
		next.Layers = []ocispec.Descriptor{}
	}
	if c.o.Seal {
		if im.Composefs, err = sealedDigest(ctx, layers); err != nil {
			return none, err
		}
		if next.Annotations == nil {
			next.Annotations = map[string]string{}
		}
		next.Annotations[mount.SealingKey] = im.Composefs
	}
	newConfig, err := withDiffIDs(rawConfig, diffIDs)
	if err != nil {
		return none, err
	}
	next.Config = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(newConfig), Size: int64(len(newConfig))}
	if err := c.to.Put(ctx, next.Config, strings.NewReader(string(newConfig))); err != nil {
		return none, err
	}
	out, err := json.Marshal(next)
	if err != nil {
		return none, err
	}
	return c.to.PutManifest(ctx, next.MediaType, out, tag)
}

// withDiffIDs is the config with other DiffIDs; what else it has, known to us
// or not, stays.
func withDiffIDs(raw []byte, ids []digest.Digest) ([]byte, error) {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	var err error
	if fields["rootfs"], err = json.Marshal(ocispec.RootFS{Type: "layers", DiffIDs: ids}); err != nil {
		return nil, err
	}
	return json.Marshal(fields)
}

// replaced are the beginnings of annotations that speak of the bytes of a layer
// or of the tree of an image as it was.
var replaced = []string{
	"containerd.io/snapshot/", "io.containers.estargz.", "io.containers.zstd-chunked.", "io.github.containers.zstd-chunked.",
	"composefs.", "containers.composefs.",
}

func kept(annotations map[string]string) map[string]string {
	k := maps.Clone(annotations)
	maps.DeleteFunc(k, func(key, _ string) bool {
		return slices.ContainsFunc(replaced, func(prefix string) bool { return strings.HasPrefix(key, prefix) })
	})
	return k
}

func sealedDigest(ctx context.Context, layers []*layerResult) (string, error) {
	var all []image.Layer
	for _, l := range layers {
		all = append(all, l.layer)
	}
	return mount.SealedDigest(ctx, all, func(d image.Digest) (image.Digest, error) {
		for _, l := range layers {
			if v, ok := l.verity[d]; ok {
				return v, nil
			}
		}
		return image.Digest{}, errors.New("in no layer")
	})
}
