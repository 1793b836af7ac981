package containerd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// PushBase makes an image of the lowest two layers of the Debian image in each
// of the forms, with more on top, and pushes it to the registry at addr as
// repository name, tagged by form. containerd, whatever its snapshotter, cannot
// unpack the third: in it a file replaces a folder.
func PushBase(ctx context.Context, set *images.Set, dir, addr, name string, forms []string, more ...*imagetest.Blob) error {
	for _, form := range forms {
		layout := filepath.Join(dir, name+"-"+form)
		if err := writeBase(set, layout, name, form, more...); err != nil {
			return fmt.Errorf("image %s of %s: %w", name, form, err)
		}
		if err := images.Push(ctx, layout, name, addr, form); err != nil {
			return err
		}
	}
	return nil
}

// AddBase is PushBase for a registry of a test.
func AddBase(reg *registrytest.Registry, set *images.Set, dir, name, form string) error {
	layout := filepath.Join(dir, name+"-"+form)
	if err := writeBase(set, layout, name, form); err != nil {
		return fmt.Errorf("image %s of %s: %w", name, form, err)
	}
	var index ocispec.Index
	text, err := os.ReadFile(filepath.Join(layout, ocispec.ImageIndexFile))
	if err == nil {
		err = json.Unmarshal(text, &index)
	}
	if err != nil {
		return err
	}
	blobs, err := os.ReadDir(filepath.Join(layout, "blobs", "sha256"))
	if err != nil {
		return err
	}
	for _, b := range blobs {
		data, err := os.ReadFile(filepath.Join(layout, "blobs", "sha256", b.Name()))
		if err != nil {
			return err
		}
		reg.Add(digest.NewDigestFromEncoded(digest.SHA256, b.Name()), bytes.NewReader(data), int64(len(data)))
		if b.Name() == index.Manifests[0].Digest.Encoded() {
			reg.AddManifest(name, form, index.Manifests[0].MediaType, data)
		}
	}
	return nil
}

// writeBase writes the image into a new OCI layout.
func writeBase(set *images.Set, layout, name, form string, more ...*imagetest.Blob) error {
	m, _, err := set.Manifest(form, images.Debian)
	if err != nil {
		return err
	}
	blob := func(layout string, d digest.Digest) string {
		return filepath.Join(layout, "blobs", "sha256", d.Encoded())
	}
	var config ocispec.Image
	text, err := os.ReadFile(blob(set.Layout(form), m.Config.Digest))
	if err == nil {
		err = json.Unmarshal(text, &config)
	}
	if err == nil {
		err = os.MkdirAll(filepath.Join(layout, "blobs", "sha256"), 0o755)
	}
	if err != nil {
		return err
	}
	layers := m.Layers[:2:2]
	for _, l := range layers {
		if err := link(blob(set.Layout(form), l.Digest), blob(layout, l.Digest)); err != nil {
			return err
		}
	}
	config.RootFS.DiffIDs = config.RootFS.DiffIDs[:2:2]
	config.History = nil
	for _, l := range more {
		if err := os.WriteFile(blob(layout, l.Desc.Digest), l.Data, 0o644); err != nil {
			return err
		}
		layers = append(layers, l.Desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
	}
	return images.WriteImage(layout, name, config, layers)
}

// link makes a second name for a file, or a copy where that cannot be.
func link(from, to string) error {
	err := os.Link(from, to)
	if err == nil || errors.Is(err, fs.ErrExist) {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, 0o644)
}
