package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/image/tarindex"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	repo "github.com/cfs-fuse/cfs-fuse/internal/repository"
)

// A layer's index as an OCI artifact: about the layer's blob, one file
// (docs/index.md).
const (
	IndexArtifact  = "application/vnd.cfs-fuse.layer-index.v1"
	indexMediaType = IndexArtifact
)

// A LayerIndex is the index of an ordinary layer.
type LayerIndex struct {
	Number int // of the layer, from 0, the lowest
	Layer  ocispec.Descriptor
	Index  *tarindex.Index
	Proven bool // this store has seen the whole layer, with its DiffID
}

// Indexes returns the index of each ordinary layer of the image. Layers of which
// there is none are read as a whole first, and their files stored. The indexes
// can be used until Close.
func (img *Image) Indexes(ctx context.Context) ([]LayerIndex, error) {
	if img.m.src == nil {
		return nil, hint.Wrap(fmt.Errorf("%s: a composefs image has no layers", img.m.source), "name an image of a registry or a layout")
	}
	if err := img.open(ctx); err != nil {
		return nil, err
	}
	p := img.m.image
	var all []LayerIndex
	for i := range p.layers {
		x, err := p.indexes.index(i)
		if errors.Is(err, errNoIndex) {
			continue // it has a table of contents of its own
		}
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i, err)
		}
		all = append(all, LayerIndex{Number: i, Layer: p.layers[i], Index: x, Proven: !slices.Contains(p.indexes.foreign, i)})
	}
	return all, nil
}

// PushIndex attaches an index to its layer in a repository, and returns the
// artifact's descriptor. The same index is attached once.
func PushIndex(ctx context.Context, r *repo.Repository, l LayerIndex) (ocispec.Descriptor, error) {
	b := l.Index.Bytes()
	return r.Attach(ctx, l.Layer, IndexArtifact, nil, repo.File{MediaType: indexMediaType, Size: int64(len(b)), Digest: digest.FromBytes(b), From: bytes.NewReader(b)})
}

// PullIndex gets an index that is attached to a layer in a repository, nil if
// there is none that can be read. It is of that layer; whether it tells the truth
// of it, only the layer's DiffID can show.
func PullIndex(ctx context.Context, r *repo.Repository, layer ocispec.Descriptor) (*tarindex.Index, error) {
	found, err := r.Artifacts(ctx, layer.Digest, IndexArtifact)
	if err != nil {
		return nil, err
	}
	want, err := toc.ParseDigest(layer.Digest.String())
	if err != nil {
		return nil, err
	}
	for _, a := range found {
		if len(a.Manifest.Layers) != 1 || a.Manifest.Layers[0].MediaType != indexMediaType {
			err = errors.Join(err, fmt.Errorf("index %s: not one file of type %s", a.Desc.Digest, indexMediaType))
			continue
		}
		b, rerr := r.Read(ctx, a.Manifest.Layers[0], tarindex.MaxIndex)
		if rerr != nil {
			err = errors.Join(err, rerr)
			continue
		}
		x, oerr := tarindex.Open(b)
		if oerr == nil && (x.Blob != want || x.Size != layer.Size) {
			oerr = fmt.Errorf("it is of layer %s", x.Blob)
		}
		if oerr == nil {
			return x, nil
		}
		err = errors.Join(err, fmt.Errorf("index %s: %w", a.Desc.Digest, oerr))
	}
	return nil, err
}

// attachedIndex looks for an index of a layer that another has made, as far as
// the options allow.
func (m *Mount) attachedIndex(ctx context.Context, l *ordinaryLayer) error {
	if m.opts.Index == "" || m.opts.Index == Never {
		return nil
	}
	var x *tarindex.Index
	var err error
	if m.opts.AttachedIndex != nil {
		x, err = m.opts.AttachedIndex(ctx, l.desc)
	}
	if err == nil && x != nil && !l.diffID.IsZero() && x.DiffID != l.diffID {
		x, err = nil, fmt.Errorf("its DiffID is %s, the image's config says %s", x.DiffID, l.diffID)
	}
	if err == nil && x != nil {
		if _, err = x.TOC(); err == nil {
			l.index, l.kind = x, foreignIndex
			return nil
		}
	}
	if m.opts.Index == Require {
		if err == nil {
			err = errors.New("none is attached to it")
		}
		return hint.Wrap(fmt.Errorf("index of layer %d (%s): %w", l.number, l.desc.Digest, err), "make one with 'cfs-fuse index push', or mount with --index auto")
	}
	if err != nil {
		m.log.Warn("no index of the layer was got; it is read as a whole", "layer", l.number, "error", err)
	}
	return nil
}
