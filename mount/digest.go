package mount

import (
	"context"
	"encoding/hex"
	"fmt"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// SealingKey is the manifest's annotation for the fs-verity digest, in
// hexadecimal, of the image that all layers merge into (format document 4).
const SealingKey = sealingKey

// SealedDigest computes the fs-verity digest that the sealed image of these
// layers will have, in hexadecimal: what goes with SealingKey. verityOf gives
// a content's fs-verity SHA-256 digest by its SHA-256.
func SealedDigest(ctx context.Context, layers []image.Layer, verityOf func(image.Digest) (image.Digest, error)) (string, error) {
	tree, err := image.Merge(layers)
	if err != nil {
		return "", fmt.Errorf("merge the layers: %w", err)
	}
	root := lazyTree(tree)
	if err := fillTree(ctx, root, withVerity(verityOf)); err != nil {
		return "", err
	}
	h := verity.New(verity.SHA256)
	if err := erofs.Write(h, root, imageFormat); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum()), nil
}
