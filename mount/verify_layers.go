package mount

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// tables reads each layer's table of contents again, and of local sources (or
// if it is wanted) the whole blob, for its digest and its DiffID.
func (v *verifier) tables(ctx context.Context, parent *Link) error {
	if v.m.src == nil {
		parent.add(fmt.Sprintf("%d layers", len(v.manifest.Layers)), Unproven, "no source was given to read their tables of contents from")
		return nil
	}
	diffIDs, noConfig := v.diffIDs(ctx)
	if noConfig != nil {
		parent.add("config", Unproven, "%s", oneLine(noConfig.Error()))
	} else {
		parent.add("config "+v.manifest.Config.Digest.String(), Proven, "SHA-256 of its bytes; the manifest names it")
	}
	whole := v.o.Blobs || !v.m.remote()
	layers := make([]image.Layer, len(v.manifest.Layers))
	all := true
	for i, desc := range v.manifest.Layers {
		if err := ctx.Err(); err != nil {
			return err
		}
		l := parent.add(fmt.Sprintf("layer %d, %s", i, desc.Digest), Proven, "the manifest names it")
		want := ""
		if diffIDs != nil {
			want = diffIDs[i]
		}
		t, link := v.table(ctx, l, i, desc, want)
		if t == nil {
			all = false
		} else {
			digest, err := toc.ParseDigest(desc.Digest.String())
			if err != nil {
				return err
			}
			layers[i] = image.Layer{Digest: digest, Size: desc.Size, TOC: t}
			link.Why += fmt.Sprintf("; %d entries, each chunk and file with its digest", len(t.Entries))
		}
		if !whole {
			v.proveDiffID(ctx, l, i, desc, t, want)
			continue
		}
		v.blob(ctx, l, desc, want)
	}
	if all {
		v.layers = layers
	}
	return nil
}

// table reads a layer's table of contents, nil if it cannot be had.
func (v *verifier) table(ctx context.Context, parent *Link, layer int, desc ocispec.Descriptor, diffID string) (*toc.TOC, *Link) {
	const what = "table of contents"
	r := fetcher.ReaderAt(ctx, v.m.src.Blob(desc), desc.Size)
	t, err := toc.Read(r, desc.Size, toc.Options{Annotations: desc.Annotations})
	if err == nil {
		return t, parent.add(what, Proven, "its digest is in the manifest")
	}
	if errors.Is(err, toc.ErrNoTOC) {
		return v.ordinaryTable(parent, layer, desc, diffID)
	}
	if !errors.Is(err, toc.ErrNoTOCDigest) {
		return nil, parent.add(what, Unproven, "cannot be read again: %s", oneLine(err.Error()))
	}
	t, err = toc.Read(r, desc.Size, toc.Options{Annotations: desc.Annotations, InsecureTOC: true})
	if err != nil {
		return nil, parent.add(what, Unproven, "cannot be read again: %s", oneLine(err.Error()))
	}
	return t, parent.add(what, Unproven, "no digest of it is in the manifest: it is believed")
}

// blob reads a whole layer once.
func (v *verifier) blob(ctx context.Context, parent *Link, desc ocispec.Descriptor, diffID string) {
	compressed, plain, derr, err := hashBlob(ctx, v.m.src.Blob(desc), desc.Size)
	if err != nil {
		parent.add("blob", Unproven, "cannot be read: %s", oneLine(err.Error()))
		return
	}
	if compressed != desc.Digest {
		err = fmt.Errorf("its SHA-256 is %s", compressed)
	}
	b := parent.check("blob", err, "SHA-256 of its %d bytes", desc.Size)
	switch {
	case derr != nil:
		b.add("DiffID "+diffID, Unproven, "it does not decompress: %s", oneLine(derr.Error()))
	case diffID == "":
		b.add("DiffID", Unproven, "there is no config that names it; the layer's is %s", plain)
	case plain.String() != diffID:
		b.add("DiffID "+diffID, Wrong, "the uncompressed layer has %s", plain)
	default:
		b.add("DiffID "+diffID, Proven, "SHA-256 of the uncompressed layer; the config names it")
	}
}

// hashBlob reads a blob to its end. It returns its digest and that of what it
// decompresses to, or why it does not.
func hashBlob(ctx context.Context, b fetcher.Blob, size int64) (compressed, plain digest.Digest, derr, err error) {
	if size == 0 {
		return digest.FromBytes(nil), "", errors.New("it is empty"), nil
	}
	body, err := b.ReadRange(ctx, 0, size)
	if err != nil {
		return "", "", nil, err
	}
	defer body.Close()
	h := sha256.New()
	r := &failingReader{r: io.TeeReader(body, h)}
	plain, derr = hashPlain(r)
	// What follows the last frame, or where decompressing failed.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return "", "", nil, err
	}
	return digest.NewDigest(digest.SHA256, h), plain, derr, r.err
}

// failingReader remembers an error of the reader itself, which a decompressor
// would report as its own.
type failingReader struct {
	r   io.Reader
	err error
}

func (f *failingReader) Read(p []byte) (int, error) {
	n, err := f.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		f.err = err
	}
	return n, err
}

// maxWindow bounds the memory that a zstd frame may ask for, in bytes.
const maxWindow = 128 << 20

func hashPlain(r io.Reader) (digest.Digest, error) {
	var magic [4]byte
	if _, err := io.ReadFull(r, magic[:]); err != nil {
		return "", err
	}
	r = io.MultiReader(bytes.NewReader(magic[:]), r)
	var plain io.Reader
	switch {
	case magic[0] == 0x1f && magic[1] == 0x8b:
		z, err := gzip.NewReader(r)
		if err != nil {
			return "", err
		}
		plain = z
	case magic != [4]byte{0x28, 0xb5, 0x2f, 0xfd} && (magic[0]&0xf0 != 0x50 || [3]byte(magic[1:]) != [3]byte{0x2a, 0x4d, 0x18}):
		plain = r // neither zstd nor one of its skippable frames: a tar as it is
	default:
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(1<<63-1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return "", err
		}
		defer z.Close()
		plain = z
	}
	h := sha256.New()
	if _, err := io.Copy(h, plain); err != nil {
		return "", err
	}
	return digest.NewDigest(digest.SHA256, h), nil
}
