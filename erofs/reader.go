package erofs

import (
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// A CorruptError says where an image contradicts the format.
type CorruptError struct {
	NID    uint64 // the inode being read, 0 if none
	Offset int64  // in the image, in bytes
	What   string
}

// Error names the inode and the offset.
func (e *CorruptError) Error() string {
	if e.NID == 0 {
		return fmt.Sprintf("corrupt image at byte %d: %s", e.Offset, e.What)
	}
	return fmt.Sprintf("corrupt image at byte %d (nid %d): %s", e.Offset, e.NID, e.What)
}

// Feature bits of the superblock that change how an image is read
// (feature_incompat in fs/erofs/erofs_fs.h).
const (
	incompatZeroPadding = 1 << 0 // about compressed data only; mkfs.erofs sets it always
	incompatChunked     = 1 << 2 // chunk-based files
	incompatFragments   = 1 << 5 // about compressed data too; a packed inode may have the next
	incompatPrefixes    = 1 << 6 // a table of long prefixes of xattr names
	incompat48bit       = 1 << 7 // block numbers and the root's nid of more than 32 and 16 bits
	incompatKnown       = incompatZeroPadding | incompatChunked | incompatFragments | incompatPrefixes | incompat48bit
)

// A Header is what an image says about itself as a whole.
type Header struct {
	// Composefs is set if the image has a composefs header. The next three
	// mean nothing without it.
	Composefs bool
	Version   uint32 // composefs format version
	HasACL    bool   // some inode has a POSIX ACL; if not, the kernel's mount needs noacl

	Inodes    uint64
	Size      int64 // bytes, by the superblock
	BlockSize int
	BuildSec  int64 // the mtime that compact inodes share
	BuildNsec uint32
}

// A Reader reads an EROFS image. All methods but Close may be called from
// several goroutines. Nothing in the image is trusted: whatever its bytes,
// methods return, and with no more memory than the result needs; what
// contradicts the format gives a *CorruptError, what the format allows and
// this package does not know wraps errors.ErrUnsupported.
//
// A Reader over a slice or a mapping copies nothing: what methods say is "of
// the image" must not be changed, and not be used after Close.
type Reader struct {
	b     []byte // the whole image, nil if it is read through r
	r     io.ReaderAt
	size  int64
	unmap func() error

	header    Header
	blockBits uint
	meta      int64 // byte position of nid 0
	xattrBase int64 // byte position of shared xattr 0
	root      uint64
	prefixes  []string // the image's own prefixes of xattr names
	hasFilter bool
	onlyHoles bool // chunk-based files have no data in the image
}

// Open reads the superblock of an image of size bytes. A nil error promises an
// image whose features this package can serve; the rest is checked as it is
// used, or all at once by Check.
func Open(r io.ReaderAt, size int64) (*Reader, error) {
	return opened(&Reader{r: r, size: size})
}

func opened(r *Reader) (*Reader, error) {
	if err := r.open(); err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	return r, nil
}

// OpenBytes is Open for an image in memory, which it keeps and does not copy.
func OpenBytes(b []byte) (*Reader, error) {
	if b == nil {
		b = []byte{}
	}
	return opened(&Reader{b: b, size: int64(len(b))})
}

// OpenFile maps the file at path into memory and opens the image in it. The
// file must not be cut short while it is open (replacing it by a rename is
// fine): reading beyond its new end would kill the process.
func OpenFile(path string) (*Reader, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open image: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, fmt.Errorf("open image: %w", err)
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("open image %s: not a regular file", path)
	case st.Size() == 0 || st.Size() > math.MaxInt:
		return nil, fmt.Errorf("open image %s: %w", path, &CorruptError{What: fmt.Sprintf("a file of %d bytes", st.Size())})
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map image %s: %w", path, err)
	}
	rd := &Reader{b: b, size: st.Size(), unmap: func() error { return unix.Munmap(b) }}
	if err := rd.open(); err != nil {
		rd.Close()
		return nil, fmt.Errorf("open image %s: %w", path, err)
	}
	return rd, nil
}

// Trim lets go of the memory in which a file that OpenFile mapped was read so
// far; what is read again comes from the page cache. It may be called while
// other methods run.
func (r *Reader) Trim() error {
	if r.unmap == nil {
		return nil
	}
	if err := unix.Madvise(r.b, unix.MADV_DONTNEED); err != nil {
		return fmt.Errorf("trim image: %w", err)
	}
	return nil
}

// Close unmaps what OpenFile mapped. Nothing that came from the Reader may be
// used during or after it, files of FS included.
func (r *Reader) Close() error {
	r.b, r.r, r.size = []byte{}, nil, 0
	if r.unmap == nil {
		return nil
	}
	unmap := r.unmap
	r.unmap = nil
	if err := unmap(); err != nil {
		return fmt.Errorf("unmap image: %w", err)
	}
	return nil
}

