// Package mount conducts: it takes one image at one mount point through its
// four states, and leaves when nothing is left to do. It fetches, stores,
// parses and serves nothing itself.
//
//	Lazy      FUSE serves the tree, or the kernel does and FUSE what is not
//	          whole (Hybrid); absent bytes come from the source
//	Complete  every content is whole in the store, and checked
//	Sealed    sealed.erofs is written with all fs-verity digests, and synced
//	Swapped   a kernel EROFS + overlayfs mount is in the first one's place
//
// States only go forward, and the first three are recomputed from the store at
// each start: Complete means that no content is absent, Sealed that
// images/<manifest digest>/ has a sealed.json whose digest sealed.erofs has.
//
// What an image's folder holds (written whole, as a folder, or not at all; the
// next two when it is sealed, the last two when something was read):
//
//	manifest.json  the image manifest, byte for byte
//	lazy.erofs     the merged tree; each file refers to its content digest
//	chunks         where each content's chunks lie in the layers (package image)
//	sealed.erofs   the same tree, at the same nids; files refer to fs-verity digests
//	sealed.json    the fs-verity digest of sealed.erofs, and what the kernel enforces of it
//	profile.json   what programs read first, in order (image.Profile)
//	start.json     the Story of the start of the last mount that fetched something
//
// and chunks.checked, which says that the chunks were checked since the machine
// was started.
package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/tarindex"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A Policy says how much something is wanted.
type Policy string

// The policies of swapping and of fs-verity.
const (
	Auto    Policy = "auto"    // swap: if the kernel can
	Never   Policy = "never"   // swap: stay on FUSE
	Require Policy = "require" // swap, verity: or fail with the reason
	Try     Policy = "try"     // verity: enforce it if kernel and filesystem can
	Off     Policy = "off"     // verity: compute digests, enforce nothing
)

// Options say how an image is mounted.
type Options struct {
	// Root is the store's folder; Runtime the folder of records of what is
	// mounted.
	Root, Runtime string
	// Source says how the source is reached.
	Source fetcher.Options
	// Backend is AutoBackend (also when empty), FUSE or Hybrid.
	Backend Backend
	// TryHybrid, if set, finds out in another process what TryHybrid does, for
	// who must end when it is killed: see fusefs.Options.Unasked.
	TryHybrid func(dir string) error
	// Attributes restrict what programs may do with the mount, before the swap
	// and after it: MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV and MOUNT_ATTR_NOEXEC,
	// or'ed. AllowOther lets other users in without root; with root they are.
	Attributes int
	AllowOther bool
	// View is how the tree is shown, before the swap and after it.
	View View
	// Swap is Auto (also when empty), Never or Require; Verity is Try (also
	// when empty), Require or Off.
	Swap, Verity Policy
	// SwapNamespaces are processes in whose mount namespaces the mount is
	// swapped too, wherever they have it, after its own mount point.
	SwapNamespaces []int
	// Digest, if not zero, is the fs-verity digest that the sealed image must
	// have.
	Digest image.Digest
	// NoFill leaves what no program reads in the source.
	NoFill bool
	// Index says whether an ordinary layer may be read by an index that another has
	// made: Never (also when empty), Auto or Require, which refuses to read
	// such a layer as a whole. AttachedIndex looks for one, and returns nil if
	// there is none.
	Index         Policy
	AttachedIndex func(ctx context.Context, layer ocispec.Descriptor) (*tarindex.Index, error)
	// InsecureTOC takes layers whose table of contents no manifest vouches
	// for.
	InsecureTOC bool
	// Share is the memory and the rate of what this process fetches. Nil: the
	// default's.
	Share *fetcher.Share
	// SpareMemory is called, if set, with how many bytes are about to be in
	// memory besides what Share has, since nothing can be stored; with 0 when
	// that is over. It must not take long.
	SpareMemory func(bytes int64)
	// Refresh asks a registry what a tag stands for, even if the store knows
	// an answer. Local sources are always asked.
	Refresh bool
	// Record makes the mount one for recording an access profile: it begins anew,
	// and has what is read from this mount and nothing else. With FUSE as
	// backend and Swap Never, that is everything.
	Record bool
	// Profile is asked, for an image that is served lazily, for the access
	// profile to start with: by its manifest, and told whether the store has
	// one that was recorded with it. Nil, or no profile: the store's, of this image or
	// else of another of its repository. It runs beside other preparations, and after
	// profilePatience it is not waited for any longer.
	Profile func(ctx context.Context, manifest image.Digest, own bool) (*image.Profile, error)
	// Budget bounds the store; what is not in use is evicted to keep to it.
	Budget cache.Budget
	// Objects are the folders of objects of a composefs: source.
	Objects []string
	// Began is when the command was given, if that was before Start.
	Began time.Time
	// Progress, if set, hears of each step of the start and how far it has come,
	// with a total of 0 if that is not known. It must not take long.
	Progress func(what string, done, total int64)
	// Metrics and Logger may be nil.
	Metrics *metrics.Metrics
	Logger  *slog.Logger
}

