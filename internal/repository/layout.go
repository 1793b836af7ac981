package repository

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// A layout is an OCI image layout in a folder (image-spec, image-layout.md).
type layout struct{ dir string }

// maxIndex is the largest index.json, in bytes.
const maxIndex = 16 << 20

func openLayout(dir string, write bool) (*layout, error) {
	l := &layout{dir}
	if write {
		if err := os.MkdirAll(filepath.Join(dir, ocispec.ImageBlobsDir, "sha256"), 0o755); err != nil {
			return nil, fmt.Errorf("make layout: %w", err)
		}
		raw, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
		if err != nil {
			return nil, err
		}
		path := filepath.Join(dir, ocispec.ImageLayoutFile)
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			if err := durable.WriteFile(path, raw, 0o644); err != nil {
				return nil, fmt.Errorf("make layout: %w", err)
			}
		}
		if _, err := durable.Clean(filepath.Join(dir, ocispec.ImageBlobsDir, "sha256")); err != nil {
			return nil, fmt.Errorf("remove what an interrupted write has left: %w", err)
		}
	}
	if _, err := l.index(); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = hint.Wrap(err, "check the path; an OCI image layout has an index.json")
		}
		return nil, err
	}
	return l, nil
}

func (l *layout) Close() error { return nil }

func (l *layout) path(d digest.Digest) string {
	return filepath.Join(l.dir, ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

// index reads index.json; a layout that is being made has none.
func (l *layout) index() (*ocispec.Index, error) {
	x := &ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	f, err := os.Open(filepath.Join(l.dir, ocispec.ImageIndexFile))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat(filepath.Join(l.dir, ocispec.ImageLayoutFile)); err == nil {
			return x, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open layout: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxIndex+1))
	if err == nil && len(raw) > maxIndex {
		err = fmt.Errorf("more than %d bytes", maxIndex)
	}
	if err == nil {
		err = json.Unmarshal(raw, x)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return x, nil
}

func (l *layout) push(ctx context.Context, d ocispec.Descriptor, tag string, r io.ReaderAt) error {
	if d.Digest.Algorithm() != digest.SHA256 || d.Digest.Validate() != nil {
		return fmt.Errorf("write blob %s: no SHA-256 digest", d.Digest)
	}
	if err := l.write(ctx, d, r); err != nil {
		return fmt.Errorf("write blob %s to %s: %w", d.Digest, l.dir, err)
	}
	if !isManifest(d.MediaType) {
		return nil
	}
	var m struct {
		ArtifactType string              `json:"artifactType"`
		Subject      *ocispec.Descriptor `json:"subject"`
	}
	raw := make([]byte, min(d.Size, maxManifest))
	if _, err := r.ReadAt(raw, 0); err != nil && err != io.EOF {
		return err
	}
	if err := json.Unmarshal(raw, &m); err != nil {
		return fmt.Errorf("write manifest %s to %s: %w", d.Digest, l.dir, err)
	}
	if tag == "" && m.Subject == nil {
		return nil // an index will list it
	}
	d.ArtifactType = m.ArtifactType
	if err := l.list(d, tag); err != nil {
		return fmt.Errorf("name manifest %s in %s: %w", d.Digest, l.dir, err)
	}
	return nil
}

// write puts a blob under its digest, unless one of its size is there.
func (l *layout) write(ctx context.Context, d ocispec.Descriptor, r io.ReaderAt) error {
	path := l.path(d.Digest)
	if fi, err := os.Stat(path); err == nil && fi.Mode().IsRegular() && fi.Size() == d.Size {
		return nil
	}
	f, err := durable.Create(path, 0o644)
	if err != nil {
		return err
	}
	defer f.Abort()
	sum := digest.SHA256.Digester()
	n, err := io.Copy(io.MultiWriter(f, sum.Hash()), &contextReader{ctx, io.NewSectionReader(r, 0, d.Size)})
	if err != nil {
		return err
	}
	if n != d.Size || sum.Digest() != d.Digest {
		return fmt.Errorf("%d bytes with the digest %s, want %d", n, sum.Digest(), d.Size)
	}
	return f.Commit()
}

// list adds a manifest to index.json; whatever had the tag loses it.
func (l *layout) list(d ocispec.Descriptor, tag string) error {
	lock, err := os.Open(l.dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	for {
		if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", l.dir, err)
	}
	x, err := l.index()
	if err != nil {
		return err
	}
	if tag != "" {
		d.Annotations = map[string]string{ocispec.AnnotationRefName: tag}
	}
	x.Manifests = slices.DeleteFunc(x.Manifests, func(e ocispec.Descriptor) bool {
		name := e.Annotations[ocispec.AnnotationRefName]
		return name == tag && (tag != "" || e.Digest == d.Digest)
	})
	x.Manifests = append(x.Manifests, d)
	raw, err := json.Marshal(x)
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(l.dir, ocispec.ImageIndexFile), raw, 0o644)
}

func (l *layout) open(_ context.Context, d ocispec.Descriptor) (io.ReadCloser, error) {
	f, err := os.Open(l.path(d.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrNotFound, err)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

// referrers lists all artifacts of the type: the manifests tell whose they are.
func (l *layout) referrers(_ context.Context, _ ocispec.Descriptor, artifactType string) ([]ocispec.Descriptor, error) {
	x, err := l.index()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(x.Manifests, func(d ocispec.Descriptor) bool { return d.ArtifactType != artifactType }), nil
}

// A contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
