// Package fusesession lets a FUSE session outlive the process that serves it.
// A session is the /dev/fuse descriptor, the one INIT exchange that its
// connection has had, and whatever answers its requests; this package knows
// the first two and hands go-fuse a descriptor to serve, be the session new or
// ten processes old. Who keeps the descriptor meanwhile is its callers'
// business (package keeper).
//
// The kernel sends INIT once in the life of a connection, and go-fuse's Server
// begins with reading it. go-fuse's ProtocolServer, made for virtiofs, takes
// requests as bytes from wherever they come. So this package reads and writes
// /dev/fuse itself (server.go), and go-fuse parses, dispatches and formats:
//
//	new session    kernel ── INIT ──► ProtocolServer ── reply ──► kernel
//	                          both are kept: Params
//	successor      Params ── INIT, as it was agreed ──► ProtocolServer
//	                          reply: must be what was agreed; the kernel gets none
//
// The other way, go-fuse's Server on a socketpair that dup3(2) replaces by
// /dev/fuse once INIT is answered, works too and is as fast, but has a hole
// that was seen at one kill in ten of an idle server on a busy machine. A thread
// that is being killed still takes a request that came with the kill off the
// queue (wait_event_interruptible looks at the condition first), and then
// fails to copy it into a page that was never touched, as page faults of a
// dying thread fail. The request is lost, and its program gets EIO. Here
// requests are read into pages that are present.
//
// What the kernel remembers of a session stays as the first server made it:
// protocol version, flags, sizes, and operations that were answered with
// ENOSYS. A successor that would have agreed to other flags is refused by
// NewServer, before it has touched the session.
//
// Requests that a process had read when it died are still with the kernel,
// which waits for their answers. Takeover makes it send them again
// (FUSE_NOTIFY_RESEND, Linux 6.9; linux/fuse.h), with the same ID but for its
// topmost bit. For older kernels requests are kept in a file in memory until
// they are answered (journal.go), and the successor begins with those that are
// there.
package fusesession

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Params are what a successor must know of a session besides its descriptor.
type Params struct {
	// Request and Reply are the INIT exchange, as it went over /dev/fuse
	// (struct fuse_in_header and fuse_init_in, fuse_out_header and
	// fuse_init_out of linux/fuse.h).
	Request []byte `json:"init_request"`
	Reply   []byte `json:"init_reply"`
	// Journal says that requests are kept in the file of Session.Requests,
	// since the kernel cannot repeat them.
	Journal bool `json:"journal,omitempty"`
}

// A Session is one connection to the kernel.
type Session struct {
	dev      *os.File
	requests *os.File // of the journal; nil if the kernel can repeat requests
	params   Params
	resumed  bool
}

// New makes a session of a /dev/fuse descriptor on which the kernel's INIT
// still waits to be read. It takes dev over.
func New(dev *os.File) *Session { return &Session{dev: dev} }

// Resume makes a session of the descriptor and parameters that another
// process's session had, and of its file of Requests, nil if it had none. It
// takes the files over, unless it fails.
func Resume(dev, requests *os.File, p Params) (*Session, error) {
	if _, err := p.agreed(); err != nil {
		return nil, fmt.Errorf("continue a FUSE session: %w", err)
	}
	if p.Journal && requests == nil {
		return nil, errors.New("continue a FUSE session: its journal of requests is not there")
	}
	if !p.Journal {
		requests = nil
	}
	return &Session{dev: dev, requests: requests, params: p, resumed: true}, nil
}

// Requests returns the file that a successor needs besides File, nil if none.
func (s *Session) Requests() *os.File { return s.requests }

// File returns the /dev/fuse descriptor, which the Session goes on owning.
func (s *Session) File() *os.File { return s.dev }

// Params returns what a successor must know. They are there once NewServer has
// succeeded.
func (s *Session) Params() Params { return s.params }

// Resumed reports whether another process has served the session before.
func (s *Session) Resumed() bool { return s.resumed }

// Close closes the descriptor, after the server's end.
func (s *Session) Close() error {
	if s.requests != nil {
		s.requests.Close()
	}
	return s.dev.Close()
}

