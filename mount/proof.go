package mount

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/tarindex"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// fromFiles puts a layer together again from what is stored of it and from what of
// a tar is not files, the layer's index or its tar-split data, and compares it
// with the DiffID. Nothing of the files is fetched. ok is false if that cannot be
// done, for the reason err.
func (v *verifier) fromFiles(ctx context.Context, layer int, desc ocispec.Descriptor, t *toc.TOC) (got string, ok bool, err error) {
	if x, err := v.m.image.indexes.index(layer); err == nil {
		err = x.Prove(ctx, v.readStored)
		if d, wrong := errors.AsType[*tarindex.DigestError](err); wrong {
			return d.Got.String(), true, nil
		}
		return x.DiffID.String(), err == nil, err
	} else if !errors.Is(err, errNoIndex) {
		return "", false, err
	}
	position, has := desc.Annotations[tarSplitAnnotation]
	if !has || t == nil {
		return "", false, errors.New("it has no tar-split data")
	}
	d, err := v.fromTarSplit(ctx, desc, position, t)
	return d.String(), err == nil, err
}

// readStored reads bytes of a stored content.
func (v *verifier) readStored(d toc.Digest, p []byte, off int64) error {
	f, err := v.openStored(d)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.ReadAt(p, off)
	return err
}

func (v *verifier) openStored(d image.Digest) (*os.File, error) {
	f, err := os.Open(filepath.Join(v.m.store.ContentsDir(), d.Path()))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("file %s of the layer is not stored", d)
	}
	return f, err
}

// tarSplitAnnotation gives the place of a layer's tar-split data: offset,
// compressed and uncompressed length, with colons between (containers/storage,
// pkg/chunked).
const tarSplitAnnotation = "io.github.containers.zstd-chunked.tarsplit-position"

// maxTarSplit bounds tar-split data, in bytes.
const maxTarSplit = 512 << 20

// fromTarSplit makes the tar from tar-split data and the stored files, and
// returns its digest.
func (v *verifier) fromTarSplit(ctx context.Context, desc ocispec.Descriptor, position string, t *toc.TOC) (digest.Digest, error) {
	var n [3]int64
	fields := strings.Split(position, ":")
	if len(fields) != len(n) {
		return "", fmt.Errorf("annotation %s: %.100q: want three numbers", tarSplitAnnotation, position)
	}
	for i, f := range fields {
		var err error
		if n[i], err = strconv.ParseInt(f, 10, 64); err != nil || n[i] < 0 {
			return "", fmt.Errorf("annotation %s: %.100q: want three numbers", tarSplitAnnotation, position)
		}
	}
	if n[1] == 0 || n[1] > maxTarSplit || n[2] > maxTarSplit || n[0] > desc.Size-n[1] {
		return "", fmt.Errorf("annotation %s: %.100q in a blob of %d bytes", tarSplitAnnotation, position, desc.Size)
	}
	body, err := v.m.src.Blob(desc).ReadRange(ctx, n[0], n[1])
	if err != nil {
		return "", err
	}
	defer body.Close()
	z, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxTarSplit), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return "", err
	}
	defer z.Close()
	files, err := v.filesOf(ctx, t)
	if err != nil {
		return "", err
	}
	h := sha256.New()
	if err := asm.WriteOutputTarStream(files, storage.NewJSONUnpacker(io.LimitReader(z, n[2])), h); err != nil {
		return "", fmt.Errorf("put together by tar-split: %w", err)
	}
	return digest.NewDigest(digest.SHA256, h), nil
}

// layerFiles gives tar-split the files of a layer.
type layerFiles struct {
	ctx   context.Context
	v     *verifier
	names map[string]image.Digest
}

func (v *verifier) filesOf(ctx context.Context, t *toc.TOC) (*layerFiles, error) {
	l := &layerFiles{ctx, v, map[string]image.Digest{}}
	for _, e := range t.Entries {
		if e.Type != toc.Reg || e.Size == 0 {
			continue
		}
		name := path.Clean("/" + e.Name)
		if d, ok := l.names[name]; ok && d != e.Digest {
			return nil, fmt.Errorf("the layer has %q twice", e.Name)
		}
		l.names[name] = e.Digest
	}
	return l, nil
}

// Get implements storage.FileGetter.
func (l *layerFiles) Get(name string) (io.ReadCloser, error) {
	if err := l.ctx.Err(); err != nil {
		return nil, err
	}
	d, ok := l.names[path.Clean("/"+name)]
	if !ok {
		return nil, fmt.Errorf("the table of contents has no file %q", name)
	}
	return l.v.openStored(d)
}

// proveDiffID adds what the stored files prove of a layer's DiffID, when its blob
// is not read.
func (v *verifier) proveDiffID(ctx context.Context, parent *Link, layer int, desc ocispec.Descriptor, t *toc.TOC, want string) {
	what := "DiffID " + want
	if want == "" {
		parent.add("DiffID", Unproven, "there is no config that names it")
		return
	}
	got, ok, err := v.fromFiles(ctx, layer, desc, t)
	switch {
	case !ok:
		parent.add(what, Unproven, "needs the whole blob (--blobs reads it): %s; no byte that programs read rests on it", oneLine(err.Error()))
	case got != want:
		parent.add(what, Wrong, "put together from the stored files, the layer has %s", got)
	default:
		parent.add(what, Proven, "SHA-256 of the layer, put together from the stored files; the config names it")
	}
}

// ordinaryTable is the table of contents of an ordinary layer, by its index.
func (v *verifier) ordinaryTable(parent *Link, layer int, desc ocispec.Descriptor, diffID string) (*toc.TOC, *Link) {
	const what = "table of contents"
	x, err := v.m.image.indexes.index(layer)
	if err == nil && (x.Blob.String() != desc.Digest.String() || x.Size != desc.Size) {
		err = fmt.Errorf("its index is of %s", x.Blob)
	}
	var t *toc.TOC
	if err == nil {
		t, err = x.TOC()
	}
	switch {
	case err != nil:
		return nil, parent.add(what, Unproven, "cannot be made from the layer's index: %s", oneLine(err.Error()))
	case diffID != "" && x.DiffID.String() != diffID:
		return t, parent.add(what, Wrong, "the layer's index is of a layer with the DiffID %s", x.DiffID)
	}
	return t, parent.add(what, Proven, "made from the layer's index, which the DiffID vouches for")
}

var _ storage.FileGetter = (*layerFiles)(nil)
