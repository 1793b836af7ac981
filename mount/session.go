package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/fusesession"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// A Keeper keeps a mount's FUSE session while no process serves it, and sees
// to it that another one does.
type Keeper interface {
	// Keep replaces what is kept. The keeper makes its own copies of files.
	Keep(state []byte, files map[string]*os.File) error
	// Name says what keeps the session, and as which process (0: none of its own).
	Name() (name string, pid int)
	// Replace has the program at path go on with the session. Without an
	// error this process is told to leave soon.
	Replace(path string) error
}

// A sessionState is what a successor must know of a mount besides the command
// line and the descriptors. Handles and nodes have no state (package fusefs),
// so it does not change while the mount lives.
type sessionState struct {
	ManifestDigest string             `json:"manifest_digest,omitempty"`
	Backend        Backend            `json:"backend"`
	BackendReason  string             `json:"backend_reason"`
	MountID        int                `json:"mount_id"`
	Dev            string             `json:"dev"` // of the first mount's filesystem
	FUSE           fusesession.Params `json:"fuse"`
}

// The names of kept descriptors.
const (
	fuseFile     = "fuse"     // /dev/fuse
	requestsFile = "requests" // of a kernel that cannot repeat them
	controlFile  = "control"  // the socket that other commands connect to
	imageFile    = "image"    // of a composefs: source, whose path may come to mean another one
	leaseFile    = "lease"    // without it the image could be evicted while no process lives
	usernsFile   = "userns"   // of --idmap, whose process may have ended
)

// FuseFile returns the /dev/fuse among kept files, nil if there is none.
func FuseFile(files map[string]*os.File) *os.File { return files[fuseFile] }

// Serves reports whether this process serves the mount, or files that are
// still open on it.
func (m *Mount) Serves() bool { return m.server != nil }

// KeepBy gives the session to a keeper, and shows it in the status; restarts
// is how many processes have served the mount before. After it, Resume can go
// on with the mount in another process.
func (m *Mount) KeepBy(k Keeper, c *Control, restarts int) error {
	conn := m.server.Session()
	state, err := json.Marshal(sessionState{
		ManifestDigest: m.status.ManifestDigest, Backend: m.firstBackend, BackendReason: m.firstReason,
		MountID: m.server.MountID(), Dev: m.firstDev, FUSE: conn.Params(),
	})
	if err != nil {
		return err
	}
	socket, err := c.file()
	if err != nil {
		return err
	}
	defer socket.Close()
	files := map[string]*os.File{fuseFile: conn.File(), controlFile: socket}
	if f := conn.Requests(); f != nil {
		files[requestsFile] = f
	}
	if m.imageFile != nil {
		files[imageFile] = m.imageFile
	}
	if m.lease != nil && m.lease.File() != nil {
		files[leaseFile] = m.lease.File()
	}
	if m.view.userns != nil {
		files[usernsFile] = m.view.userns
	}
	if err := k.Keep(state, files); err != nil {
		return fmt.Errorf("keep the session: %w", err)
	}
	m.KeptBy(k, restarts)
	return nil
}

// KeptBy notes in the status what keeps the session already.
func (m *Mount) KeptBy(k Keeper, restarts int) {
	m.mu.Lock()
	m.keeper = k
	m.status.Restarts = restarts
	m.mu.Unlock()
}

// Resume goes on with a mount that another process has made with the same
// source, mount point and Options, from what that one gave its Keeper. It
// takes files over. When all is ready it calls wait, which returns when
// the process before has ended; until then it changes nothing. A nil error
// promises that the session is served, and that a swap that was under way is
// done or not begun.
func Resume(source, mountpoint string, o Options, state []byte, files map[string]*os.File, wait func() error) (_ *Mount, err error) {
	var st sessionState
	if err := json.Unmarshal(state, &st); err != nil {
		return nil, fmt.Errorf("continue the mount: %w", err)
	}
	defer files[leaseFile].Close() // a lease of our own is taken meanwhile
	if files[fuseFile] == nil {
		return nil, errors.New("continue the mount: its /dev/fuse was not kept")
	}
	if source, err = absoluteSource(source); err != nil {
		return nil, err
	}
	abs, err := ResolveMountpoint(mountpoint)
	if err != nil {
		return nil, err
	}
	m := newMount(source, abs, o)
	m.resumed = true
	defer func() {
		if err != nil {
			m.release()
		} else {
			o.Metrics.Resumed()
			m.unwatch = o.Metrics.Watch(m.observe)
		}
	}()
	if err = m.openView(files[usernsFile]); err != nil {
		return nil, err
	}
	m.firstBackend, m.firstReason, m.firstDev = st.Backend, st.BackendReason, st.Dev
	m.status.Backend, m.status.BackendReason = string(st.Backend), st.BackendReason
	conn, err := fusesession.Resume(files[fuseFile], files[requestsFile], st.FUSE)
	if err != nil {
		return nil, err
	}
	path, composefs := composefsSource(source)
	if composefs {
		err = m.resumeComposefs(conn, path, files[imageFile], wait)
	} else {
		err = m.resumeImage(conn, st, wait)
	}
	if err != nil {
		return nil, err
	}
	if err := m.server.TakeOver(st.MountID); err != nil {
		return nil, err
	}
	wanted, err := m.settle(st.MountID)
	if err != nil || !wanted || composefs {
		return m, err
	}
	m.startConductor()
	return m, nil
}

