package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// CheckOptions say how thoroughly a store is checked.
type CheckOptions struct {
	// Read reads every whole file and every staged chunk, and compares its
	// digests. Without it files are believed to hold what they held when they
	// got their names.
	Read bool
	// Image checks the files of an image's folder, and says what is wrong
	// with them. Nil: only the index of contents is checked.
	Image func(d image.Digest, dir string) []error
	// Progress hears of bytes as they are read. Nil: nobody does.
	Progress func(n int64)
	// Report hears of each problem as it is found. Nil: nobody does.
	Report func(Problem)
}

// A Problem is something in a store that is not as it should be.
type Problem struct {
	Path string `json:"path"` // below the store's folder
	What string `json:"what"`
	Done string `json:"done"` // what was done about it, "" for nothing
}

// A Checked says what Check has seen.
type Checked struct {
	Contents  int   `json:"contents"` // whole files
	Objects   int   `json:"objects"`
	Staged    int   `json:"staged"`
	Images    int   `json:"images"`
	BytesRead int64 `json:"bytes_read"`
	Problems  int   `json:"problems"`
	// Lost are contents that were moved aside, of which only the source has
	// another copy.
	Lost []image.Digest `json:"-"`
	// LostImages are images whose folder was moved aside: it is made anew when
	// they are mounted.
	LostImages []image.Digest `json:"-"`
}

// A checker is one run of Check.
type checker struct {
	s      *Store
	o      CheckOptions
	images []*heldImage
	res    Checked
}

// Check looks whether the store is what docs/store.md says: the names in it,
// files against their names, the two links of each file, staging maps, images.
// It may run beside live mounts and other commands. What is damaged is moved
// to quarantine/, so that it is absent and is fetched again; links and
// modes are put right. A nil error promises that everything was looked at,
// not that all was well: see Problems.
func (s *Store) Check(ctx context.Context, o CheckOptions) (*Checked, error) {
	c := &checker{s: s, o: o}
	if c.o.Report == nil {
		c.o.Report = func(Problem) {}
	}
	if err := c.run(ctx); err != nil {
		return &c.res, fmt.Errorf("check store %s: %w", s.root, err)
	}
	return &c.res, nil
}

// read counts bytes that are read.
func (c *checker) read(n int64) {
	c.res.BytesRead += n
	if c.o.Progress != nil {
		c.o.Progress(n)
	}
}

// found counts and reports a problem.
func (c *checker) found(path, done, format string, args ...any) {
	c.res.Problems++
	if rel, err := filepath.Rel(c.s.root, path); err == nil {
		path = rel
	}
	c.o.Report(Problem{path, fmt.Sprintf(format, args...), done})
}

func (c *checker) run(ctx context.Context) (err error) {
	if err := c.layout(); err != nil {
		return err
	}
	if err := c.checkImages(); err != nil {
		return err
	}
	if c.images, err = c.s.heldImages(); err != nil {
		return err
	}
	defer closeHeld(c.images)
	for b := range 256 {
		if err := ctx.Err(); err != nil {
			return err
		}
		for _, h := range c.images {
			if err := h.load(byte(b)); err != nil {
				return err
			}
		}
		if err := c.fan(ctx, c.s.contentsDir, b, c.content); err != nil {
			return err
		}
		if err := c.fan(ctx, c.s.objectsDir, b, c.object); err != nil {
			return err
		}
	}
	return c.checkStaging(ctx)
}

// storeNames are the names in the store's folder, and whether they are folders.
var storeNames = map[string]bool{
	versionName: false, readmeName: false, bootName: false, syncedName: false, usageName: false, collectName: false,
	"objects": true, "contents": true, "staging": true, "images": true, "refs": true, ProfilesName: true,
	leasesName: true, pinsName: true, asideName: true, "lost+found": true,
}

// layout checks the names in the store's folder and in those that hold
// nothing but digests.
func (c *checker) layout() error {
	entries, err := os.ReadDir(c.s.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(c.s.root, e.Name())
		dir, ours := storeNames[e.Name()]
		switch {
		case strings.HasPrefix(e.Name(), ".tmp-"): // being written
		case !ours:
			c.found(path, "", "not a part of the store")
		case dir != e.IsDir() || !dir && !e.Type().IsRegular():
			c.found(path, "", "of the wrong type (%s)", e.Type())
		}
	}
	for _, dir := range []string{leasesName, pinsName} {
		entries, err := os.ReadDir(filepath.Join(c.s.root, dir))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if _, ok := parseHex(e.Name()); !ok || !e.Type().IsRegular() {
				c.found(filepath.Join(c.s.root, dir, e.Name()), "", "not named by a manifest's digest")
			}
		}
	}
	for dir, f := range map[string]folder{"objects": c.s.objectsDir, "contents/sha256": c.s.contentsDir} {
		if err := c.fanNames(dir, f); err != nil {
			return err
		}
	}
	return nil
}

