// Package toc reads the table of contents (TOC) of a layer blob, trusting none
// of it: it finds the TOC, checks it against the digest that the manifest
// promises, and gives back entries whose chunks are known to lie inside the
// blob, apart from each other, and to add up to their files. It fetches no
// file data, checks none, and does not look at names: which of them make a
// tree is the business of package image.
//
// Three layouts are read. All of them are an ordinary compressed tar, cut into
// members (gzip) or frames (zstd) at the boundaries of file data, with the TOC
// behind it:
//
//	eStargz (stargz-snapshotter, docs/estargz.md)
//
//	  +------------------+--------------------------+------------------------+
//	  | members of a tar | member: a tar of one     | footer: 51 bytes, an   |
//	  |                  | file, stargz.index.json  | empty member           |
//	  +------------------+--------------------------+------------------------+
//	  0                  TOC offset                                       size
//
//	  The footer is a gzip header with FEXTRA. The extra field holds one
//	  subfield "SG" of 22 bytes: the TOC offset as 16 hexadecimal digits, then
//	  "STARGZ". The legacy footer has 47 bytes: the 22 bytes are the extra
//	  field themselves, without a subfield header.
//
//	zstd:chunked (stargz-snapshotter, estargz/zstdchunked)
//
//	  +-----------------+-----------+------------------+-----------+---------+
//	  | frames of a tar | skippable | frame: TOC JSON  | skippable | 40-byte |
//	  |                 | header, 8 |                  | header, 8 | footer  |
//	  +-----------------+-----------+------------------+-----------+---------+
//	                                TOC offset
//
//	  The footer is five little-endian 64-bit fields: TOC offset, compressed
//	  length, uncompressed length, type (1), and the magic "GnUlInUx".
//
//	zstd:chunked (containers/storage, pkg/chunked)
//
//	  As above, with a second skippable frame, the tar-split data (which we do
//	  not read), between TOC and footer. The footer has 64 bytes: TOC offset,
//	  compressed length, uncompressed length, type, the same three for
//	  tar-split, and the magic "GNUlInUx".
//
// A chunk's bytes begin at its offset. They end, where containers/storage
// wrote the TOC, at the file's next chunk or its endOffset, else at the next
// offset that any chunk of the TOC has, or at the end of the tar.
//
// Every limit this package holds is a constant in limits.go.
package toc

// A Compression says how the spans of a blob are compressed.
type Compression uint8

// The compressions. The numbers are part of the "chunks" file (package image).
const (
	None Compression = iota // stored
	Gzip                    // RFC 1952, one or more members
	Zstd                    // RFC 8878, one or more frames
	// GzipIndexed is gzip cut anywhere: a span begins at a checkpoint that an
	// index has (package tarindex).
	GzipIndexed
)

// String returns "none", "gzip", "zstd" or "gzip with an index".
func (c Compression) String() string {
	switch c {
	case None:
		return "none"
	case Gzip:
		return "gzip"
	case Zstd:
		return "zstd"
	case GzipIndexed:
		return "gzip with an index"
	}
	return "unknown compression"
}

// A Format is the layout a TOC was found in.
type Format uint8

// The formats.
const (
	EStargz     Format = 1 + iota // gzip, footer of 51 or 47 bytes
	ZstdChunked                   // zstd, either dialect
	Tar                           // an ordinary layer, by an index of its own (package tarindex)
)

// String returns "eStargz", "zstd:chunked" or "tar with an index".
func (f Format) String() string {
	switch f {
	case EStargz:
		return "eStargz"
	case ZstdChunked:
		return "zstd:chunked"
	case Tar:
		return "tar with an index"
	}
	return "unknown format"
}

// A Type is the kind of file an entry describes.
type Type uint8

// The types, in the words of the TOC ("chunk" entries become Chunks).
const (
	Dir Type = 1 + iota
	Reg
	Symlink
	Hardlink
	Char
	Block
	Fifo
)

var typeNames = [...]string{Dir: "dir", Reg: "reg", Symlink: "symlink", Hardlink: "hardlink", Char: "char", Block: "block", Fifo: "fifo"}

// String returns the TOC's word for the type.
func (t Type) String() string {
	if t == 0 || int(t) >= len(typeNames) {
		return "unknown type"
	}
	return typeNames[t]
}

// An Xattr is one extended attribute. The value may hold any bytes.
type Xattr struct {
	Name  string
	Value []byte
}

// A Chunk is a piece of a regular file, and where its bytes are in the blob.
type Chunk struct {
	// The span: decompressing the blob's bytes [BlobOffset, BlobEnd) gives,
	// from InnerOffset on, the chunk's Size bytes. The span may hold several
	// members or frames and more bytes than the chunk: tar headers, padding,
	// other chunks. Spans of one layer are either the same or disjoint.
	BlobOffset, BlobEnd int64
	InnerOffset         int64

	// The chunk is the file's bytes [FileOffset, FileOffset+Size); Size > 0,
	// and at most MaxChunk unless Zero.
	FileOffset, Size int64

	// Digest of the chunk's uncompressed bytes. It is never zero, except
	// that a Zero chunk needs none.
	Digest Digest

	// Zero says that the chunk is all zero bytes. Then nothing need be
	// fetched, BlobOffset, BlobEnd and InnerOffset are 0, and Size may be as
	// large as the file: a hole must not be given a buffer.
	Zero bool
}

// An Entry is one name in a layer, with what the tar header said of it.
type Entry struct {
	Name string // as in the TOC, byte for byte: not cleaned, not checked
	Type Type
	Mode uint32 // permission bits, setuid, setgid and sticky (07777)
	UID  uint32
	GID  uint32
	Size int64 // of a regular file, in bytes; 0 otherwise

	MtimeSec  int64 // since 1970 in UTC; 0 when the TOC gives none
	MtimeNsec uint32

	Linkname           string // of a symbolic or hard link, as in the TOC
	DevMajor, DevMinor uint32 // of a device: at most 12 and 20 bits

	Xattrs []Xattr // sorted by name, names distinct
	Digest Digest  // SHA-256 of the content; zero unless Reg with Size > 0
	Chunks []Chunk // by FileOffset, covering [0, Size) exactly
}

// A TOC is what Read makes of a layer.
type TOC struct {
	Format      Format
	Compression Compression
	Digest      Digest // of the uncompressed TOC JSON

	// Entries in the TOC's order, which is the tar's, without the landmarks.
	Entries []Entry

	// PrefetchEnd is the offset of .prefetch.landmark: the blob's bytes
	// [0, PrefetchEnd) hold the prioritized files. 0: none known.
	PrefetchEnd int64
}
