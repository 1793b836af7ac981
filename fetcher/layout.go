package fetcher

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A layout is an image in an OCI image layout (image-spec, image-layout.md): a
// folder, or a tar of one whose members are read in place.
type layout struct {
	kind, path string // "oci" or "oci-archive"
	ref        string // "tag", "@digest" or ""
	platform   ocispec.Platform
	metadata   *tally // of requests outside a Fetcher

	mu      sync.Mutex
	closed  bool
	files   []*os.File
	archive *os.File            // once opened
	members map[string]extent   // of archive, by clean path
	open    map[string]*os.File // of a folder, by clean path
}

type extent struct{ off, size int64 }

// maxMembers bounds the members of an archive that are kept in memory.
const maxMembers = 1 << 20

func newLayout(kind, path, ref string, p ocispec.Platform, metadata *tally) *layout {
	return &layout{kind: kind, path: path, ref: ref, platform: p, metadata: metadata, open: map[string]*os.File{}}
}

// parseLayoutName splits PATH[:TAG|@DIGEST] at the last colon or at "@sha256:".
func parseLayoutName(s string) (path, ref string, err error) {
	path = s
	if i := strings.LastIndex(s, "@sha256:"); i >= 0 {
		if _, err := toc.ParseDigest(s[i+1:]); err != nil {
			return "", "", err
		}
		path, ref = s[:i], s[i:]
	} else if i := strings.LastIndexByte(s, ':'); i >= 0 && validTag(s[i+1:]) {
		path, ref = s[:i], s[i+1:]
	}
	if path == "" {
		return "", "", hint.Wrap(errors.New("no path"), "write oci:DIR or oci-archive:FILE, then :TAG if it holds several images")
	}
	return path, ref, nil
}

func (l *layout) String() string {
	s := l.kind + ":" + l.path
	if l.ref != "" && l.ref[0] != '@' {
		s += ":"
	}
	return s + l.ref
}

// section finds a file of the layout by its slash-separated path.
func (l *layout) section(name string) (*io.SectionReader, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if l.kind == "oci" {
		f := l.open[name]
		if f == nil {
			var err error
			if f, err = os.Open(filepath.Join(l.path, filepath.FromSlash(name))); err != nil {
				return nil, err
			}
			l.open[name] = f
			l.files = append(l.files, f)
		}
		fi, err := f.Stat()
		if err != nil {
			return nil, err
		}
		if !fi.Mode().IsRegular() {
			return nil, fmt.Errorf("%s: not a regular file", f.Name())
		}
		return io.NewSectionReader(f, 0, fi.Size()), nil
	}
	if l.members == nil {
		f, err := os.Open(l.path)
		if err != nil {
			return nil, err
		}
		l.files = append(l.files, f)
		if l.members, err = tarMembers(f); err != nil {
			return nil, hint.Wrap(fmt.Errorf("%s: %w", l.path, err), "it must be a tar of an OCI image layout, uncompressed")
		}
		l.archive = f
	}
	e, ok := l.members[name]
	if !ok {
		return nil, fmt.Errorf("%s: member %s: %w", l.path, name, fs.ErrNotExist)
	}
	return io.NewSectionReader(l.archive, e.off, e.size), nil
}

// tarMembers finds where the regular files of a tar are. As with unpacking,
// the last of two members with one name counts.
func tarMembers(f *os.File) (map[string]extent, error) {
	members := map[string]extent{}
	r := tar.NewReader(f)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return members, nil
		}
		if err != nil {
			return nil, err
		}
		name := path.Clean(h.Name)
		if h.Typeflag != tar.TypeReg {
			delete(members, name)
			continue
		}
		off, err := f.Seek(0, io.SeekCurrent) // archive/tar reads no further than the header
		if err != nil {
			return nil, err
		}
		if sparse(h) {
			return nil, fmt.Errorf("member %.200q is sparse", h.Name)
		}
		if members[name] = (extent{off, h.Size}); len(members) > maxMembers {
			return nil, fmt.Errorf("more than %d members", maxMembers)
		}
	}
}

func sparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse") {
			return true
		}
	}
	return h.Typeflag == tar.TypeGNUSparse
}