func (m *Mount) resumeImage(conn *fusesession.Session, st sessionState, wait func() error) (err error) {
	m.resumed = true
	digest, err := toc.ParseDigest(st.ManifestDigest)
	if err != nil {
		return err
	}
	if m.store, err = cache.Open(m.opts.Root, cache.Options{Metrics: m.opts.Metrics, Logger: m.log, Budget: m.opts.Budget}); err != nil {
		return err
	}
	if m.src, err = fetcher.OpenSource(m.source, m.opts.Source); err != nil {
		return err
	}
	if m.image, err = m.load(digest); err != nil {
		return err
	}
	m.status.ManifestDigest = st.ManifestDigest
	m.log = m.log.With("image", st.ManifestDigest)
	if m.reader, err = erofs.OpenFile(m.image.path(lazyName)); err != nil {
		return err
	}
	contents := &lazyContents{index: m.image.index}
	if st.Backend == Hybrid {
		m.server, err = fusefs.ResumeObjects(conn, contents, m.fuseOptions())
	} else {
		m.server, err = fusefs.ResumeImage(conn, m.reader, contents, m.fuseOptions())
	}
	if err != nil {
		return err
	}
	if err := wait(); err != nil {
		return err
	}
	// Now that nobody else fills, for this mount, what is whole does not change under us.
	if m.contents, err = m.store.Contents(m.image.index); err != nil {
		return err
	}
	m.startStory()
	m.beginStory()
	m.resumeStory()
	m.fetch = m.newFetcher(m.startProfile())
	contents.local, contents.spare, contents.fetch, contents.seen, contents.story = m.contents, m.spare, m.fetch, m.record, m.story
	return nil
}

func (m *Mount) resumeComposefs(conn *fusesession.Session, path string, f *os.File, wait func() error) error {
	if f == nil {
		return errors.New("continue the mount: its image was not kept")
	}
	objects, err := m.openComposefs(path, f)
	if err != nil {
		return err
	}
	if m.server, err = fusefs.ResumeImage(conn, m.reader, objects, m.fuseOptions()); err != nil {
		return err
	}
	return wait()
}

// settle finds out how far the process before has come with the swap, and
// finishes one that was begun. It reports whether one may still be made.
func (m *Mount) settle(mountID int) (wanted bool, err error) {
	all, err := kmount.Mounts()
	if err != nil {
		return false, err
	}
	var mine *kmount.Info
	for i := range all {
		if all[i].ID == mountID && ours(all[i]) && all[i].Mountpoint == m.mountpoint {
			mine = &all[i]
		}
	}
	if mine == nil {
		// The swap is done, or it was unmounted: only files that are open keep
		// the session.
		if top, err := kmount.At(m.mountpoint); err == nil && isSealedMount(top) {
			m.swapped(verityOf(top))
			m.noteDigest()
			m.swapAlso() // it may have died before that; what it has swapped is left
		}
		return false, nil
	}
	for _, beneath := range all {
		if beneath.ID == mine.Parent && beneath.Mountpoint == m.mountpoint && isSealedMount(beneath) && m.server.IsTop(m.mountpoint) {
			if len(mountedOn(*mine, all)) > 0 {
				return true, nil // not without that: another swap takes it along
			}
			m.log.Info("a swap that was cut short is finished")
			if err := kmount.Detach(m.mountpoint); err != nil {
				return false, err
			}
			m.swapped(verityOf(beneath))
			m.noteDigest()
			m.swapAlso()
			return false, nil
		}
	}
	return true, nil
}

// Leave readies this process to end without unmounting, as another one is
// about to go on: what it fills and seals is left at a good place, or at any
// place when ctx ends.
func (m *Mount) Leave(ctx context.Context) {
	if m.stop == nil {
		return
	}
	m.stop()
	done := make(chan struct{})
	go func() {
		m.run.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}