// A Mount is an image at a mount point.
type Mount struct {
	opts       Options
	log        *slog.Logger
	mountpoint string
	source     string
	view       shownView

	store *cache.Store
	// sharedStore says that others use store too, and close it.
	sharedStore bool
	lease       *cache.Lease
	held        image.Digest   // what lease is on
	image       *preparedImage // nil for composefs: sources
	contents    *cache.Contents
	spare       *spareChunks // in front of contents
	fetch       *fetcher.Fetcher
	record      *recorder      // nil for composefs: sources
	opens       *openWatch     // of a hybrid mount; may be nil
	story       *story         // nil for what is only looked at
	sealing     atomic.Int64   // files that seal has come to
	inherited   []image.Access // the profile of a related image, or one that was given
	asked       *profileQuery  // nil: Options.Profile has not been asked
	src         fetcher.Source
	link        *fetcher.Link // to src
	reader      *erofs.Reader
	server      *fusefs.Server
	objects     *objectFolders // of a composefs: source
	// imageFile is the image of a composefs: source, for a successor.
	imageFile *os.File
	// What serves until the swap, and why.
	firstBackend Backend
	firstReason  string
	firstDev     string // of its filesystem, as mountinfo has it
	resumed      bool   // from another process, which may have sealed the image
	lazyFrom     bool   // it was begun by this process, with an image that was not sealed
	unwatch      func()
	chunkedOnly  bool // an image with an ordinary layer is refused
	reports      reports
	started      time.Time // from when the profile counts
	begun        time.Time // from when milestones count

	stop     context.CancelFunc
	run      sync.WaitGroup
	swapping sync.Mutex // held by who swaps: the conductor, or SwapNow's request

	mu     sync.Mutex
	status Status
	keeper Keeper
	change chan struct{} // closed and replaced at each change of status
}

