package fusefs

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A session is what the filesystems of this package have in common: where
// bytes come from, what was asked, and the end of the mount. Operations that
// a filesystem does not have are answered with ENOSYS by the embedded default,
// after which the kernel does without them.
type session struct {
	fuse.RawFileSystem
	contents Contents
	opts     Options
	ctx      context.Context // ends with the mount
	cancel   context.CancelCauseFunc
	counts   [len(operations)]atomic.Int64
	asked    atomic.Int64 // all of counts
	first    sync.Once    // read that was answered
}

// requestsBetween is how many requests lie between two calls of OnRequests.
const requestsBetween = 1024

func newSession(contents Contents, o Options) *session {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &session{
		RawFileSystem: fuse.NewDefaultRawFileSystem(),
		contents:      contents,
		opts:          o,
		ctx:           ctx,
		cancel:        cancel,
	}
}

// stop wakes every read that waits.
func (s *session) stop() { s.cancel(errStopped) }

func (s *session) String() string { return "cfs-fuse" }

// Forget does nothing: a node has no state here.
func (s *session) Forget(uint64, uint64) {}

// Open and OpenDir answer ENOSYS: the kernel then opens files and folders by
// itself, keeps their pages and listings, and never asks again (fuse_file_open
// in the kernel's fs/fuse/file.c).
func (s *session) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	s.count(opOpen)
	return fuse.ENOSYS
}

func (s *session) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	s.count(opOpenDir)
	return fuse.ENOSYS
}

// Flush answers ENOSYS for the same reason: the default says OK, and is asked
// again at each close.
func (s *session) Flush(<-chan struct{}, *fuse.FlushIn) fuse.Status {
	s.count(opFlush)
	return fuse.ENOSYS
}

// readObject answers a READ from an object: fewer bytes than wanted are an
// error, since the image has said how many there are.
func (s *session) readObject(cancel <-chan struct{}, in *fuse.ReadIn, object string, buf []byte) (source string, err error) {
	ctx := newRequest(s.ctx, cancel, in.Caller.Pid)
	n, fetched, err := s.contents.ReadAt(ctx, object, buf, int64(in.Offset))
	ctx.end()
	source = metrics.Local
	if fetched {
		source = metrics.Registry
	}
	return source, short(n, len(buf), in.Offset, err)
}

// short makes an error of a read that gave fewer bytes than it must.
func short(n, want int, off uint64, err error) error {
	if n == want {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("object is shorter than the image says: %d of %d bytes at offset %d", n, want, off)
	}
	return err
}

// fail reports an error that a program is about to get as an errno. The nid
// is 0 where only the object is known.
func (s *session) fail(nid uint64, object string, err error) fuse.Status {
	if !errors.Is(err, context.Canceled) {
		s.opts.Metrics.RequestFailed()
		if s.opts.OnError != nil {
			s.opts.OnError(nid, object, err)
		}
	}
	return errno(err)
}

// answered notes a READ that was answered.
func (s *session) answered(source string, start time.Time) {
	s.opts.Metrics.Read(source, time.Since(start))
	if s.opts.OnFirstRead != nil {
		s.first.Do(s.opts.OnFirstRead)
	}
}

// operations are the requests that the kernel waits for, by the names that
// linux/fuse.h has for them; changes, which a read-only mount never asks for,
// are not counted.
var operations = [...]string{
	"lookup", "getattr", "readlink", "open", "opendir", "read", "readdir", "readdirplus",
	"getxattr", "listxattr", "statfs", "ioctl", "access", "flush", "lseek", "statx",
}

const (
	opLookup = iota
	opGetAttr
	opReadlink
	opOpen
	opOpenDir
	opRead
	opReadDir
	opReadDirPlus
	opGetXAttr
	opListXAttr
	opStatFs
	opIoctl
	opAccess
	opFlush
	opLseek
	opStatx
)

func (s *session) count(op int) {
	s.counts[op].Add(1)
	s.opts.Metrics.FUSERequest(operations[op])
	if s.asked.Add(1)%requestsBetween == 0 && s.opts.OnRequests != nil {
		s.opts.OnRequests()
	}
}

func (s *session) requests() map[string]int64 {
	all := map[string]int64{}
	for i := range s.counts {
		if n := s.counts[i].Load(); n > 0 {
			all[operations[i]] = n
		}
	}
	return all
}

// These have no answer of their own; they are here to be counted.

func (s *session) Ioctl(cancel <-chan struct{}, in *fuse.IoctlIn, inbuf []byte, out *fuse.IoctlOut, outbuf []byte) fuse.Status {
	s.count(opIoctl)
	return s.RawFileSystem.Ioctl(cancel, in, inbuf, out, outbuf)
}

func (s *session) Access(cancel <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	s.count(opAccess)
	return s.RawFileSystem.Access(cancel, in)
}

func (s *session) Lseek(cancel <-chan struct{}, in *fuse.LseekIn, out *fuse.LseekOut) fuse.Status {
	s.count(opLseek)
	return s.RawFileSystem.Lseek(cancel, in, out)
}

func (s *session) Statx(cancel <-chan struct{}, in *fuse.StatxIn, out *fuse.StatxOut) fuse.Status {
	s.count(opStatx)
	return s.RawFileSystem.Statx(cancel, in, out)
}
