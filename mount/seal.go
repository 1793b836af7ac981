package mount

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A hexDigest is an fs-verity SHA-256 digest, written in hexadecimal without a
// prefix, as the fsverity and composefs tools write it.
type hexDigest image.Digest

func (d hexDigest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText writes the digest.
func (d hexDigest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads the digest.
func (d *hexDigest) UnmarshalText(text []byte) error {
	if len(text) != hex.EncodedLen(len(d)) {
		return fmt.Errorf("fs-verity digest %.80q: want 64 hexadecimal digits", text)
	}
	_, err := hex.Decode(d[:], text)
	return err
}

// A sealedRecord is what sealed.json holds.
type sealedRecord struct {
	// Composefs is the fs-verity digest of sealed.erofs.
	Composefs hexDigest `json:"composefs_digest"`
	// Verity is what was obtained when the image was sealed: the digests are
	// only written down ("computed"), or fs-verity is enabled on sealed.erofs
	// and each object ("enabled"), and a mount that enforces it was tried
	// ("enforced").
	Verity string `json:"verity"`
	// OCI is the digest that the image would have if it were made as composefs-rs
	// makes one of an OCI image, in hexadecimal. It is computed where the
	// manifest's author has sealed another image than ours.
	OCI string `json:"composefs_oci_digest,omitempty"`
	// Reason says why it is not more: the kernel's.
	Reason string `json:"reason,omitempty"`
}

const (
	verityEnforced = "enforced"
	verityEnabled  = "enabled"
	verityComputed = "computed"
)

// seal writes sealed.erofs and its record. A nil error promises that both, and
// every object they refer to, survive a power cut, and that the image has the
// digest that was asked for.
func (m *Mount) seal(ctx context.Context) (sealedRecord, error) {
	// Another process with the same image may be at it too: one does the work.
	lock, err := lockFolder(m.image.dir)
	if err != nil {
		return sealedRecord{}, err
	}
	defer lock.Close()
	if rec, ok := m.sealedRecord(); ok {
		return rec, m.checkDigest(rec)
	}
	if err := m.prove(ctx); err != nil {
		return sealedRecord{}, err
	}
	rec := sealedRecord{Verity: verityEnabled}
	m.sealing.Store(0)
	root, err := sealedTree(ctx, m.image, func(d image.Digest) (v image.Digest, err error) {
		content, ok := m.image.index.Find(d)
		if !ok {
			return v, errors.New("not in the index of chunks")
		}
		m.sealing.Add(1)
		return m.contents.Verity(content)
	})
	if err != nil {
		return rec, err
	}
	if m.opts.Verity == Off {
		rec.Verity, rec.Reason = verityComputed, "--verity off"
	} else if err := m.unsupported(&rec, m.enableObjects(ctx)); err != nil {
		return rec, err
	}

	dir, err := os.MkdirTemp(m.image.dir, ".seal-*")
	if err != nil {
		return rec, fmt.Errorf("seal: %w", err)
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, sealedName)
	if err := erofs.WriteFile(tmp, root, imageFormat); err != nil {
		return rec, err
	}
	if rec.Composefs, err = measure(tmp); err != nil {
		return rec, err
	}
	if a := m.image.author; a != "" && m.opts.Digest.IsZero() && a != rec.Composefs.String() {
		rec.OCI = m.ociDigest(ctx)
	}
	if err := m.checkDigest(rec); err != nil {
		return rec, err
	}
	if rec.Verity == verityEnabled {
		if err := m.unsupported(&rec, enableVerity(tmp)); err != nil {
			return rec, err
		}
	}
	if err := m.store.Sync(); err != nil {
		return rec, err
	}
	if rec.Verity == verityEnabled {
		if rec.Verity, err = tryEnforced(tmp, m.store.Objects(), rec.Composefs); err != nil {
			rec.Reason = err.Error()
		}
	}
	if err := os.Rename(tmp, m.image.path(sealedName)); err != nil {
		return rec, fmt.Errorf("name the sealed image: %w", err)
	}
	data, err := json.MarshalIndent(rec, "", "  ")
	if err != nil {
		return rec, err
	}
	return rec, durable.WriteFile(m.image.path(recordName), append(data, '\n'), 0o644)
}

// ociDigest is what sealedRecord.OCI says, "" if it cannot be had.
func (m *Mount) ociDigest(ctx context.Context) string {
	sum, err := m.image.otherForm(ctx, sealedHashing, true, func(d image.Digest) ([]byte, error) {
		content, ok := m.image.index.Find(d)
		if !ok {
			return nil, errors.New("not in the index of chunks")
		}
		v, err := m.contents.Verity(content)
		return v[:], err
	}, m.store.ContentsDir())
	if err != nil {
		m.log.Warn("the image cannot be made as composefs-rs would", "error", err)
		return ""
	}
	return hex.EncodeToString(sum)
}

// unsupported notes in the record that there is no fs-verity where the store
// is, if that is what err says; any other error it returns.
func (m *Mount) unsupported(rec *sealedRecord, err error) error {
	unsupported, ok := errors.AsType[*verity.NotSupportedError](err)
	if !ok {
		return err
	}
	rec.Verity, rec.Reason = verityComputed, "no fs-verity under "+m.opts.Root+": "+unsupported.Err.Error()
	return nil
}

// tryEnforced finds out whether the kernel enforces the fs-verity digests of an
// image on which it is enabled, by a mount that nobody sees.
func tryEnforced(imagePath, objects string, digest hexDigest) (obtained string, err error) {
	f, err := kernelMount(imagePath, objects, digest[:], shownView{})
	if err != nil {
		return verityEnabled, err
	}
	return verityEnforced, f.Close()
}

// sealedTree is the tree of lazy.erofs with each file's content digest
// replaced by the fs-verity digest that verityOf gives for it.
func sealedTree(ctx context.Context, p *preparedImage, verityOf func(image.Digest) (image.Digest, error)) (*erofs.Node, error) {
	return p.treeWith(ctx, withVerity(verityOf))
}

func withVerity(verityOf func(image.Digest) (image.Digest, error)) func(*erofs.Node) error {
	return func(n *erofs.Node) error {
		v, err := verityOf(image.Digest(n.Digest))
		n.Target, n.Digest = v.Path(), v[:]
		return err
	}
}

// treeWith is the tree of lazy.erofs after fill was called for each file that
// has a content digest in the place of an fs-verity digest.
func (p *preparedImage) treeWith(ctx context.Context, fill func(n *erofs.Node) error) (*erofs.Node, error) {
	r, err := erofs.OpenFile(p.path(lazyName))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	root, err := erofs.Load(r)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", lazyName, err)
	}
	return root, fillTree(ctx, root, fill)
}

// fillTree calls fill for each file below n that has a content digest.
func fillTree(ctx context.Context, n *erofs.Node, fill func(n *erofs.Node) error) error {
	if n.Link == nil && len(n.Digest) > 0 {
		content := n.Digest
		if err := fill(n); err != nil {
			return fmt.Errorf("fs-verity digest of content %x: %w", content, err)
		}
	}
	for _, c := range n.Children {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := fillTree(ctx, c, fill); err != nil {
			return err
		}
	}
	return nil
}

// enableObjects sees to it that each object of the image has fs-verity.
func (m *Mount) enableObjects(ctx context.Context) error {
	for i := range m.image.index.Contents() {
		if err := ctx.Err(); err != nil {
			return err
		}
		v, err := m.contents.Verity(i)
		if err != nil {
			return err
		}
		if err := enableVerity(filepath.Join(m.store.Objects(), v.Path())); err != nil {
			return err
		}
	}
	return nil
}

func enableVerity(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("enable fs-verity: %w", err)
	}
	defer f.Close()
	return verity.Enable(f)
}

