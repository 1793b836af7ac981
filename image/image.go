// Package image is the vocabulary of an image: layers, the files in them, the
// chunks these are made of, and the one tree that the layers merge into. It
// also writes and reads the "chunks" file, the index from a file's content to
// its chunks. It talks to no registry, stores no file data and knows no
// EROFS.
//
// Merge shows the layers as overlayfs would:
//
//	layer 1 (upper)   etc/  etc/passwd  .wh.tmp   a -> hard link to b
//	layer 0 (lower)   etc/  etc/passwd  etc/group  tmp/  tmp/x  b
//	─────────────────────────────────────────────────────────────
//	tree              etc/            of layer 1: the upper metadata
//	                  etc/passwd      of layer 1: file over file
//	                  etc/group       of layer 0: directories merge
//	                  a, b            one inode of layer 0, two names
//	                                  tmp is hidden by its whiteout
//
// The "chunks" file, all numbers little-endian, all records without padding
// but what is drawn, everything not drawn forbidden:
//
//	header, 32 bytes
//	   0  8  magic "cfschnks"
//	   8  4  version: 1
//	  12  4  L, the number of layers
//	  16  4  N, the number of contents
//	  20  4  C, the number of chunks
//	  24  8  zero
//
//	L layers of 64 bytes, the lowest first
//	   0 32  SHA-256 digest of the layer blob
//	  32  8  size of the blob in bytes
//	  40  8  PrefetchEnd: bytes [0, PrefetchEnd) hold the prioritized files
//	  48  1  compression: 0 none, 1 gzip, 2 zstd, 3 gzip from checkpoints
//	  49 15  zero
//
//	N contents of 48 bytes, in strictly ascending order of digest
//	   0 32  SHA-256 digest of the content
//	  32  8  size in bytes, at least 1
//	  40  4  its first ref
//	  44  4  how many refs it has, at least 1
//	The refs of content i+1 begin where those of content i end.
//
//	C refs of 4 bytes: chunk numbers. The refs of a content name its chunks in
//	the order of their place in the file, which they cover exactly.
//
//	C chunks of 80 bytes
//	   0  8  BlobOffset \  the span; equal spans decompress once, spans of
//	   8  8  BlobEnd    /  a layer are else disjoint; both 0: a hole
//	  16  8  InnerOffset of the chunk in the decompressed span
//	  24  8  FileOffset
//	  32  8  size in bytes, at least 1
//	  40  4  layer
//	  44  4  content
//	  48 32  SHA-256 digest of the chunk (of a hole: may be zero)
//	They are in the order of layer, BlobOffset, InnerOffset, content,
//	FileOffset, so that a fetcher reads them as a plan; holes come last, in the
//	order of content, FileOffset.
//
//	trailer, 32 bytes: SHA-256 of everything before it
//
// The same tree and layers give the same bytes. The file has no name of the
// image in it and is of no use without one: it is made anew when it is lost.
package image

import (
	"fmt"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// A Digest is a SHA-256 digest.
type Digest = toc.Digest

// A Layer is one layer of an image: what the manifest's descriptor says of the
// blob, and the TOC read from it.
type Layer struct {
	Digest Digest // of the (compressed) blob
	Size   int64  // of the blob, in bytes
	TOC    *toc.TOC
}

// A Tree is the one tree that an image's layers merge into.
type Tree struct {
	Root  *Node
	Names int   // nodes of the tree, the root included
	Dirs  int   // directories, the root included
	Files int   // regular files; hard links to one count once
	Bytes int64 // sum of the sizes of these files
}

// The file types of a Node's Mode, and the mask for them (inode(7)).
const (
	ModeFmt     = 0o170000
	ModeSymlink = 0o120000
	ModeReg     = 0o100000
	ModeBlock   = 0o060000
	ModeDir     = 0o040000
	ModeChar    = 0o020000
	ModeFifo    = 0o010000
)

// A Node is one name in the tree.
type Node struct {
	Name      string // one path component; "" for the root
	Mode      uint32 // st_mode: file type and permissions
	UID, GID  uint32
	Nlink     uint32 // files: names in the tree; directories: 2 + subdirectories
	Rdev      uint32 // of a device: st_rdev in Linux's new encoding
	MtimeSec  int64
	MtimeNsec uint32
	Size      int64       // of a regular file; of a symlink, its target's length; else 0
	Target    string      // of a symlink
	Xattrs    []toc.Xattr // sorted by name
	Content   Digest      // of a regular file with Size > 0
	Layer     int         // whose entry gave the metadata and data
	Chunks    []toc.Chunk // by FileOffset, covering [0, Size); shared with the TOC
	Children  []*Node     // of a directory: sorted by name, bytewise
	Link      *Node       // if not nil, a further name of that node, which comes earlier in the tree (depth first); only Name is set besides
}

// IsDir reports whether n is a directory.
func (n *Node) IsDir() bool { return n.Mode&ModeFmt == ModeDir }

// IsReg reports whether n is a regular file. A Link is none: its target is.
func (n *Node) IsReg() bool { return n.Mode&ModeFmt == ModeReg }

// Rdev is a device number as st_rdev has it in Linux's new encoding
// (linux/kdev_t.h, new_encode_dev): 12 bits of major, 20 of minor.
func Rdev(major, minor uint32) uint32 {
	return minor&0xff | major&0xfff<<8 | minor&^0xff<<12
}

// An EntryError says which entry of which layer cannot be part of a tree.
type EntryError struct {
	Layer       int    // from 0, the lowest
	LayerDigest Digest // of the blob
	Entry       string // the entry's name as the TOC has it
	Err         error
}

func (e *EntryError) Error() string {
	return fmt.Sprintf("layer %d (%s): entry %q: %v", e.Layer, e.LayerDigest, e.Entry, e.Err)
}

// Unwrap returns Err.
func (e *EntryError) Unwrap() error { return e.Err }
