// Package repository writes images and artifacts to where they are kept, a
// repository of a registry or an OCI image layout, and finds the artifacts that
// refer to what is there. It knows nothing of what blobs hold, and does not read
// layers: that is package fetcher's.
//
// Nothing is named before it is whole: blobs first, each under its digest, then
// the manifests that list them, and a tag last.
//
// An artifact is a manifest with an artifactType, an empty config and, as
// subject, the descriptor of what it is about (OCI image-spec 1.1, manifest.md,
// "Guidelines for Artifact Usage"). It is found by that digest, through the
// registry's referrers API, else through the tag sha256-<hex>, an index that
// clients keep (distribution-spec 1.1, "Listing Referrers", "Referrers Tag
// Schema"). In a layout, index.json lists artifacts beside the images.
package repository

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// Limits of what is read into memory: bytes of a manifest (distribution-spec,
// "Pushing Manifests"), and referrers of one subject.
const (
	maxManifest  = 4 << 20
	maxReferrers = 1024
)

// ErrNotFound says that there is no such blob or manifest.
var ErrNotFound = errors.New("not found")

// A backend keeps blobs and manifests. Its errors name the object.
type backend interface {
	// push stores a blob, or a manifest, whose bytes r gives from the start
	// again at each call of it, unless it is there. A manifest gets the tag,
	// if that is not empty.
	push(ctx context.Context, d ocispec.Descriptor, tag string, r io.ReaderAt) error
	// open reads a blob or manifest, of which nothing has been checked.
	open(ctx context.Context, d ocispec.Descriptor) (io.ReadCloser, error)
	// referrers lists what says it is about subject.
	referrers(ctx context.Context, subject ocispec.Descriptor, artifactType string) ([]ocispec.Descriptor, error)
	Close() error
}

// A Repository holds images and artifacts. It is safe for concurrent use.
type Repository struct {
	name fetcher.Name
	b    backend
}

// Open prepares for writing to and reading from the repository or layout of
// the image that name names: docker://HOST/NAME[:TAG] or oci:DIR[:TAG], as
// fetcher.OpenSource has it. With write, a host is chosen that takes what is pushed,
// and the folder of a layout is made if it is not there. No registry is asked
// yet.
func Open(name string, write bool, o fetcher.Options) (*Repository, error) {
	n, err := fetcher.ParseName(name)
	if err != nil {
		return nil, err
	}
	r := &Repository{name: n}
	switch n.Kind {
	case "docker":
		r.b, err = openRemote(n, write, o)
	case "oci":
		r.b, err = openLayout(n.Path, write)
	default:
		err = hint.Wrap(fmt.Errorf("%s: nothing can be written there", name), "use docker://HOST/NAME:TAG or oci:DIR:TAG")
	}
	if err != nil {
		return nil, err
	}
	return r, nil
}

// Name returns what the repository was opened as.
func (r *Repository) Name() fetcher.Name { return r.name }

// Close ends what is under way.
func (r *Repository) Close() error { return r.b.Close() }

// Put stores the blob, of which r gives d.Size bytes, under its digest, unless
// it is there.
func (r *Repository) Put(ctx context.Context, d ocispec.Descriptor, from io.ReaderAt) error {
	d.MediaType = "application/octet-stream" // whatever it is, it is no manifest
	return r.b.push(ctx, d, "", from)
}

// PutManifest stores a manifest or index and, if tag is not empty, names it so.
// What it lists must be there.
func (r *Repository) PutManifest(ctx context.Context, mediaType string, raw []byte, tag string) (ocispec.Descriptor, error) {
	d := describe(mediaType, raw)
	return d, r.b.push(ctx, d, tag, bytes.NewReader(raw))
}

// Read returns the bytes of a blob or manifest of at most limit bytes. A nil
// error promises that they have its digest. It is ErrNotFound if there is none.
func (r *Repository) Read(ctx context.Context, d ocispec.Descriptor, limit int64) ([]byte, error) {
	raw, err := r.read(ctx, d, limit)
	if err != nil {
		return nil, fmt.Errorf("read %s of %s: %w", d.Digest, r.name, err)
	}
	return raw, nil
}

func (r *Repository) read(ctx context.Context, d ocispec.Descriptor, limit int64) ([]byte, error) {
	if err := d.Digest.Validate(); err != nil {
		return nil, err
	}
	if d.Size < 0 || d.Size > limit {
		return nil, fmt.Errorf("%d bytes, the limit is %d", d.Size, limit)
	}
	body, err := r.b.open(ctx, d)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, d.Size+1))
	if err != nil {
		return nil, err
	}
	if got := d.Digest.Algorithm().FromBytes(raw); int64(len(raw)) != d.Size || got != d.Digest {
		return nil, fmt.Errorf("%d bytes with the digest %s, want %d", len(raw), got, d.Size)
	}
	return raw, nil
}

