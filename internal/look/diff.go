package look

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

// A Change is how one path differs between two trees.
type Change struct {
	Path string `json:"path"`
	Kind string `json:"kind"` // "added", "removed" or "changed"
	// What differs of a changed path: type, content, mode, owner, mtime,
	// target, device, xattrs, links.
	What []string `json:"what,omitempty"`
	// Sizes in bytes of regular files, before and after.
	Before int64 `json:"bytes_before"`
	After  int64 `json:"bytes_after"`
}

// The kinds of a Change.
const (
	Added   = "added"
	Removed = "removed"
	Changed = "changed"
)

// Diff calls fn for each path that is not the same in both trees, in order. A
// folder that is in one tree only is told before what is in it. With times,
// other modification times count as a change.
func Diff(a, b *Tree, fa, fb File, times bool, fn func(Change) error) error {
	d := &differ{a, b, times, fn, folders{}}
	if err := d.changed(fa, fb); err != nil || !fa.IsDir() || !fb.IsDir() {
		return err
	}
	return d.folders(fa, fb)
}

type differ struct {
	a, b  *Tree
	times bool
	fn    func(Change) error
	seen  folders // of a
}

func (d *differ) folders(fa, fb File) error {
	if err := d.seen.enter(fa); err != nil {
		return err
	}
	left, err := d.a.Children(fa)
	if err != nil {
		return err
	}
	right, err := d.b.Children(fb)
	if err != nil {
		return err
	}
	for len(left) > 0 || len(right) > 0 {
		order := 0
		switch {
		case len(left) == 0:
			order = 1
		case len(right) == 0:
			order = -1
		default:
			order = strings.Compare(left[0].Name(), right[0].Name())
		}
		switch {
		case order < 0:
			err = d.alone(d.a, left[0], Removed)
			left = left[1:]
		case order > 0:
			err = d.alone(d.b, right[0], Added)
			right = right[1:]
		default:
			err = d.both(left[0], right[0])
			left, right = left[1:], right[1:]
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// alone tells of a file, and what is below it, that is in one tree only.
func (d *differ) alone(t *Tree, f File, kind string) error {
	return t.Walk(f, func(f File, _ int) error {
		c := Change{Path: f.Path, Kind: kind}
		if kind == Added {
			c.After = fileSize(f)
		} else {
			c.Before = fileSize(f)
		}
		return d.fn(c)
	})
}

func fileSize(f File) int64 {
	if f.IsRegular() {
		return f.Size
	}
	return 0
}

func (d *differ) both(fa, fb File) error {
	if err := d.changed(fa, fb); err != nil {
		return err
	}
	if fa.IsDir() && fb.IsDir() {
		return d.folders(fa, fb)
	}
	for _, one := range []struct {
		t    *Tree
		f    File
		kind string
	}{{d.a, fa, Removed}, {d.b, fb, Added}} {
		if !one.f.IsDir() {
			continue
		}
		all, err := one.t.Children(one.f)
		if err != nil {
			return err
		}
		for _, c := range all {
			if err := d.alone(one.t, c, one.kind); err != nil {
				return err
			}
		}
	}
	return nil
}

// changed tells what differs of a path that both trees have.
func (d *differ) changed(fa, fb File) error {
	var what []string
	differs := func(name string, yes bool) {
		if yes {
			what = append(what, name)
		}
	}
	const kind = unix.S_IFMT
	differs("type", fa.Mode&kind != fb.Mode&kind)
	if fa.Mode&kind == fb.Mode&kind {
		other, err := d.otherData(fa, fb)
		if err != nil {
			return err
		}
		differs("content", fa.IsRegular() && other)
		differs("target", fa.IsSymlink() && other)
		differs("device", fa.Rdev != fb.Rdev)
		differs("links", !fa.IsDir() && fa.Nlink != fb.Nlink)
	}
	differs("mode", fa.Mode&0o7777 != fb.Mode&0o7777 && !(fa.IsSymlink() && fb.IsSymlink()))
	differs("owner", fa.UID != fb.UID || fa.GID != fb.GID)
	differs("mtime", d.times && (fa.MtimeSec != fb.MtimeSec || fa.MtimeNsec != fb.MtimeNsec))
	xa, err := d.a.Xattrs(fa)
	if err != nil {
		return err
	}
	xb, err := d.b.Xattrs(fb)
	if err != nil {
		return err
	}
	differs("xattrs", !slices.EqualFunc(xa, xb, func(x, y erofs.Xattr) bool { return x.Name == y.Name && bytes.Equal(x.Value, y.Value) }))
	if len(what) == 0 {
		return nil
	}
	return d.fn(Change{Path: fb.Path, Kind: Changed, What: what, Before: fileSize(fa), After: fileSize(fb)})
}

// otherData reports whether two files of the same type have different bytes, by
// the digests that name them, or different targets.
func (d *differ) otherData(fa, fb File) (bool, error) {
	switch {
	case fa.IsSymlink():
		ta, err := d.a.Target(fa)
		if err != nil {
			return false, err
		}
		tb, err := d.b.Target(fb)
		return ta != tb, err
	case !fa.IsRegular():
		return false, nil
	case fa.Size != fb.Size:
		return true, nil
	case fa.External() != fb.External():
		return false, fmt.Errorf("compare %s: one image holds its bytes and the other a digest of them", fa.Path)
	}
	oa, err := d.a.Object(fa)
	if err != nil {
		return false, err
	}
	ob, err := d.b.Object(fb)
	if err != nil || oa != "" {
		return oa != ob, err
	}
	ba, err := d.inline(d.a, fa)
	if err != nil {
		return false, err
	}
	bb, err := d.inline(d.b, fb)
	return !bytes.Equal(ba, bb), err
}

// inline returns the bytes of a file that the image has itself.
func (d *differ) inline(t *Tree, f File) ([]byte, error) {
	if f.Size > erofs.MaxInline {
		return nil, fmt.Errorf("compare %s: the image holds its %d bytes, and no digest of them", f.Path, f.Size)
	}
	b := make([]byte, f.Size)
	_, err := t.r.ReadAt(f.Inode, b, 0)
	return b, err
}
