package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// PushBase makes an image of the lowest two layers of the Debian image in each
// of the forms, with more on top, and pushes it to the registry at addr as
// repository name, tagged by form. containerd, whatever its snapshotter, cannot
// unpack the third: in it a file replaces a folder.
func PushBase(ctx context.Context, set *images.Set, dir, addr, name string, forms []string, more ...*imagetest.Blob) error {
	for _, form := range forms {
		m, _, err := set.Manifest(form, images.Debian)
		if err != nil {
			return err
		}
		layout := filepath.Join(dir, name+"-"+form)
		var config ocispec.Image
		text, err := os.ReadFile(filepath.Join(set.Layout(form), "blobs", "sha256", m.Config.Digest.Encoded()))
		if err == nil {
			err = json.Unmarshal(text, &config)
		}
		if err == nil {
			err = os.MkdirAll(filepath.Join(layout, "blobs", "sha256"), 0o755)
		}
		if err != nil {
			return fmt.Errorf("image of %s: %w", form, err)
		}
		layers := m.Layers[:2:2]
		for _, l := range layers {
			err := link(filepath.Join(set.Layout(form), "blobs", "sha256", l.Digest.Encoded()), filepath.Join(layout, "blobs", "sha256", l.Digest.Encoded()))
			if err != nil {
				return err
			}
		}
		config.RootFS.DiffIDs = config.RootFS.DiffIDs[:2]
		config.History = nil
		for _, l := range more {
			if err := os.WriteFile(filepath.Join(layout, "blobs", "sha256", l.Desc.Digest.Encoded()), l.Data, 0o644); err != nil {
				return err
			}
			layers = append(layers, l.Desc)
			config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, l.DiffID)
		}
		if err := images.WriteImage(layout, name, config, layers); err != nil {
			return err
		}
		if err := images.Push(ctx, layout, name, addr, form); err != nil {
			return err
		}
	}
	return nil
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
