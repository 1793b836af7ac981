package snapshotter

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// pullTime is how long after a layer was asked for an image counts as being
// pulled: it is kept though its topmost snapshot is not there yet.
const pullTime = 10 * time.Minute

// closeTime bounds how long an image that is given up is waited for: a
// container that still has it keeps its session.
const closeTime = 5 * time.Second

// trees are the trees that are open, at most one for each Origin.
type trees struct {
	opts    mount.Options
	store   io.Closer
	openOne func(ctx context.Context, o mount.Origin, dir string) (*mount.Lowers, error)
	// closeOne is Lowers.Close.
	closeOne func(l *mount.Lowers, ctx context.Context) error
	images   images

	mu    sync.Mutex
	byKey map[string]*tree
}

// A tree is one Origin's.
type tree struct {
	key    string
	digest string // of the image's manifest
	ready  chan struct{}
	lowers *mount.Lowers // once ready; nil with err
	err    error
	users  int // calls under way
	asked  time.Time
	// closed, if not nil, is closed when the mounts in its folder are taken away.
	// Until then nobody else may make any there.
	closed chan struct{}
}

func newTrees(o mount.Options, changed func()) (*trees, error) {
	store, err := mount.OpenStore(o)
	if err != nil {
		return nil, err
	}
	return &trees{
		opts: o, store: store, byKey: map[string]*tree{}, closeOne: (*mount.Lowers).Close,
		openOne: func(ctx context.Context, origin mount.Origin, dir string) (*mount.Lowers, error) {
			return mount.OpenLowers(ctx, store, origin, dir, o, changed)
		},
	}, nil
}

// keyOf names an Origin's tree, as its folder has it too.
func keyOf(o mount.Origin) string {
	sum := sha256.Sum256([]byte(o.Digest() + " " + strconv.Itoa(o.Layers)))
	return hex.EncodeToString(sum[:8])
}

// folder is where the mounts of all trees are.
func (t *trees) folder() string { return filepath.Join(t.opts.Runtime, "images") }

// open returns the tree of an Origin, which stays open at least until done is
// called.
func (t *trees) open(ctx context.Context, o mount.Origin) (l *mount.Lowers, done func(), err error) {
	return t.openWith(ctx, o, nil)
}

// openWith is open, with something to do between opening a tree and running
// it.
func (t *trees) openWith(ctx context.Context, o mount.Origin, before func(*mount.Lowers) error) (*mount.Lowers, func(), error) {
	key := keyOf(o)
	t.mu.Lock()
	e := t.byKey[key]
	if e != nil && e.closed != nil {
		t.mu.Unlock()
		select {
		case <-e.closed:
			return t.openWith(ctx, o, before)
		case <-ctx.Done():
			return nil, nil, ctx.Err()
		}
	}
	mine := e == nil
	if mine {
		e = &tree{key: key, digest: o.Digest(), ready: make(chan struct{})}
		t.byKey[key] = e
	}
	e.users++
	e.asked = time.Now()
	t.mu.Unlock()
	done := func() {
		t.mu.Lock()
		e.users--
		t.mu.Unlock()
	}
	if mine {
		e.lowers, e.err = t.openOne(ctx, o, filepath.Join(t.folder(), key))
		if e.err == nil && before != nil {
			if err := before(e.lowers); err != nil {
				t.opts.Logger.Error("containers that use the image see errors where it is not local", "image", o.Reference, "error", err)
			}
		}
		if e.err != nil {
			t.mu.Lock()
			delete(t.byKey, key)
			t.mu.Unlock()
		} else {
			e.lowers.Run()
		}
		close(e.ready)
	}
	select {
	case <-e.ready:
	case <-ctx.Done():
		done()
		return nil, nil, ctx.Err()
	}
	if e.err != nil {
		done()
		// The one who opened it may have given up, and we have not.
		if !mine && ctx.Err() == nil && (errors.Is(e.err, context.Canceled) || errors.Is(e.err, context.DeadlineExceeded)) {
			return t.openWith(ctx, o, before)
		}
		return nil, nil, e.err
	}
	return e.lowers, done, nil
}

// get returns the tree of an Origin if it is open.
func (t *trees) get(o mount.Origin) *mount.Lowers {
	t.mu.Lock()
	e := t.byKey[keyOf(o)]
	gone := e == nil || e.closed != nil
	t.mu.Unlock()
	if gone {
		return nil
	}
	select {
	case <-e.ready:
		return e.lowers
	default:
		return nil
	}
}

// opened lists the trees that are ready.
func (t *trees) opened() map[string]*mount.Lowers {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := map[string]*mount.Lowers{}
	for key, e := range t.byKey {
		select {
		case <-e.ready:
			if e.err == nil && e.closed == nil {
				all[key] = e.lowers
			}
		default:
		}
	}
	return all
}

