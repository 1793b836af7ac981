package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// An Image is an image that is looked into without being mounted. What is
// fetched for it goes into the store, chunk by chunk and checked, as a mount's
// bytes do; what the store has is not fetched.
type Image struct {
	m        *Mount // a store, a source, an image; never mounted
	digest   image.Digest
	known    bool
	manifest *fetcher.Manifest

	once     sync.Once // of open
	openErr  error
	contents *lazyContents // nil for composefs: sources
}

// OpenImage opens an image by its source, by the mount point where it is
// mounted, or by "sha256:" and the digest of a manifest in the store. Options'
// Root, Runtime, Source, Objects, InsecureTOC, Refresh, Metrics and Logger count. No request is made
// yet.
func OpenImage(ctx context.Context, name string, o Options) (_ *Image, err error) {
	o.NoFill = true
	source, digest, objects := name, "", o.Objects
	switch {
	case strings.HasPrefix(name, "/") || strings.HasPrefix(name, "."):
		s, err := Query(ctx, o.Runtime, name)
		if err != nil {
			return nil, err
		}
		source, digest = s.Source, s.ManifestDigest
		if s.Root != "" {
			o.Root = s.Root
		}
	case strings.HasPrefix(name, "sha256:"):
		source, digest = "", name
	default:
		if source, err = absoluteSource(name); err != nil {
			return nil, err
		}
	}
	img := &Image{m: newMount(source, "", o)}
	m := img.m
	defer func() {
		if err != nil {
			img.Close()
		}
	}()
	if path, ok := composefsSource(source); ok {
		return img, img.openComposefs(path, objects)
	}
	if m.store, err = cache.Open(m.opts.Root, cache.Options{Metrics: o.Metrics, Logger: m.opts.Logger, Budget: o.Budget}); err != nil {
		return nil, hint.Wrap(err, "name a folder of your own with --root")
	}
	if digest != "" {
		if img.digest, err = toc.ParseDigest(digest); err != nil {
			return nil, err
		}
		img.known = true
		if source == "" {
			if source, m.opts.Source.Platform, err = sourceOf(m.store, img.digest); err != nil {
				return nil, err
			}
			m.source = source
		}
	}
	if m.src, err = fetcher.OpenSource(source, m.opts.Source); err != nil {
		return nil, err
	}
	if !img.known && m.remote() && !o.Refresh {
		img.digest, img.known = m.known()
	}
	return img, nil
}

// sourceOf returns where an image of the store came from.
func sourceOf(s *cache.Store, d image.Digest) (source, platform string, err error) {
	all, err := s.Sources()
	if err != nil {
		return "", "", err
	}
	if len(all[d]) == 0 {
		return "", "", hint.Wrap(fmt.Errorf("the store has no image %s", d), "'cfs-fuse cache ls' lists those that it has")
	}
	source, platform, _ = strings.Cut(all[d][0], "\n")
	return source, strings.TrimSpace(platform), nil
}

func (img *Image) openComposefs(path string, objects []string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	img.m.opts.Objects = objects
	_, err = img.m.openComposefs(path, f)
	return err
}

// Source returns the source in full.
func (img *Image) Source() string {
	if img.m.src != nil {
		return img.m.src.String()
	}
	return img.m.source
}

// Root returns the folder of the store.
func (img *Image) Root() string { return img.m.opts.Root }

// Manifest returns the image's manifest, from the store if that has it; nil for
// a composefs: source.
func (img *Image) Manifest(ctx context.Context) (*fetcher.Manifest, error) {
	m := img.m
	if img.manifest != nil || m.src == nil {
		return img.manifest, nil
	}
	if img.known {
		raw, err := os.ReadFile(filepath.Join(m.imageDir(img.digest), manifestName))
		if err == nil {
			if p, err := fetcher.ParseManifest(raw); err == nil && p.Digest == img.digest {
				img.manifest = p
				return p, nil
			}
		}
	}
	manifest, err := m.src.Resolve(ctx)
	if err != nil {
		return nil, err
	}
	img.manifest, img.digest, img.known = manifest, manifest.Digest, true
	return manifest, nil
}

// Config returns the image's config as it is, nil for a source that has none.
func (img *Image) Config(ctx context.Context) ([]byte, error) {
	manifest, err := img.Manifest(ctx)
	if err != nil || manifest == nil || manifest.LocalLayer || manifest.Config.Size == 0 {
		return nil, err
	}
	return fetcher.ReadConfig(ctx, img.m.src, manifest)
}

// open makes the tree known: from the store, or from the layers' tables of
// contents.
func (img *Image) open(ctx context.Context) error {
	img.once.Do(func() { img.openErr = img.openTree(ctx) })
	return img.openErr
}

