package snapshotter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	containerdmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// A choice is what was the best state of an image when a snapshot over it was
// made.
type choice struct {
	Origin mount.Origin `json:"origin"`
	Stack  mount.Stack  `json:"stack"`
	// Above are the ordinary snapshots, by their numbers, between the snapshot and
	// the image, the topmost first.
	Above []string `json:"above,omitempty"`
	// Mapped, if not nil, says that owners are mapped, since containerd cannot do
	// that for data-only lowers.
	Mapped *mapping `json:"mapped,omitempty"`
}

// A mapping is of user and group IDs, as containerd's labels have it.
type mapping struct {
	UIDs string `json:"uids"`
	GIDs string `json:"gids"`
	// Lowers are the folders of Above, the topmost first, and of the image's tree,
	// as they are seen mapped.
	Lowers []string `json:"lowers"`
}

// mappingOf returns the mapping that the labels of a snapshot want, nil if none.
func (s *Snapshotter) mappingOf(labels map[string]string) *mapping {
	m := &mapping{UIDs: labels[snapshots.LabelSnapshotUIDMapping], GIDs: labels[snapshots.LabelSnapshotGIDMapping]}
	if !s.opts.RemapIDs || m.UIDs == "" || m.GIDs == "" {
		return nil
	}
	return m
}

// apply makes the mapped mounts of a choice, if it wants any.
func (m *mapping) apply(s *Snapshotter, c *choice, tree *mount.Lowers) error {
	if m == nil {
		return nil
	}
	userns, err := containerdmount.GetUsernsFD(m.UIDs, m.GIDs)
	if err != nil {
		return fmt.Errorf("user namespace of the mapping %s and %s: %w", m.UIDs, m.GIDs, err)
	}
	defer userns.Close()
	sum := sha256.Sum256([]byte(m.UIDs + " " + m.GIDs))
	name := hex.EncodeToString(sum[:6])
	var lowers []string
	for _, id := range c.Above {
		at, err := tree.Map(s.upper(id), name+"-"+id, userns)
		if err != nil {
			return err
		}
		lowers = append(lowers, at)
	}
	at, err := tree.Map(c.Stack.Tree, name+"-"+c.Stack.Backend, userns)
	if err != nil {
		return err
	}
	m.Lowers = append(lowers, at)
	return nil
}

// choice returns what was stored with a snapshot, nil if nothing.
func (s *Snapshotter) choice(id string) (*choice, error) {
	var c choice
	err := readJSON(s.choiceOf(id), &c)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &c, nil
}

// choose finds the first remote ancestor of a new snapshot, and takes the best
// that there is of its tree now. It returns nil if there is none.
func (s *Snapshotter) choose(ctx context.Context, parent string, labels map[string]string) (*choice, error) {
	var above []string
	remote := ""
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		for name := parent; name != "" && remote == ""; {
			id, info, _, err := storage.GetInfo(ctx, name)
			if err != nil {
				return fmt.Errorf("parent %s: %w", name, err)
			}
			if s.isRemote(id) {
				remote = id
			} else {
				above = append(above, id)
			}
			name = info.Parent
		}
		return nil
	})
	if err != nil || remote == "" {
		return nil, err
	}
	c := &choice{Above: above}
	if err := readJSON(s.originOf(remote), &c.Origin); err != nil {
		return nil, err
	}
	tree, done, err := s.trees.open(ctx, c.Origin)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", c.Origin.Reference, err)
	}
	defer done()
	if c.Stack, err = tree.Best(ctx); err != nil {
		return nil, fmt.Errorf("image %s: %w", c.Origin.Reference, err)
	}
	if c.Mapped = s.mappingOf(labels); c.Mapped != nil {
		if err := c.Mapped.apply(s, c, tree); err != nil {
			return nil, fmt.Errorf("image %s: %w", c.Origin.Reference, err)
		}
	}
	return c, s.keepSessions()
}

// restore sees to it that the mounts of a stored choice are there.
func (s *Snapshotter) restore(ctx context.Context, c *choice) error {
	tree, done, err := s.trees.open(ctx, c.Origin)
	if err == nil {
		defer done()
		if err = tree.Restore(ctx, c.Stack); err == nil {
			err = c.Mapped.apply(s, c, tree)
		}
	}
	if err != nil {
		return fmt.Errorf("image %s: %w", c.Origin.Reference, err)
	}
	return s.keepSessions()
}