// closeAllBut gives up the trees that needed does not name; pulled are the
// manifests of which there are snapshots.
func (t *trees) closeAllBut(ctx context.Context, needed, pulled map[string]bool) error {
	var all error
	for {
		e := t.unneeded(needed, pulled)
		if e == nil {
			return all
		}
		limited, cancel := context.WithTimeout(ctx, closeTime)
		all = errors.Join(all, t.closeOne(e.lowers, limited))
		cancel()
		t.forget(e)
	}
}

// unneeded returns a tree that is to be given up, marked as being closed, nil if
// there is none.
func (t *trees) unneeded(needed, pulled map[string]bool) *tree {
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, e := range t.byKey {
		if needed[key] || e.users > 0 || e.closed != nil || pulled[e.digest] && time.Since(e.asked) < pullTime {
			continue
		}
		e.closed = make(chan struct{})
		return e
	}
	return nil
}

// forget ends what closing a tree keeps others from.
func (t *trees) forget(e *tree) {
	t.mu.Lock()
	delete(t.byKey, e.key)
	t.mu.Unlock()
	close(e.closed)
}

// leave stops what goes on in the background, and leaves all mounts as they
// are. The store stays open if sessions are served from it still.
func (t *trees) leave() {
	opened := t.opened()
	for _, l := range opened {
		l.Leave()
	}
	if len(opened) == 0 {
		t.store.Close()
	}
}

// wakeTidy has the sessions kept, and the trees that nobody needs closed, soon.
func (s *Snapshotter) wakeTidy() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// tidy does that.
func (s *Snapshotter) tidy(ctx context.Context) {
	tick := time.NewTicker(time.Minute) // pulls that were given up
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-s.wake:
		}
		if err := s.settle(ctx); err != nil && ctx.Err() == nil {
			s.log.Warn("images that are not needed any more", "error", err)
		}
	}
}

// settle gives up the trees that no snapshot needs, and keeps the sessions of
// the others.
func (s *Snapshotter) settle(ctx context.Context) error {
	remote, chosen, err := s.origins(ctx)
	if err != nil {
		return err
	}
	needed, pulled := map[string]bool{}, map[string]bool{}
	for _, o := range append(remote, chosen...) {
		needed[keyOf(o)] = true
		pulled[o.Digest()] = true
	}
	err = s.trees.closeAllBut(ctx, needed, pulled)
	return errors.Join(err, s.keepSessions())
}

// open opens the tree of each image, so that it is filled and kept from being
// evicted, and takes away the mounts of trees that there are no more.
func (s *Snapshotter) open(ctx context.Context) {
	remote, chosen, err := s.origins(ctx)
	if err != nil {
		s.log.Error("the images of snapshots cannot be listed", "error", err)
		return
	}
	known := map[string]bool{}
	all := map[string]mount.Origin{}
	for _, o := range append(remote, chosen...) {
		known[keyOf(o)] = true
	}
	for _, o := range remote {
		if o.Whole() {
			all[keyOf(o)] = o
		}
	}
	for _, o := range chosen {
		all[keyOf(o)] = o
	}
	if err := s.trees.sweep(known); err != nil {
		s.log.Warn("mounts of images that are no more", "error", err)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(openAtOnce)
	for _, o := range all {
		g.Go(func() error {
			_, done, err := s.trees.open(gctx, o)
			if err == nil {
				done()
			} else if gctx.Err() == nil {
				s.log.Warn("an image cannot be opened; it is tried again when a container needs it", "image", o.Reference, "error", err)
			}
			return nil
		})
	}
	g.Wait()
}

// openAtOnce is how many images are opened at a time at the start: what is read
// for it is on the disk, mostly.
const openAtOnce = 4

// sweep takes away the mounts of trees that are not known, nor open.
func (t *trees) sweep(known map[string]bool) error {
	dirs, err := os.ReadDir(t.folder())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("folder of mounts: %w", err)
	}
	var all error
	for _, d := range dirs {
		t.mu.Lock()
		e := t.byKey[d.Name()]
		over := e == nil && !known[d.Name()]
		if over {
			e = &tree{key: d.Name(), ready: make(chan struct{}), closed: make(chan struct{})}
			t.byKey[e.key] = e
		}
		t.mu.Unlock()
		if over {
			all = errors.Join(all, mount.DetachLowers(filepath.Join(t.folder(), e.key)))
			t.forget(e)
		}
	}
	return all
}

// isNew reports whether a folder is one of a snapshot that is being made.
func isNew(name string) bool { return strings.HasPrefix(name, "new-") }
