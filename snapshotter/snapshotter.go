// Package snapshotter is a proxy snapshotter of containerd: it gives containers
// root filesystems that are there before their images are. Images are package
// mount's business; who asks, with which labels, and which overlayfs a snapshot
// becomes, is this one's.
//
// A snapshot is one of three:
//
//	remote    committed, a layer of an image that is served lazily. containerd
//	          asked for it with labels that say which, heard "already exists",
//	          and downloaded nothing. It has no files: the layers up to it are
//	          one tree (mount.Origin, mount.Lowers).
//	ordinary  committed, a folder of differences as of containerd's overlayfs
//	          snapshotter: unpacked by containerd, or committed from a container.
//	active    a container's, or a view: overlayfs over the ordinary snapshots
//	          among its ancestors, down to the first remote one, whose tree is
//	          lowest. What was the best state of that tree when the snapshot
//	          was made is stored with it, and is its answer until it is removed.
//
// In its folder of the store:
//
//	metadata.db            the graph of snapshots (containerd's storage package)
//	snapshots/ID/fs, work  of those that are not remote
//	snapshots/ID/origin    of a remote one: mount.Origin as JSON
//	snapshots/ID/choice    of an active one with a remote ancestor: as JSON
//
// and in the runtime folder a folder per tree, of mount.Lowers. What state an
// image is in is written nowhere here: package mount finds it out.
package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	containerdmount "github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// Options say where a Snapshotter has its files, and how images are fetched.
type Options struct {
	// Mount is for all images: Root and Runtime are its folders. Swap,
	// Attributes and Digest are not used.
	Mount mount.Options
	// Keeper, if set, keeps FUSE sessions while no process serves them.
	Keeper Keeper
	// RemapIDs leaves mapping the IDs of user namespaces to containerd, which
	// says it with the mount options uidmap= and gidmap=; without it containerd
	// changes owners file by file.
	RemapIDs bool
}

// A Keeper keeps FUSE sessions for a successor of this process.
type Keeper interface {
	// Keep replaces what is kept. The keeper makes its own copies of files.
	Keep(state []byte, files map[string]*os.File) error
}

// A Snapshotter is containerd's view of the images of a node. Its methods may
// be called at the same time.
type Snapshotter struct {
	opts     Options
	log      *slog.Logger
	root     string
	overlay  []string // options of every overlayfs
	lock     *os.File // of root
	meta     *storage.MetaStore
	trees    *trees
	register register

	stop   context.CancelFunc
	run    sync.WaitGroup
	wake   chan struct{} // for tidy
	closed sync.Once
}

var _ snapshots.Snapshotter = (*Snapshotter)(nil)
var _ snapshots.Cleaner = (*Snapshotter)(nil)

// New opens the snapshots below o.Mount.Root, goes on with the sessions that an
// earlier process has left (kept may be nil), and begins to fill what is not
// whole. An image that cannot be had is reported, and is in nobody else's way.
func New(o Options, kept *Sessions) (_ *Snapshotter, err error) {
	if o.Mount.Logger == nil {
		o.Mount.Logger = slog.New(slog.DiscardHandler)
	}
	s := &Snapshotter{opts: o, log: o.Mount.Logger, root: filepath.Join(o.Mount.Root, "snapshotter"), wake: make(chan struct{}, 1)}
	if s.trees, err = newTrees(o.Mount, s.wakeTidy); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.trees.leave()
		}
	}()
	if err := os.MkdirAll(s.path("snapshots"), 0o700); err != nil {
		return nil, hint.Wrap(fmt.Errorf("folder of snapshots: %w", err), "name another folder with --root")
	}
	if ok, err := fs.SupportsDType(s.root); err != nil || !ok {
		return nil, hint.Wrap(fmt.Errorf("folder of snapshots %s: its filesystem does not say what kind its entries are (d_type), which overlayfs needs: %v", s.root, err),
			"make xfs with -n ftype=1, or name another folder with --root")
	}
	s.overlay = overlayOptions()
	if s.lock, err = lockRoot(s.root); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.lock.Close()
		}
	}()
	if err = s.removeUnfinished(); err != nil {
		return nil, err
	}
	if s.meta, err = storage.NewMetaStore(s.path("metadata.db")); err != nil {
		return nil, fmt.Errorf("snapshots of %s: %w", s.root, err)
	}
	ctx, stop := context.WithCancel(context.Background())
	s.stop = stop
	if err = s.resume(ctx, kept); err == nil {
		err = s.keepSessions()
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.run.Go(func() { s.tidy(ctx) })
	s.run.Go(func() { s.open(ctx) })
	return s, nil
}