// open reads header and superblock (format document 2.2 and 2.4).
func (r *Reader) open() error {
	s, err := r.bytes(0, superOffset, superSize)
	if err != nil {
		return fmt.Errorf("read superblock: %w", err)
	}
	if le.Uint32(s) != superMagic {
		return &CorruptError{Offset: superOffset, What: "no EROFS superblock"}
	}
	compat, incompat := le.Uint32(s[8:]), le.Uint32(s[80:])
	if unknown := incompat &^ incompatKnown; unknown != 0 {
		return fmt.Errorf("EROFS image with features %#x (compression, further devices or newer): %w", unknown, errors.ErrUnsupported)
	}
	r.blockBits = uint(s[12])
	if r.blockBits < 9 || r.blockBits > 16 {
		return &CorruptError{Offset: superOffset + 12, What: fmt.Sprintf("blocks of 2^%d bytes", r.blockBits)}
	}
	if s[90] != 0 {
		return fmt.Errorf("EROFS image with directory blocks of their own size: %w", errors.ErrUnsupported)
	}
	if compat&compatChecksum != 0 {
		if err := r.checksum(); err != nil {
			return err
		}
	}
	var blocks uint64
	r.root, blocks = uint64(le.Uint16(s[14:])), uint64(le.Uint32(s[36:]))
	if incompat&incompat48bit != 0 && le.Uint64(s[112:]) != 0 {
		blocks |= r.root << 32
		r.root = le.Uint64(s[112:])
	}
	if blocks > uint64(r.size)>>r.blockBits {
		return &CorruptError{Offset: superOffset + 36, What: fmt.Sprintf("the image has %d bytes, its superblock says %d blocks of %d", r.size, blocks, 1<<r.blockBits)}
	}
	r.meta = int64(le.Uint32(s[40:])) << r.blockBits
	r.xattrBase = int64(le.Uint32(s[44:])) << r.blockBits
	r.hasFilter = compat&compatFilter != 0 && s[104] == 0
	r.header = Header{
		Inodes:    le.Uint64(s[16:]),
		Size:      int64(blocks) << r.blockBits,
		BlockSize: 1 << r.blockBits,
		BuildSec:  int64(le.Uint64(s[24:])),
		BuildNsec: le.Uint32(s[32:]),
	}
	h, err := r.bytes(0, 0, 32)
	if err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	if le.Uint32(h) == headerMagic && le.Uint32(h[4:]) == headerVersion {
		r.header.Composefs = true
		r.header.HasACL = le.Uint32(h[8:])&flagHasACL != 0
		r.header.Version = le.Uint32(h[12:])
	}
	if incompat&incompatPrefixes != 0 {
		packed := uint64(0)
		if incompat&incompatFragments != 0 {
			packed = le.Uint64(s[96:])
		}
		if err := r.readPrefixes(int(s[91]), int64(le.Uint32(s[92:]))*4, packed); err != nil {
			return fmt.Errorf("read prefixes of xattr names: %w", err)
		}
	}
	r.onlyHoles = r.header.Composefs && incompat&incompatChunked == 0
	root, err := r.Inode(r.root)
	if err != nil {
		return fmt.Errorf("read root directory: %w", err)
	}
	if !root.IsDir() {
		return &CorruptError{NID: r.root, Offset: superOffset + 14, What: "the root is not a directory"}
	}
	return nil
}

// checksum compares the CRC-32C of the rest of the superblock's block.
func (r *Reader) checksum() error {
	n := 1 << r.blockBits
	if n > superOffset {
		n -= superOffset
	}
	b, err := r.bytes(0, superOffset, n)
	if err != nil {
		return fmt.Errorf("read superblock: %w", err)
	}
	table := crc32.MakeTable(crc32.Castagnoli)
	sum := crc32.Update(0, table, b[:4])
	sum = crc32.Update(sum, table, zeros[:4]) // where the checksum stands
	sum = ^crc32.Update(sum, table, b[8:])
	if want := le.Uint32(b[4:]); sum != want {
		return &CorruptError{Offset: superOffset + 4, What: fmt.Sprintf("the superblock's checksum is %#x, want %#x", sum, want)}
	}
	return nil
}

// bytes returns n bytes of the image for the inode nid; callers bound n.
func (r *Reader) bytes(nid uint64, off int64, n int) ([]byte, error) {
	if off < 0 || off > r.size || int64(n) > r.size-off {
		return nil, &CorruptError{NID: nid, Offset: off, What: fmt.Sprintf("%d bytes are needed here, the image ends at %d", n, r.size)}
	}
	if r.b != nil {
		return r.b[off : off+int64(n) : off+int64(n)], nil
	}
	b := make([]byte, n)
	if k, err := r.r.ReadAt(b, off); k < n {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read image at byte %d: %w", off, err)
	}
	return b, nil
}

// Root returns the nid of the root directory.
func (r *Reader) Root() uint64 { return r.root }

// Header returns what the image says about itself.
func (r *Reader) Header() Header { return r.header }

