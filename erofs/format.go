package erofs

import (
	"encoding/binary"
	"math/bits"
	"strings"
)

// Numbers of the on-disk format: composefs header (format document 2.2),
// EROFS superblock (2.4; fs/erofs/erofs_fs.h in Linux), inodes (2.8).
const (
	blockBits = 12 // of what Write makes; a Reader takes it from the superblock
	blockSize = 1 << blockBits
	slotBits  = 5 // inodes start at multiples of 32 bytes: nid = position / 32
	slotSize  = 1 << slotBits

	headerMagic   = 0xd078629a
	headerVersion = 1
	flagHasACL    = 1 << 0

	superOffset = 1024
	superSize   = 128
	superMagic  = 0xE0F5E1E2

	compatChecksum = 1 << 0 // the superblock's block has a CRC-32C
	compatMtime    = 1 << 1 // times of inodes are mtimes
	compatFilter   = 1 << 2 // inodes with xattrs have a name filter

	layoutPlain   = 0 // data in consecutive blocks
	layoutInline  = 2 // the same, with the last partial block after the inode
	layoutChunked = 4 // a map of chunks after the inode

	compactSize  = 32
	extendedSize = 64

	direntSize = 12
	nullAddr   = 0xffffffff // block address of a hole

	xattrHeaderSize = 12
	xattrEntrySize  = 4
	maxShared       = 128 // references to shared xattrs Write puts in one inode
	filterSeed      = 0x25BBE08F

	maxXattrName  = 255
	maxXattrValue = 65535
	maxXattrs     = 32767 // bytes of xattrs of one node, as xattrCost counts them: composefs's limit

	// maxXattrArea is EROFS's limit, in bytes: i_xattr_icount has 16 bits and
	// counts words after the header, and one for that.
	maxXattrArea = xattrHeaderSize + 4*(65535-1)
)

// The overlayfs xattrs that composefs uses (format document 2.5).
const (
	trustedPrefix = "trusted.overlay."
	escapedPrefix = "trusted.overlay.overlay."

	metacopyXattr  = "trusted.overlay.metacopy"
	redirectXattr  = "trusted.overlay.redirect"
	opaqueXattr    = "trusted.overlay.opaque"
	whiteoutXattr  = "trusted.overlay.overlay.whiteout"
	whiteoutUser   = "user.overlay.whiteout"
	whiteoutsXattr = "trusted.overlay.overlay.whiteouts"
	whiteoutsUser  = "user.overlay.whiteouts"
	nestedOpaque   = "trusted.overlay.overlay.opaque"
	nestedUser     = "user.overlay.opaque"

	aclAccess  = "system.posix_acl_access"
	aclDefault = "system.posix_acl_default"
	selinux    = "security.selinux"
)

// xattrPrefixes are the name prefixes by their index in an xattr entry.
var xattrPrefixes = [...]string{1: "user.", 2: aclAccess, 3: aclDefault, 4: "trusted.", 5: "lustre.", 6: "security."}

// splitXattr returns the prefix index and the rest of a name as mkcomposefs
// does: by prefix even for the two ACL names, and never index 5 (2.7).
func splitXattr(name string) (index uint8, suffix string) {
	for _, i := range [...]uint8{1, 2, 3, 4, 6} {
		if rest, ok := strings.CutPrefix(name, xattrPrefixes[i]); ok {
			return i, rest
		}
	}
	return 0, name
}

// filterBit returns the bit of an inode's xattr name filter that stands for a
// name, cleared when the inode may have it.
func filterBit(index uint8, suffix string) uint32 {
	return 1 << (xxh32(suffix, filterSeed+uint32(index)) & 31)
}

// StoredXattr returns the name under which an image keeps the xattr that a
// user of the mounted tree sees as name: "trusted.overlay.X" is escaped to
// "trusted.overlay.overlay.X", others stay.
func StoredXattr(name string) string {
	if rest, ok := strings.CutPrefix(name, trustedPrefix); ok {
		return escapedPrefix + rest
	}
	return name
}

// VisibleXattr undoes StoredXattr. ok is false for a name that overlayfs keeps
// to itself and shows to nobody: an unescaped "trusted.overlay.X".
func VisibleXattr(stored string) (name string, ok bool) {
	if rest, found := strings.CutPrefix(stored, escapedPrefix); found {
		return trustedPrefix + rest, true
	}
	return stored, !strings.HasPrefix(stored, trustedPrefix)
}

// xxh32 is the xxHash of 32 bits (XXH32 of the xxHash specification).
func xxh32(s string, seed uint32) uint32 {
	const p1, p2, p3, p4, p5 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F, 0x165667B1
	length := uint32(len(s))
	word := func(i int) uint32 {
		return uint32(s[i]) | uint32(s[i+1])<<8 | uint32(s[i+2])<<16 | uint32(s[i+3])<<24
	}
	var h uint32
	if len(s) >= 16 {
		lanes := [4]uint32{seed + p1, seed + p2, seed, seed - p1}
		lanes[0] += p2
		for ; len(s) >= 16; s = s[16:] {
			for i := range lanes {
				lanes[i] = bits.RotateLeft32(lanes[i]+word(4*i)*p2, 13) * p1
			}
		}
		h = bits.RotateLeft32(lanes[0], 1) + bits.RotateLeft32(lanes[1], 7) +
			bits.RotateLeft32(lanes[2], 12) + bits.RotateLeft32(lanes[3], 18)
	} else {
		h = seed + p5
	}
	h += length
	for ; len(s) >= 4; s = s[4:] {
		h = bits.RotateLeft32(h+word(0)*p3, 17) * p4
	}
	for i := range len(s) {
		h = bits.RotateLeft32(h+uint32(s[i])*p5, 11) * p1
	}
	h = (h ^ h>>15) * p2
	h = (h ^ h>>13) * p3
	return h ^ h>>16
}

var le = binary.LittleEndian

// roundUp returns n rounded up to a multiple of unit, a power of two.
func roundUp(n, unit uint64) uint64 { return (n + unit - 1) &^ (unit - 1) }
