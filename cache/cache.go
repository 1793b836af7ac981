// Package cache keeps the contents of files on disk by digest and fills them
// a chunk at a time. It fetches nothing, knows no paths of an image, and
// keeps no list of what it holds: everything is found again on disk.
//
// A content is the bytes of a regular file, known by their SHA-256 digest. On
// its way it has one of these forms (docs/store.md has the layout by the byte):
//
//	absent                              nothing on disk
//	   │ Put of one of several chunks       │ Put of the only chunk
//	   ▼                                    ▼
//	staged    staging/sha256-<digest>     unnamed temporary file
//	          staging/sha256-<digest>.map   │
//	   │ Put of the last chunk              │
//	   └──────────► checked ◄───────────────┘
//	                   │ link(2), link(2)
//	                   ▼
//	whole     objects/<fs-verity digest>       one inode
//	          contents/sha256/<digest>         two names
//
// A digest's name appears only when the file behind it is whole and its bytes
// have that digest. Nothing is synced file by file: Sync makes everything
// durable at once, and what was written after the last Sync is checked again
// when the store is first opened after the machine was started anew.
//
// Any number of processes may use a store at once. A staging file is filled by
// the process that holds the lock on its map; another process that fills the
// same content uses a temporary file of its own and ends with the same object.
//
// What an image needs is kept while it is in use: a Lease says so, and so does
// any mount of it. Collect removes the rest, within a budget the least
// recently used images first.
//
// Errors: AbsentError (fetch the chunk), DigestError (the chunks were right but
// the whole is not), ErrBudget (nothing more may be stored), anything else as the
// kernel gave it.
package cache

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// Options of a store. The zero value is right.
type Options struct {
	Metrics *metrics.Metrics // counts chunks that could not be written, and evictions; may be nil
	Logger  *slog.Logger     // nil: nothing is logged
	Budget  Budget           // to which Put keeps, evicting what is not in use
	BootID  string           // names this run of the machine; empty: ask the kernel
}

// A Store is an open store. Its methods may be called from several
// goroutines.
type Store struct {
	root    string
	metrics *metrics.Metrics
	log     *slog.Logger
	boot    bootID

	rootDir, objectsDir, contentsDir, stagingDir folder

	noTmpfile bool // O_TMPFILE does not work here: temporary files have names
	linkEmpty bool // linkat(2) takes a bare descriptor; else by way of /proc/self/fd
	chmod     bool // the umask takes bits from 0644, which must be put back
	noXattr   atomic.Bool
	noVerity  atomic.Bool

	files  *pool[image.Digest, wholeFile] // by content digest
	stages *pool[layoutID, *stage]
	meter  meter

	mu     sync.Mutex
	images map[*Contents]struct{} // open ones; guarded by mu
	closed bool                   // guarded by mu
}

// How many descriptors a store keeps open at most while they are idle: one
// for each whole content, two for each staged one.
const (
	idleFiles  = 256
	idleStages = 64
)

// A folder is a folder's descriptor.
type folder struct {
	f  *os.File
	fd int
}

func openFolder(path string) (folder, error) {
	f, err := os.OpenFile(path, unix.O_DIRECTORY|unix.O_RDONLY, 0)
	if err != nil {
		return folder{}, err
	}
	return folder{f, int(f.Fd())}, nil
}

func (d folder) close() error {
	if d.f == nil {
		return nil
	}
	return d.f.Close()
}

// Open opens the store in the folder root and makes it if the folder is
// absent or empty. A folder that holds anything else, or a store of a later
// layout than this program knows, is an error. The first Open after the
// machine was started checks what was written since the last Sync and removes
// what is damaged, while other callers of Open wait. A nil error promises that
// every name under Objects and ContentsDir stands for a file that was whole
// and checked when it got the name, and that is not known to be damaged since.
func Open(root string, o Options) (*Store, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", root, err)
	}
	s := &Store{
		root:    abs,
		metrics: o.Metrics,
		log:     o.Logger,
		files:   newPool[image.Digest](idleFiles, wholeFile.close),
		stages:  newPool[layoutID](idleStages, (*stage).close),
		images:  make(map[*Contents]struct{}),
	}
	s.meter.s, s.meter.budget = s, o.Budget
	s.meter.total.Store(-1)
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.boot, err = readBootID(o.BootID); err == nil {
		err = s.open()
	}
	if err != nil {
		s.closeFolders()
		return nil, fmt.Errorf("open store %s: %w", abs, err)
	}
	return s, nil
}

