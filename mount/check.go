package mount

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
)

// CheckImage returns what is wrong with the files in the folder dir of the
// image with manifest digest d: the manifest against the digest, the index of
// chunks, all metadata of both EROFS images, the sealed one against its
// record. What concerns the sealed image only is a cache.ErrSealed. That
// contents are there is not its matter.
func CheckImage(d image.Digest, dir string) []error {
	var wrong []error
	raw, err := os.ReadFile(filepath.Join(dir, manifestName))
	if err == nil && sha256.Sum256(raw) != d {
		err = fmt.Errorf("%s: its digest is not %s", manifestName, d)
	}
	if err == nil {
		_, err = fetcher.ParseManifest(raw)
	}
	wrong = appendError(wrong, err)
	b, err := mapFile(filepath.Join(dir, chunksName))
	if err == nil {
		p := preparedImage{mapped: b}
		if _, err = image.OpenIndex(b); err != nil {
			err = fmt.Errorf("%s: %w", chunksName, err)
		}
		p.close()
	}
	wrong = appendError(wrong, err)
	wrong = appendError(wrong, checkErofs(filepath.Join(dir, lazyName)))
	if err := checkSealed(dir); err != nil {
		wrong = append(wrong, fmt.Errorf("%w: %w", cache.ErrSealed, err))
	}
	return wrong
}

func appendError(all []error, err error) []error {
	if err != nil {
		all = append(all, err)
	}
	return all
}

func checkErofs(path string) error {
	r, err := erofs.OpenFile(path)
	if err != nil {
		return err
	}
	defer r.Close()
	if err := r.Check(); err != nil {
		return fmt.Errorf("%s: %w", filepath.Base(path), err)
	}
	return nil
}

// checkSealed checks the sealed image, if there is a record of one. Without, it
// is what a process left that ended in between, and will be written again.
func checkSealed(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, recordName))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var rec sealedRecord
	if err := json.Unmarshal(data, &rec); err != nil {
		return fmt.Errorf("%s: %w", recordName, err)
	}
	got, err := measure(filepath.Join(dir, sealedName))
	if err != nil {
		return err
	}
	if got != rec.Composefs {
		return fmt.Errorf("%s: its fs-verity digest is %s, its record has %s", sealedName, got, rec.Composefs)
	}
	return checkErofs(filepath.Join(dir, sealedName))
}

// Repair fetches contents of an image again from one of its sources: those of
// lost that the image needs and the store does not have. It returns which.
// Options' Source, Logger and InsecureTOC are used.
func Repair(ctx context.Context, store *cache.Store, d image.Digest, source string, lost []image.Digest, o Options) (fetched []image.Digest, err error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	o.Root = store.Root()
	o.InsecureTOC = true // it is the image that was let in, the index is made already
	m := &Mount{opts: o, log: o.Logger, store: store, source: source}
	defer func() { m.lease.Close() }()
	if m.image, err = m.load(d); err != nil {
		return nil, fmt.Errorf("repair image %s: %w", d, err)
	}
	defer m.image.close()
	if m.contents, err = store.Contents(m.image.index); err != nil {
		return nil, err
	}
	defer m.contents.Close()
	var want []int
	for _, l := range lost {
		if i, ok := m.image.index.Find(l); ok && !m.contents.Whole(i) {
			want = append(want, i)
		}
	}
	if len(want) == 0 {
		return nil, nil
	}
	if m.src, err = fetcher.OpenSource(source, o.Source); err != nil {
		return nil, err
	}
	defer m.src.Close()
	f := m.newFetcher(nil)
	defer f.Close()
	for _, i := range want {
		ct := m.image.index.Content(i)
		if err := f.Need(ctx, i, 0, ct.Size); err != nil {
			return fetched, fmt.Errorf("repair image %s from %s: %w", d, source, err)
		}
		fetched = append(fetched, ct.Digest)
	}
	return fetched, store.Sync()
}