// mounts are what containerd has to mount for a snapshot.
func (s *Snapshotter) mounts(snap storage.Snapshot, info snapshots.Info, c *choice) []containerdmount.Mount {
	var options []string
	if s.opts.RemapIDs && (c == nil || c.Mapped == nil) {
		if v, ok := info.Labels[snapshots.LabelSnapshotUIDMapping]; ok {
			options = append(options, "uidmap="+v)
		}
		if v, ok := info.Labels[snapshots.LabelSnapshotGIDMapping]; ok {
			options = append(options, "gidmap="+v)
		}
	}
	active := snap.Kind == snapshots.KindActive
	if c != nil && !active && len(c.Above) == 0 && len(c.Stack.Data) == 0 {
		// Nor is one folder enough of an image that FUSE serves.
		tree := c.Stack.Tree
		if c.Mapped != nil {
			tree = c.Mapped.Lowers[0]
		}
		return []containerdmount.Mount{{Type: "bind", Source: tree, Options: append(options, "ro", "rbind")}}
	}
	if c == nil && (len(snap.ParentIDs) == 0 || !active && len(snap.ParentIDs) == 1) {
		// overlayfs needs two folders.
		dir, access := s.upper(snap.ID), "rw"
		if !active {
			access = "ro"
			if len(snap.ParentIDs) == 1 {
				dir = s.upper(snap.ParentIDs[0])
			}
		}
		return []containerdmount.Mount{{Type: "bind", Source: dir, Options: append(options, access, "rbind")}}
	}
	if active {
		options = append(options, "workdir="+s.workdir(snap.ID), "upperdir="+s.upper(snap.ID))
	}
	var lowers []string
	ids := snap.ParentIDs
	if c != nil {
		ids = c.Above
	}
	for i, id := range ids {
		dir := s.upper(id)
		if c != nil && c.Mapped != nil {
			dir = c.Mapped.Lowers[i]
		}
		lowers = append(lowers, dir)
	}
	if c != nil {
		stack := c.Stack
		if c.Mapped != nil {
			stack.Tree = c.Mapped.Lowers[len(c.Above)]
		}
		lowers = append(lowers, stack.Lowerdir())
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	options = append(options, s.overlay...)
	if c != nil && len(c.Stack.Data) > 0 {
		options = append(options, "metacopy=on")
		if c.Stack.Enforced {
			options = append(options, "verity=require")
		}
	}
	mounts := []containerdmount.Mount{{Type: "overlay", Source: "overlay", Options: options}}
	if c != nil && len(c.Stack.Data) > 0 {
		mounts = append(mounts, nothing(active))
	}
	return mounts
}

// nothing is a mount that containerd does nothing for: a remount without
// options. With it, it does not take the other one for an overlayfs whose layers
// it may look into by itself: it would split lowerdir= at each colon, and find
// files without their bytes in the EROFS mount. It does so when it looks for
// users in /etc/passwd (openOverlay in its internal/fsview), and when it unpacks
// a layer (core/diff/apply); now it mounts for both. Who runs the commands of
// 'ctr snapshot mounts' remounts what is there.
func nothing(active bool) containerdmount.Mount {
	access := "ro"
	if active {
		access = "rw"
	}
	return containerdmount.Mount{Type: "none", Source: "none", Options: []string{"remount", access}}
}

// overlayOptions are those of every overlayfs. Folders can be renamed as on
// other filesystems, not only copied (redirect_dir=); and a folder of
// differences may be the lower of many, though it was an upper once (index=).
// A kernel does not have the one that it has no parameter for.
func overlayOptions() (options []string) {
	for _, o := range []string{"redirect_dir=on", "index=off"} {
		name, _, _ := strings.Cut(o, "=")
		if exists("/sys/module/overlay/parameters/" + name) {
			options = append(options, o)
		}
	}
	return options
}

// ownUpper gives the folder of a new snapshot's differences the owner that its
// root shall have: that of the root of what is below, or the one that root is
// mapped to.
func (s *Snapshotter) ownUpper(dir string, snap storage.Snapshot, info snapshots.Info, c *choice) error {
	uidmap, umapped := info.Labels[snapshots.LabelSnapshotUIDMapping]
	gidmap, gmapped := info.Labels[snapshots.LabelSnapshotGIDMapping]
	if umapped || gmapped {
		uid, err := mappedRoot(uidmap)
		if err != nil {
			return err
		}
		gid, err := mappedRoot(gidmap)
		if err != nil {
			return err
		}
		return os.Lchown(dir, uid, gid)
	}
	if c != nil && len(c.Above) == 0 {
		return own(dir, c.Stack.Mode, int(c.Stack.UID), int(c.Stack.GID))
	}
	if len(snap.ParentIDs) == 0 {
		return nil
	}
	below := s.upper(snap.ParentIDs[0])
	fi, err := os.Stat(below)
	if err != nil {
		return fmt.Errorf("root of the parent: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("root of the parent %s: no owner", below)
	}
	return own(dir, st.Mode, int(st.Uid), int(st.Gid))
}

// own gives a folder the permissions, S_ISUID, S_ISGID and S_ISVTX among them,
// and the owner of another.
func own(dir string, mode uint32, uid, gid int) error {
	if err := os.Lchown(dir, uid, gid); err != nil {
		return err
	}
	if err := unix.Chmod(dir, mode&0o7777); err != nil {
		return fmt.Errorf("chmod %s: %w", dir, err)
	}
	return nil
}