func (c *checker) fanNames(name string, f folder) error {
	entries, err := os.ReadDir(f.f.Name())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, ok := parseHex(e.Name() + strings.Repeat("0", 62)); !ok || !e.IsDir() || len(e.Name()) != 2 {
			c.found(filepath.Join(c.s.root, name, e.Name()), "", "not a folder of two hexadecimal digits")
		}
	}
	return nil
}

// fan checks each file of a fan-out folder.
func (c *checker) fan(ctx context.Context, dir folder, prefix int, check func(path string, d image.Digest, st unix.Stat_t) error) error {
	fan := fmt.Sprintf("%02x", prefix)
	f, err := openFolder(filepath.Join(dir.f.Name(), fan))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.close()
	for {
		names, _ := f.f.Readdirnames(1024)
		if len(names) == 0 {
			return nil
		}
		for _, name := range names {
			if err := ctx.Err(); err != nil {
				return err
			}
			path := fan + "/" + name
			d, ok := parseHex(fan + name)
			if !ok {
				c.found(filepath.Join(dir.f.Name(), path), "", "not named by a digest")
				continue
			}
			var st unix.Stat_t
			if err := unix.Fstatat(dir.fd, path, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
				continue // gone meanwhile
			}
			if err := check(path, d, st); err != nil {
				return err
			}
		}
	}
}

// regular checks type and mode of a file that has a digest's name, and moves it
// aside if it cannot be one of ours.
func (c *checker) regular(dir folder, path string, d image.Digest, st unix.Stat_t) (ok bool, err error) {
	full := filepath.Join(dir.f.Name(), path)
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size == 0 {
		err := c.s.setAside(dir, path, "odd", d)
		c.found(full, "moved aside", "type and mode %o, %d bytes: want a regular file that is not empty", st.Mode, st.Size)
		return false, err
	}
	if st.Mode&0o7133 != 0 { // setuid, executable, or others may write
		err := unix.Fchmodat(dir.fd, path, objectMode, 0)
		c.found(full, "set to 644", "mode %o", st.Mode&0o7777)
		return true, err
	}
	return true, nil
}

// content checks a whole content.
func (c *checker) content(path string, d image.Digest, st unix.Stat_t) error {
	ok, err := c.regular(c.s.contentsDir, path, d, st)
	if !ok || err != nil {
		return err
	}
	c.res.Contents++
	full := filepath.Join(c.s.ContentsDir(), path)
	w, err := c.s.openContent(d)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.close()
	object, noted := notedDigest(w.fd)
	wrong := ""
	for _, h := range c.images {
		if ct, ok := h.needs(d); ok && ct.Size != st.Size {
			wrong = fmt.Sprintf("%d bytes, image %s has %d", st.Size, h.digest, ct.Size)
		}
	}
	if c.o.Read && wrong == "" {
		c.read(w.size)
		computed, content, err := hashFile(w.fd, w.size, true, true)
		switch {
		case err != nil:
			wrong = err.Error()
		case content != d:
			wrong = "its bytes have digest " + content.String()
		default:
			if noted && computed != object {
				c.found(full, "noted anew", "noted fs-verity digest %s, its bytes have %s", hexOf(object), hexOf(computed))
				c.s.setXattr(w.fd, computed)
			}
			object, noted = computed, true
		}
	}
	if wrong != "" {
		if err := c.s.discardWhole(w.fd, d, object); err != nil {
			return err
		}
		c.found(full, "moved aside", "%s", wrong)
		c.res.Lost = append(c.res.Lost, d)
		return nil
	}
	if !noted {
		return nil // its object's name is found when it is read
	}
	return c.link(w.fd, full, d, object, st)
}

// link checks that a content has its object's name. A name is given only after
// the file was read: what is noted on it proves nothing.
func (c *checker) link(fd int, full string, d, object image.Digest, st unix.Stat_t) error {
	var o unix.Stat_t
	err := unix.Fstatat(c.s.objectsDir.fd, object.Path(), &o, unix.AT_SYMLINK_NOFOLLOW)
	if err == nil && o.Ino == st.Ino && o.Dev == st.Dev {
		return nil
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	c.read(st.Size)
	computed, _, herr := hashFile(fd, st.Size, true, false)
	if herr != nil {
		return nil // --read says what is wrong with it
	}
	if computed != object {
		c.s.setXattr(fd, computed)
		c.found(full, "noted anew", "noted fs-verity digest %s, its bytes have %s", hexOf(object), hexOf(computed))
		return c.link(fd, full, d, computed, st)
	}
	if err == nil {
		if o.Size == st.Size {
			// Which is right the bytes tell: only then is one of them replaced.
			c.found(full, "", "object %s is another file", hexOf(object))
			return nil
		}
		if err := c.s.setAside(c.s.objectsDir, object.Path(), "object", object); err != nil {
			return err
		}
	}
	if err := c.s.restoreObject(image.Content{Digest: d, Size: st.Size}, object); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return nil // removed meanwhile
		}
		return err
	}
	c.found(full, "linked", "object %s is missing", hexOf(object))
	return nil
}

