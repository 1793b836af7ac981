package fusesession

import (
	"encoding/binary"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A journal is the memory that requests are read into, and where they are kept
// until they are answered:
//
//	slot 0 … slot 255      512 bytes each: the requests that are being handled
//	buffer 0 … buffer n-1  8192 bytes each: what readers read into
//
// A request begins with its length (struct fuse_in_header), so a slot or
// buffer whose first four bytes are zero is empty. Where the kernel can repeat
// requests the memory is the process's own and slots are not used; where it
// cannot, it is a file in memory that a successor gets: what is in it the
// process before had read, and perhaps not answered. To answer twice does no harm:
// the kernel knows the request by its ID, or not any more (ENOENT).
type journal struct {
	memory []byte
	slots  chan int // empty ones; nil if they are not used
	free   chan []byte
}

const (
	slotSize   = 512
	slotsCount = 256
)

// openJournal maps f, which may be nil, for as many readers at once. It
// returns the slots that are in use, after what was in buffers has been put
// into slots too.
func openJournal(f *os.File, buffers int) (j *journal, pending []int, err error) {
	size := slotsCount*slotSize + buffers*readBuffer
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS
	if f != nil {
		fi, err := f.Stat()
		if err != nil {
			return nil, nil, fmt.Errorf("journal of requests: %w", err)
		}
		// It may have been made with more buffers; they all count.
		if n := int(fi.Size()); n > size && n < 64<<20 {
			size = n
		} else if err := f.Truncate(int64(size)); err != nil {
			return nil, nil, fmt.Errorf("journal of requests: %w", err)
		}
		fd, flags = int(f.Fd()), unix.MAP_SHARED
	}
	j = &journal{}
	if j.memory, err = unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_POPULATE); err != nil {
		return nil, nil, fmt.Errorf("buffers: %w", err)
	}
	unix.Mlock(j.memory) // where the limit allows it: against reclaim
	if f != nil {
		j.slots = make(chan int, slotsCount)
		for i := range slotsCount {
			if j.length(i) != 0 {
				pending = append(pending, i)
			} else {
				j.slots <- i
			}
		}
	}
	rest := j.memory[slotsCount*slotSize:]
	j.free = make(chan []byte, len(rest)/readBuffer)
	for ; len(rest) >= readBuffer; rest = rest[readBuffer:] {
		b := rest[:readBuffer:readBuffer]
		if n := lengthOf(b); f != nil && n != 0 && int(n) <= readBuffer {
			if i := j.keep(b[:n]); i >= 0 {
				pending = append(pending, i)
			}
		}
		empty(b)
		j.free <- b
	}
	return j, pending, nil
}

func (j *journal) close() { unix.Munmap(j.memory) }

func (j *journal) slot(i int) []byte { return j.memory[i*slotSize : (i+1)*slotSize : (i+1)*slotSize] }

func (j *journal) length(i int) uint32 { return lengthOf(j.slot(i)) }

// keep notes a request and returns its slot, -1 if it is not kept: there are
// too many at once, or it is a larger one than a file system that cannot be
// written gets.
func (j *journal) keep(request []byte) int {
	if j.slots == nil || len(request) > slotSize || len(request) < sizeInHeader {
		return -1
	}
	select {
	case i := <-j.slots:
		b := j.slot(i)
		copy(b[4:], request[4:])
		atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[0])), uint32(len(request)))
		return i
	default:
		return -1
	}
}

// request returns a copy of what is in a slot.
func (j *journal) request(i int) []byte {
	b := j.slot(i)
	n := min(int(j.length(i)), slotSize)
	request := append([]byte(nil), b[:n]...)
	if n >= 4 {
		binary.NativeEndian.PutUint32(request, uint32(n))
	}
	return request
}

// done empties a slot, once its request is answered.
func (j *journal) done(i int) {
	if i >= 0 {
		empty(j.slot(i))
		j.slots <- i
	}
}

func lengthOf(b []byte) uint32 { return atomic.LoadUint32((*uint32)(unsafe.Pointer(&b[0]))) }

func empty(b []byte) { atomic.StoreUint32((*uint32)(unsafe.Pointer(&b[0])), 0) }

// newJournalFile makes the file of a journal.
func newJournalFile() (*os.File, error) {
	fd, err := unix.MemfdCreate("cfs-fuse-requests", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("journal of requests: memfd_create: %w", err)
	}
	return os.NewFile(uintptr(fd), "requests"), nil
}
