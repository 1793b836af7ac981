package mount

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/image"
	repo "github.com/cfs-fuse/cfs-fuse/internal/repository"
)

// An access profile as an OCI artifact: about a manifest, one file.
const (
	ProfileArtifact  = "application/vnd.cfs-fuse.access-profile.v1"
	profileMediaType = ProfileArtifact + "+json"
)

// PushProfile attaches an access profile to an image's manifest in its
// repository, and returns the artifact's descriptor. What is attached there already
// it does not attach again.
func PushProfile(ctx context.Context, r *repo.Repository, manifest ocispec.Descriptor, p *image.Profile) (ocispec.Descriptor, error) {
	raw, err := p.Encode()
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	found, err := r.Artifacts(ctx, manifest.Digest, ProfileArtifact)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(found) > 0 && len(found[0].Manifest.Layers) == 1 && found[0].Manifest.Layers[0].Digest == digest.FromBytes(raw) {
		return found[0].Desc, nil
	}
	annotations := map[string]string{ocispec.AnnotationCreated: time.Now().UTC().Format(time.RFC3339)}
	return r.Attach(ctx, manifest, ProfileArtifact, annotations,
		repo.File{MediaType: profileMediaType, Size: int64(len(raw)), From: bytes.NewReader(raw)})
}

// PullProfile gets the newest access profile that is attached to a manifest, nil
// if there is none.
//
// Who may write to the repository can have made it. It names contents of the
// image by digest, and decides in which order they are fetched, not what they are.
func PullProfile(ctx context.Context, r *repo.Repository, manifest digest.Digest) (*image.Profile, error) {
	found, err := r.Artifacts(ctx, manifest, ProfileArtifact)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	a := found[0]
	if n := len(a.Manifest.Layers); n != 1 || a.Manifest.Layers[0].MediaType != profileMediaType {
		return nil, fmt.Errorf("access profile %s: %d files, want one of type %s", a.Desc.Digest, n, profileMediaType)
	}
	raw, err := r.Read(ctx, a.Manifest.Layers[0], image.MaxProfileSize)
	if err != nil {
		return nil, fmt.Errorf("access profile %s: %w", a.Desc.Digest, err)
	}
	return image.ParseProfile(raw)
}

// ContentNames returns a name for each content of an image that the store in
// root has, the first in the order of the tree; nothing if it does not have the image.
func ContentNames(root string, manifest image.Digest) (map[image.Digest]string, error) {
	r, err := erofs.OpenFile(filepath.Join(root, "images", hex.EncodeToString(manifest[:]), lazyName))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer r.Close()
	names := map[image.Digest]string{}
	tree, err := erofs.Load(r)
	if err != nil {
		return nil, err
	}
	var walk func(n *erofs.Node, path string)
	walk = func(n *erofs.Node, path string) {
		if n.Link == nil && len(n.Digest) == len(image.Digest{}) {
			if d := image.Digest(n.Digest); names[d] == "" {
				names[d] = path
			}
		}
		for _, c := range n.Children {
			walk(c, path+"/"+c.Name)
		}
	}
	walk(tree, "")
	return names, nil
}