// read reads a whole small file of the layout.
func (l *layout) read(name string) ([]byte, error) {
	s, err := l.section(name)
	if err != nil {
		return nil, err
	}
	if s.Size() > maxManifest {
		return nil, fmt.Errorf("%s: %d bytes, the limit is %d", name, s.Size(), maxManifest)
	}
	return io.ReadAll(s)
}

func blobPath(d digest.Digest) string {
	return "blobs/sha256/" + strings.TrimPrefix(d.String(), "sha256:")
}

func (l *layout) Resolve(ctx context.Context) (*Manifest, error) {
	m, err := l.resolve()
	if err != nil {
		err = fmt.Errorf("resolve %s: %w", l, err)
		if errors.Is(err, fs.ErrNotExist) && hint.Of(err) == "" {
			err = hint.Wrap(err, "check the path; the layout must be whole, with index.json and blobs/sha256")
		}
		return nil, err
	}
	return m, nil
}

func (l *layout) resolve() (*Manifest, error) {
	raw, x, err := l.named()
	if err != nil {
		return nil, err
	}
	if x != nil {
		if len(x.Manifests) == 1 {
			x.Manifests[0].Platform = nil // whatever it says, it is the one that was asked for
		}
		if raw, err = json.Marshal(x); err != nil {
			return nil, err
		}
	}
	return resolve(raw, l.platform, func(d ocispec.Descriptor) ([]byte, error) { return l.read(blobPath(d.Digest)) })
}

// named finds what the name stands for: by digest the document itself, else
// index.json with nothing but what has the tag.
func (l *layout) named() (raw []byte, x *ocispec.Index, err error) {
	if raw, err = l.read("index.json"); err != nil {
		return nil, nil, err
	}
	x = &ocispec.Index{}
	if err := json.Unmarshal(raw, x); err != nil {
		return nil, nil, fmt.Errorf("index.json: %w", err)
	}
	if d, ok := strings.CutPrefix(l.ref, "@"); ok {
		// The digest may be of a manifest that index.json reaches only
		// through an index, so the blob itself is asked for.
		raw, err := l.read(blobPath(digest.Digest(d)))
		if err == nil {
			err = checkDigest(digest.Digest(d), raw)
		}
		return raw, nil, err
	}
	var tags []string
	var found []ocispec.Descriptor
	for _, d := range x.Manifests {
		tag := d.Annotations[ocispec.AnnotationRefName]
		if tag == "" && d.ArtifactType != "" {
			continue // about an image, not one
		}
		if tag != "" {
			tags = append(tags, tag)
		}
		if l.ref == "" || tag == l.ref || strings.HasSuffix(tag, ":"+l.ref) {
			found = append(found, d)
		}
	}
	slices.Sort(tags)
	tags = slices.Compact(tags)
	if len(found) == 0 {
		return nil, nil, hint.Wrap(fmt.Errorf("no image with the tag %q", l.ref), "it has: "+strings.Join(tags, ", "))
	}
	if l.ref == "" && len(found) > 1 && len(tags) > 1 {
		return nil, nil, hint.Wrap(fmt.Errorf("%d images, no tag given", len(found)), "add one of: :"+strings.Join(tags, ", :"))
	}
	x.Manifests = found
	return nil, x, nil
}

func (l *layout) Blob(d ocispec.Descriptor) Blob {
	return &fileBlob{d.Digest.String(), l.metadata, func() (*io.SectionReader, error) {
		if err := checkDescriptor(d); err != nil {
			return nil, err
		}
		s, err := l.section(blobPath(d.Digest))
		if err == nil && s.Size() != d.Size {
			return nil, fmt.Errorf("%d bytes, the manifest says %d", s.Size(), d.Size)
		}
		return s, err
	}}
}

func (l *layout) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	var err error
	for _, f := range l.files {
		err = errors.Join(err, f.Close())
	}
	l.files = nil
	return err
}

// A fileBlob reads a part of a local file.
type fileBlob struct {
	name     string
	metadata *tally
	open     func() (*io.SectionReader, error)
}

