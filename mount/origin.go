package mount

import (
	"context"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// An Origin is the lowest layers of an image in a registry, as one of
// containerd's snapshots stands for them. It is all that is needed to make
// their tree again.
type Origin struct {
	// Reference is the image's, as in "registry.example.com/app:1".
	Reference string `json:"reference"`
	// Manifest is the image's manifest, byte for byte.
	Manifest []byte `json:"manifest"`
	// Layers is how many of the manifest's layers, the lowest first.
	Layers int `json:"layers"`
}

// FindImage asks the registry for the manifest of the image at reference. With
// a digest ("sha256:…"), it is that manifest or an error. The Origin returned
// has all layers; their digests are returned as well, the lowest first.
func FindImage(ctx context.Context, reference, digest string, o Options) (Origin, []string, error) {
	src, err := fetcher.OpenSource(pinned(reference, digest), o.sourceOptions())
	if err != nil {
		return Origin{}, nil, err
	}
	defer src.Close()
	m, err := src.Resolve(ctx)
	if err != nil {
		return Origin{}, nil, err
	}
	layers := make([]string, len(m.Layers))
	for i, l := range m.Layers {
		layers[i] = l.Digest.String()
	}
	return Origin{Reference: reference, Manifest: m.Raw, Layers: len(layers)}, layers, nil
}

// Digest returns the digest of the image's manifest, and "" if that cannot be
// read.
func (o Origin) Digest() string {
	m, err := fetcher.ParseManifest(o.Manifest)
	if err != nil {
		return ""
	}
	return m.Digest.String()
}

// Whole reports whether the Origin has all layers of its image.
func (o Origin) Whole() bool {
	m, err := fetcher.ParseManifest(o.Manifest)
	return err == nil && len(m.Layers) == o.Layers
}

// pinned returns the source of a reference, with its digest replaced by digest
// unless that is empty.
func pinned(reference, digest string) string {
	source := "docker://" + strings.TrimPrefix(reference, "docker://")
	if digest == "" {
		return source
	}
	name, _, _ := strings.Cut(source, "@")
	return name + "@" + digest
}

func (o Options) sourceOptions() fetcher.Options {
	s := o.Source
	s.Metrics, s.Logger = o.Metrics, o.Logger
	return s
}

// An originSource is the source of an Origin: of all its image's layers, or of
// a manifest made up for the lowest of them.
type originSource struct {
	fetcher.Source // the image's
	name           string
	manifest       *fetcher.Manifest
}

var _ fetcher.Source = originSource{}

func openOrigin(o Origin, opts Options) (originSource, error) {
	m, err := fetcher.ParseManifest(o.Manifest)
	if err != nil {
		return originSource{}, fmt.Errorf("image %s: %w", o.Reference, err)
	}
	if o.Layers < 1 || o.Layers > len(m.Layers) {
		return originSource{}, hint.Wrap(fmt.Errorf("image %s: %d of its %d layers are wanted", o.Reference, o.Layers, len(m.Layers)), "remove the image and pull it again")
	}
	src, err := fetcher.OpenSource(pinned(o.Reference, m.Digest.String()), opts.sourceOptions())
	if err != nil {
		return originSource{}, err
	}
	s := originSource{Source: src, name: src.String(), manifest: m}
	if o.Layers == len(m.Layers) {
		return s, nil
	}
	s.name += "#layers=" + strconv.Itoa(o.Layers)
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: m.Config, Layers: m.Layers[:o.Layers],
	})
	if err == nil {
		s.manifest, err = fetcher.ParseManifest(raw)
	}
	if err != nil {
		src.Close()
		return s, fmt.Errorf("image %s: the lowest %d layers: %w", o.Reference, o.Layers, err)
	}
	return s, nil
}

// String returns the image's source, with the number of layers if those are
// not all.
func (s originSource) String() string { return s.name }

// Resolve returns the manifest without a request.
func (s originSource) Resolve(context.Context) (*fetcher.Manifest, error) { return s.manifest, nil }
