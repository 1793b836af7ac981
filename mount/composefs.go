package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// startComposefs serves a composefs image that somebody else made, with its
// folders of objects, through FUSE. Everything is local: there is nothing to
// fill, and the image is not ours to seal.
func (m *Mount) startComposefs(path string) error {
	if len(m.opts.Objects) == 0 {
		return hint.Wrap(fmt.Errorf("mount %s: no folder of objects", m.source), "add --objects DIR")
	}
	if m.opts.Backend == Hybrid {
		return hint.Wrap(fmt.Errorf("mount %s: --backend hybrid: there is nothing to fetch for a composefs image", m.source),
			"use --backend fuse, or mount.composefs for a mount of the kernel's")
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	objects, err := m.openComposefs(path, f)
	if err != nil {
		return err
	}
	m.firstBackend, m.firstReason = FUSE, m.status.BackendReason
	if m.server, err = fusefs.Mount(m.mountpoint, m.reader, objects, m.fuseOptions()); err != nil {
		return err
	}
	m.readFurther()
	return nil
}

// openComposefs opens the image f, which has or had the name path, and the
// folders of objects. It takes f over.
func (m *Mount) openComposefs(path string, f *os.File) (*objectFolders, error) {
	m.imageFile, m.objects = f, &objectFolders{}
	for _, dir := range m.opts.Objects {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return nil, fmt.Errorf("folder of objects: %w", err)
		}
		m.objects.roots = append(m.objects.roots, root)
	}
	open := fmt.Sprintf("/proc/self/fd/%d", f.Fd())
	digest, err := measure(open)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if want := m.opts.Digest; !want.IsZero() && digest != hexDigest(want) {
		return nil, hint.Wrap(fmt.Errorf("%s: its fs-verity digest is %s, --digest wants %s", path, digest, hexDigest(want)),
			"check which image the digest was made for")
	}
	if m.reader, err = erofs.OpenFile(open); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if m.opts.Verity == Require {
		if err := m.objects.want(m.reader); err != nil {
			return nil, err
		}
	}
	m.update(func(s *Status) {
		s.State = Complete
		s.BackendReason = "a composefs: source; mount.composefs makes kernel mounts"
		s.ComposefsDigest = digest.String()
		s.Verity = "not enforced (FUSE serves)"
		if m.opts.Verity == Require {
			s.Verity = "each object is checked when it is first read (FUSE serves)"
		}
		s.Note = "a composefs: source is served as it is"
		s.stuck = errors.New(s.Note)
	})
	return m.objects, nil
}

// objectFolders finds objects below folders, in order, and nothing outside of
// them whatever an image's redirects say.
type objectFolders struct {
	roots []*os.Root
	// digests are the fs-verity digests that objects must have, by name; nil
	// if they are not looked at.
	digests map[string][]byte
	checked sync.Map // names of objects that were found right: checkedFile
}

// want has each object checked against the digest that the image has for it,
// before its first byte is given out, and again if it has changed since. It
// fails if a file of the image has no digest.
func (o *objectFolders) want(r *erofs.Reader) error {
	o.digests = map[string][]byte{}
	return r.Walk(func(path string, ino erofs.Inode) error {
		if !ino.External() {
			return nil
		}
		object, digest, err := r.Payload(ino)
		if err != nil {
			return err
		}
		if len(digest) != verity.SHA256.Size() {
			return hint.Wrap(fmt.Errorf("--verity require: %s: the image has no fs-verity digest for it", path), "make the image with digests (mkcomposefs --digest-store)")
		}
		if other, ok := o.digests[object]; ok && !bytes.Equal(other, digest) {
			return fmt.Errorf("--verity require: %s: the image has two fs-verity digests for object %s", path, object)
		}
		o.digests[object] = bytes.Clone(digest)
		return nil
	})
}

// check compares an object's fs-verity digest, the kernel's if it has one.
func (o *objectFolders) check(object string, f *os.File) error {
	if o.digests == nil {
		return nil
	}
	now, err := nameOpen(f)
	if err != nil {
		return err
	}
	if then, ok := o.checked.Load(object); ok && then == now {
		return nil
	}
	alg, got, err := verity.Measure(f)
	if err != nil || alg != verity.SHA256 {
		if got, err = verity.Digest(f, verity.SHA256); err != nil {
			return err
		}
	}
	if err := verity.Compare(object, verity.SHA256, o.digests[object], got); err != nil {
		return err
	}
	o.checked.Store(object, now)
	return nil
}

var _ fusefs.Contents = (*objectFolders)(nil)

func (o *objectFolders) ReadAt(_ context.Context, object string, p []byte, off int64) (int, bool, error) {
	name := filepath.FromSlash(strings.TrimLeft(object, "/"))
	for _, root := range o.roots {
		// Objects are regular files; a fifo must not block the open.
		f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, false, fmt.Errorf("object %s: %w", object, err)
		}
		defer f.Close()
		if err := o.check(object, f); err != nil {
			return 0, false, err
		}
		n, err := f.ReadAt(p, off)
		if err == io.EOF {
			err = nil
		}
		return n, false, err
	}
	return 0, false, fmt.Errorf("object %s: %w in any folder of objects", object, os.ErrNotExist)
}

func (o *objectFolders) close() {
	for _, r := range o.roots {
		r.Close()
	}
}
