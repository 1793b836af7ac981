package erofs

// An Xattr is one extended attribute. In a Node the name is the one a user of
// the mounted tree sees; in an Inode it is the one stored in the image.
type Xattr struct {
	Name  string // full name, prefix included, 1 to 255 bytes without NUL
	Value []byte // at most 65,535 bytes
}

// A Node is one entry of the tree that an image is written from or read back
// into. It says what a user of the mounted tree sees; whiteouts and overlay
// xattrs are escaped by Write and unescaped by Load.
type Node struct {
	Name  string // 1 to 255 bytes; ignored on the root
	Mode  uint32 // st_mode: type and permission bits, at most 16 bits
	UID   uint32
	GID   uint32
	Nlink uint32 // stored as it is, except on directories, where Write counts
	Rdev  uint32 // character and block devices: st_rdev in Linux's new encoding

	// Size is st_size in bytes. Write ignores it on directories and symbolic
	// links; Load sets it to the stored size everywhere.
	Size uint64

	MtimeSec  int64  // seconds since 1970, may be negative
	MtimeNsec uint32 // below 1e9

	// Target is where a symbolic link points (1 to 4095 bytes), or, on an
	// external regular file, its payload: the path of its object below the
	// folder of objects ("ab/cdef…"), at most 4095 bytes, "" if unknown.
	Target string

	// Digest is the fs-verity digest of an external regular file: 32 bytes
	// (SHA-256), 64 bytes (SHA-512) or nil if unknown.
	Digest []byte

	// Content is what an inline regular file holds, Size bytes and at most
	// MaxInline. A regular file with Size > 0 and nil Content is external: the
	// image says where its data is but does not hold it. Content wins over
	// Target and Digest.
	Content []byte

	Xattrs   []Xattr // names are unique; any order
	Children []*Node // directories only; any order, names unique

	// Link, if not nil, makes this entry a further name of the node it points
	// to, which must be in the same tree, not a directory and not itself a
	// link. Only Name counts then.
	Link *Node
}

// Limits of the format, section 2.11 of the format document.
const (
	MaxName    = 255  // bytes in the name of a directory entry
	MaxTarget  = 4095 // bytes in a symbolic link's target or a payload
	MaxInline  = 5000 // bytes of content an image may hold for one file
	MaxVersion = 1    // highest composefs format version that Write knows
)

// Types of a directory entry as EROFS stores them (DirEntry.Type).
const (
	TypeRegular   = 1
	TypeDir       = 2
	TypeChar      = 3
	TypeBlock     = 4
	TypeFifo      = 5
	TypeSocket    = 6
	TypeSymlink   = 7
	typeUndefined = 0
)

// The type bits of st_mode.
const (
	modeType    = 0o170000
	modeSocket  = 0o140000
	modeSymlink = 0o120000
	modeRegular = 0o100000
	modeBlock   = 0o060000
	modeDir     = 0o040000
	modeChar    = 0o020000
	modeFifo    = 0o010000
)

// fileType returns the directory entry type of a mode, or typeUndefined.
func fileType(mode uint32) uint8 {
	switch mode & modeType {
	case modeRegular:
		return TypeRegular
	case modeDir:
		return TypeDir
	case modeChar:
		return TypeChar
	case modeBlock:
		return TypeBlock
	case modeFifo:
		return TypeFifo
	case modeSocket:
		return TypeSocket
	case modeSymlink:
		return TypeSymlink
	}
	return typeUndefined
}