// object checks an object that has no content's name, and the digest that is
// noted on each.
func (c *checker) object(path string, d image.Digest, st unix.Stat_t) error {
	ok, err := c.regular(c.s.objectsDir, path, d, st)
	if !ok || err != nil {
		return err
	}
	c.res.Objects++
	full := filepath.Join(c.s.Objects(), path)
	var noted image.Digest
	n, xerr := unix.Lgetxattr(full, verityXattr, noted[:])
	bad := xerr == nil && n == len(noted) && noted != d
	if !bad && (!c.o.Read || st.Nlink > 1) {
		return nil // what has two names was read as a content
	}
	fd, err := openat(c.s.objectsDir.fd, path, unix.O_RDONLY|unix.O_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	c.read(st.Size)
	got, content, err := hashFile(fd, st.Size, true, true)
	if err == nil && got == d {
		if bad {
			c.s.setXattr(fd, d)
			c.found(full, "noted anew", "noted fs-verity digest %s", hexOf(noted))
		}
		return nil
	}
	if aerr := c.s.setAside(c.s.objectsDir, path, "object", d); aerr != nil {
		return aerr
	}
	c.found(full, "moved aside", "its bytes have fs-verity digest %s (%v)", hexOf(got), err)
	if err == nil && st.Nlink > 1 { // the content may be right all the same
		if ok, _ := hasSize(c.s.contentsDir.fd, content.Path(), st.Size); ok {
			return c.s.restoreObject(image.Content{Digest: content, Size: st.Size}, got)
		}
	}
	return nil
}

// checkImages checks the folders of images. One that is damaged and not in use
// is moved aside; of one that is in use only the problem is told.
func (c *checker) checkImages() error {
	digests, err := c.s.ImageDigests()
	if err != nil {
		return err
	}
	for _, d := range digests {
		c.res.Images++
		dir := c.s.ImageDir(d)
		var wrong []error
		if c.o.Image != nil {
			wrong = c.o.Image(d, dir)
		}
		if len(wrong) == 0 {
			continue
		}
		done, err := c.imageAside(d, dir, wrong)
		if err != nil {
			return err
		}
		for _, w := range wrong {
			c.found(dir, done, "%v", w)
		}
	}
	return nil
}

// ErrSealed marks what is wrong with the sealed image only, which is made anew
// from the rest.
var ErrSealed = errors.New("the sealed image is damaged")

func (c *checker) imageAside(d image.Digest, dir string, wrong []error) (done string, err error) {
	f, err := lockFile(c.s.leasePath(d), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	if open, err := c.s.isOpen(d); open || err != nil {
		return "", err
	}
	if !slices.ContainsFunc(wrong, func(err error) bool { return !errors.Is(err, ErrSealed) }) {
		for _, name := range []string{RecordName, SealedName} {
			if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return "", err
			}
		}
		return "will be sealed again", nil
	}
	c.res.LostImages = append(c.res.LostImages, d)
	images, err := openFolder(c.s.Images())
	if err != nil {
		return "", err
	}
	defer images.close()
	return "moved aside", c.s.setAside(images, hexOf(d), "image", d)
}

// checkStaging checks staging files and their maps, and with Read the chunks
// that the maps mark.
func (c *checker) checkStaging(ctx context.Context) error {
	dir := c.s.stagingDir.f.Name()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		path := filepath.Join(dir, e.Name())
		h, ok := strings.CutPrefix(strings.TrimSuffix(e.Name(), mapSuffix), stagingPrefix)
		d, isHex := parseHex(h)
		switch {
		case strings.HasPrefix(e.Name(), ".tmp-"): // somebody's, or litter that Open removes
		case !ok || !isHex || !e.Type().IsRegular():
			c.found(path, "", "not a staging file")
		case strings.HasSuffix(e.Name(), mapSuffix):
			if err := c.stagingMap(path, d); err != nil {
				return err
			}
		default:
			c.res.Staged++
		}
	}
	return nil
}

