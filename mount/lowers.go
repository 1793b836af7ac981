package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/internal/fusesession"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// Lowers are an image whose mounts are lower layers of overlayfs mounts that
// others make: containers'. Where Start makes one mount and swaps it, here each
// container is given the best Stack that there is when it is prepared, and
// keeps it.
//
// In its folder, which has no other files, are mounts:
//
//	lazy/    EROFS: lazy.erofs
//	data/    FUSE: every content of the image, for as long as one is not whole
//	sealed/  EROFS: sealed.erofs, once it is there
//	tree/    FUSE: the whole tree, where the kernel cannot do with less
//	mapped-NAME/  one of them, or another folder, with owners mapped (Map)
//
// They outlive the process, and so do FUSE sessions if somebody keeps them
// (Session).
type Lowers struct {
	m   *Mount
	dir string
	// looked is closed when it is known whether the image is sealed.
	looked chan struct{}
	// changed is called when a session has begun or ended.
	changed func()

	mu      sync.Mutex // of what follows, and of mounting
	backend Backend    // "": not chosen yet
	reason  string
	server  *fusefs.Server
	verity  string // of the sealed image's mount; "": not tried yet
	closed  bool
}

// The folders of Lowers.
const (
	lazyFolder   = "lazy"
	dataFolder   = "data"
	sealedFolder = "sealed"
	treeFolder   = "tree"
)

// OpenStore opens the store that the Lowers of a process share.
func OpenStore(o Options) (*cache.Store, error) {
	return cache.Open(o.Root, cache.Options{Metrics: o.Metrics, Logger: o.Logger, Budget: o.Budget})
}

// OpenLowers prepares the image of an Origin, and begins to fill it. A nil
// error promises that all its layers can be served. Nothing is mounted yet.
// What an earlier process has mounted in dir is taken over. changed, if set, is
// called when what Session returns has changed.
func OpenLowers(ctx context.Context, store *cache.Store, origin Origin, dir string, o Options, changed func()) (_ *Lowers, err error) {
	if changed == nil {
		changed = func() {}
	}
	defer func() { o.Metrics.Started(resultOf(err)) }()
	src, err := openOrigin(origin, o)
	if err != nil {
		return nil, err
	}
	m := newMount(src.String(), dir, o)
	m.log = m.opts.Logger.With("source", src.String())
	m.store, m.sharedStore, m.src = store, true, src
	m.chunkedOnly = true // containerd unpacks other images itself
	m.startStory()
	defer func() {
		if err != nil {
			m.release()
		}
	}()
	if m.image, err = m.prepare(ctx); err != nil {
		return nil, err
	}
	m.status.ManifestDigest = m.image.digest.String()
	m.log = m.log.With("image", m.image.digest.String())
	if m.contents, err = m.store.Contents(m.image.index); err != nil {
		return nil, err
	}
	if m.reader, err = erofs.OpenFile(m.image.path(lazyName)); err != nil {
		return nil, hint.Wrap(err, "remove "+m.image.dir+" and pull the image again")
	}
	m.beginStory()
	m.fetch = m.newFetcher(m.startProfile())
	m.milestone(metrics.Mounted)
	m.unwatch = o.Metrics.Watch(m.observe)
	m.story.mounted()
	return &Lowers{m: m, dir: dir, looked: make(chan struct{}), changed: changed}, nil
}

// Run starts what goes on in the background: filling and sealing. After it,
// Close must be called.
func (l *Lowers) Run() {
	bg, stop := context.WithCancel(context.Background())
	l.m.stop = stop
	l.m.run.Go(func() { l.conduct(bg) })
	l.m.run.Go(func() { l.m.keepProfile(bg) })
}

// TryHybrid finds out whether this kernel can do what Hybrid needs on the
// filesystem of the folder dir, by doing it. The error has the kernel's words.
func TryHybrid(dir string) error { return tryHybrid(dir) }