// Root returns the store's folder as an absolute path.
func (s *Store) Root() string { return s.root }

// Objects returns the folder of whole files by fs-verity digest: a composefs
// object store, the file of digest d at d.Path() below it.
func (s *Store) Objects() string { return filepath.Join(s.root, "objects") }

// ContentsDir returns the folder of the same files by the SHA-256 digest of
// their content, the file of digest d at d.Path() below it.
func (s *Store) ContentsDir() string { return filepath.Join(s.root, "contents", "sha256") }

// Images returns the folder with one folder for each image; package mount
// owns what is in it.
func (s *Store) Images() string { return filepath.Join(s.root, "images") }

// Refs returns the folder with what sources resolved to; package mount owns
// what is in it.
func (s *Store) Refs() string { return filepath.Join(s.root, "refs") }

// Sync makes the store durable with one syncfs(2). A nil error promises that
// everything for which Put returned before Sync was called survives a power
// cut, under both of its names when it is whole, and will not be read again
// at the first Open after it.
func (s *Store) Sync() error {
	s.mu.Lock()
	closed := s.closed
	s.mu.Unlock()
	if closed {
		return fmt.Errorf("sync store %s: %w", s.root, os.ErrClosed)
	}
	// The stamp is taken first: what is written while syncfs runs counts as
	// written after it.
	stamp, err := s.now()
	if err == nil {
		err = unix.Syncfs(s.rootDir.fd)
	}
	if err == nil {
		err = durable.WriteFile(filepath.Join(s.root, syncedName), stamp.marshal(), 0o600)
	}
	if err != nil {
		return fmt.Errorf("sync store %s: %w", s.root, err)
	}
	return nil
}

// Close closes every Contents of the store, waiting for calls in progress,
// and every descriptor. It does not sync.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	open := make([]*Contents, 0, len(s.images))
	for c := range s.images {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		c.Close()
	}
	s.stages.closeAll()
	s.files.closeAll()
	s.meter.note()
	return s.closeFolders()
}

func (s *Store) closeFolders() error {
	return errors.Join(s.rootDir.close(), s.objectsDir.close(), s.contentsDir.close(), s.stagingDir.close())
}

// An AbsentError says that the first byte wanted is not in the store.
type AbsentError struct {
	Chunk int // of the image's index: the chunk to fetch
}

func (e *AbsentError) Error() string { return fmt.Sprintf("chunk %d is not in the store", e.Chunk) }

// A DigestError says that a content's chunks were all right but the whole is
// not what its digest says: the layer's table of contents contradicts itself.
type DigestError struct {
	Want, Got image.Digest // SHA-256 of the whole content
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("content %s is made of chunks that together have digest %s", e.Want, e.Got)
}

// Progress is how much of an image is local. Contents that occur at several
// paths count once.
type Progress struct {
	Files, FilesLocal int   // contents, and whole ones
	Bytes, BytesLocal int64 // of contents, and of their local chunks
}

// now returns the time of the filesystem's clock, which files written next
// get as their modification time or an earlier one than those.
func (s *Store) now() (stamp, error) {
	t, err := s.temp()
	if err != nil {
		return stamp{}, err
	}
	defer s.discard(t)
	if _, err := unix.Write(t.fd, []byte{0}); err != nil {
		return stamp{}, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(t.fd, &st); err != nil {
		return stamp{}, err
	}
	return stamp(time.Unix(st.Mtim.Unix())), nil
}
