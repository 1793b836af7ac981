package guest

import (
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fiemap is struct fiemap with one struct fiemap_extent (linux/fiemap.h).
type fiemap struct {
	start, length         uint64
	flags, mapped, extent uint32
	_                     uint32
	logical, physical     uint64
	size                  uint64
	_                     [2]uint64
	extentFlags           uint32
	_                     [3]uint32
}

const (
	fsIocFiemap     = 0xc020660b
	fiemapFlagSync  = 1
	extentUnmovable = 0x1 | 0x2 | 0x4 | 0x8 | 0x80 | 0x200 // last is fine; the others have no plain place on the disk
)

// onDevice returns where on the disk's device the byte at offset off of a file
// lies.
func onDevice(t *testing.T, path string, off int64) int64 {
	t.Helper()
	f, err := os.Open(path)
	check(t, err)
	defer f.Close()
	m := fiemap{start: uint64(off), length: 1, flags: fiemapFlagSync, extent: 1}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIocFiemap, uintptr(unsafe.Pointer(&m))); errno != 0 {
		t.Fatalf("FIEMAP of %s: %v", path, errno)
	}
	if m.mapped != 1 || m.extentFlags&(extentUnmovable&^1) != 0 || m.logical > uint64(off) {
		t.Fatalf("FIEMAP of %s at %d: %+v", path, off, m)
	}
	return int64(m.physical - m.logical + uint64(off))
}

// flip inverts the lowest bit of one byte of the disk, beneath the filesystem.
func flip(t *testing.T, at int64) {
	t.Helper()
	dropCaches(t)
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	check(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], at)
	check(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], at)
	check(t, err)
	check(t, f.Sync())
	dropCaches(t)
}