// stagingMap checks a map against its staging file.
func (c *checker) stagingMap(path string, d image.Digest) error {
	name := stagingName(d)
	f, err := c.s.lockMap(name + mapSuffix)
	if err != nil {
		return err
	}
	locked := f != nil
	if locked {
		defer f.Close()
	} else { // somebody fills it: what is read may be about to change
		fd, err := openat(c.s.stagingDir.fd, name+mapSuffix, unix.O_RDONLY|unix.O_NOFOLLOW)
		if err != nil {
			return nil
		}
		f = os.NewFile(uintptr(fd), name+mapSuffix)
		defer f.Close()
	}
	m, err := loadMap(f)
	if fi, serr := f.Stat(); serr == nil && fi.Size() == 0 {
		err = nil // made, and its process was killed, or this very moment
		m = nil
	}
	var st unix.Stat_t
	serr := unix.Fstatat(c.s.stagingDir.fd, name, &st, unix.AT_SYMLINK_NOFOLLOW)
	begun := err == nil && m == nil || errors.Is(serr, unix.ENOENT) || err == nil && st.Size == 0 && !slices.ContainsFunc(m.bits, func(b byte) bool { return b != 0 })
	if locked && begun {
		// What a process leaves that is killed while it makes map and file:
		// nothing is lost.
		return errors.Join(ignoreAbsent(unix.Unlinkat(c.s.stagingDir.fd, name, 0)), ignoreAbsent(unix.Unlinkat(c.s.stagingDir.fd, name+mapSuffix, 0)))
	}
	if begun || serr != nil {
		return nil
	}
	if err == nil && (m.content != d || m.size != st.Size) {
		err = fmt.Errorf("it is for %d bytes of %s, the file has %d", m.size, m.content, st.Size)
	}
	if err != nil && !locked {
		return nil // whoever has the lock may be making it anew
	}
	if err != nil {
		c.found(path, "removed", "%v", err)
		return errors.Join(unix.Unlinkat(c.s.stagingDir.fd, name, 0), unix.Unlinkat(c.s.stagingDir.fd, name+mapSuffix, 0))
	}
	if !c.o.Read || m.boot != c.s.boot { // else it is compared before it is believed
		return nil
	}
	return c.stagedChunks(f, m, locked)
}

// stagedChunks compares the chunks that a map marks with an image's index that
// cuts the content in the same way.
func (c *checker) stagedChunks(f *os.File, m *stageMap, locked bool) error {
	x, done, err := c.indexFor(m)
	if x == nil || err != nil {
		return err
	}
	defer done()
	i, _ := x.Find(m.content)
	fd, err := openat(c.s.stagingDir.fd, stagingName(m.content), unix.O_RDONLY|unix.O_NOFOLLOW)
	if err != nil {
		return ignoreAbsent(err)
	}
	defer unix.Close(fd)
	var bad []int
	for k := range m.chunks {
		if !m.has(k) {
			continue
		}
		ch := x.Chunk(x.ContentChunk(i, k))
		c.read(ch.Size)
		if right, err := checkChunk(fd, ch); err != nil || !right {
			bad = append(bad, k)
			m.bits[k/8] &^= 1 << (k % 8)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	what := "will be fetched again when it is read"
	if locked {
		what = "will be fetched again"
		if _, err := f.WriteAt(m.bits, mapHeaderSize); err != nil {
			return err
		}
	}
	c.found(filepath.Join(c.s.root, "staging", stagingName(m.content)), what, "%d chunks are damaged, the first is %d", len(bad), bad[0])
	return nil
}

// indexFor opens the index of an image to whose layout a map belongs; nil if
// there is none.
func (c *checker) indexFor(m *stageMap) (*image.Index, func(), error) {
	for _, h := range c.images {
		if h.table == nil {
			continue
		}
		if err := h.load(m.content[0]); err != nil {
			return nil, nil, err
		}
		if _, ok := h.needs(m.content); !ok {
			continue
		}
		x, done, err := c.s.openIndex(h.digest)
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			return nil, nil, err
		}
		if i, ok := x.Find(m.content); ok {
			ct := x.Content(i)
			if ct.Chunks == m.chunks && layoutOf(ct, func(k int) image.Chunk { return x.Chunk(x.ContentChunk(i, k)) }) == m.layout {
				return x, done, nil
			}
		}
		done()
	}
	return nil, nil, nil
}

// openIndex maps the index of an image, until the function is called.
func (s *Store) openIndex(d image.Digest) (*image.Index, func(), error) {
	f, err := os.Open(filepath.Join(s.ImageDir(d), ChunksName))
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if fi.Size() == 0 {
		return nil, nil, fmt.Errorf("%s: %w", f.Name(), image.ErrIndex)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(fi.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, fmt.Errorf("map %s: %w", f.Name(), err)
	}
	x, err := image.OpenIndex(b)
	if err != nil {
		unix.Munmap(b)
		return nil, nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return x, func() { unix.Munmap(b) }, nil
}