// Start mounts source at the folder mountpoint. A nil error promises that the
// mount is visible and that its whole tree can be listed; bytes may still have
// to be fetched when they are read. A failed Start leaves nothing mounted.
//
// An image that the store has Sealed is mounted by the kernel at once, and an
// image of a registry then without a request to it; Wait then returns
// immediately.
func Start(ctx context.Context, source, mountpoint string, o Options) (_ *Mount, err error) {
	defer func() { o.Metrics.Started(resultOf(err)) }()
	if source, err = absoluteSource(source); err != nil {
		return nil, err
	}
	abs, err := ResolveMountpoint(mountpoint)
	if err != nil {
		return nil, hint.Wrap(err, "name an existing folder (mkdir -p "+mountpoint+")")
	}
	if o.Runtime != "" {
		// Until the mount is there, so that two commands do not both find
		// the mount point free.
		lock, err := lockMountpoint(o.Runtime, abs)
		if err != nil {
			return nil, err
		}
		defer lock.Close()
	}
	if err := checkMountpoint(abs, o.Runtime); err != nil {
		return nil, err
	}
	m := newMount(source, abs, o)
	o = m.opts
	m.startStory()
	defer func() {
		if err != nil {
			m.release()
		} else {
			m.milestone(metrics.Mounted)
			m.unwatch = o.Metrics.Watch(m.observe)
		}
	}()
	if err = m.openView(nil); err != nil {
		return nil, err
	}
	if err = m.view.checkUpper(); err != nil {
		return nil, err
	}
	if path, ok := composefsSource(source); ok {
		return m, m.startComposefs(path)
	}
	m.story.phase("store")
	if m.store, err = cache.Open(o.Root, cache.Options{Metrics: o.Metrics, Logger: m.log, Budget: o.Budget}); err != nil {
		return nil, err
	}
	m.story.phase("image")
	if m.src, err = fetcher.OpenSource(source, o.Source); err != nil {
		return nil, err
	}
	if m.image, err = m.prepare(ctx); err != nil {
		return nil, err
	}
	m.status.ManifestDigest = m.image.digest.String()
	m.log = m.log.With("image", m.image.digest.String())
	m.story.phase("local files")
	if m.contents, err = m.store.Contents(m.image.index); err != nil {
		return nil, err
	}
	o.Metrics.NotFetched(metrics.PassedShared, m.contents.Progress().BytesLocal)
	m.beginStory()
	if rec, ok := m.sealedRecord(); ok {
		if err := m.checkDigest(rec); err != nil {
			return nil, err
		}
		m.setSealed(rec)
		if m.opts.Swap != Never {
			if done, err := m.mountSealed(rec); done || err != nil {
				return m, err
			}
		}
	}
	if err = m.checkStays(); err != nil {
		return nil, err
	}
	if err = m.serve(); err != nil {
		return nil, err
	}
	m.lazyFrom = m.state() < Sealed
	m.story.mounted()
	m.startConductor()
	return m, nil
}

// newMount fills in what the options leave out.
func newMount(source, mountpoint string, o Options) *Mount {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Swap == "" {
		o.Swap = Auto
	}
	if o.Verity == "" {
		o.Verity = Try
	}
	if o.Backend == "" {
		o.Backend = AutoBackend
	}
	log := o.Logger.With("source", source, "mountpoint", mountpoint)
	o.Source.Metrics, o.Source.Logger = o.Metrics, log
	m := &Mount{
		opts: o, log: log,
		mountpoint: mountpoint, source: source, started: time.Now(), begun: time.Now(), link: fetcher.NewLink(),
		change: make(chan struct{}),
	}
	m.unwatch = func() {}
	m.status = Status{Source: source, Mountpoint: mountpoint, Root: o.Root, PID: os.Getpid(), Backend: string(FUSE), Verity: "none yet"}
	return m
}

// openView checks how the tree is to be shown, and opens what that needs; the
// userns is one that another process has kept, or nil.
func (m *Mount) openView(userns *os.File) (err error) {
	if err := m.opts.View.check(m.opts, m.source); err != nil {
		userns.Close()
		return err
	}
	if m.view, err = m.opts.View.open(userns); err != nil {
		return err
	}
	m.status.IDMap, m.status.Upper, m.status.Work, m.status.Context = m.view.IDMap, m.view.Upper, m.view.Work, m.view.Context
	return nil
}

func (m *Mount) startConductor() {
	bg, stop := context.WithCancel(context.Background())
	m.stop = stop
	m.run.Go(func() { m.conduct(bg) })
	m.run.Go(func() { m.keepProfile(bg) })
}

// serve starts the fetcher and mounts the image by FUSE or as a hybrid.
func (m *Mount) serve() error {
	m.story.phase("backend")
	hybrid, why, err := m.chooseBackend()
	if err != nil {
		return err
	}
	m.story.detail("%s", why)
	m.story.phase("mount")
	m.fetch = m.newFetcher(m.startProfile())
	if m.reader, err = erofs.OpenFile(m.image.path(lazyName)); err != nil {
		return hint.Wrap(err, "remove "+m.image.dir+" and mount again")
	}
	contents := &lazyContents{m.image.index, m.contents, m.spare, m.fetch, m.record, m.story}
	o := m.fuseOptions()
	if hybrid {
		err = m.serveHybrid(contents, o)
		if err != nil && m.opts.Backend == AutoBackend && !m.view.overlayOnly() {
			hybrid, why = false, "not hybrid: "+oneLine(err.Error())
		}
	}
	if !hybrid {
		o.Context = m.view.Context
		m.server, err = fusefs.Mount(m.mountpoint, m.reader, contents, o)
		err = m.view.withContext(err)
	} else if err != nil {
		return fmt.Errorf("mount at %s: %w", m.mountpoint, err)
	}
	m.firstBackend, m.firstReason = FUSE, why
	if hybrid {
		m.firstBackend = Hybrid
	}
	m.status.Backend, m.status.BackendReason = string(m.firstBackend), why
	if err == nil {
		m.noteDev()
		m.trim() // of what was read once to mount it
	}
	m.log.Debug("mounted", "backend", m.status.Backend, "reason", why, "after", time.Since(m.started))
	return err
}