// measure computes the fs-verity digest of a file.
func measure(path string) (hexDigest, error) {
	f, err := os.Open(path)
	if err != nil {
		return hexDigest{}, fmt.Errorf("measure: %w", err)
	}
	defer f.Close()
	sum, err := verity.Digest(f, verity.SHA256)
	if err != nil {
		return hexDigest{}, fmt.Errorf("measure %s: %w", path, err)
	}
	return hexDigest(sum), nil
}

// errWrongDigest says that the image is not the one that --digest names.
var errWrongDigest = errors.New("wrong image")

// checkDigest compares a sealed image's digest with the one asked for, or else
// with the one that the manifest's author sealed.
func (m *Mount) checkDigest(rec sealedRecord) error {
	if a := m.image.author; a != "" && m.opts.Digest.IsZero() && a != rec.Composefs.String() && a != rec.OCI {
		return hint.Wrap(fmt.Errorf("%w: the sealed image's fs-verity digest is %s, the manifest's annotation %s says %s", errWrongDigest, rec.Composefs, sealingKey, a),
			"the author has sealed another form of the image; if this one is right, say --digest "+rec.Composefs.String())
	}
	if want := m.opts.Digest; !want.IsZero() && rec.Composefs != hexDigest(want) {
		return hint.Wrap(fmt.Errorf("%w: the sealed image's fs-verity digest is %s, --digest wants %s", errWrongDigest, rec.Composefs, hexDigest(want)),
			"check which image the digest was made for")
	}
	return nil
}