// removeUnfinished removes the folders of snapshots that a process was making
// when it was killed: nobody else makes any, as s has the lock.
func (s *Snapshotter) removeUnfinished() error {
	dirs, err := os.ReadDir(s.path("snapshots"))
	for _, d := range dirs {
		if isNew(d.Name()) {
			err = errors.Join(err, os.RemoveAll(s.dir(d.Name())))
		}
	}
	if err != nil {
		return hint.Wrap(fmt.Errorf("remove what was not finished of the snapshots: %w", err), "look at "+s.path("snapshots"))
	}
	return nil
}

// lockTime is how long a process that has just died may take to let go of its
// lock.
const lockTime = 10 * time.Second

// lockRoot sees to it that one process has the snapshots.
func lockRoot(dir string) (*os.File, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("lock the snapshots: %w", err)
	}
	for end := time.Now().Add(lockTime); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(end) {
			f.Close()
			return nil, hint.Wrap(fmt.Errorf("lock the snapshots in %s: another process has them: %w", dir, err), "end that one, or name another folder with --root")
		}
	}
}

func (s *Snapshotter) path(name string) string   { return filepath.Join(s.root, name) }
func (s *Snapshotter) dir(id string) string      { return filepath.Join(s.root, "snapshots", id) }
func (s *Snapshotter) upper(id string) string    { return filepath.Join(s.dir(id), "fs") }
func (s *Snapshotter) workdir(id string) string  { return filepath.Join(s.dir(id), "work") }
func (s *Snapshotter) isRemote(id string) bool   { return exists(filepath.Join(s.dir(id), originName)) }
func (s *Snapshotter) originOf(id string) string { return filepath.Join(s.dir(id), originName) }
func (s *Snapshotter) choiceOf(id string) string { return filepath.Join(s.dir(id), choiceName) }

// The files of a snapshot's folder.
const (
	originName = "origin"
	choiceName = "choice"
)

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// Stat returns what is known of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

// Update changes a snapshot's labels.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Walk calls fn for each snapshot that passes the filters.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

// Usage returns what a snapshot takes of the disk. The image of remote
// snapshots is the topmost one's: what is local of it now, whoever shares it.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	err = s.meta.WithTransaction(ctx, false, func(ctx context.Context) error {
		id, info, usage, err = storage.GetInfo(ctx, key)
		return err
	})
	switch {
	case err != nil:
		return usage, err
	case info.Kind == snapshots.KindActive:
		du, err := fs.DiskUsage(ctx, s.upper(id))
		return snapshots.Usage(du), err
	case s.isRemote(id):
		return s.remoteUsage(id), nil
	}
	return usage, nil
}

// Mounts returns the mounts of an active snapshot or a view: the same at each
// call. It sees to it that what they refer to is mounted.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]containerdmount.Mount, error) {
	var snap storage.Snapshot
	var info snapshots.Info
	err := s.meta.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		if snap, err = storage.GetSnapshot(ctx, key); err != nil {
			return err
		}
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return nil, err
	}
	c, err := s.choice(snap.ID)
	if err != nil {
		return nil, err
	}
	if c != nil {
		if err := s.restore(ctx, c); err != nil {
			return nil, err
		}
	}
	return s.mounts(snap, info, c), nil
}

// Prepare makes an active snapshot. With labels that name a layer of an image
// that can be served, it makes the remote snapshot of that layer and fails with
// errdefs.ErrAlreadyExists.
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]containerdmount.Mount, error) {
	labels, err := labelsOf(opts)
	if err != nil {
		return nil, err
	}
	if w := wantedOf(labels); w != nil {
		done, err := s.prepareRemote(ctx, w, key, parent, opts)
		if err != nil {
			return nil, err
		}
		if done {
			return nil, fmt.Errorf("snapshot %s: layer %s of %s is served: %w", w.target, w.layer, w.reference, errdefs.ErrAlreadyExists)
		}
	}
	return s.create(ctx, snapshots.KindActive, key, parent, opts)
}

func labelsOf(opts []snapshots.Opt) (map[string]string, error) {
	var base snapshots.Info
	for _, o := range opts {
		if err := o(&base); err != nil {
			return nil, err
		}
	}
	return base.Labels, nil
}