// Status returns what is known now. Its Mountpoint is the folder.
func (l *Lowers) Status() Status { return l.m.Status() }

// WaitFor returns nil once the image has reached state, which is Sealed at
// most.
func (l *Lowers) WaitFor(ctx context.Context, state State) error {
	for {
		l.m.mu.Lock()
		st, change := l.m.status, l.m.change
		l.m.mu.Unlock()
		switch {
		case st.State >= state:
			return nil
		case st.stuck != nil:
			return fmt.Errorf("state %s %w: %w", state, ErrStuck, st.stuck)
		}
		select {
		case <-change:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// conduct fills and seals, as far as that can be done.
func (l *Lowers) conduct(ctx context.Context) {
	m := l.m
	if rec, ok := m.sealedRecord(); ok && m.checkDigest(rec) == nil {
		m.setSealed(rec)
	}
	m.lazyFrom = m.state() < Sealed
	close(l.looked)
	if m.state() < Complete {
		work := m.fill
		if m.opts.NoFill {
			work = m.awaitComplete
		}
		if !m.persist(ctx, "fill", work) {
			return
		}
		m.setState(Complete)
	}
	if m.state() < Sealed {
		var rec sealedRecord
		if !m.persist(ctx, "seal", func(ctx context.Context) (err error) {
			rec, err = m.seal(ctx)
			return err
		}) {
			return
		}
		m.setSealed(rec)
		m.log.Info("sealed", "composefs_digest", rec.Composefs.String(), "verity", rec.Verity)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	if err := l.mountSealed(); err != nil {
		m.blocked(ctx, fmt.Errorf("mount the sealed image: %w", err))
		return
	}
	// Containers that have FUSE for a lower keep it; others need it no more.
	if l.backend == Hybrid {
		l.detach(dataFolder)
	}
}

// A Stack says which lowers an overlayfs has of an image.
type Stack struct {
	// Backend is "kernel" (sealed), Hybrid or FUSE.
	Backend string `json:"backend"`
	// Tree is the folder of the tree, Data those of data-only lowers.
	Tree string   `json:"tree"`
	Data []string `json:"data,omitempty"`
	// Enforced says that the overlayfs is to have verity=require.
	Enforced bool `json:"verity,omitempty"`
	// UID, GID and Mode (permissions) are those of the tree's root, which is not
	// to be asked of FUSE by its server.
	UID  uint32 `json:"uid"`
	GID  uint32 `json:"gid"`
	Mode uint32 `json:"mode"`
}

// kernelBackend is the Backend of a Stack without FUSE.
const kernelBackend = "kernel"

// Lowerdir returns the Stack as overlayfs's lowerdir= has it, after whatever
// other lowers there are above.
func (s Stack) Lowerdir() string {
	b := escapeLower(s.Tree)
	for _, d := range s.Data {
		b += "::" + escapeLower(d)
	}
	return b
}

// Best returns the best Stack that there is now, with its mounts made: the
// kernel's alone once the image is sealed, else the hybrid one, or FUSE's where
// the kernel cannot.
func (l *Lowers) Best(ctx context.Context) (Stack, error) {
	select {
	case <-l.looked:
	case <-ctx.Done():
		return Stack{}, ctx.Err()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return Stack{}, errLowersClosed
	}
	if l.m.state() >= Sealed {
		err := l.mountSealed()
		if err == nil {
			return l.stack(kernelBackend)
		}
		l.m.log.Warn("the sealed image cannot be mounted by the kernel", "error", err)
	}
	if err := l.mountLazy(); err != nil {
		return Stack{}, err
	}
	return l.stack(string(l.backend))
}

var errLowersClosed = errors.New("the image is being removed")

// Restore sees to it that the mounts of a Stack that Best has returned once,
// perhaps in another process or before a reboot, are there.
func (l *Lowers) Restore(ctx context.Context, s Stack) error {
	select {
	case <-l.looked:
	case <-ctx.Done():
		return ctx.Err()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return errLowersClosed
	}
	switch s.Backend {
	case kernelBackend:
		if l.m.state() < Sealed {
			return hint.Wrap(fmt.Errorf("image %s: it was sealed and is no longer", l.m.image.digest), "wait until it is fetched again, or remove the container")
		}
		return l.mountSealed()
	case string(Hybrid), string(FUSE):
		hybrid := s.Backend == string(Hybrid)
		switch {
		case l.server == nil || l.backend == Backend(s.Backend):
			l.choose(hybrid, "chosen before")
		case !hybrid || l.m.state() < Complete:
			return hint.Wrap(fmt.Errorf("image %s: others use it with backend %s, and this one began with %s; an image has one at a time", l.m.image.digest, l.backend, s.Backend),
				"remove the container and make it anew")
		}
		if hybrid {
			return l.mountHybrid()
		}
		return l.mountTree()
	}
	return fmt.Errorf("image %s: unknown backend %.40q of a stored choice", l.m.image.digest, s.Backend)
}

func (l *Lowers) path(name string) string { return filepath.Join(l.dir, name) }

func (l *Lowers) stack(backend string) (Stack, error) {
	root, err := l.m.reader.Inode(l.m.reader.Root())
	if err != nil {
		return Stack{}, fmt.Errorf("image %s: %w", l.m.image.digest, err)
	}
	s := Stack{Backend: backend, Tree: l.path(treeFolder), UID: root.UID, GID: root.GID, Mode: root.Mode & 0o7777}
	switch backend {
	case kernelBackend:
		s.Tree, s.Data, s.Enforced = l.path(sealedFolder), []string{l.m.store.Objects()}, l.verity == verityEnforced
	case string(Hybrid):
		s.Tree, s.Data = l.path(lazyFolder), []string{l.m.store.ContentsDir(), l.path(dataFolder)}
	}
	return s, nil
}

// mountLazy makes the mounts of an image that is not sealed. mu is held.
func (l *Lowers) mountLazy() error {
	m := l.m
	if l.backend == "" {
		hybrid, why, err := m.chooseBackend()
		if err != nil {
			return err
		}
		l.choose(hybrid, why)
	}
	if l.backend == Hybrid {
		err := l.mountHybrid()
		if err == nil || m.opts.Backend == Hybrid || l.server != nil {
			return err
		}
		m.log.Warn("the image is served by FUSE alone", "error", err)
		l.choose(false, "not hybrid: "+oneLine(err.Error()))
	}
	return l.mountTree()
}

func (l *Lowers) choose(hybrid bool, why string) {
	l.backend, l.reason = FUSE, why
	if hybrid {
		l.backend = Hybrid
	}
	l.m.update(func(s *Status) { s.Backend, s.BackendReason = string(l.backend), why })
}

// mountHybrid makes the EROFS mount of the lazy image, and the FUSE one of its
// contents unless that is there. mu is held.
func (l *Lowers) mountHybrid() error {
	if err := l.mountImage(lazyFolder, lazyName, nil); err != nil {
		return err
	}
	if l.m.state() >= Complete {
		// Every content is whole: an empty folder is as good as FUSE.
		return l.makeFolder(dataFolder)
	}
	if l.server != nil {
		return nil
	}
	if err := l.clear(dataFolder); err != nil {
		return err
	}
	srv, f, err := fusefs.ServeObjects(l.lazyContents(), l.fuseOptions())
	if err != nil {
		return err
	}
	err = kmount.Attach(f, l.path(dataFolder))
	f.Close()
	if err == nil {
		err = srv.SeenAt(l.path(dataFolder))
	}
	if err != nil {
		kmount.Detach(l.path(dataFolder))
		<-srv.Done()
		return err
	}
	l.serving(srv)
	return nil
}

// mountTree makes the FUSE mount of the whole tree. mu is held.
func (l *Lowers) mountTree() error {
	if l.server != nil {
		return nil
	}
	if err := l.clear(treeFolder); err != nil {
		return err
	}
	srv, err := fusefs.Mount(l.path(treeFolder), l.m.reader, l.lazyContents(), l.fuseOptions())
	if err != nil {
		return err
	}
	l.serving(srv)
	return nil
}

func (l *Lowers) lazyContents() *lazyContents {
	return &lazyContents{l.m.image.index, l.m.contents, l.m.spare, l.m.fetch, l.m.record, l.m.story}
}

func (l *Lowers) fuseOptions() fusefs.Options {
	o := l.m.fuseOptions()
	o.Unasked = true
	return o
}

// serving notes the session that is served now, and waits for its end. mu is
// held.
func (l *Lowers) serving(srv *fusefs.Server) {
	l.server = srv
	l.m.run.Go(func() {
		<-srv.Done()
		l.mu.Lock()
		if l.server == srv {
			l.server = nil
		}
		l.mu.Unlock()
		l.changed()
	})
}

// mountSealed makes the EROFS mount of the sealed image, after a trial that
// says what the kernel enforces. mu is held.
func (l *Lowers) mountSealed() error {
	if l.verity == "" {
		rec, ok := l.m.sealedRecord()
		if !ok {
			return errors.New("the sealed image is no longer whole")
		}
		trial, verity, err := l.m.sealedMount(rec)
		if err != nil {
			return err
		}
		trial.Close()
		l.verity = verity
		l.m.update(func(s *Status) { s.Backend, s.BackendReason, s.Verity = kernelBackend, "", verity })
	}
	var digest []byte
	if l.verity == verityEnforced {
		rec, ok := l.m.sealedRecord()
		if !ok {
			return errors.New("the sealed image is no longer whole")
		}
		digest = rec.Composefs[:]
	}
	return l.mountImage(sealedFolder, sealedName, digest)
}

// mountImage mounts one of the image's EROFS files in the folder name, if it is
// not there; with a digest the kernel must vouch that the file has it. mu is
// held.
func (l *Lowers) mountImage(name, file string, digest []byte) error {
	if info, err := kmount.At(l.path(name)); err == nil && info.FSType == "erofs" {
		return nil
	}
	if err := l.clear(name); err != nil {
		return err
	}
	path := l.m.image.path(file)
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("mount image %s: %w", l.m.image.digest, err)
	}
	defer f.Close()
	r, err := erofs.OpenFile(kmount.Path(f))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	noACL := !r.Header().HasACL
	r.Close()
	if digest != nil {
		if err := checkImage(f, digest); err != nil {
			return err
		}
	}
	if digest != nil || len(path) > kmount.MaxString {
		path = kmount.Path(f) // the file that was measured
	}
	e, err := erofsMount(path, noACL)
	if err != nil {
		return err
	}
	defer e.Close()
	return kmount.Attach(e, l.path(name))
}

// clear makes the folder name, with nothing mounted on it.
func (l *Lowers) clear(name string) error {
	l.detach(name)
	return l.makeFolder(name)
}

// makeFolder makes the folder name. It does not look at what is mounted there.
func (l *Lowers) makeFolder(name string) error {
	if _, err := kmount.At(l.path(name)); err == nil {
		return nil
	}
	if err := os.MkdirAll(l.path(name), 0o755); err != nil {
		return hint.Wrap(fmt.Errorf("folder of the mounts of image %s: %w", l.m.image.digest, err), "name another folder with --runtime-dir")
	}
	return nil
}

// detach takes away whatever is mounted on the folder name.
func (l *Lowers) detach(name string) {
	for range 16 { // as many as a mishap may have piled up
		if _, err := kmount.At(l.path(name)); err != nil {
			return
		}
		if err := kmount.Detach(l.path(name)); err != nil {
			l.m.log.Warn("a mount could not be taken away", "error", err)
			return
		}
	}
}

// A lowersSession is what a successor must know of a session besides its
// Origin and its descriptors.
type lowersSession struct {
	Backend Backend            `json:"backend"`
	Reason  string             `json:"reason"`
	MountID int                `json:"mount_id"`
	FUSE    fusesession.Params `json:"fuse"`
}

// Session returns what a successor's Resume needs to go on with the FUSE
// session of the image, and false if there is none. The files are the Lowers'.
func (l *Lowers) Session() (state json.RawMessage, files map[string]*os.File, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.server == nil || l.closed {
		return nil, nil, false
	}
	conn := l.server.Session()
	state, err := json.Marshal(lowersSession{l.backend, l.reason, l.server.MountID(), conn.Params()})
	if err != nil {
		return nil, nil, false // of strings and numbers: it cannot
	}
	files = map[string]*os.File{fuseFile: conn.File()}
	if f := conn.Requests(); f != nil {
		files[requestsFile] = f
	}
	return state, files, true
}

// Resume goes on with a session that another process has served. It must be
// called before Run. It takes the files over.
func (l *Lowers) Resume(state json.RawMessage, files map[string]*os.File) error {
	var st lowersSession
	if err := json.Unmarshal(state, &st); err != nil {
		return fmt.Errorf("continue the session of image %s: %w", l.m.image.digest, err)
	}
	if files[fuseFile] == nil {
		return fmt.Errorf("continue the session of image %s: its /dev/fuse was not kept", l.m.image.digest)
	}
	conn, err := fusesession.Resume(files[fuseFile], files[requestsFile], st.FUSE)
	if err != nil {
		return err
	}
	var srv *fusefs.Server
	if st.Backend == Hybrid {
		srv, err = fusefs.ResumeObjects(conn, l.lazyContents(), l.fuseOptions())
	} else {
		srv, err = fusefs.ResumeImage(conn, l.m.reader, l.lazyContents(), l.fuseOptions())
	}
	if err == nil {
		err = srv.TakeOver(st.MountID)
	}
	if err != nil {
		return fmt.Errorf("continue the session of image %s: %w", l.m.image.digest, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.choose(st.Backend == Hybrid, st.Reason)
	l.serving(srv)
	return nil
}

// SessionOver reports whether the kernel has let go of a session among kept
// files.
func SessionOver(files map[string]*os.File) bool {
	dev := files[fuseFile]
	return dev == nil || fusesession.Over(dev)
}

// DetachLowers takes away the mounts that Lowers, which are open nowhere any
// more, have left in dir, and dir.
func DetachLowers(dir string) error {
	l := &Lowers{m: newMount("", dir, Options{}), dir: dir}
	for _, name := range l.folders() {
		l.detach(name)
		os.Remove(l.path(name))
	}
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("folder of an image's mounts: %w", err)
	}
	return nil
}

// Leave readies this process to end, with every mount left as it is for a
// successor. What it fills and seals is left where it is.
func (l *Lowers) Leave() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	if l.m.stop != nil {
		l.m.stop()
	}
}

// Close takes the image's mounts away and gives up its lease. Containers that
// run on them keep what they have, but what is not local they get no more.
func (l *Lowers) Close(ctx context.Context) error {
	l.mu.Lock()
	l.closed = true
	srv := l.server
	for _, name := range l.folders() {
		l.detach(name)
		os.Remove(l.path(name))
	}
	l.mu.Unlock()
	var err error
	if srv != nil {
		err = srv.Close(ctx, "")
	}
	if err == nil {
		l.m.release()
	} else if l.m.stop != nil {
		l.m.stop()
	}
	if rerr := os.Remove(l.dir); rerr != nil && !errors.Is(rerr, os.ErrNotExist) {
		err = errors.Join(err, fmt.Errorf("folder of the mounts of image %s: %w", l.m.image.digest, rerr))
	}
	return err
}
