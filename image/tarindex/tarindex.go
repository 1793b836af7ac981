// Package tarindex reads ordinary layers (a tar, compressed by gzip or zstd or
// not at all) once, from the first byte to the last, and makes an index of what
// it saw, by which any file can later be read by range from the same blob. It
// reads no registry, and stores no file itself.
//
//	blob ─► SHA-256 ─► decompress ─► SHA-256 (DiffID) ─► tar ─┬─► Store: files by digest
//	                       │                                  ├─► digests ──────┐
//	                       └─► points                         └─► skeleton ─────┤
//	                             └──────────────────────────────────────────────┴─► Index
//
// An index holds three things of a layer:
//
//	points    places of the blob where decompressing can begin. The bytes from one
//	          to the next are a span (package toc).
//	digests   SHA-256 of each content, and of each chunk of those that have several
//	skeleton  the tar without the data of its files
//
// What the table of contents says is computed from the skeleton by the reader
// that read the tar: an index has no second account of names and sizes that
// could say something else. And the DiffID can be computed from the skeleton
// and the files, wherever these came from, which proves the one and the other.
//
// A file's chunks end where a span does, and have at most MaxChunk bytes.
// docs/index.md has the index by the byte.
package tarindex

import (
	"errors"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/inflate"
)

// Sizes in bytes of uncompressed data.
const (
	// MaxSpan is the longest span of a gzip layer.
	MaxSpan = 4 << 20
	// MaxChunk is the longest chunk.
	MaxChunk = 4 << 20
	// SmallFile is the longest file that is given to a Store in one piece.
	SmallFile = 1 << 20
	// minFrames is the shortest span of a zstd layer, but for the last one's: so
	// many frames are one span.
	minFrames = 1 << 20
)

// What one layer may ask of us, as in package toc.
const (
	maxEntries  = 2 << 20
	maxChunks   = 4 << 20
	maxFile     = 1 << 50   // bytes of a file
	maxHoles    = 64 << 30  // bytes of the holes of a layer's files: they are hashed as zeros
	maxTar      = 1 << 42   // bytes of the tar
	maxSkeleton = 512 << 20 // bytes of it, uncompressed
	maxPoints   = 1 << 20
	maxWindow   = 128 << 20 // of a zstd frame
	maxName     = 255       // XATTR_NAME_MAX (linux/limits.h)
	maxValue    = 64 << 10  // XATTR_SIZE_MAX
	maxMajor    = 1<<12 - 1 // linux/kdev_t.h
	maxMinor    = 1<<20 - 1
)

// ErrIndex says that bytes are no whole index of the version we write, or
// contradict themselves.
var ErrIndex = errors.New("damaged or unknown layer index")

// ErrLayer says that a blob is no layer that can be read: not a tar, or not
// compressed as it seems to be.
var ErrLayer = errors.New("not a layer")

// A DigestError says that a layer's bytes are not what was promised.
type DigestError struct {
	What      string // "blob" or "DiffID"
	Want, Got toc.Digest
}

func (e *DigestError) Error() string {
	return e.What + " is " + e.Got.String() + ", want " + e.Want.String()
}

// A Store takes the contents of files as they come by. It is called from one
// goroutine. What it cannot store is its own matter: it can be had from the
// blob again.
type Store interface {
	// Put takes a content of at most SmallFile bytes, which are the store's
	// from now on.
	Put(content toc.Digest, data []byte)
	// Create begins to take a larger one, of size bytes.
	Create(size int64) File
}

// A File takes the bytes of one content in their order, and then is told its
// digest, or is aborted.
type File interface {
	Write(p []byte)
	Commit(content toc.Digest)
	Abort()
}

// A point is where decompressing can begin.
type point struct {
	in, out         int64               // offset in the blob; bytes of the tar before it
	gzip            *inflate.Checkpoint // of a gzip layer; its lengths and window are in packed
	packed          []byte
	window, lengths int // bytes of them, not packed
}

// An Index is what is known of a layer. It is safe for concurrent use.
type Index struct {
	Blob, DiffID toc.Digest
	Size         int64           // of the blob, in bytes
	TarSize      int64           // in bytes
	Compression  toc.Compression // None, GzipIndexed or Zstd

	b        []byte // the index itself
	points   []byte // records, as in b
	windows  []byte
	digests  []byte
	skeleton []byte // compressed

	skeletonSize int64 // of it, uncompressed
}