// View makes a read-only snapshot.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]containerdmount.Mount, error) {
	return s.create(ctx, snapshots.KindView, key, parent, opts)
}

// create makes an active snapshot or a view.
func (s *Snapshotter) create(ctx context.Context, kind snapshots.Kind, key, parent string, opts []snapshots.Opt) ([]containerdmount.Mount, error) {
	labels, err := labelsOf(opts)
	if err != nil {
		return nil, err
	}
	c, err := s.choose(ctx, parent, labels)
	if err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(s.path("snapshots"), "new-*")
	if err != nil {
		return nil, hint.Wrap(fmt.Errorf("folder of a snapshot: %w", err), "see whether the disk is full")
	}
	defer func() { os.RemoveAll(tmp) }()
	if err := os.Mkdir(filepath.Join(tmp, "fs"), 0o755); err != nil {
		return nil, fmt.Errorf("folder of a snapshot: %w", err)
	}
	if kind == snapshots.KindActive {
		if err := os.Mkdir(filepath.Join(tmp, "work"), 0o711); err != nil {
			return nil, fmt.Errorf("folder of a snapshot: %w", err)
		}
	}
	if c != nil {
		if err := writeJSON(filepath.Join(tmp, choiceName), c); err != nil {
			return nil, err
		}
	}
	var snap storage.Snapshot
	var info snapshots.Info
	err = s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		if snap, err = storage.CreateSnapshot(ctx, kind, key, parent, opts...); err != nil {
			return err
		}
		if _, info, _, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		if err := s.ownUpper(filepath.Join(tmp, "fs"), snap, info, c); err != nil {
			return err
		}
		return s.place(tmp, snap.ID)
	})
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", key, err)
	}
	return s.mounts(snap, info, c), nil
}

// place gives a new snapshot's folder its name. The number may have been a
// snapshot's whose transaction failed in the end.
func (s *Snapshotter) place(tmp, id string) error {
	err := os.Rename(tmp, s.dir(id))
	if err != nil && exists(s.dir(id)) {
		if err = os.RemoveAll(s.dir(id)); err == nil {
			err = os.Rename(tmp, s.dir(id))
		}
	}
	if err != nil {
		return fmt.Errorf("folder of snapshot %s: %w", id, err)
	}
	return nil
}

// Commit makes a committed snapshot, an ordinary one, of an active one.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	return s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		id, _, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		usage, err := fs.DiskUsage(ctx, s.upper(id))
		if err != nil {
			return fmt.Errorf("commit %s: %w", key, err)
		}
		if _, err := storage.CommitActive(ctx, key, name, snapshots.Usage(usage), opts...); err != nil {
			return fmt.Errorf("commit %s as %s: %w", key, name, err)
		}
		return nil
	})
}

// Remove removes a snapshot, and in the background what no other needs.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) (err error) {
		id, _, err = storage.Remove(ctx, key)
		return err
	})
	if err != nil {
		return fmt.Errorf("remove %s: %w", key, err)
	}
	if err := os.RemoveAll(s.dir(id)); err != nil {
		s.log.Warn("the folder of a removed snapshot stays until the next cleanup", "error", err)
	}
	s.wakeTidy()
	return nil
}

// Cleanup removes folders of snapshots that are no more, and gives up the
// images that none needs.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	var litter []string
	err := s.meta.WithTransaction(ctx, true, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		if err != nil {
			return err
		}
		dirs, err := os.ReadDir(s.path("snapshots"))
		if err != nil {
			return err
		}
		for _, d := range dirs {
			if _, ok := ids[d.Name()]; !ok && !isNew(d.Name()) {
				litter = append(litter, s.dir(d.Name()))
			}
		}
		return nil
	})
	for _, dir := range litter {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		return fmt.Errorf("clean up snapshots: %w", err)
	}
	return s.settle(ctx)
}

// Close ends this process's part: every mount and session stays as it is, for
// a successor. It may be called more than once.
func (s *Snapshotter) Close() error {
	var err error
	s.closed.Do(func() {
		s.stop()
		s.run.Wait()
		s.trees.leave()
		err = errors.Join(s.meta.Close(), s.lock.Close())
	})
	return err
}

// IsNotFound reports whether an error says that there is no such snapshot.
func IsNotFound(err error) bool { return errdefs.IsNotFound(err) }

func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return durable.WriteFile(path, data, 0o600)
}

func readJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(data, v)
	}
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
