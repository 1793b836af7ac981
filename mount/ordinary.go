package mount

import (
	"cmp"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/tarindex"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
)

// Layer indexes are kept in the folders of the images that have the layer:
// ownIndex if this store has seen the whole layer, with its DiffID; foreignIndex
// if another has made it, and the DiffID is still to be proven.
const (
	indexPrefix  = "layer-"
	ownIndex     = ".index"
	foreignIndex = ".foreign-index"
)

func indexName(layer image.Digest, kind string) string {
	return indexPrefix + hex.EncodeToString(layer[:]) + kind
}

// streamsAtOnce returns how many ordinary layers are read in parallel: the
// largest, which comes first, must not wait for a processor because of others.
func streamsAtOnce() int { return min(8, runtime.GOMAXPROCS(0)+1) }

// An ordinaryLayer is a layer without a table of contents of its own.
type ordinaryLayer struct {
	number int
	desc   ocispec.Descriptor
	diffID image.Digest // zero: not known
	index  *tarindex.Index
	table  *toc.TOC // by index
	kind   string   // ownIndex or foreignIndex
}

// readOrdinary gets the index of each ordinary layer of an image: from the
// store, or by reading the layer, whose files are then in the store. The largest
// layers come first: the tree is known when the last one is read.
func (m *Mount) readOrdinary(ctx context.Context, manifest *fetcher.Manifest, ordinary []*ordinaryLayer) (Work, error) {
	if len(ordinary) == 0 {
		return Work{}, nil
	}
	diffIDs, err := configDiffIDs(ctx, m.src, manifest)
	if err != nil && ctx.Err() != nil {
		return Work{}, err
	}
	if err != nil {
		m.log.Debug("the image's config names no DiffIDs", "error", err)
	}
	var todo []*ordinaryLayer
	for _, l := range ordinary {
		if diffIDs != nil {
			if l.diffID, err = toc.ParseDigest(diffIDs[l.number]); err != nil {
				return Work{}, fmt.Errorf("config %s: DiffID of layer %d: %w", manifest.Config.Digest, l.number, err)
			}
		}
		l.index, l.kind = m.findIndex(l)
	}
	asking, actx := errgroup.WithContext(ctx)
	asking.SetLimit(tocsAtOnce)
	for _, l := range ordinary {
		if l.index == nil {
			asking.Go(func() error { return m.attachedIndex(actx, l) })
		}
	}
	if err := asking.Wait(); err != nil {
		return Work{}, err
	}
	for _, l := range ordinary {
		if l.index == nil {
			todo = append(todo, l)
		}
	}
	slices.SortStableFunc(todo, func(a, b *ordinaryLayer) int { return cmp.Compare(b.desc.Size, a.desc.Size) })
	total := int64(0)
	for _, l := range todo {
		total += l.desc.Size
	}
	var done atomic.Int64
	m.story.phase("ordinary layers")
	stream := fetcher.NewStream(m.opts.Share, m.opts.Metrics)
	w := newContentWriter(m)
	defer w.close()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(streamsAtOnce())
	for _, l := range todo {
		g.Go(func() error {
			return m.readLayer(gctx, stream, l, w, func(n int) {
				m.story.progress("layers (bytes)", done.Add(int64(n)), total)
			})
		})
	}
	err = g.Wait()
	work := stream.Work()
	m.story.detail("%d of %d layers, %d bytes", len(todo), len(manifest.Layers), work.Bytes)
	return Work{Requests: work.Requests, Bytes: work.Bytes}, err
}