// Over reports whether the kernel has let go of the connection: what it was
// mounted for is unmounted, with no file open, or was aborted.
func Over(dev *os.File) bool {
	fds := []unix.PollFd{{Fd: int32(dev.Fd())}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLERR != 0 // fuse_dev_poll in the kernel's fs/fuse/dev.c
}

// NewServer returns a server of the session that has not begun to read
// requests. The Init of fs is not called. The rest of a new session is answered once
// Serve is called; in a resumed one Takeover has to be called first. Files
// cannot be written: the kernel is told to send at most a page at once.
//
// It fails, with the session untouched, when fs and o would have agreed with
// the kernel on something else than a resumed session has.
func (s *Session) NewServer(fs fuse.RawFileSystem, o *fuse.MountOptions) (*Server, error) {
	request := s.params.Request
	var was *fuse.InitOut
	if s.resumed {
		var err error
		if was, err = s.params.agreed(); err != nil {
			return nil, err
		}
		request = offer(request, was.Flags64())
	} else {
		buf := make([]byte, readBuffer)
		n, err := retry(func() (int, error) { return unix.Read(int(s.dev.Fd()), buf) })
		if err != nil {
			return nil, fmt.Errorf("read the kernel's INIT: %w", err)
		}
		request = buf[:n]
		if err := checkRequest(request); err != nil {
			return nil, err
		}
		s.params.Journal = s.params.Journal || !canResend(request)
		if s.params.Journal {
			if s.requests, err = newJournalFile(); err != nil {
				return nil, err
			}
		}
	}
	srv, err := newServer(s.dev, s.requests, fs, o)
	if err != nil {
		return nil, err
	}
	reply := make([]byte, sizeOutHeader+sizeInitOut)
	n, status := srv.protocol.HandleRequest([][]byte{request}, [][]byte{reply})
	if !status.Ok() {
		n = 0 // parseReply says it
	}
	out, err := parseReply(reply[:n])
	if err == nil {
		binary.NativeEndian.PutUint32(reply[offMaxWrite:], maxWrite)
		out.MaxWrite = maxWrite
		if was != nil {
			err = same(was, out)
		} else if _, err = unix.Write(int(s.dev.Fd()), reply); err != nil {
			err = fmt.Errorf("answer the kernel's INIT: %w", err)
		}
	}
	if err != nil {
		srv.close()
		return nil, err
	}
	if !s.resumed {
		s.params.Request, s.params.Reply = bytes.Clone(request), reply
	}
	return srv, nil
}

// readBuffer is FUSE_MIN_READ_BUFFER of linux/fuse.h, in bytes: enough for
// every request if none writes more than maxWrite, which is the least that the
// kernel takes (process_init_reply in its fs/fuse/inode.c).
const (
	readBuffer = 8192
	maxWrite   = 4096
)

// opInit is FUSE_INIT of linux/fuse.h.
const opInit = 26

const (
	sizeInHeader  = int(unsafe.Sizeof(fuse.InHeader{}))
	sizeOutHeader = int(unsafe.Sizeof(fuse.OutHeader{}))
	sizeInitIn    = int(unsafe.Sizeof(fuse.InitIn{}))
	sizeInitOut   = int(unsafe.Sizeof(fuse.InitOut{}))
	// before protocol 7.36 INIT ended with its first flags
	sizeOldInitIn = sizeInHeader + 16
	// where the flags are in an INIT request
	offFlags, offFlags2 = sizeInHeader + 12, sizeInHeader + 16
	// where max_write is in its answer
	offMaxWrite = sizeOutHeader + 20
)

func checkRequest(b []byte) error {
	if len(b) < sizeOldInitIn || len(b) > sizeInitIn {
		return fmt.Errorf("the kernel's INIT has %d bytes", len(b))
	}
	if op := binary.NativeEndian.Uint32(b[4:]); op != opInit {
		return fmt.Errorf("the kernel's first request is number %d, not INIT", op)
	}
	return nil
}

func parseReply(b []byte) (*fuse.InitOut, error) {
	if len(b) < sizeOutHeader {
		return nil, fmt.Errorf("go-fuse answered INIT with %d bytes", len(b))
	}
	if status := int32(binary.NativeEndian.Uint32(b[4:])); status != 0 {
		return nil, fmt.Errorf("go-fuse answered INIT: %w", unix.Errno(-status))
	}
	if len(b) != sizeOutHeader+sizeInitOut {
		return nil, fmt.Errorf("go-fuse answered INIT with %d bytes", len(b))
	}
	var out fuse.InitOut
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&out)), sizeInitOut), b[sizeOutHeader:])
	return &out, nil
}

// agreed checks the parameters and returns what was answered.
func (p Params) agreed() (*fuse.InitOut, error) {
	if err := checkRequest(p.Request); err != nil {
		return nil, err
	}
	return parseReply(p.Reply)
}

// canResend reports whether the kernel that sent INIT knows FUSE_NOTIFY_RESEND.
func canResend(request []byte) bool {
	return len(request) >= offFlags2+4 &&
		binary.NativeEndian.Uint32(request[offFlags2:])&(fuse.CAP_HAS_RESEND>>32) != 0
}

// offer returns an INIT request that offers of its flags only those agreed.
func offer(request []byte, agreed uint64) []byte {
	b := bytes.Clone(request)
	mask := func(off int, flags uint32) {
		if len(b) >= off+4 {
			binary.NativeEndian.PutUint32(b[off:], binary.NativeEndian.Uint32(b[off:])&flags)
		}
	}
	mask(offFlags, uint32(agreed))
	mask(offFlags2, uint32(agreed>>32))
	return b
}

// same fails unless a successor agrees to what the session has.
func same(was, now *fuse.InitOut) error {
	var diffs []string
	diff := func(what string, a, b uint64) {
		if a != b {
			diffs = append(diffs, fmt.Sprintf("%s %#x, the session has %#x", what, b, a))
		}
	}
	// The minor version that go-fuse answers changes nothing in what it does.
	diff("protocol", uint64(was.Major), uint64(now.Major))
	diff("flags", was.Flags64(), now.Flags64())
	diff("max_write", uint64(was.MaxWrite), uint64(now.MaxWrite))
	diff("max_pages", uint64(was.MaxPages), uint64(now.MaxPages))
	if diffs != nil {
		return errors.New("this build of the program cannot continue the session: " + strings.Join(diffs, "; "))
	}
	return nil
}

func retry(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