// A File is a blob of an artifact. From gives Size bytes.
type File struct {
	MediaType   string
	Size        int64
	Digest      digest.Digest // "": From is read for it
	From        io.ReaderAt
	Annotations map[string]string
}

// Attach stores an artifact about subject, a manifest or a blob, and returns
// its descriptor. The same files and annotations make the same artifact, which
// is then there once.
func (r *Repository) Attach(ctx context.Context, subject ocispec.Descriptor, artifactType string, annotations map[string]string, files ...File) (ocispec.Descriptor, error) {
	d, err := r.attach(ctx, subject, artifactType, annotations, files)
	if err != nil {
		return d, fmt.Errorf("attach %s to %s in %s: %w", artifactType, subject.Digest, r.name, err)
	}
	return d, nil
}

func (r *Repository) attach(ctx context.Context, subject ocispec.Descriptor, artifactType string, annotations map[string]string, files []File) (ocispec.Descriptor, error) {
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: artifactType, Config: ocispec.DescriptorEmptyJSON, Annotations: annotations,
		Subject: &ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size},
	}
	m.Config.Data = nil
	if err := r.Put(ctx, m.Config, bytes.NewReader(ocispec.DescriptorEmptyJSON.Data)); err != nil {
		return ocispec.Descriptor{}, err
	}
	for _, f := range files {
		d := ocispec.Descriptor{MediaType: f.MediaType, Digest: f.Digest, Size: f.Size, Annotations: f.Annotations}
		if d.Digest == "" {
			sum, err := digest.FromReader(io.NewSectionReader(f.From, 0, f.Size))
			if err != nil {
				return ocispec.Descriptor{}, err
			}
			d.Digest = sum
		}
		if err := r.Put(ctx, d, f.From); err != nil {
			return ocispec.Descriptor{}, err
		}
		m.Layers = append(m.Layers, d)
	}
	raw, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d, err := r.PutManifest(ctx, m.MediaType, raw, "")
	d.ArtifactType, d.Annotations = artifactType, annotations
	return d, err
}

// An Artifact is one that was found.
type Artifact struct {
	Desc     ocispec.Descriptor // of its manifest
	Manifest ocispec.Manifest   // Layers are its files
}

// Artifacts returns the artifacts of a type about subject, of which only the
// digest needs to be known; newest first, by the annotation
// org.opencontainers.image.created, where they have one. A nil error promises that each
// manifest has its digest, names the subject and has the type. None is no error.
//
// Who may write to the repository may have made any of them.
func (r *Repository) Artifacts(ctx context.Context, subject digest.Digest, artifactType string) ([]Artifact, error) {
	found, err := r.artifacts(ctx, subject, artifactType)
	if err != nil {
		return nil, fmt.Errorf("find what refers to %s in %s: %w", subject, r.name, err)
	}
	return found, nil
}

func (r *Repository) artifacts(ctx context.Context, subject digest.Digest, artifactType string) ([]Artifact, error) {
	if err := subject.Validate(); err != nil {
		return nil, err
	}
	descs, err := r.b.referrers(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: subject}, artifactType)
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if len(descs) > maxReferrers {
		return nil, fmt.Errorf("%d artifacts, the limit is %d", len(descs), maxReferrers)
	}
	var found []Artifact
	for _, d := range descs {
		raw, err := r.Read(ctx, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: d.Digest, Size: d.Size}, maxManifest)
		if errors.Is(err, ErrNotFound) {
			continue // removed, and the list not yet
		}
		if err != nil {
			return nil, err
		}
		a := Artifact{Desc: d}
		if err := json.Unmarshal(raw, &a.Manifest); err != nil {
			return nil, fmt.Errorf("manifest %s: %w", d.Digest, err)
		}
		if s := a.Manifest.Subject; s != nil && s.Digest == subject && a.Manifest.ArtifactType == artifactType {
			found = append(found, a)
		}
	}
	slices.SortStableFunc(found, func(a, b Artifact) int {
		at, bt := a.Manifest.Annotations[ocispec.AnnotationCreated], b.Manifest.Annotations[ocispec.AnnotationCreated]
		switch {
		case at > bt:
			return -1
		case at < bt:
			return 1
		}
		return 0
	})
	return found, nil
}

func describe(mediaType string, raw []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(raw), Size: int64(len(raw))}
}

// isManifest reports whether the media type is that of what has a place among
// the manifests.
func isManifest(mediaType string) bool {
	return manifestTypes[mediaType]
}

var manifestTypes = map[string]bool{
	ocispec.MediaTypeImageManifest: true, ocispec.MediaTypeImageIndex: true,
	"application/vnd.docker.distribution.manifest.v2+json":      true,
	"application/vnd.docker.distribution.manifest.list.v2+json": true,
}