// readLayer reads one layer from its first byte to its last.
func (m *Mount) readLayer(ctx context.Context, stream *fetcher.Stream, l *ordinaryLayer, w *contentWriter, report func(n int)) error {
	blob := m.src.Blob(l.desc)
	start := time.Now()
	x, err := m.tryLayer(ctx, stream, blob, l, w, report)
	if other, ok := fetcher.Elsewhere(blob); ok && err != nil && ctx.Err() == nil && wrongBytes(err) {
		m.log.Debug("a layer is asked for again", "layer", l.number, "error", err)
		x, err = m.tryLayer(ctx, stream, other, l, w, report)
	}
	if err != nil {
		err = fmt.Errorf("layer %d (%s, %s): %w", l.number, l.desc.Digest, l.desc.MediaType, err)
		switch d, isDigest := errors.AsType[*tarindex.DigestError](err); {
		case isDigest && d.What == "DiffID":
			return hint.Wrap(err, "the image contradicts itself; build or push it again")
		case isDigest:
			return hint.Wrap(err, "do not trust this source, or the way to it")
		case errors.Is(err, tarindex.ErrLayer):
			return hint.Wrap(err, "layers are tars, with gzip, zstd or no compression, or eStargz or zstd:chunked")
		}
		return err
	}
	m.log.Debug("layer read", "layer", l.number, "bytes", l.desc.Size, "index", len(x.Bytes()), "spans", x.Spans(),
		"took", time.Since(start).Round(time.Millisecond).String())
	l.index, l.kind = x, ownIndex
	return nil
}

// wrongBytes reports whether an error says that other bytes might do.
func wrongBytes(err error) bool {
	d, ok := errors.AsType[*tarindex.DigestError](err)
	return ok && d.What == "blob" || errors.Is(err, tarindex.ErrLayer)
}

func (m *Mount) tryLayer(ctx context.Context, stream *fetcher.Stream, blob fetcher.Blob, l *ordinaryLayer, w tarindex.Store, report func(n int)) (*tarindex.Index, error) {
	if l.desc.Size == 0 {
		return nil, fmt.Errorf("%w: it has no bytes", tarindex.ErrLayer)
	}
	d, err := toc.ParseDigest(l.desc.Digest.String())
	if err != nil {
		return nil, err
	}
	body, err := stream.Open(ctx, blob, l.desc.Size)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	return tarindex.Build(ctx, &reportingReader{r: body, report: report}, tarindex.Layer{Blob: d, Size: l.desc.Size, DiffID: l.diffID}, w)
}

// findIndex looks for a layer's index in the folders of the store's images.
func (m *Mount) findIndex(l *ordinaryLayer) (*tarindex.Index, string) {
	d, err := toc.ParseDigest(l.desc.Digest.String())
	if err != nil {
		return nil, ""
	}
	kinds := []string{ownIndex, foreignIndex}
	if !m.trustsOthers() {
		kinds = kinds[:1]
	}
	for _, kind := range kinds {
		names, err := filepath.Glob(filepath.Join(m.store.Images(), "*", indexName(d, kind)))
		if err != nil {
			return nil, ""
		}
		for _, name := range names {
			x, err := readIndex(name)
			if err == nil && (x.Blob != d || x.Size != l.desc.Size || !l.diffID.IsZero() && x.DiffID != l.diffID) {
				err = errors.New("it is of another layer")
			}
			if err == nil {
				return x, kind
			}
			m.log.Debug("an index is passed over", "file", name, "error", err)
		}
	}
	return nil, ""
}

// trustsOthers reports whether an index that another has made may be used.
func (m *Mount) trustsOthers() bool { return m.opts.Index == Auto || m.opts.Index == Require }

