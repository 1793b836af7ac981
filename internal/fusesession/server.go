package fusesession

import (
	"encoding/binary"
	"errors"
	"log"
	"os"
	"runtime"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A Server reads the requests of a session and writes the answers that a
// go-fuse ProtocolServer gives. It works as go-fuse's own Server does: the
// goroutine that has read a request handles it, after it has started another
// one to read should none be left, so that a request costs no switch.
type Server struct {
	dev      *os.File
	fs       fuse.RawFileSystem
	protocol *fuse.ProtocolServer
	log      *log.Logger

	journal *journal
	pending []int // slots of the journal that the process before has left
	most    int   // readers at once

	mu      sync.Mutex
	readers int // in read(2)
	loops   sync.WaitGroup
	gone    sync.Once
	onGone  func()
}

func newServer(dev, requests *os.File, fs fuse.RawFileSystem, o *fuse.MountOptions) (*Server, error) {
	s := &Server{dev: dev, fs: fs, protocol: fuse.NewProtocolServer(fs, o), log: o.Logger, most: min(max(runtime.GOMAXPROCS(0), 2), 16)}
	if s.log == nil {
		s.log = log.Default()
	}
	var err error
	s.journal, s.pending, err = openJournal(requests, s.most+1)
	return s, err
}

func (s *Server) close() { s.journal.close() }

// Serve answers requests until the kernel lets go of the session. Gone is
// called then, before Serve waits for requests that are still being handled.
func (s *Server) Serve(gone func()) {
	s.onGone = gone
	for _, slot := range s.pending {
		s.loops.Go(func() { s.handle(s.journal.request(slot), slot) })
	}
	s.readers++
	s.loops.Add(1)
	s.loop()
	s.loops.Wait()
	s.close()
	s.fs.OnUnmount()
}

// loop reads and handles requests; the caller has counted it as a reader.
func (s *Server) loop() {
	defer s.loops.Done()
	for {
		buf := <-s.journal.free
		n, err := retry(func() (int, error) { return unix.Read(int(s.dev.Fd()), buf) })
		var request []byte
		slot := -1
		if err == nil {
			request = append(takeBuffer(n)[:0], buf[:n]...)
			slot = s.journal.keep(request)
		}
		empty(buf)
		s.journal.free <- buf
		s.mu.Lock()
		s.readers--
		if err == nil && s.readers == 0 {
			s.readers++
			s.loops.Add(1)
			go s.loop()
		}
		s.mu.Unlock()
		switch {
		case err == nil:
			s.handle(request, slot)
			giveBuffer(request[:cap(request)])
		case errors.Is(err, unix.ENOENT): // aborted before it was read
		case errors.Is(err, unix.ENODEV):
			s.gone.Do(s.onGone)
			return
		default:
			s.log.Printf("read /dev/fuse: %v", err)
			s.gone.Do(s.onGone)
			return
		}
		s.mu.Lock()
		if s.readers >= s.most {
			s.mu.Unlock()
			return
		}
		s.readers++
		s.mu.Unlock()
	}
}

// Operations of linux/fuse.h whose answers have the size that they ask for, at
// the offset of fuse_read_in or fuse_getxattr_in, and those without an answer.
const (
	opForget      = 2
	opRead        = 15
	opGetXAttr    = 22
	opListXAttr   = 23
	opReadDir     = 28
	opInterrupt   = 36
	opIoctl       = 39
	opBatchForget = 42
	opReadDirPlus = 44

	offReadSize    = sizeInHeader + 16
	offXAttrSize   = sizeInHeader
	offIoctlOut    = sizeInHeader + 28
	smallAnswer    = 8192    // holds all others: a link's target has at most 4095 bytes
	largestPayload = 4 << 20 // of any limit on pages in a request that kernels have
)

// answerSize returns how many bytes the answer to a request may have besides
// its header.
func answerSize(request []byte) int {
	at := func(off int) int {
		if len(request) < off+4 {
			return 0
		}
		return int(min(binary.NativeEndian.Uint32(request[off:]), largestPayload))
	}
	switch binary.NativeEndian.Uint32(request[4:]) {
	case opRead, opReadDir, opReadDirPlus:
		return max(smallAnswer, at(offReadSize))
	case opGetXAttr, opListXAttr:
		return max(smallAnswer, at(offXAttrSize))
	case opIoctl:
		return smallAnswer + at(offIoctlOut)
	}
	return smallAnswer
}

// handle answers a request, which is kept in a slot of the journal.
func (s *Server) handle(request []byte, slot int) {
	defer s.journal.done(slot)
	if len(request) < sizeInHeader {
		s.log.Printf("a request of %d bytes from the kernel", len(request))
		return
	}
	answer := takeBuffer(answerSize(request))
	defer giveBuffer(answer)
	header := make([]byte, sizeOutHeader)
	n, status := s.protocol.HandleRequest([][]byte{request}, [][]byte{header, answer})
	if !status.Ok() {
		switch binary.NativeEndian.Uint32(request[4:]) {
		case opForget, opBatchForget, opInterrupt:
			return
		}
		n = sizeOutHeader
		binary.NativeEndian.PutUint32(header, uint32(n))
		binary.NativeEndian.PutUint32(header[4:], uint32(-int32(status)))
		copy(header[8:], request[8:16])
	}
	if n == 0 {
		return
	}
	_, err := retry(func() (int, error) {
		return unix.Writev(int(s.dev.Fd()), [][]byte{header, answer[:n-sizeOutHeader]})
	})
	// ENOENT: the program that waited has gone, or the whole session.
	if err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
		s.log.Printf("answer request %d: %v", binary.NativeEndian.Uint32(request[4:]), err)
	}
}

// buffers are for requests and answers, by the power of two that is their size.
var buffers [24]sync.Pool

func sizeClass(size int) (class int) {
	for class = 9; 1<<class < size; class++ {
	}
	return class
}

func takeBuffer(size int) []byte {
	class := sizeClass(size)
	if b, ok := buffers[class].Get().(*[]byte); ok {
		return *b
	}
	return make([]byte, 1<<class)
}

func giveBuffer(b []byte) { buffers[sizeClass(len(b))].Put(&b) }

// InPlace is the answer to a READ whose n bytes are in the buffer that Read was
// given: it saves go-fuse from copying them there.
func InPlace(n int) fuse.ReadResult { return inPlace(n) }

type inPlace int

func (p inPlace) Bytes(buf []byte) ([]byte, fuse.Status) { return buf[:p], fuse.OK }
func (p inPlace) Size() int                              { return int(p) }
func (p inPlace) Done()                                  {}

// Readv is what ProtocolServer calls; dst is that buffer.
func (p inPlace) Readv([][]byte) (int, fuse.Status) { return int(p), fuse.OK }
