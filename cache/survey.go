package cache

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// A Usage is what the store has on disk. Sizes are bytes of the filesystem's
// blocks, except where a field says that it counts bytes of content.
type Usage struct {
	Images       []ImageUsage `json:"images"` // the least recently used first
	Contents     int64        `json:"contents"`
	ContentBytes int64        `json:"content_bytes"`
	StagedBytes  int64        `json:"staged_bytes"`
	ImageBytes   int64        `json:"image_bytes"` // folders of images: trees, indexes, manifests
	AsideBytes   int64        `json:"quarantine_bytes"`
	// UnneededBytes are of contents that no image needs, and are part of
	// ContentBytes and StagedBytes.
	UnneededBytes int64 `json:"unneeded_bytes"`
	// ForeignBytes are of objects without a content's name, which other
	// programs have put into the folder of objects; they stay.
	ForeignBytes int64 `json:"foreign_bytes"`
	Total        int64 `json:"total_bytes"`
	FreeBytes    int64 `json:"filesystem_free_bytes"`
}

// An ImageUsage is one image's part in a store.
type ImageUsage struct {
	Digest   string    `json:"manifest_digest"`
	LastUsed time.Time `json:"last_used"`
	InUse    bool      `json:"in_use"` // mounted, or held by a process
	Pinned   bool      `json:"pinned"`
	Sealed   bool      `json:"sealed"`
	Files    int       `json:"files"` // distinct contents
	Local    int       `json:"files_local"`
	Bytes    int64     `json:"bytes"` // of content, as all sizes here but Exclusive and Metadata
	// BytesLocal counts whole contents only.
	BytesLocal int64 `json:"bytes_local"`
	// Exclusive is what evicting this image alone would free.
	Exclusive int64 `json:"exclusive_bytes"`
	Metadata  int64 `json:"metadata_bytes"`
	// Damaged says what is wrong with the index, if it cannot be read.
	Damaged string `json:"damaged,omitempty"`
}

// A heldImage is an image while the store is surveyed.
type heldImage struct {
	ImageUsage
	digest image.Digest
	file   *os.File // of table
	table  *image.DigestTable
	below  []image.Content // those of the prefix that is looked at

	// evicted says that the data are to go. An image that is in use, pinned
	// or kept for another reason never is; one that comes into use while
	// the data go is evicted no longer.
	evicted bool
}

// heldImages opens the indexes of all images, the least recently used first.
// An image in use whose index cannot be read is an error: what it needs is
// not known.
func (s *Store) heldImages() (_ []*heldImage, err error) {
	digests, err := s.ImageDigests()
	if err != nil {
		return nil, err
	}
	var all []*heldImage
	defer func() {
		if err != nil {
			closeHeld(all)
		}
	}()
	for _, d := range digests {
		h, err := s.heldImage(d)
		if errors.Is(err, os.ErrNotExist) {
			continue // it has just gone
		}
		if err != nil {
			return all, err
		}
		all = append(all, h)
	}
	slices.SortFunc(all, func(a, b *heldImage) int {
		return cmp.Or(a.LastUsed.Compare(b.LastUsed), bytes.Compare(a.digest[:], b.digest[:]))
	})
	return all, nil
}

func closeHeld(all []*heldImage) {
	for _, h := range all {
		if h.file != nil {
			h.file.Close()
		}
	}
}