func readIndex(path string) (*tarindex.Index, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.Size() > tarindex.MaxIndex {
		return nil, fmt.Errorf("%s: %d bytes", path, fi.Size())
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return tarindex.Open(b)
}

// configDiffIDs reads what the image's config says the uncompressed layers are.
func configDiffIDs(ctx context.Context, src fetcher.Source, manifest *fetcher.Manifest) ([]string, error) {
	if manifest.LocalLayer || manifest.Config.Size == 0 || manifest.Config.Digest == ocispec.DescriptorEmptyJSON.Digest {
		return nil, errors.New("a single layer has no config")
	}
	raw, err := fetcher.ReadConfig(ctx, src, manifest)
	if err != nil {
		return nil, err
	}
	var config struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if len(config.RootFS.DiffIDs) != len(manifest.Layers) {
		return nil, fmt.Errorf("the config has %d DiffIDs for %d layers", len(config.RootFS.DiffIDs), len(manifest.Layers))
	}
	var all []string
	for _, d := range config.RootFS.DiffIDs {
		all = append(all, d.String())
	}
	return all, nil
}

// A contentWriter puts the contents of layers into the store: small ones by
// goroutines of its own, since making files takes as long as decompressing them.
type contentWriter struct {
	store *cache.Store
	m     *Mount
	small chan smallContent
	work  sync.WaitGroup
	full  atomic.Bool // the store takes nothing any more: what is missing is fetched later
}

type smallContent struct {
	digest image.Digest
	data   []byte
}

const (
	contentWriters = 2
	smallQueue     = 64
)

func newContentWriter(m *Mount) *contentWriter {
	w := &contentWriter{store: m.store, m: m, small: make(chan smallContent, smallQueue)}
	for range contentWriters {
		w.work.Go(func() {
			for c := range w.small {
				if !w.full.Load() {
					w.note(w.store.PutContent(c.digest, c.data))
				}
			}
		})
	}
	return w
}

// close waits until everything is stored. Nothing may be put any more.
func (w *contentWriter) close() {
	close(w.small)
	w.work.Wait()
}

func (w *contentWriter) note(err error) {
	if err != nil && !w.full.Swap(true) {
		w.m.log.Warn("a file of a layer could not be stored; what is missing will be fetched again", "error", withHint(err))
	}
}

// Put stores a small content, after a while.
func (w *contentWriter) Put(d toc.Digest, data []byte) { w.small <- smallContent{d, data} }

// Create begins to store a large one.
func (w *contentWriter) Create(int64) tarindex.File {
	f := &contentFile{w: w}
	if !w.full.Load() {
		in, err := w.store.Incoming()
		w.note(err)
		f.in = in
	}
	return f
}

// A contentFile is a large content on its way into the store; in is nil if that
// takes it not.
type contentFile struct {
	w  *contentWriter
	in *cache.Incoming
}

func (f *contentFile) Write(p []byte) {
	if f.in == nil {
		return
	}
	if _, err := f.in.Write(p); err != nil {
		f.w.note(err)
		f.Abort()
	}
}

func (f *contentFile) Commit(d toc.Digest) {
	if f.in != nil {
		f.w.note(f.in.Commit(d))
		f.in = nil
	}
}

func (f *contentFile) Abort() {
	if f.in != nil {
		f.in.Abort()
		f.in = nil
	}
}

// layerIndexes are the indexes of an image's layers, mapped when the image is
// loaded, since its folder may be replaced, and opened when they are needed.
type layerIndexes struct {
	layers  []layerIndex
	foreign []int // layers whose index another has made, and that were not proven
}

type layerIndex struct {
	digest image.Digest
	mapped []byte // nil: the layer has none
	once   sync.Once
	x      *tarindex.Index
	err    error
}

// loadIndexes maps the indexes in the folder of an image.
func loadIndexes(dir string, layers []image.IndexLayer) (*layerIndexes, error) {
	l := &layerIndexes{layers: make([]layerIndex, len(layers))}
	for i, layer := range layers {
		o := &l.layers[i]
		o.digest = layer.Digest
		for _, kind := range []string{ownIndex, foreignIndex} {
			b, err := mapFile(filepath.Join(dir, indexName(layer.Digest, kind)))
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				l.close()
				return nil, err
			}
			if o.mapped = b; kind == foreignIndex {
				l.foreign = append(l.foreign, i)
			}
			break
		}
		if o.mapped == nil && layer.Compression == toc.GzipIndexed {
			l.close()
			return nil, fmt.Errorf("the index of layer %d is missing", i)
		}
	}
	return l, nil
}

// errNoIndex says that a layer has no index: it has a table of contents.
var errNoIndex = errors.New("the layer has no index")

// index returns the index of a layer.
func (l *layerIndexes) index(layer int) (*tarindex.Index, error) {
	if layer < 0 || layer >= len(l.layers) || l.layers[layer].mapped == nil {
		return nil, errNoIndex
	}
	o := &l.layers[layer]
	o.once.Do(func() {
		if o.x, o.err = tarindex.Open(o.mapped); o.err == nil && o.x.Blob != o.digest {
			o.err = fmt.Errorf("index of layer %s: it is that of %s", o.digest, o.x.Blob)
		}
	})
	return o.x, o.err
}

