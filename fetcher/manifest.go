package fetcher

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// Limits of what is held in memory, in bytes, and of indexes inside indexes.
// Registries must take manifests of 4 MiB (distribution-spec, "Pushing manifests").
const (
	maxManifest = 8 << 20
	maxConfig   = 8 << 20
	maxNesting  = 4
)

// Docker's media types for what OCI calls index, manifest and config
// (distribution, "Image Manifest Version 2, Schema 2").
const (
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
)

// schema2 is what every manifest of today has (image-spec, manifest.md).
var schema2 = specs.Versioned{SchemaVersion: 2}

// manifestTypes is the Accept header of a request for a manifest.
var manifestTypes = strings.Join([]string{
	ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, dockerIndex, dockerManifest,
}, ", ")

// A Manifest is what says which blobs an image consists of.
type Manifest struct {
	Digest image.Digest         // of Raw
	Raw    []byte               // the JSON as the source gave it
	Config ocispec.Descriptor   // of the image's config; see ReadConfig
	Layers []ocispec.Descriptor // lowest first

	// LocalLayer says that this manifest was made up for a file that the user
	// named (layer:FILE): nothing vouches for the TOC's digest but the user.
	LocalLayer bool
}

// MediaType returns what the manifest says it is: OCI's, if nothing.
func (m *Manifest) MediaType() string { return newDocument(m.Raw).MediaType }

// ParseManifest reads an image manifest: OCI's, or docker's schema 2, which
// has the same form. A nil error promises that every digest in it is a
// SHA-256, and that no size is negative.
func ParseManifest(raw []byte) (*Manifest, error) {
	d := image.Digest(digestOf(raw))
	if len(raw) > maxManifest {
		return nil, fmt.Errorf("manifest %s: %d bytes, the limit is %d", d, len(raw), maxManifest)
	}
	var m struct {
		SchemaVersion int                  `json:"schemaVersion"`
		MediaType     string               `json:"mediaType"`
		Config        *ocispec.Descriptor  `json:"config"`
		Layers        []ocispec.Descriptor `json:"layers"`
		Manifests     json.RawMessage      `json:"manifests"`
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", d, err)
	}
	switch {
	case m.SchemaVersion == 1:
		return nil, hint.Wrap(fmt.Errorf("manifest %s: docker's schema 1", d), "push the image again with a tool of this decade")
	case m.SchemaVersion != 2 || m.Manifests != nil:
		return nil, fmt.Errorf("manifest %s: not an image manifest", d)
	case m.Config == nil:
		return nil, fmt.Errorf("manifest %s: no config", d)
	}
	out := &Manifest{Digest: d, Raw: raw, Config: *m.Config, Layers: m.Layers}
	if err := checkDescriptor(out.Config); err != nil {
		return nil, fmt.Errorf("manifest %s: config: %w", d, err)
	}
	for i, l := range out.Layers {
		if err := checkDescriptor(l); err != nil {
			return nil, fmt.Errorf("manifest %s: layer %d: %w", d, i, err)
		}
	}
	return out, nil
}

func checkDescriptor(d ocispec.Descriptor) error {
	if _, err := toc.ParseDigest(d.Digest.String()); err != nil {
		return err
	}
	if d.Size < 0 {
		return fmt.Errorf("%s: size %d", d.Digest, d.Size)
	}
	return nil
}

func digestOf(b []byte) image.Digest {
	d, _ := toc.ParseDigest(digest.FromBytes(b).String())
	return d
}

// errDigest is in every error of checkDigest.
var errDigest = errors.New("wrong digest")

func checkDigest(want digest.Digest, b []byte) error {
	if got := digest.FromBytes(b); got != want {
		return hint.Wrap(fmt.Errorf("%w: digest is %s, want %s", errDigest, got, want), "do not trust this source, or the way to it")
	}
	return nil
}

// isIndex tells an index from a manifest by what it holds: the media type of
// an answer is no evidence, and OCI's own may be left out of the JSON.
func isIndex(raw []byte) (*ocispec.Index, bool) {
	var x struct {
		ocispec.Index
		Layers json.RawMessage `json:"layers"`
	}
	if len(raw) > maxManifest || json.Unmarshal(raw, &x) != nil || x.Manifests == nil || x.Layers != nil {
		return nil, false
	}
	return &x.Index, true
}

func parsePlatform(s string) (ocispec.Platform, error) {
	if s == "" {
		return platforms.DefaultSpec(), nil
	}
	p, err := platforms.Parse(s)
	if err != nil || !strings.Contains(s, "/") {
		return p, hint.Wrap(fmt.Errorf("platform %q: want os/arch or os/arch/variant", s), "write for example --platform linux/arm64")
	}
	return p, nil
}

// choose picks from an index the entry that suits the platform best: the same,
// or an older variant of the same processor. An entry that says no platform is
// taken when it is alone.
func choose(x *ocispec.Index, want ocispec.Platform) (ocispec.Descriptor, error) {
	match := platforms.Only(want)
	var best *ocispec.Descriptor
	var have []string
	for i, d := range x.Manifests {
		if d.Platform == nil {
			continue
		}
		have = append(have, platforms.Format(*d.Platform))
		if match.Match(*d.Platform) && (best == nil || match.Less(*d.Platform, *best.Platform)) {
			best = &x.Manifests[i]
		}
	}
	if best == nil && len(x.Manifests) == 1 && x.Manifests[0].Platform == nil {
		best = &x.Manifests[0]
	}
	if best == nil {
		slices.Sort(have)
		return ocispec.Descriptor{}, hint.Wrap(fmt.Errorf("no image for %s in the index", platforms.Format(want)),
			"use --platform with one of: "+strings.Join(slices.Compact(have), ", "))
	}
	return *best, checkDescriptor(*best)
}

// resolve follows indexes from raw to the manifest of a platform. get gives
// the bytes of a descriptor, which resolve checks.
func resolve(raw []byte, want ocispec.Platform, get func(ocispec.Descriptor) ([]byte, error)) (*Manifest, error) {
	for range maxNesting {
		x, ok := isIndex(raw)
		if !ok {
			return ParseManifest(raw)
		}
		d, err := choose(x, want)
		if err != nil {
			return nil, err
		}
		if raw, err = get(d); err != nil {
			return nil, err
		}
		if err := checkDigest(d.Digest, raw); err != nil {
			return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
	}
	return nil, errors.New("indexes inside indexes: too many")
}