// lockFolder takes the lock that processes share on a folder, and waits for
// it. Closing the file gives it back, and so does the end of the process.
func lockFolder(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", dir, err)
	}
	return f, nil
}

// sealedRecord returns the record of a sealed image when the store still holds
// all that it promises: sealed.erofs with its digest, and every object. An
// image that was sealed without fs-verity does not count where there is
// fs-verity now and it is wanted: it is sealed again.
func (m *Mount) sealedRecord() (sealedRecord, bool) {
	var rec sealedRecord
	data, err := os.ReadFile(m.image.path(recordName))
	if err != nil {
		return rec, false
	}
	if err := json.Unmarshal(data, &rec); err != nil {
		m.log.Warn("the record of the sealed image cannot be read; the image is sealed again", "error", err)
		return rec, false
	}
	got, err := measure(m.image.path(sealedName))
	if err != nil || got != rec.Composefs {
		m.log.Warn("the sealed image does not have its digest; it is sealed again", "want", rec.Composefs, "got", got, "error", err)
		return rec, false
	}
	if rec.Verity == verityComputed && m.opts.Verity != Off && m.verityWorks() {
		return rec, false
	}
	if p := m.contents.Progress(); p.FilesLocal != p.Files {
		return rec, false
	}
	if err := m.checkObjects(); err != nil {
		m.log.Warn("an object of the sealed image is missing; the image is sealed again", "error", err)
		return rec, false
	}
	return rec, true
}

// verityWorks tries fs-verity on a file of the image's folder.
func (m *Mount) verityWorks() bool {
	f, err := os.CreateTemp(m.image.dir, ".verity-*")
	if err != nil {
		return false
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString("try")
	if err = errors.Join(err, f.Close()); err != nil {
		return false
	}
	return enableVerity(f.Name()) == nil
}

// checkObjects fails unless each object that sealed.erofs refers to is there
// with its size, after giving back names that others took away: the folder of
// objects is shared with composefs's own tools.
func (m *Mount) checkObjects() error {
	err := m.eachObject()
	if !errors.Is(err, os.ErrNotExist) {
		return err
	}
	for i := range m.image.index.Contents() {
		if _, err := m.contents.Verity(i); err != nil {
			return err
		}
	}
	return m.eachObject()
}

func (m *Mount) eachObject() error {
	r, err := erofs.OpenFile(m.image.path(sealedName))
	if err != nil {
		return err
	}
	defer r.Close()
	objects, err := os.OpenRoot(m.store.Objects())
	if err != nil {
		return err
	}
	defer objects.Close()
	return r.Walk(func(path string, ino erofs.Inode) error {
		if !ino.External() {
			return nil
		}
		object, _, err := r.Payload(ino)
		if err != nil {
			return err
		}
		fi, err := objects.Lstat(object)
		if err == nil && (!fi.Mode().IsRegular() || fi.Size() != ino.Size) {
			err = fmt.Errorf("object %s: %d bytes, want %d", object, fi.Size(), ino.Size)
		}
		return err
	})
}

// setSealed records that the image is sealed, and what that is worth before
// the kernel enforces anything.
func (m *Mount) setSealed(rec sealedRecord) {
	m.update(func(s *Status) {
		s.State = max(s.State, Sealed)
		s.ComposefsDigest = rec.Composefs.String()
		s.Verity = "not enforced (FUSE serves; digests are in the image)"
		if rec.Reason != "" {
			s.Verity = "not enforced (kernel: " + rec.Reason + ")"
		}
	})
}

// noteDigest has the status show the digest of the sealed image, which another
// process has mounted.
func (m *Mount) noteDigest() {
	var rec sealedRecord
	data, err := os.ReadFile(m.image.path(recordName))
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	if err != nil {
		m.log.Warn("the record of the sealed image cannot be read", "error", err)
		return
	}
	m.update(func(s *Status) { s.ComposefsDigest = rec.Composefs.String() })
}
