package mount

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// The files of an image's folder.
const (
	manifestName = "manifest.json"
	lazyName     = cache.LazyName
	chunksName   = cache.ChunksName
	sealedName   = cache.SealedName
	recordName   = cache.RecordName
	// insecureName is there if a layer's table of contents was taken without
	// a digest in the manifest (--insecure-toc).
	insecureName = "insecure-toc"
)

// Limits of what one image's tables of contents may hold, all layers together:
// what is held in memory until they are merged.
const (
	maxLayers  = 1024
	maxEntries = 8 << 20
)

// tocsAtOnce is how many layers' tables of contents are asked for in parallel.
const tocsAtOnce = 16

// A preparedImage is an image whose tree and chunks are known.
type preparedImage struct {
	digest  image.Digest
	dir     string
	layers  []ocispec.Descriptor
	author  string // the sealed image's fs-verity digest by the manifest's annotation, "" if it has none
	index   *image.Index
	mapped  []byte // what index reads
	indexes *layerIndexes
	fetched Work // metadata
	// streamed is what was asked for of layers that were read as a whole.
	streamed Work
}

func (p *preparedImage) path(name string) string { return filepath.Join(p.dir, name) }

func (p *preparedImage) close() {
	if p.mapped != nil {
		unix.Munmap(p.mapped)
		p.mapped = nil
	}
	if p.indexes != nil {
		p.indexes.close()
	}
}

// prepare finds the image in the store, or asks the source for its manifest
// and tables of contents and writes the image's folder.
func (m *Mount) prepare(ctx context.Context) (*preparedImage, error) {
	digest, known := m.known()
	if known && !m.trustsOthers() {
		m.discardForeign(digest)
	}
	if known && !m.opts.Refresh && m.remote() {
		p, err := m.load(digest)
		if err == nil || errors.Is(err, toc.ErrNoTOCDigest) {
			return p, err
		}
		if !errors.Is(err, os.ErrNotExist) {
			m.log.Warn("the image's folder is damaged and is made anew", "error", err)
			if err := m.discard(digest); err != nil {
				return nil, err
			}
		}
	}
	m.story.phase("manifest")
	manifest, err := m.src.Resolve(ctx)
	if err != nil {
		// A local source that was moved away is no reason not to mount what
		// the store has of it.
		if known && !m.remote() && errors.Is(err, os.ErrNotExist) {
			if p, lerr := m.load(digest); lerr == nil {
				m.log.Warn("the source is gone; the store's copy is mounted", "error", err)
				return p, nil
			}
		}
		return nil, err
	}
	if !m.trustsOthers() {
		m.discardForeign(manifest.Digest)
	}
	p, err := m.load(manifest.Digest)
	if errors.Is(err, toc.ErrNoTOCDigest) {
		return nil, err
	}
	t := &tables{}
	if err != nil {
		if !errors.Is(err, os.ErrNotExist) {
			if err := m.discard(manifest.Digest); err != nil {
				return nil, err
			}
		}
		m.askProfile(manifest.Digest, false)
		if t, err = m.write(ctx, manifest); err != nil {
			return nil, err
		}
		if p, err = m.load(manifest.Digest); err != nil {
			return nil, err
		}
	}
	p.fetched, p.streamed = t.fetched, t.streamed
	p.fetched.Requests++ // the manifest
	p.fetched.Bytes += int64(len(manifest.Raw))
	if !known || digest != manifest.Digest {
		if err := durable.WriteFile(m.refPath(), []byte(manifest.Digest.String()+"\n"), 0o644); err != nil {
			m.log.Warn("what the source stands for could not be noted", "error", err)
		}
	}
	m.noteSource()
	return p, nil
}

// remote reports whether asking the source costs a request.
func (m *Mount) remote() bool { return strings.HasPrefix(m.src.String(), "docker://") }

// refPath is the file that remembers what this source was resolved to for this
// platform. The name is a digest, since references may be longer than names.
func (m *Mount) refPath() string {
	sum := sha256.Sum256([]byte(m.src.String() + "\x00" + m.opts.Source.Platform))
	return filepath.Join(m.opts.Root, "refs", hex.EncodeToString(sum[:]))
}

// known returns the manifest digest that the store remembers for this source.
func (m *Mount) known() (image.Digest, bool) {
	data, err := os.ReadFile(m.refPath())
	if err != nil {
		return image.Digest{}, false
	}
	digest, err := toc.ParseDigest(strings.TrimSpace(string(data)))
	return digest, err == nil
}

func (m *Mount) imageDir(digest image.Digest) string {
	return m.store.ImageDir(digest)
}

// discard moves a damaged image folder out of the way and removes it.
func (m *Mount) discard(digest image.Digest) error {
	tmp, err := os.MkdirTemp(m.store.Images(), ".bad-*")
	if err == nil {
		err = os.Rename(m.imageDir(digest), filepath.Join(tmp, "image"))
		os.RemoveAll(tmp)
	}
	if err != nil {
		return fmt.Errorf("put the damaged image %s aside: %w", digest, err)
	}
	return nil
}