func (b *fileBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	t := tallyOf(ctx, b.metadata)
	s, err := b.open()
	if err == nil && (off < 0 || n <= 0 || off > s.Size()-n) {
		err = fmt.Errorf("range of %d bytes at %d of %d bytes", n, off, s.Size())
	}
	if err != nil {
		t.add(metrics.FromFile, false, 0)
		return nil, fmt.Errorf("read blob %s: %w", b.name, err)
	}
	return &fileBody{ctx: ctx, name: b.name, r: io.NewSectionReader(s, off, n), left: n, tally: t}, nil
}

type fileBody struct {
	ctx   context.Context
	name  string
	r     *io.SectionReader
	left  int64
	read  int64
	tally *tally // nil once counted
}

func (b *fileBody) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	if b.left == 0 {
		return 0, io.EOF
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	b.read += int64(n)
	if n > 0 {
		return n, nil
	}
	if err == nil {
		return 0, nil
	}
	return 0, fmt.Errorf("read blob %s: %w", b.name, noEOF(err))
}

func (b *fileBody) Close() error {
	b.tally.add(metrics.FromFile, true, b.read)
	b.tally = nil
	return nil
}

// A layerFile is an image of one layer, a file that the user names.
type layerFile struct {
	path     string
	metadata *tally // of requests outside a Fetcher

	mu     sync.Mutex
	f      *os.File
	closed bool
}

func (l *layerFile) String() string { return "layer:" + l.path }

func (l *layerFile) section() (*io.SectionReader, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, ErrClosed
	}
	if l.f == nil {
		f, err := os.Open(l.path)
		if err != nil {
			return nil, err
		}
		l.f = f
	}
	fi, err := l.f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file", l.path)
	}
	return io.NewSectionReader(l.f, 0, fi.Size()), nil
}

// Resolve reads the whole file for its digest. The manifest depends on nothing
// but the file's bytes.
func (l *layerFile) Resolve(ctx context.Context) (*Manifest, error) {
	s, err := l.section()
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", l, err)
	}
	var magic [4]byte
	if _, err := s.ReadAt(magic[:], 0); err != nil {
		return nil, fmt.Errorf("resolve %s: %w", l, noEOF(err))
	}
	mediaType := ocispec.MediaTypeImageLayer
	switch {
	case magic[0] == 0x1f && magic[1] == 0x8b: // RFC 1952
		mediaType = ocispec.MediaTypeImageLayerGzip
	case magic == [4]byte{0x28, 0xb5, 0x2f, 0xfd}: // RFC 8878
		mediaType = ocispec.MediaTypeImageLayerZstd
	}
	h := digest.SHA256.Digester()
	if _, err := io.Copy(h.Hash(), &fileBody{ctx: ctx, name: l.path, r: s, left: s.Size()}); err != nil {
		return nil, fmt.Errorf("resolve %s: %w", l, err)
	}
	raw, err := json.Marshal(ocispec.Manifest{
		Versioned: schema2,
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    ocispec.DescriptorEmptyJSON,
		Layers:    []ocispec.Descriptor{{MediaType: mediaType, Digest: h.Digest(), Size: s.Size()}},
	})
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", l, err)
	}
	m, err := ParseManifest(raw)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", l, err)
	}
	m.LocalLayer = true
	return m, nil
}

func (l *layerFile) Blob(d ocispec.Descriptor) Blob {
	return &fileBlob{d.Digest.String(), l.metadata, func() (*io.SectionReader, error) {
		if d.Digest == ocispec.DescriptorEmptyJSON.Digest {
			data := string(ocispec.DescriptorEmptyJSON.Data)
			return io.NewSectionReader(strings.NewReader(data), 0, int64(len(data))), nil
		}
		s, err := l.section()
		if err == nil && s.Size() != d.Size {
			return nil, hint.Wrap(fmt.Errorf("%s has %d bytes now, and had %d", l.path, s.Size(), d.Size), "do not change a layer while it is mounted")
		}
		return s, err
	}}
}

func (l *layerFile) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	if l.f == nil {
		return nil
	}
	f := l.f
	l.f = nil
	return f.Close()
}
