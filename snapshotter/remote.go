package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// The labels by which containerd says what a snapshot is to be of: its own
// (pkg/snapshotters in containerd; despite the name not CRI's alone), and those of
// stargz-snapshotter's clients, which mean the same.
const (
	refLabel      = "containerd.io/snapshot/cri.image-ref"
	layerLabel    = "containerd.io/snapshot/cri.layer-digest"
	manifestLabel = "containerd.io/snapshot/cri.manifest-digest"

	stargzRefLabel   = "containerd.io/snapshot/remote/stargz.reference"
	stargzLayerLabel = "containerd.io/snapshot/remote/stargz.digest"
)

// A wanted is a layer that containerd would unpack next.
type wanted struct {
	target    string // the snapshot's name to be: the layer's chain ID
	reference string // the image's
	layer     string // digest
	manifest  string // digest; "" if the client does not say it
}

// wantedOf reads the labels of a snapshot. It returns nil if they do not name a
// layer of an image.
func wantedOf(labels map[string]string) *wanted {
	first := func(names ...string) string {
		for _, n := range names {
			if v := labels[n]; v != "" {
				return v
			}
		}
		return ""
	}
	w := &wanted{
		target:    labels[snapshots.LabelSnapshotRef],
		reference: first(refLabel, stargzRefLabel),
		layer:     first(layerLabel, stargzLayerLabel),
		manifest:  labels[manifestLabel],
	}
	if w.target == "" || w.reference == "" || w.layer == "" {
		return nil
	}
	return w
}

// images remembers what was found out of images that are being pulled.
type images struct {
	mu      sync.Mutex
	found   map[string]foundImage // by reference and manifest digest
	refused map[string]bool       // images that fall back, by the same
}

type foundImage struct {
	origin mount.Origin
	layers []string // digests, the lowest first
}

// rememberedImages bounds images: what is forgotten is asked for again.
const rememberedImages = 256

func (i *images) put(key string, f foundImage) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.found == nil || len(i.found) >= rememberedImages {
		i.found = map[string]foundImage{}
	}
	i.found[key] = f
}

func (i *images) get(key string) (foundImage, bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f, ok := i.found[key]
	return f, ok
}

// refuse reports whether that is news.
func (i *images) refuse(key string) bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.refused[key] {
		return false
	}
	if i.refused == nil || len(i.refused) >= rememberedImages {
		i.refused = map[string]bool{}
	}
	i.refused[key] = true
	return true
}

// accept forgets that an image fell back.
func (i *images) accept(key string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.refused, key)
}

// prepareRemote makes the remote snapshot of a layer. It returns false if
// containerd has to unpack the layer: the whole image then falls back.
func (s *Snapshotter) prepareRemote(ctx context.Context, w *wanted, key, parent string, opts []snapshots.Opt) (done bool, err error) {
	depth, exists, err := s.placeOf(ctx, w, parent)
	if err != nil || exists {
		return exists, err
	}
	image := w.reference + "@" + w.manifest
	origin, err := s.serve(ctx, w, depth)
	if err != nil {
		if ctx.Err() != nil {
			return false, err
		}
		if s.trees.images.refuse(image) {
			text := err.Error()
			if h := hint.Of(err); h != "" {
				text += "; " + h
			}
			s.log.Warn("the image is not served lazily: containerd downloads and unpacks it", "image", w.reference, "manifest", w.manifest, "error", text)
		}
		return false, nil
	}
	s.trees.images.accept(image)
	tmp, err := os.MkdirTemp(s.path("snapshots"), "new-*")
	if err != nil {
		return false, hint.Wrap(fmt.Errorf("folder of a snapshot: %w", err), "see whether the disk is full")
	}
	defer func() { os.RemoveAll(tmp) }()
	if err := writeJSON(filepath.Join(tmp, originName), origin); err != nil {
		return false, err
	}
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		snap, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent, opts...)
		if err != nil {
			return err
		}
		// The chain ID is the name, so that it is found by people too; it may
		// be taken by one with another parent, of the same layers unpacked.
		name := w.target
		if _, _, _, err := storage.GetInfo(ctx, name); err == nil {
			name = w.target + " " + key
		}
		if _, err := storage.CommitActive(ctx, key, name, snapshots.Usage{}, opts...); err != nil {
			return err
		}
		return s.place(tmp, snap.ID)
	})
	if err != nil {
		return false, fmt.Errorf("snapshot %s: %w", w.target, err)
	}
	return true, nil
}

