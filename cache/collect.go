package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
)

// Eviction, in this order, until the store is within its budget:
//
//	1. what no image needs, and what was moved aside
//	2. the data of images, least recently used first: the image is Lazy again
//	3. the images' folders, in the same order: the image is unknown again
//
// An image that is in use or pinned keeps everything, and so does a content
// that such an image needs. The record that says that an image is Sealed
// goes before the first of its contents.

// CollectOptions say what may go. The zero value removes nothing.
type CollectOptions struct {
	Budget
	Unneeded bool           // remove what no image needs even if there is room
	Remove   []image.Digest // images that are to go, whatever room there is, with what only they need
	DryRun   bool           // remove nothing, say what would be
	spare    int64          // bytes that are to fit in the budget too
}

// A Collected says what Collect did. Sizes are bytes on disk.
type Collected struct {
	Before   int64    `json:"before_bytes"`
	Freed    int64    `json:"freed_bytes"`
	Contents int      `json:"contents_removed"`
	Evicted  []string `json:"evicted"` // manifest digests of images that are Lazy again
	Removed  []string `json:"removed"` // of images that are gone
	// Over is by how much the store is over its budget still: the rest is in
	// use, or pinned.
	Over int64 `json:"over_bytes"`
}

// ErrInUse says that an image cannot be removed: it is mounted, or a process
// holds it.
var ErrInUse = errors.New("the image is in use")

// ErrPinned says that an image cannot be removed: it is pinned.
var ErrPinned = errors.New("the image is pinned")

// A collection is one run of Collect.
type collection struct {
	s      *Store
	o      CollectOptions
	images []*heldImage
	known  map[image.Digest]bool
	low    int // levels that go: from low on,
	cut    int // below cut

	nameless map[uint64]struct{} // inodes that lost their content's name, and whose object's name is not known
	res      Collected
}

// Collect brings the store within a budget, as far as what is in use allows,
// and removes what the options name. Any number of processes may use the
// store meanwhile: what one of them has a lease on, or has mounted, is never
// touched, and one that opens an image waits for a moment at most. One
// Collect runs at a time, another waits for it.
func (s *Store) Collect(ctx context.Context, o CollectOptions) (*Collected, error) {
	res, err := s.collect(ctx, o)
	if err != nil {
		return res, fmt.Errorf("collect in store %s: %w", s.root, err)
	}
	return res, nil
}

func (s *Store) collect(ctx context.Context, o CollectOptions) (*Collected, error) {
	c := &collection{s: s, o: o, res: Collected{Evicted: []string{}, Removed: []string{}}, known: map[image.Digest]bool{}, nameless: map[uint64]struct{}{}, low: unneeded, cut: unneeded}
	unlock, err := s.onlyCollector(ctx)
	if err != nil {
		return &c.res, err
	}
	defer unlock()
	if err := s.cleanImages(); err != nil {
		return &c.res, err
	}
	if _, err := durable.Clean(s.stagingDir.f.Name()); err != nil {
		return &c.res, err
	}
	s.meter.note()
	noted := s.meter.total.Load()
	if c.images, err = s.heldImages(); err != nil {
		return &c.res, err
	}
	defer func() { closeHeld(c.images) }()
	for _, h := range c.images {
		c.known[h.digest] = true
	}
	if err := c.choose(); err != nil {
		return &c.res, err
	}
	u, frees, err := s.count(ctx, c.images)
	if err != nil {
		return &c.res, err
	}
	c.res.Before = u.Total
	need := c.need(u)
	planned := c.plan(u, frees, need)
	if o.DryRun {
		c.res.Freed = planned
	} else {
		err = c.run(ctx, need)
	}
	c.res.Over = max(0, c.over(u)-c.res.Freed)
	if !o.DryRun {
		s.metrics.Evicted(len(c.res.Evicted), c.res.Freed)
		if err == nil && len(c.res.Removed) < len(o.Remove) {
			err = fmt.Errorf("remove images: %w by now", ErrInUse)
		}
		s.meter.update(func(total, _ int64) (int64, int64) {
			return max(0, u.Total-c.res.Freed+total-noted), time.Now().Unix()
		})
	}
	return &c.res, err
}

