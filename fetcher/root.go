package fetcher

import (
	"context"
	"encoding/json"
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A Document is a manifest or an index, as the source has it.
type Document struct {
	MediaType string
	Raw       []byte
	Index     *ocispec.Index // nil: an image manifest
}

// A tree gives documents by what names them, without choosing a platform.
type tree interface {
	root(ctx context.Context) ([]byte, error)
	document(ctx context.Context, d ocispec.Descriptor) ([]byte, error)
}

// ReadRoot gets what the source's name stands for, an index with all its
// platforms if it is one. A nil error promises that it has the digest that the
// name gives. Several manifests of a layout with one tag are an index.
func ReadRoot(ctx context.Context, s Source) (*Document, error) {
	t, ok := s.(tree)
	if !ok {
		return nil, fmt.Errorf("read %s: it has no manifest", s)
	}
	raw, err := t.root(ctx)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", s, err)
	}
	return newDocument(raw), nil
}

// ReadDocument gets a manifest or index that an index lists. A nil error
// promises that it has its digest.
func ReadDocument(ctx context.Context, s Source, d ocispec.Descriptor) (*Document, error) {
	t, ok := s.(tree)
	if !ok {
		return nil, fmt.Errorf("read %s: it has no manifests", s)
	}
	err := checkDescriptor(d)
	var raw []byte
	if err == nil {
		raw, err = t.document(ctx, d)
	}
	if err == nil {
		err = checkDigest(d.Digest, raw)
	}
	if err != nil {
		return nil, fmt.Errorf("manifest %s of %s: %w", d.Digest, s, err)
	}
	return newDocument(raw), nil
}

func newDocument(raw []byte) *Document {
	d := &Document{Raw: raw}
	var m struct {
		MediaType string `json:"mediaType"`
	}
	_ = json.Unmarshal(raw, &m) // who parses the document says what is wrong
	d.MediaType = m.MediaType
	if x, ok := isIndex(raw); ok {
		d.Index = x
	}
	if d.MediaType == "" {
		d.MediaType = ocispec.MediaTypeImageManifest
		if d.Index != nil {
			d.MediaType = ocispec.MediaTypeImageIndex
		}
	}
	return d
}

func (r *registry) root(ctx context.Context) ([]byte, error) {
	raw, err := r.manifest(ctx, r.ref.object())
	if err == nil && r.ref.digest != "" {
		err = checkDigest(r.ref.digest, raw)
	}
	return raw, advise(err, r.ref.host)
}

func (r *registry) document(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	return r.manifest(ctx, d.Digest.String())
}

func (l *layout) root(context.Context) ([]byte, error) {
	raw, x, err := l.named()
	if err != nil || x == nil {
		return raw, err
	}
	if len(x.Manifests) == 1 {
		d := x.Manifests[0]
		if err := checkDescriptor(d); err != nil {
			return nil, err
		}
		if raw, err = l.read(blobPath(d.Digest)); err == nil {
			err = checkDigest(d.Digest, raw)
		}
		return raw, err
	}
	return json.Marshal(ocispec.Index{Versioned: schema2, MediaType: ocispec.MediaTypeImageIndex, Manifests: x.Manifests})
}

func (l *layout) document(_ context.Context, d ocispec.Descriptor) ([]byte, error) {
	return l.read(blobPath(d.Digest))
}