// discardForeign removes an image's folder if it was made by an index that another
// has made and that was never proven: this time such indexes are not trusted.
func (m *Mount) discardForeign(digest image.Digest) {
	if names, err := filepath.Glob(filepath.Join(m.imageDir(digest), "*"+foreignIndex)); err != nil || len(names) == 0 {
		return
	}
	m.log.Warn("the store's tree of the image rests on an index that another has made; it is made anew (--index auto keeps it)")
	if err := m.discard(digest); err != nil {
		m.log.Warn("the tree is used as it is", "error", err)
	}
}

// load opens the folder of an image. It fails with os.ErrNotExist when there
// is none, and with another error when what is there cannot be used.
func (m *Mount) load(digest image.Digest) (*preparedImage, error) {
	if err := m.hold(digest); err != nil {
		return nil, err
	}
	p := &preparedImage{digest: digest, dir: m.imageDir(digest)}
	raw, err := os.ReadFile(p.path(manifestName))
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(raw) != digest {
		return nil, fmt.Errorf("%s: its digest is not %s", p.path(manifestName), digest)
	}
	manifest, err := fetcher.ParseManifest(raw)
	if err != nil {
		return nil, err
	}
	p.layers = manifest.Layers
	if p.author, err = sealingAnnotation(manifest); err != nil {
		return nil, fmt.Errorf("image %s: %w", digest, err)
	}
	if _, err := os.Stat(p.path(insecureName)); err == nil && !m.opts.InsecureTOC {
		return nil, hint.Wrap(fmt.Errorf("image %s was mounted with --insecure-toc before: %w", digest, toc.ErrNoTOCDigest), insecureHint)
	}
	if p.mapped, err = mapFile(p.path(chunksName)); err != nil {
		return nil, damaged(err)
	}
	if p.index, err = p.openIndex(m.log); err != nil {
		p.close()
		return nil, fmt.Errorf("%s: %w", p.path(chunksName), err)
	}
	// What the check has read need not stay resident.
	unix.Madvise(p.mapped, unix.MADV_DONTNEED)
	if n := len(p.index.Layers()); n != len(p.layers) {
		p.close()
		return nil, fmt.Errorf("%s: %d layers, the manifest has %d", p.path(chunksName), n, len(p.layers))
	}
	if p.indexes, err = loadIndexes(p.dir, p.index.Layers()); err != nil {
		p.close()
		return nil, damaged(err)
	}
	// The image is read when it is served; here only that it can be.
	r, err := erofs.OpenFile(p.path(lazyName))
	if err != nil {
		p.close()
		return nil, damaged(err)
	}
	r.Close()
	return p, nil
}

// damaged makes an error about a file that must be there one that is not
// taken for an image that is not there.
func damaged(err error) error { return fmt.Errorf("damaged: %v", err) }

// mapFile maps a whole file for reading.
func mapFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() == 0 {
		return nil, fmt.Errorf("map %s: empty file", path)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %s: %w", path, err)
	}
	return b, nil
}

// write makes the folder of an image: beside its name, synced, renamed.
func (m *Mount) write(ctx context.Context, manifest *fetcher.Manifest) (*tables, error) {
	m.log.Debug("manifest read", "after", time.Since(m.started))
	m.story.phase("tables of contents")
	t, err := m.readTOCs(ctx, manifest)
	if err != nil {
		return t, err
	}
	m.log.Debug("tables of contents read", "after", time.Since(m.started))
	m.story.detail("%d layers, %d bytes in %d requests", len(t.layers), t.fetched.Bytes, t.fetched.Requests)
	m.story.phase("merge")
	tree, err := image.Merge(t.layers)
	if err != nil {
		return t, hint.Wrap(fmt.Errorf("merge the layers of %s: %w", manifest.Digest, err),
			"the image is malformed; build it anew or report it to its author")
	}
	m.log.Debug("layers merged", "after", time.Since(m.started))
	m.story.detail("%d names", tree.Names)
	m.story.phase("write the tree")
	dir := m.imageDir(manifest.Digest)
	tmp, err := os.MkdirTemp(m.store.Images(), ".tmp-*")
	if err != nil {
		return t, fmt.Errorf("make the folder of image %s: %w", manifest.Digest, err)
	}
	defer os.RemoveAll(tmp)
	if err := durable.WriteFile(filepath.Join(tmp, manifestName), manifest.Raw, 0o644); err != nil {
		return t, err
	}
	if t.insecure {
		if err := durable.WriteFile(filepath.Join(tmp, insecureName), nil, 0o644); err != nil {
			return t, err
		}
	}
	if err := erofs.WriteFile(filepath.Join(tmp, lazyName), lazyTree(tree), imageFormat); err != nil {
		return t, err
	}
	f, err := durable.Create(filepath.Join(tmp, chunksName), 0o644)
	if err != nil {
		return t, err
	}
	defer f.Abort()
	if err := image.WriteIndex(f, tree, t.layers); err != nil {
		return t, fmt.Errorf("write %s: %w", chunksName, err)
	}
	if err := f.Commit(); err != nil {
		return t, err
	}
	for _, l := range t.ordinary {
		if err := durable.WriteFile(filepath.Join(tmp, indexName(l.index.Blob, l.kind)), l.index.Bytes(), 0o644); err != nil {
			return t, err
		}
	}
	m.log.Debug("image written", "after", time.Since(m.started))
	err = os.Rename(tmp, dir)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		return t, nil // another process was faster
	}
	if err != nil {
		return t, fmt.Errorf("name the folder of image %s: %w", manifest.Digest, err)
	}
	return t, durable.SyncDir(filepath.Dir(dir))
}