// placeOf returns how many ancestors the wanted snapshot has, and whether it is
// there already.
func (s *Snapshotter) placeOf(ctx context.Context, w *wanted, parent string) (depth int, there bool, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name := parent; name != ""; depth++ {
			_, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return fmt.Errorf("parent %s: %w", name, err)
			}
			name = info.Parent
		}
		err := storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			if info.Kind != snapshots.KindCommitted || info.Parent != parent || info.Labels[snapshots.LabelSnapshotRef] != w.target {
				return nil
			}
			id, _, _, err := storage.GetInfo(ctx, info.Name)
			there = there || err == nil && s.isRemote(id)
			return err
		})
		if errdefs.IsNotFound(err) { // there was never a snapshot
			err = nil
		}
		return err
	})
	return depth, there, err
}

// serve finds the image that a layer is of, and opens its tree. It returns the
// Origin of the layer's snapshot.
func (s *Snapshotter) serve(ctx context.Context, w *wanted, depth int) (mount.Origin, error) {
	key := w.reference + "@" + w.manifest
	is := func(f foundImage) bool { return depth < len(f.layers) && f.layers[depth] == w.layer }
	found, ok := s.trees.images.get(key)
	if !ok || !is(found) { // a tag may stand for another image by now
		var err error
		if found.origin, found.layers, err = mount.FindImage(ctx, w.reference, w.manifest, s.opts.Mount); err != nil {
			return mount.Origin{}, err
		}
		if !is(found) {
			return mount.Origin{}, fmt.Errorf("layer %d of image %s is not %s", depth, found.origin.Digest(), w.layer)
		}
		s.trees.images.put(key, found)
	}
	_, done, err := s.trees.open(ctx, found.origin)
	if err != nil {
		return mount.Origin{}, err
	}
	done()
	origin := found.origin
	origin.Layers = depth + 1
	return origin, nil
}

// remoteUsage is what is local of the image of a remote snapshot, if that is
// its topmost one.
func (s *Snapshotter) remoteUsage(id string) snapshots.Usage {
	var o mount.Origin
	if err := readJSON(s.originOf(id), &o); err != nil || !o.Whole() {
		return snapshots.Usage{}
	}
	tree := s.trees.get(o)
	if tree == nil {
		return snapshots.Usage{}
	}
	st := tree.Status()
	return snapshots.Usage{Inodes: int64(st.FilesLocal), Size: st.BytesLocal}
}

// origins lists the Origins of all remote snapshots, and of all choices.
func (s *Snapshotter) origins(ctx context.Context) (remote, chosen []mount.Origin, err error) {
	var ids []string
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		all, err := storage.IDMap(ctx)
		for id := range all {
			ids = append(ids, id)
		}
		return err
	})
	if errdefs.IsNotFound(err) {
		err = nil
	}
	for _, id := range ids {
		var o mount.Origin
		switch err := readJSON(s.originOf(id), &o); {
		case err == nil:
			remote = append(remote, o)
			continue
		case !errors.Is(err, os.ErrNotExist):
			s.log.Warn("a snapshot's image is not known any more", "snapshot", id, "error", err)
			continue
		}
		c, err := s.choice(id)
		if err != nil {
			s.log.Warn("a snapshot's image is not known any more", "snapshot", id, "error", err)
		} else if c != nil {
			chosen = append(chosen, c.Origin)
		}
	}
	return remote, chosen, err
}