// onlyCollector waits for its turn.
func (s *Store) onlyCollector(ctx context.Context) (func(), error) {
	for {
		d, err := openFolder(filepath.Join(s.root, leasesName))
		if err != nil {
			return nil, err
		}
		err = retry(func() error { return unix.Flock(d.fd, unix.LOCK_EX|unix.LOCK_NB) })
		if err == nil {
			return func() { d.close() }, nil
		}
		d.close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", leasesName, err)
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// choose checks the images that were named for removal, and makes every other
// one keep what it has.
func (c *collection) choose() error {
	if len(c.o.Remove) == 0 {
		return nil
	}
	named := map[image.Digest]bool{}
	for _, d := range c.o.Remove {
		named[d] = true
	}
	for _, h := range c.images {
		switch {
		case !named[h.digest]:
			h.Pinned = true
		case h.InUse:
			return fmt.Errorf("remove image %s: %w", h.digest, ErrInUse)
		case h.Pinned:
			return fmt.Errorf("remove image %s: %w", h.digest, ErrPinned)
		}
	}
	for d := range named {
		if !c.known[d] {
			return fmt.Errorf("remove image %s: %w", d, os.ErrNotExist)
		}
	}
	return nil
}

// over returns by how much the store, as counted, is over the budget.
func (c *collection) over(u *Usage) int64 {
	over := int64(0)
	if c.o.Size > 0 {
		over = max(over, u.Total+c.o.spare-c.o.Size)
	}
	if c.o.Free > 0 {
		over = max(over, c.o.Free+c.o.spare-u.FreeBytes)
	}
	return over
}

// need is over, with a twentieth of the budget more where it is a running
// process that wants room, so that it need not count again soon.
func (c *collection) need(u *Usage) int64 {
	over := c.over(u)
	if over > 0 && c.o.spare > 0 {
		over += c.o.Size / 20
	}
	return over
}

// plan sets which levels go, and returns how many bytes that frees.
func (c *collection) plan(u *Usage, frees []int64, need int64) (freed int64) {
	if len(c.o.Remove) > 0 {
		c.low, c.cut = 0, len(c.images)
		for i, h := range c.images {
			if h.evicted = !h.keeps(); h.evicted {
				freed += frees[i+1] + h.Metadata
				if c.o.DryRun {
					c.res.Removed = append(c.res.Removed, h.digest.String())
				}
			}
		}
		return freed
	}
	if need <= 0 && !c.o.Unneeded {
		return 0
	}
	c.cut = 0
	freed = frees[0] + u.AsideBytes
	for i, h := range c.images {
		if freed >= need {
			return freed
		}
		c.cut = i + 1
		if h.keeps() {
			continue
		}
		h.evicted = true
		freed += frees[i+1]
		if c.o.DryRun && h.Local > 0 {
			c.res.Evicted = append(c.res.Evicted, h.digest.String())
		}
	}
	return freed
}

// run removes what plan chose, and then folders of images if that was not
// enough.
func (c *collection) run(ctx context.Context, need int64) error {
	if len(c.o.Remove) == 0 && c.cut > unneeded {
		c.res.Freed += c.s.emptyAside()
	}
	for _, h := range c.images {
		if h.evicted {
			if err := c.unseal(h); err != nil {
				return err
			}
		}
	}
	if c.cut == unneeded {
		return nil
	}
	for b := range 256 {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.sweep(byte(b)); err != nil {
			return err
		}
	}
	if err := c.sweepNameless(); err != nil {
		return err
	}
	for _, h := range c.images {
		if h.evicted && h.Local > 0 && len(c.o.Remove) == 0 {
			c.res.Evicted = append(c.res.Evicted, h.digest.String())
		}
	}
	for _, h := range c.images {
		if h.evicted && (len(c.o.Remove) > 0 || c.res.Freed < need) {
			if err := c.removeFolder(h); err != nil {
				return err
			}
		}
	}
	return nil
}

// take locks an image that is to be evicted. It returns nil, and makes the
// image keep what it has, if it has come into use.
func (c *collection) take(h *heldImage) (*os.File, error) {
	f, err := lockFile(c.s.leasePath(h.digest), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		var open bool
		if open, err = c.s.isOpen(h.digest); err == nil && !open {
			return f, nil
		}
		f.Close()
	}
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		return nil, err
	}
	h.InUse, h.evicted = true, false
	return nil, nil
}

// unseal takes the image's record away, and what it promised.
func (c *collection) unseal(h *heldImage) error {
	f, err := c.take(h)
	if f == nil || err != nil {
		return err
	}
	defer f.Close()
	for _, name := range []string{RecordName, SealedName} {
		path := filepath.Join(c.s.ImageDir(h.digest), name)
		fi, err := os.Lstat(path)
		if err == nil {
			err = os.Remove(path)
		}
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		c.res.Freed += blocks(fi.Size())
		h.Metadata -= blocks(fi.Size())
	}
	return nil
}

// sweep removes the contents of a prefix that are to go, after a look at
// which images there are by now and which of them have come into use.
func (c *collection) sweep(prefix byte) error {
	f, err := lockFile(filepath.Join(c.s.root, collectName), unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := c.lookAgain(); err != nil {
		return err
	}
	for _, h := range c.images {
		if err := h.load(prefix); err != nil {
			return err
		}
	}
	goes := func(l levelled) bool { return l.level >= c.low && l.level < c.cut }
	err = c.s.eachContent(prefix, c.images, func(l levelled) error {
		if !goes(l) {
			return nil
		}
		return c.removeWhole(l)
	})
	if err != nil {
		return err
	}
	return c.s.eachStaged(prefix, c.images, func(l levelled) error {
		if !goes(l) {
			return nil
		}
		return c.removeStaged(l)
	})
}

// lookAgain finds images that are new, and those that have come into use.
func (c *collection) lookAgain() error {
	digests, err := c.s.ImageDigests()
	if err != nil {
		return err
	}
	for _, d := range digests {
		if c.known[d] {
			continue
		}
		h, err := c.s.heldImage(d)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		h.InUse = true // whoever brought it is about to
		c.known[d] = true
		c.images = append(c.images, h)
	}
	for _, h := range c.images {
		if !h.evicted {
			continue
		}
		used, err := c.s.inUse(h.digest)
		if err != nil {
			return err
		}
		if used {
			h.InUse, h.evicted = true, false
		}
	}
	return nil
}

// removeWhole takes both names of a content away, the content's first: an
// object without it is removed by the next collection, a content without
// an object would have to be found out as such.
func (c *collection) removeWhole(l levelled) error {
	var object image.Digest
	n, err := unix.Lgetxattr(filepath.Join(c.s.ContentsDir(), l.name), verityXattr, object[:])
	noted := err == nil && n == len(object)
	if err := unix.Unlinkat(c.s.contentsDir.fd, l.name, 0); err != nil {
		return ignoreAbsent(err)
	}
	c.res.Contents++
	c.s.files.discard(l.digest) // an open file would keep its room
	if l.stat.Nlink > 2 {       // somebody else has a link: nothing is freed
		l.stat.Blocks = 0
	}
	c.res.Freed += l.stat.Blocks * 512
	if l.stat.Nlink < 2 {
		return nil
	}
	if noted {
		var st unix.Stat_t
		if unix.Fstatat(c.s.objectsDir.fd, object.Path(), &st, unix.AT_SYMLINK_NOFOLLOW) == nil && st.Ino == l.stat.Ino {
			return ignoreAbsent(unix.Unlinkat(c.s.objectsDir.fd, object.Path(), 0))
		}
	}
	c.nameless[l.stat.Ino] = struct{}{}
	return nil
}

func ignoreAbsent(err error) error {
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// removeStaged removes a staging file or a map, unless somebody fills it.
func (c *collection) removeStaged(l levelled) error {
	name := strings.TrimSuffix(l.name, mapSuffix)
	f, err := c.s.lockMap(name + mapSuffix)
	if f == nil || err != nil {
		return err
	}
	defer f.Close()
	c.res.Freed += l.stat.Blocks * 512
	if err := ignoreAbsent(unix.Unlinkat(c.s.stagingDir.fd, name, 0)); err != nil {
		return err
	}
	return ignoreAbsent(unix.Unlinkat(c.s.stagingDir.fd, name+mapSuffix, 0))
}

// namelessAge is how old an object without a content's name must be to be
// taken for what a crash left between the two.
const namelessAge = time.Minute

// sweepNameless removes objects of ours that have no content's name: those that
// a crash left, and those whose digest was not noted on them. What other
// programs put into the folder has no note of ours and stays.
func (c *collection) sweepNameless() error {
	if len(c.o.Remove) > 0 && len(c.nameless) == 0 {
		return nil
	}
	for b := range 256 {
		fan := fmt.Sprintf("%02x", b)
		err := c.s.eachFile(filepath.Join(c.s.Objects(), fan), func(name string) (image.Digest, bool) {
			return parseHex(fan + name)
		}, func(fd int, l levelled) error {
			if unix.Fstatat(fd, l.name, &l.stat, unix.AT_SYMLINK_NOFOLLOW) != nil || l.stat.Nlink != 1 {
				return nil
			}
			_, lost := c.nameless[l.stat.Ino]
			if !lost {
				var d image.Digest
				n, err := unix.Lgetxattr(filepath.Join(c.s.Objects(), fan, l.name), verityXattr, d[:])
				if err != nil || n != len(d) || time.Since(time.Unix(l.stat.Ctim.Unix())) < namelessAge {
					return nil
				}
				c.res.Freed += l.stat.Blocks * 512
			}
			return ignoreAbsent(unix.Unlinkat(fd, l.name, 0))
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// removeFolder removes an image's folder, what names led to it, and its lease.
func (c *collection) removeFolder(h *heldImage) error {
	f, err := c.take(h)
	if f == nil || err != nil {
		return err
	}
	defer f.Close()
	gone, err := os.MkdirTemp(c.s.Images(), ".gone-*")
	if err != nil {
		return err
	}
	if err := os.Rename(c.s.ImageDir(h.digest), filepath.Join(gone, "image")); err != nil {
		return errors.Join(err, os.Remove(gone))
	}
	if err := os.RemoveAll(gone); err != nil {
		return err
	}
	if err := c.s.removeRefs(h.digest); err != nil {
		return err
	}
	c.res.Freed += h.Metadata
	c.res.Removed = append(c.res.Removed, h.digest.String())
	return ignoreAbsent(unix.Unlink(c.s.leasePath(h.digest)))
}

// removeRefs removes what names of sources lead to the image.
func (s *Store) removeRefs(d image.Digest) error {
	return s.eachRef(func(path string, to image.Digest, _ string) error {
		if to != d {
			return nil
		}
		os.Remove(path + RefSourceSuffix)
		return os.Remove(path)
	})
}

// RefSourceSuffix ends the name of the file beside a ref that says what source
// it is of: the source, and the platform if one was asked for, a line each.
const RefSourceSuffix = ".source"

// eachRef calls do for each file in refs/ with the digest in it and, if that is
// noted, the source.
func (s *Store) eachRef(do func(path string, to image.Digest, source string) error) error {
	entries, err := os.ReadDir(s.Refs())
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(s.Refs(), e.Name())
		if strings.HasSuffix(path, RefSourceSuffix) || !e.Type().IsRegular() {
			continue
		}
		b, err := os.ReadFile(path)
		hex, ok := strings.CutPrefix(strings.TrimSpace(string(b)), "sha256:")
		d, isHex := parseHex(hex)
		if err != nil || !ok || !isHex {
			continue
		}
		source, _ := os.ReadFile(path + RefSourceSuffix)
		if err := do(path, d, strings.TrimSpace(string(source))); err != nil {
			return err
		}
	}
	return nil
}

// Sources returns by image the sources that are known to lead to it.
func (s *Store) Sources() (map[image.Digest][]string, error) {
	all := map[image.Digest][]string{}
	err := s.eachRef(func(_ string, to image.Digest, source string) error {
		if source != "" {
			all[to] = append(all[to], source)
		}
		return nil
	})
	return all, err
}