// readTOCs reads the table of contents of each layer, and of ordinary layers
// all of it.
func (m *Mount) readTOCs(ctx context.Context, manifest *fetcher.Manifest) (*tables, error) {
	if n := len(manifest.Layers); n > maxLayers {
		return &tables{}, fmt.Errorf("image %s: %d layers, the limit is %d", manifest.Digest, n, maxLayers)
	}
	layers := make([]image.Layer, len(manifest.Layers))
	var requests, bytes, entries, done atomic.Int64
	var unvouched atomic.Bool
	var mu sync.Mutex
	var ordinary []*ordinaryLayer // guarded by mu
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(tocsAtOnce)
	for i, desc := range manifest.Layers {
		g.Go(func() error {
			digest, err := toc.ParseDigest(desc.Digest.String())
			if err != nil {
				return fmt.Errorf("layer %d: %w", i, err)
			}
			blob := m.src.Blob(desc)
			r := &countingReaderAt{r: m.link.ReaderAt(gctx, blob, desc.Size), requests: &requests, bytes: &bytes}
			o := toc.Options{Annotations: desc.Annotations, InsecureTOC: manifest.LocalLayer}
			t, err := toc.Read(r, desc.Size, o)
			_, _, promised := toc.Promised(desc.Annotations)
			final := err == nil || errors.Is(err, toc.ErrNoTOCDigest) || errors.Is(err, toc.ErrNoTOC) && !promised
			if other, ok := fetcher.Elsewhere(blob); ok && !final && !r.failed {
				// The bytes came, and are not what they should be.
				m.log.Debug("a table of contents is asked for again", "layer", i, "error", err)
				r.r = m.link.ReaderAt(gctx, other, desc.Size)
				t, err = toc.Read(r, desc.Size, o)
			}
			if errors.Is(err, toc.ErrNoTOCDigest) && m.opts.InsecureTOC {
				unvouched.Store(true)
				o.InsecureTOC = true
				t, err = toc.Read(r, desc.Size, o)
			}
			if errors.Is(err, toc.ErrNoTOC) && !m.chunkedOnly {
				mu.Lock()
				defer mu.Unlock()
				ordinary = append(ordinary, &ordinaryLayer{number: i, desc: desc})
				return nil
			}
			if err != nil {
				return layerError(i, desc, err)
			}
			if entries.Add(int64(len(t.Entries))) > maxEntries {
				return fmt.Errorf("image %s: more than %d files and folders in its layers", manifest.Digest, maxEntries)
			}
			layers[i] = image.Layer{Digest: digest, Size: desc.Size, TOC: t}
			m.story.progress("tables of contents", done.Add(1), int64(len(layers)))
			return nil
		})
	}
	t := &tables{layers: layers}
	err := g.Wait()
	t.insecure, t.ordinary = unvouched.Load(), ordinary
	t.fetched = Work{Requests: requests.Load(), Bytes: bytes.Load()}
	if err == nil {
		t.streamed, err = m.readOrdinary(ctx, manifest, ordinary)
	}
	for _, l := range ordinary {
		if err != nil {
			break
		}
		l.table, err = l.index.TOC()
		if err == nil && entries.Add(int64(len(l.table.Entries))) > maxEntries {
			err = fmt.Errorf("image %s: more than %d files and folders in its layers", manifest.Digest, maxEntries)
		}
		layers[l.number] = image.Layer{Digest: l.index.Blob, Size: l.desc.Size, TOC: l.table}
	}
	return t, err
}

// tables is what an image's layers hold.
type tables struct {
	layers   []image.Layer
	ordinary []*ordinaryLayer
	insecure bool // the manifest does not vouch for one of them
	fetched  Work // metadata
	streamed Work // whole layers
}

const insecureHint = "use --insecure-toc if you trust the source and the way to it"

// layerError names the layer of an error, and what can be done about it.
func layerError(i int, desc ocispec.Descriptor, err error) error {
	err = fmt.Errorf("layer %d (%s, %s): %w", i, desc.Digest, desc.MediaType, err)
	if errors.Is(err, toc.ErrNoTOCDigest) {
		return hint.Wrap(err, insecureHint)
	}
	return err
}

type countingReaderAt struct {
	r interface {
		ReadAt(p []byte, off int64) (int, error)
	}
	requests, bytes *atomic.Int64
	failed          bool // for another reason than the blob's end
}

func (c *countingReaderAt) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.r.ReadAt(p, off)
	c.requests.Add(1)
	c.bytes.Add(int64(n))
	c.failed = c.failed || err != nil && err != io.EOF
	return n, err
}