// newFetcher brings the image's chunks from its source into the store, those
// in first before others.
func (m *Mount) newFetcher(first []fetcher.Part) *fetcher.Fetcher {
	blobs := make([]fetcher.Blob, len(m.image.layers))
	for i, desc := range m.image.layers {
		blobs[i] = m.src.Blob(desc)
	}
	m.spare = newSpareChunks(m.image.index, m.contents, m.opts.SpareMemory)
	return fetcher.New(m.image.index, blobs, m.spare, fetcher.FetchOptions{
		Share: m.opts.Share, First: first, Link: m.link, Checkpoint: m.image.indexes.checkpoint, Waited: m.story.waited(m.image.index), Metrics: m.opts.Metrics, Logger: m.log})
}

func (m *Mount) fuseOptions() fusefs.Options {
	o := fusefs.Options{
		Source: m.source, Attributes: m.opts.Attributes, AllowOther: m.opts.AllowOther,
		Metrics: m.opts.Metrics, Logger: m.log, OnError: m.reportReadError,
	}
	if !m.resumed {
		o.OnFirstRead = func() { m.milestone(metrics.FirstRead) }
	}
	if m.image != nil {
		o.OnRequests = m.trim
	}
	return o
}

// absoluteSource makes the path of a local source absolute: it is what the
// store remembers the image by, and what status shows.
func absoluteSource(source string) (string, error) {
	for _, kind := range []string{"oci:", "oci-archive:", "layer:", composefsPrefix} {
		if path, ok := strings.CutPrefix(source, kind); ok && path != "" {
			abs, err := filepath.Abs(path)
			if err != nil {
				return "", fmt.Errorf("source %s: %w", source, err)
			}
			return kind + abs, nil
		}
	}
	return source, nil
}

// lockMountpoint takes the lock of a mount point; closing the file gives it
// back.
func lockMountpoint(runtimeDir, mountpoint string) (*os.File, error) {
	dir := FilesOf(runtimeDir, mountpoint).Lock
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, hint.Wrap(fmt.Errorf("runtime folder: %w", err), "name another folder with --runtime-dir")
	}
	return lockFolder(dir)
}

// checkMountpoint fails unless something can be mounted on the folder path,
// after taking away a mount of ours whose server has died.
func checkMountpoint(path, runtimeDir string) error {
	if info, err := kmount.At(path); err == nil && (ours(info) || isSealedMount(info)) {
		if !isDead(info, path, runtimeDir) {
			return hint.Wrap(fmt.Errorf("mount point %s: %s is mounted there already", path, info.Source),
				"run 'cfs-fuse umount "+path+"' first")
		}
		if err := kmount.Detach(path); err != nil {
			return hint.Wrap(fmt.Errorf("take away the mount of a process that has died: %w", err), "run 'umount -l "+path+"'")
		}
		return checkMountpoint(path, runtimeDir) // a swap that was cut short left another
	}
	fi, err := os.Stat(path)
	if err == nil && !fi.IsDir() {
		err = errors.New("not a folder")
	}
	if err != nil {
		return hint.Wrap(fmt.Errorf("mount point %s: %w", path, err), "name an existing folder (mkdir -p "+path+")")
	}
	return nil
}