// checkpoint is fetcher.FetchOptions.Checkpoint.
func (l *layerIndexes) checkpoint(layer int, off int64) (*inflate.Checkpoint, int64, error) {
	x, err := l.index(layer)
	if err != nil {
		return nil, 0, err
	}
	return x.Checkpoint(off)
}

func (l *layerIndexes) close() {
	for i := range l.layers {
		if o := &l.layers[i]; o.mapped != nil {
			unix.Munmap(o.mapped)
			o.mapped, o.x = nil, nil
		}
	}
}

// errUnproven says that an index that another made does not lead to the layer's
// DiffID: it lies, or the image contradicts itself.
var errUnproven = errors.New("the index does not lead to the image's layer")

// prove compares each layer of which another has made the index with its DiffID,
// now that all its files are there. A nil error promises that the tree and the
// bytes are the image's.
func (m *Mount) prove(ctx context.Context) error {
	foreign := m.image.indexes.foreign
	if len(foreign) == 0 {
		return nil
	}
	raw, err := os.ReadFile(m.image.path(manifestName))
	if err != nil {
		return err
	}
	manifest, err := fetcher.ParseManifest(raw)
	if err != nil {
		return err
	}
	diffIDs, err := configDiffIDs(ctx, m.src, manifest)
	if err != nil {
		return fmt.Errorf("prove what indexes of others say: %w", err)
	}
	for _, i := range foreign {
		err := m.proveLayer(ctx, i, diffIDs[i])
		if _, ok := errors.AsType[*tarindex.DigestError](err); ok || errors.Is(err, tarindex.ErrIndex) {
			err = hint.Wrap(fmt.Errorf("%w: %w", errUnproven, err), "do not trust who made the index; mount with --index never")
		}
		if err != nil {
			return fmt.Errorf("layer %d (%s): %w", i, m.image.layers[i].Digest, err)
		}
		digest := m.image.index.Layers()[i].Digest
		if err := os.Rename(m.image.path(indexName(digest, foreignIndex)), m.image.path(indexName(digest, ownIndex))); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (m *Mount) proveLayer(ctx context.Context, layer int, diffID string) error {
	x, err := m.image.indexes.index(layer)
	if err != nil {
		return err
	}
	if want := x.DiffID.String(); want != diffID {
		got := x.DiffID
		d, err := toc.ParseDigest(diffID)
		if err != nil {
			return err
		}
		return &tarindex.DigestError{What: "DiffID", Want: d, Got: got}
	}
	err = x.Prove(ctx, m.readContent)
	if !errors.Is(err, errHidden) {
		return err
	}
	// Not all of the layer is here: it is read once more.
	l := &ordinaryLayer{number: layer, desc: m.image.layers[layer], diffID: x.DiffID}
	own, err := m.tryLayer(ctx, fetcher.NewStream(m.opts.Share, m.opts.Metrics), m.src.Blob(l.desc), l, nil, func(int) {})
	if err != nil {
		return err
	}
	return own.SameFiles(x)
}

// readContent reads bytes of a content that is in the store.
func (m *Mount) readContent(d toc.Digest, p []byte, off int64) error {
	content, ok := m.image.index.Find(d)
	if !ok {
		// A file that another layer hides is in no index of chunks: the layer
		// cannot be put together without it.
		return fmt.Errorf("content %s: %w", d, errHidden)
	}
	for len(p) > 0 {
		n, err := m.contents.ReadAt(content, p, off)
		if n == 0 {
			if err == nil {
				err = errors.New("nothing was read")
			}
			return fmt.Errorf("content %s at %d: %w", d, off, err)
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

var errHidden = errors.New("it is hidden by another layer, and was not fetched")

// A reportingReader tells now and then how many bytes more it gave.
type reportingReader struct {
	r      io.Reader
	report func(n int)
	untold int
}

// reportEach is after how many bytes a reportingReader tells.
const reportEach = 512 << 10

func (r *reportingReader) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.untold += n; r.untold >= reportEach || err != nil {
		r.report(r.untold)
		r.untold = 0
	}
	return n, err
}