func (img *Image) openTree(ctx context.Context) (err error) {
	m := img.m
	if m.reader != nil {
		return nil // composefs
	}
	if img.known {
		if m.image, err = m.load(img.digest); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if m.image == nil {
		if m.image, err = m.prepare(ctx); err != nil {
			return err
		}
	}
	img.digest, img.known = m.image.digest, true
	if m.contents, err = m.store.Contents(m.image.index); err != nil {
		return err
	}
	if m.reader, err = erofs.OpenFile(m.image.path(lazyName)); err != nil {
		return hint.Wrap(err, "remove "+m.image.dir+" and try again")
	}
	m.fetch = m.newFetcher(nil)
	img.contents = &lazyContents{m.image.index, m.contents, m.spare, m.fetch, nil, nil}
	return nil
}

// Tree returns the merged tree of all layers. It is the Image's.
func (img *Image) Tree(ctx context.Context) (*erofs.Reader, error) {
	return img.m.reader, errors.Join(img.open(ctx), ctx.Err())
}

// ReadAt reads bytes of an object of the tree ("ab/cdef…"), after it has
// fetched those that are not in the store. It works once Tree has.
func (img *Image) ReadAt(ctx context.Context, object string, p []byte, off int64) (n int, fetched bool, err error) {
	if img.contents == nil {
		return img.m.objects.ReadAt(ctx, object, p, off)
	}
	return img.contents.ReadAt(ctx, object, p, off)
}

// Fetch brings a whole object into the store.
func (img *Image) Fetch(ctx context.Context, object string) error {
	i, ok := img.find(object)
	if !ok {
		return nil
	}
	return img.m.fetch.Need(ctx, i, 0, img.m.image.index.Content(i).Size)
}

func (img *Image) find(object string) (int, bool) {
	if img.contents == nil || object == "" {
		return 0, false
	}
	return img.contents.Find(object)
}

// File opens an object that is whole in the store; the error is
// *cache.AbsentError if it is not.
func (img *Image) File(object string) (*os.File, error) {
	i, ok := img.find(object)
	if !ok {
		return nil, os.ErrNotExist
	}
	return img.m.contents.File(i)
}

// Local returns how many bytes of an object are in the store, and its content's
// digest. ok is false for a composefs: source, and what is no object.
func (img *Image) Local(object string) (bytes int64, digest image.Digest, ok bool) {
	i, ok := img.find(object)
	if !ok {
		return 0, digest, false
	}
	x := img.m.image.index
	c := x.Content(i)
	if img.m.contents.Whole(i) {
		return c.Size, c.Digest, true
	}
	for k := range c.Chunks {
		if j := x.ContentChunk(i, k); !img.m.contents.Missing(j) {
			bytes += x.Chunk(j).Size
		}
	}
	return bytes, c.Digest, true
}

// A LayerLocal is how much of a layer's files that are seen in the tree is in the
// store.
type LayerLocal struct{ Bytes, BytesLocal int64 }

// Progress returns how much of the image is in the store, and of each of its
// layers. ok is false if its tree is not known there; nothing is fetched.
func (img *Image) Progress(ctx context.Context) (all cache.Progress, layers []LayerLocal, ok bool) {
	if !img.known || img.m.src == nil {
		return all, nil, false
	}
	if _, err := os.Stat(filepath.Join(img.m.imageDir(img.digest), chunksName)); err != nil || img.open(ctx) != nil {
		return all, nil, false
	}
	x := img.m.image.index
	layers = make([]LayerLocal, len(x.Layers()))
	for j := range x.Chunks() {
		c := x.Chunk(j)
		if c.Zero {
			break
		}
		layers[c.Layer].Bytes += c.Size
		if !img.m.contents.Missing(j) {
			layers[c.Layer].BytesLocal += c.Size
		}
	}
	return img.m.contents.Progress(), layers, true
}

// Layers reads the table of contents of each layer, the lowest first. It fails
// for a composefs: source, which has none.
func (img *Image) Layers(ctx context.Context) ([]image.Layer, error) {
	manifest, err := img.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	if manifest == nil {
		return nil, hint.Wrap(fmt.Errorf("%s: a composefs image has no layers", img.m.source), "'cfs-fuse ls' shows its tree")
	}
	t, err := img.m.readTOCs(ctx, manifest)
	return t.layers, err
}

// Fetched returns what was asked of the source so far.
func (img *Image) Fetched() Work {
	var w Work
	if img.m.image != nil {
		w = img.m.image.fetched
	}
	if img.m.fetch != nil {
		for _, s := range img.m.fetch.Stats() {
			w.Requests, w.Bytes = w.Requests+s.Requests, w.Bytes+s.Bytes
		}
	}
	return w
}

// Close ends what is under way. What was fetched stays in the store.
func (img *Image) Close() { img.m.release() }

// A ChunkState is what the store has of one chunk of an image.
type ChunkState struct {
	Layer   int
	Size    int64 // in bytes
	Content string
	Local   bool
	Zero    bool // all zero: it is never fetched
}

// Chunks calls fn for each chunk of an image whose tree the store knows, by its
// number in the index.
func (img *Image) Chunks(ctx context.Context, fn func(chunk int, c ChunkState)) error {
	if img.m.src == nil {
		return fmt.Errorf("%s: a composefs image has no chunks", img.m.source)
	}
	if err := img.open(ctx); err != nil {
		return err
	}
	x := img.m.image.index
	for j := range x.Chunks() {
		c := x.Chunk(j)
		fn(j, ChunkState{Layer: c.Layer, Size: c.Size, Content: x.Content(c.Content).Digest.String(), Local: !img.m.contents.Missing(j), Zero: c.Zero})
	}
	return nil
}