// An Inode is one inode as the image stores it. It is a value: it may be
// copied, compared by its NID and kept as long as the Reader is open. Only an
// Inode that the same Reader returned may be passed to its methods.
type Inode struct {
	NID       uint64 // the inode's address, and its st_ino on a kernel mount
	Mode      uint32 // st_mode
	UID       uint32
	GID       uint32
	Nlink     uint32
	Rdev      uint32 // devices: st_rdev in Linux's new encoding
	MtimeNsec uint32
	MtimeSec  int64
	Size      int64  // st_size in bytes
	Blocks    uint64 // st_blocks, in units of 512 bytes, as the kernel reports them

	layout     uint8
	dotOmitted bool   // directory without an entry for itself
	external   bool   // see External
	u          uint64 // first data block or wholeHole, or the chunk format
	xattrOff   int64
	xattrSize  uint32
	inlineOff  int64 // where inline data or the chunk map begins
}

// wholeHole is the first data block of a file that is nothing but a hole.
const wholeHole = math.MaxUint64

// Type returns the directory entry type of the inode, TypeRegular and so on.
func (i *Inode) Type() uint8 { return fileType(i.Mode) }

// IsDir reports whether the inode is a directory.
func (i *Inode) IsDir() bool { return i.Mode&modeType == modeDir }

// IsRegular reports whether the inode is a regular file.
func (i *Inode) IsRegular() bool { return i.Mode&modeType == modeRegular }

// IsSymlink reports whether the inode is a symbolic link.
func (i *Inode) IsSymlink() bool { return i.Mode&modeType == modeSymlink }

// IsWhiteout reports whether the inode is a character device 0:0, which
// overlayfs over the image shows as absent.
func (i *Inode) IsWhiteout() bool { return i.Mode&modeType == modeChar && i.Rdev == 0 }

// External reports whether the inode is a regular file of a composefs image
// whose data is in an object beside the image; see Payload.
func (i *Inode) External() bool { return i.external }

// Inode reads the inode with the number nid.
func (r *Reader) Inode(nid uint64) (Inode, error) {
	i := Inode{NID: nid}
	if nid > uint64(r.size)>>slotBits {
		return i, &CorruptError{NID: nid, Offset: r.size, What: "an inode beyond the end of the image"}
	}
	pos := r.meta + int64(nid)<<slotBits
	b, err := r.bytes(nid, pos, compactSize)
	if err != nil {
		return i, err
	}
	corrupt := func(what string, v any) error {
		return &CorruptError{NID: nid, Offset: pos, What: fmt.Sprintf(what, v)}
	}
	format := le.Uint16(b)
	i.layout = uint8(format >> 1 & 7)
	if format>>5 != 0 || i.layout > layoutChunked {
		return i, corrupt("inode format %#x", format)
	}
	form := int64(compactSize)
	if format&1 != 0 {
		form = extendedSize
		if b, err = r.bytes(nid, pos, extendedSize); err != nil {
			return i, err
		}
	}
	i.Mode = uint32(le.Uint16(b[4:]))
	typ := fileType(i.Mode)
	if typ == typeUndefined {
		return i, corrupt("mode %#o has no file type", i.Mode)
	}
	u, high, null := le.Uint32(b[16:]), le.Uint16(b[6:]), uint64(1<<48-1)
	if format&1 != 0 {
		size := le.Uint64(b[8:])
		if size > math.MaxInt64 {
			return i, corrupt("size %d is above 2^63-1", size)
		}
		i.Size = int64(size)
		i.UID, i.GID = le.Uint32(b[24:]), le.Uint32(b[28:])
		i.MtimeSec, i.MtimeNsec = int64(le.Uint64(b[32:])), le.Uint32(b[40:])
		i.Nlink = le.Uint32(b[44:])
	} else {
		i.Size = int64(le.Uint32(b[8:]))
		i.UID, i.GID = uint32(le.Uint16(b[24:])), uint32(le.Uint16(b[26:]))
		i.MtimeSec, i.MtimeNsec = r.header.BuildSec+int64(le.Uint32(b[12:])), r.header.BuildNsec
		i.Nlink = 1
		// Without this bit the 16 bits are the link count, with it the high
		// bits of the block number.
		if typ == TypeDir || format>>4&1 == 0 {
			i.Nlink, high, null = uint32(high), 0, nullAddr
		}
	}
	i.dotOmitted = typ == TypeDir && format>>4&1 != 0
	i.xattrOff = pos + form
	if n := uint32(le.Uint16(b[2:])); n > 0 {
		i.xattrSize = xattrHeaderSize + 4*(n-1)
	}
	i.inlineOff = i.xattrOff + int64(i.xattrSize)
	if i.inlineOff > r.size {
		return i, corrupt("xattrs of %d bytes go beyond the end of the image", i.xattrSize)
	}
	switch typ {
	case TypeRegular, TypeDir, TypeSymlink:
		if i.u = uint64(u) | uint64(high)<<32; i.layout == layoutPlain && i.u == null {
			i.u = wholeHole
		}
		if i.layout == layoutChunked {
			if i.u = uint64(u & 0xffff); i.u>>7 != 0 {
				return i, corrupt("chunk format %#x", i.u)
			}
		}
		i.Blocks = (uint64(i.Size) + 1<<r.blockBits - 1) >> r.blockBits << (r.blockBits - 9)
		i.external = typ == TypeRegular && i.layout == layoutChunked && r.onlyHoles
	case TypeChar, TypeBlock:
		i.Rdev = u
	}
	return i, nil
}