// conduct fills, seals and swaps, as far as the options and the kernel allow.
// What stops it is kept in the status, for people and for WaitFor.
func (m *Mount) conduct(ctx context.Context) {
	if m.resumed {
		// Not before it serves: to look at the whole image takes time.
		if rec, ok := m.sealedRecord(); ok && m.checkDigest(rec) == nil {
			m.setSealed(rec)
		}
	}
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
	if m.firstBackend == Hybrid {
		if err := m.letGo(); err != nil {
			m.log.Info("files that were opened while they were not whole are read through FUSE for a while", "error", err)
		}
	} else {
		m.readFurther()
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
	if why := m.stays(); why != "" {
		m.note("swap: " + why)
		return
	}
	if err := m.swap(); err != nil {
		m.blocked(ctx, fmt.Errorf("swap: %w", err))
		return
	}
	m.setState(Swapped)
	m.swapAlso()
	m.log.Info("swapped", "after", time.Since(m.started).Round(time.Millisecond).String())
}

// Between attempts at what may come right by itself.
const (
	firstPause = time.Second
	lastPause  = time.Minute
	diskPause  = 5 * time.Second // looking whether there is room again costs little
)

// persist does a piece of work until it succeeds: a registry that is lost and a
// disk that is full come back. It returns false when ctx ended, or for what no
// repetition heals.
func (m *Mount) persist(ctx context.Context, what string, work func(context.Context) error) bool {
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		err := work(ctx)
		if ctx.Err() != nil {
			return false
		}
		if err == nil {
			m.note("")
			return true
		}
		err = fmt.Errorf("%s: %w", what, err)
		if permanent(err) {
			m.blocked(ctx, err)
			return false
		}
		if storageFails(err) {
			pause = min(pause, diskPause)
		}
		text := withHint(err)
		m.log.Warn("will be tried again", "in", pause.String(), "error", text)
		m.update(func(s *Status) { s.Note, s.retrying = text+"; trying again every "+pause.String(), true })
		select {
		case <-ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// permanent reports whether an error is the image's own, or was asked for.
func permanent(err error) bool {
	_, digest := errors.AsType[*fetcher.DigestError](err)
	_, decode := errors.AsType[*fetcher.DecodeError](err)
	_, content := errors.AsType[*cache.DigestError](err)
	return digest || decode || content || errors.Is(err, errWrongDigest) || errors.Is(err, errUnproven)
}

// awaitComplete returns when reads alone have made every content whole, or
// ctx ends.
func (m *Mount) awaitComplete(ctx context.Context) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		if p := m.contents.Progress(); p.FilesLocal == p.Files {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}

// Wait returns when nothing is left for this process to do: the mount is
// swapped, and no file is open on FUSE any more, or it was unmounted.
func (m *Mount) Wait() {
	if m.server != nil {
		<-m.server.Done()
	}
}

// Close unmounts what this process still serves, waits for its goroutines and
// closes the store. A mount that was swapped stays. The error says which files
// hold FUSE back when ctx ends first; the mount is then detached all the same.
func (m *Mount) Close(ctx context.Context) error {
	var err error
	if m.server != nil && m.state() < Swapped {
		err = m.server.Close(ctx, m.mountpoint)
	}
	m.release()
	return err
}

// release ends goroutines and closes files. It is the end of every Mount, also
// of one that failed to start.
func (m *Mount) release() {
	m.unwatch()
	if m.stop != nil {
		m.stop()
	}
	m.opens.Close()
	if m.fetch != nil {
		m.fetch.Close()
	}
	m.run.Wait()
	if m.src != nil {
		m.src.Close()
	}
	if m.contents != nil {
		if p := m.contents.Progress(); m.server != nil {
			m.opts.Metrics.NotFetched(metrics.PassedUnread, p.Bytes-p.BytesLocal)
		}
		m.contents.Close()
	}
	m.lease.Close()
	if m.store != nil && !m.sharedStore {
		m.store.Close()
	}
	select {
	case <-m.serverDone():
		if m.reader != nil {
			m.reader.Close()
		}
		if m.objects != nil {
			m.objects.close()
		}
		if m.imageFile != nil {
			m.imageFile.Close()
		}
		if m.image != nil {
			m.image.close()
		}
		m.view.close()
	default: // requests under way still read the maps; the process is leaving
	}
}

func (m *Mount) serverDone() <-chan struct{} {
	if m.server == nil {
		done := make(chan struct{})
		close(done)
		return done
	}
	return m.server.Done()
}
