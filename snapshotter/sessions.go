package snapshotter

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// Sessions are what a Keeper has kept: the FUSE sessions of the process before.
type Sessions struct {
	State json.RawMessage
	Files map[string]*os.File
}

// A keptSession is what is kept of one tree's session.
type keptSession struct {
	Tree   string          `json:"tree"` // keyOf its Origin
	Number int             `json:"number"`
	Files  []string        `json:"files"` // kept under these names, with a dash and the number
	State  json.RawMessage `json:"state"` // of mount.Lowers
}

func (k keptSession) file(name string) string { return name + "-" + strconv.Itoa(k.Number) }

// A register numbers the sessions, so that a name of a kept descriptor means
// the same one for ever.
type register struct {
	mu      sync.Mutex
	next    int
	numbers map[*os.File]int // by /dev/fuse
	last    string           // the state that was kept last
}

// keepSessions gives the sessions that there are now to the keeper, if they are
// not those that it has.
func (s *Snapshotter) keepSessions() error {
	if s.opts.Keeper == nil {
		return nil
	}
	r := &s.register
	r.mu.Lock()
	defer r.mu.Unlock()
	for tries := 1; ; tries++ {
		all, files := r.list(s.trees.opened())
		state, err := json.Marshal(all)
		if err != nil || string(state) == r.last {
			return err
		}
		if err = s.opts.Keeper.Keep(state, files); err == nil {
			r.last = string(state)
			return nil
		}
		// A session that ends meanwhile closes its files, and is on no list a
		// moment later.
		if tries == keepTries {
			return fmt.Errorf("keep the sessions of %d images: %w", len(all), err)
		}
		time.Sleep(keepPause)
	}
}

// How often, and with what pauses, sessions are given to a keeper that refuses
// them.
const (
	keepTries = 20
	keepPause = 5 * time.Millisecond
)

// list returns what is to be kept of the sessions of some trees. mu is held.
func (r *register) list(opened map[string]*mount.Lowers) (all []keptSession, files map[string]*os.File) {
	files = map[string]*os.File{}
	numbers := map[*os.File]int{}
	for _, key := range slices.Sorted(maps.Keys(opened)) {
		state, some, ok := opened[key].Session()
		if !ok {
			continue
		}
		dev := mount.FuseFile(some)
		n, ok := r.numbers[dev]
		if !ok {
			r.next++
			n = r.next
		}
		numbers[dev] = n
		k := keptSession{Tree: key, Number: n, Files: slices.Sorted(maps.Keys(some)), State: state}
		for name, f := range some {
			files[k.file(name)] = f
		}
		all = append(all, k)
	}
	r.numbers = numbers
	return all, files
}

// resume goes on with the sessions of the process before, and returns when all
// that can be are served. With an error it has not begun: the images of the
// snapshots cannot be listed now, and the keeper still has all that it had.
func (s *Snapshotter) resume(ctx context.Context, kept *Sessions) error {
	if kept == nil {
		return nil
	}
	used := map[string]bool{}
	defer func() {
		for name, f := range kept.Files {
			if !used[name] {
				f.Close()
			}
		}
	}()
	var all []keptSession
	if err := json.Unmarshal(kept.State, &all); err != nil {
		s.log.Error("the sessions of the process before cannot be continued", "error", err)
		return nil
	}
	origins := map[string]mount.Origin{}
	remote, chosen, err := s.origins(ctx)
	if err != nil {
		return hint.Wrap(fmt.Errorf("continue the sessions of the process before: list the images of snapshots: %w", err),
			"see whether the disk is full, and "+s.path("metadata.db")+" can be read")
	}
	for _, o := range append(remote, chosen...) {
		origins[keyOf(o)] = o
	}
	var g errgroup.Group
	s.register.numbers = map[*os.File]int{}
	for _, k := range all {
		files := map[string]*os.File{}
		for _, name := range k.Files {
			if f := kept.Files[k.file(name)]; f != nil {
				files[name] = f
			}
		}
		origin, ok := origins[k.Tree]
		switch {
		case mount.SessionOver(files):
			continue
		case !ok:
			s.log.Error("a session of the process before is of no image that is known", "tree", k.Tree)
			continue
		}
		s.register.next = max(s.register.next, k.Number)
		s.register.numbers[mount.FuseFile(files)] = k.Number
		for _, name := range k.Files {
			used[k.file(name)] = true
		}
		g.Go(func() error {
			_, done, err := s.trees.openWith(ctx, origin, func(l *mount.Lowers) error { return l.Resume(k.State, files) })
			if err != nil {
				s.log.Error("the session of an image cannot be continued: containers that use it see errors where it is not local",
					"image", origin.Reference, "error", err)
				for _, f := range files {
					f.Close()
				}
				return nil
			}
			done()
			return nil
		})
	}
	g.Wait()
	return nil
}