func (s *Store) heldImage(d image.Digest) (*heldImage, error) {
	h := &heldImage{digest: d}
	h.ImageUsage.Digest = d.String()
	dir := s.ImageDir(d)
	fi, err := os.Stat(dir)
	if err != nil {
		return nil, err
	}
	h.LastUsed = fi.ModTime()
	if used, err := os.Stat(s.leasePath(d)); err == nil {
		h.LastUsed = used.ModTime()
	}
	if h.InUse, err = s.inUse(d); err != nil {
		return nil, fmt.Errorf("is image %s in use: %w", d, err)
	}
	if !h.InUse { // which made the file that tells
		os.Chtimes(s.leasePath(d), h.LastUsed, h.LastUsed)
	}
	h.Pinned = exists(s.pinPath(d))
	h.Sealed = exists(filepath.Join(dir, RecordName))
	if h.Metadata, err = diskUsage(dir); err != nil {
		return nil, err
	}
	h.file, err = os.Open(filepath.Join(dir, ChunksName))
	if err == nil {
		if fi, err = h.file.Stat(); err == nil {
			h.table, err = image.OpenDigests(h.file, fi.Size())
		}
	}
	if err != nil {
		if h.file != nil {
			h.file.Close()
			h.file = nil
		}
		if !exists(dir) {
			return nil, os.ErrNotExist
		}
		if h.InUse || h.Pinned {
			return nil, fmt.Errorf("image %s is in use or pinned, and what it needs cannot be read: %w", d, err)
		}
		h.Damaged, h.table = err.Error(), nil
		return h, nil
	}
	h.Files = h.table.Contents()
	return h, nil
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// load reads the image's contents of a prefix.
func (h *heldImage) load(prefix byte) (err error) {
	if h.below = nil; h.table == nil {
		return nil
	}
	h.below, err = h.table.Prefix(prefix)
	return err
}

// needs reports whether the image needs a content of the loaded prefix.
func (h *heldImage) needs(d image.Digest) (image.Content, bool) {
	i, ok := sort.Find(len(h.below), func(i int) int { return bytes.Compare(d[:], h.below[i].Digest[:]) })
	if !ok {
		return image.Content{}, false
	}
	return h.below[i], true
}

// Who needs a content: the number in the list of images of the most recently
// used image that does, or that of one that keeps what it has.
const (
	unneeded = -1
	kept     = 1 << 30
)

// A levelled is a file with a content's name, whole or staged.
type levelled struct {
	name   string // below the folder of whole contents or in staging/
	digest image.Digest
	stat   unix.Stat_t
	level  int // the image whose eviction frees it; unneeded, or kept
	only   int // the one image that needs it, or -1
}

// eachContent calls do for each whole content of a prefix. Images must have
// loaded it.
func (s *Store) eachContent(prefix byte, images []*heldImage, do func(levelled) error) error {
	fan := hex.EncodeToString([]byte{prefix})
	return s.eachFile(filepath.Join(s.ContentsDir(), fan), func(name string) (image.Digest, bool) {
		return parseHex(fan + name)
	}, func(fd int, c levelled) error {
		if unix.Fstatat(fd, c.name, &c.stat, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return nil // gone meanwhile
		}
		c.name = fan + "/" + c.name
		c.setLevel(images)
		return do(c)
	})
}

// eachFile calls do for each name in a folder that stands for a digest.
func (s *Store) eachFile(dir string, digest func(name string) (image.Digest, bool), do func(folder int, c levelled) error) error {
	d, err := openFolder(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer d.close()
	for {
		names, err := d.f.Readdirnames(1024)
		for _, name := range names {
			if c, ok := digest(name); ok {
				if err := do(d.fd, levelled{name: name, digest: c}); err != nil {
					return err
				}
			}
		}
		if len(names) == 0 || err != nil {
			return nil
		}
	}
}

func (c *levelled) setLevel(images []*heldImage) {
	c.level, c.only = unneeded, -1
	users := 0
	for i, h := range images {
		if _, ok := h.needs(c.digest); !ok {
			continue
		}
		if users++; users == 1 {
			c.only = i
		} else {
			c.only = -1
		}
		if h.keeps() {
			c.level = kept
		} else {
			c.level = max(c.level, i)
		}
	}
}

func (h *heldImage) keeps() bool { return h.InUse || h.Pinned }

// eachStaged calls do for each staging file and each map of a prefix.
func (s *Store) eachStaged(prefix byte, images []*heldImage, do func(levelled) error) error {
	return s.eachFile(s.stagingDir.f.Name(), func(name string) (image.Digest, bool) {
		h, ok := strings.CutPrefix(strings.TrimSuffix(name, mapSuffix), stagingPrefix)
		d, isHex := parseHex(h)
		return d, ok && isHex && d[0] == prefix
	}, func(fd int, c levelled) error {
		if unix.Fstatat(fd, c.name, &c.stat, unix.AT_SYMLINK_NOFOLLOW) != nil {
			return nil
		}
		c.setLevel(images)
		return do(c)
	})
}

// Usage counts what is in the store, image by image.
func (s *Store) Usage(ctx context.Context) (*Usage, error) {
	images, err := s.heldImages()
	if err != nil {
		return nil, fmt.Errorf("count store %s: %w", s.root, err)
	}
	defer closeHeld(images)
	u, _, err := s.count(ctx, images)
	if err != nil {
		return nil, fmt.Errorf("count store %s: %w", s.root, err)
	}
	return u, nil
}

// count goes over the store once. Its second result is what each level frees,
// shifted by one: that of unneeded is the first.
func (s *Store) count(ctx context.Context, images []*heldImage) (*Usage, []int64, error) {
	u := &Usage{}
	frees := make([]int64, len(images)+1)
	free := func(c levelled, bytes int64) {
		if c.level != kept {
			frees[c.level+1] += bytes
		}
		if c.level == unneeded {
			u.UnneededBytes += bytes
		}
		if c.only >= 0 {
			images[c.only].Exclusive += bytes
		}
	}
	for b := range 256 {
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		for _, h := range images {
			if err := h.load(byte(b)); err != nil {
				return nil, nil, err
			}
			for _, c := range h.below {
				h.Bytes += c.Size
			}
		}
		err := s.eachContent(byte(b), images, func(c levelled) error {
			bytes := c.stat.Blocks * 512
			u.Contents++
			u.ContentBytes += bytes
			free(c, bytes)
			for _, h := range images {
				if ct, ok := h.needs(c.digest); ok && ct.Size == c.stat.Size {
					h.Local++
					h.BytesLocal += ct.Size
				}
			}
			return nil
		})
		if err != nil {
			return nil, nil, err
		}
		if err := s.countForeign(byte(b), u); err != nil {
			return nil, nil, err
		}
	}
	if err := s.countStaged(images, u, free); err != nil {
		return nil, nil, err
	}
	for _, h := range images {
		u.ImageBytes += h.Metadata
		h.below = nil
		u.Images = append(u.Images, h.ImageUsage)
	}
	var err error
	if u.AsideBytes, err = diskUsage(filepath.Join(s.root, asideName)); err != nil {
		return nil, nil, err
	}
	u.Total = u.ContentBytes + u.StagedBytes + u.ImageBytes + u.AsideBytes + u.ForeignBytes
	u.FreeBytes = s.meter.free()
	return u, frees, nil
}

// countStaged counts staging/ in one go: it has few files, so that the images'
// contents are looked up one by one.
func (s *Store) countStaged(images []*heldImage, u *Usage, free func(levelled, int64)) error {
	prefixes := map[byte]bool{}
	err := s.eachFile(s.stagingDir.f.Name(), func(name string) (image.Digest, bool) {
		h, ok := strings.CutPrefix(strings.TrimSuffix(name, mapSuffix), stagingPrefix)
		d, isHex := parseHex(h)
		return d, ok && isHex
	}, func(_ int, c levelled) error {
		prefixes[c.digest[0]] = true
		return nil
	})
	if err != nil {
		return err
	}
	for b := range prefixes {
		for _, h := range images {
			if err := h.load(b); err != nil {
				return err
			}
		}
		err := s.eachStaged(b, images, func(c levelled) error {
			bytes := c.stat.Blocks * 512
			u.StagedBytes += bytes
			free(c, bytes)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// countForeign counts the objects of a prefix that have no other name.
func (s *Store) countForeign(prefix byte, u *Usage) error {
	fan := hex.EncodeToString([]byte{prefix})
	return s.eachFile(filepath.Join(s.Objects(), fan), func(name string) (image.Digest, bool) {
		return parseHex(fan + name)
	}, func(fd int, c levelled) error {
		if unix.Fstatat(fd, c.name, &c.stat, unix.AT_SYMLINK_NOFOLLOW) == nil && c.stat.Nlink == 1 {
			u.ForeignBytes += c.stat.Blocks * 512
		}
		return nil
	})
}

// diskUsage returns what the files below a folder take, without the folders;
// none if it is not there.
func diskUsage(dir string) (n int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if errors.Is(err, os.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil {
			return err
		}
		if e.IsDir() {
			return nil
		}
		if fi, err := e.Info(); err == nil {
			if st, ok := fi.Sys().(*syscall.Stat_t); ok {
				n += st.Blocks * 512
			}
		}
		return nil
	})
	return n, err
}
