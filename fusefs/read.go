package fusefs

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/fusesession"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

func (f *fileSystem) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	start := time.Now()
	f.count(opRead)
	ino, st := f.inode(in.NodeId)
	if !st.Ok() {
		return nil, st
	}
	if ino.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fuse.EINVAL
	}
	off := int64(in.Offset)
	if off < 0 || off >= ino.Size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	buf = buf[:min(int64(len(buf)), int64(in.Size), ino.Size-off)]

	var err error
	var object string
	source := metrics.Local
	if !ino.External() {
		var n int
		n, err = f.image.ReadAt(ino, buf, off)
		err = short(n, len(buf), in.Offset, err)
	} else if object, _, err = f.image.Payload(ino); err == nil {
		source, err = f.readObject(cancel, in, object, buf)
	}
	if err != nil {
		return nil, f.fail(ino.NID, object, err)
	}
	f.answered(source, start)
	return fusesession.InPlace(len(buf)), fuse.OK
}

// A request is the context of one read: it ends with the mount, and when the
// reader is being killed. A read that finds its bytes in the store never calls
// Done, and then nothing watches.
//
// The kernel sends an interrupt for any signal, once per request, fatal or
// not, and then waits for our answer whatever happens. A signal that the
// reader handles must not fail its read, as it would not on a local disk (a Go
// program gets them all the time, and a page fault that fails is SIGBUS); a
// fatal one must end it at once. So an interrupt only starts to look whether
// the reader has SIGKILL pending, which the kernel marks on each thread of a
// process that a signal is about to end.
type request struct {
	context.Context // the mount's
	interrupt       <-chan struct{}
	tid             uint32

	once sync.Once
	done chan struct{} // closed: given up
	over chan struct{} // closed: answered
}

func newRequest(mount context.Context, interrupt <-chan struct{}, tid uint32) *request {
	return &request{Context: mount, interrupt: interrupt, tid: tid, done: make(chan struct{}), over: make(chan struct{})}
}

// Done is closed when the read should be given up.
func (r *request) Done() <-chan struct{} {
	r.once.Do(func() { go r.watch() })
	return r.done
}

// Err returns nil until Done is closed.
func (r *request) Err() error {
	select {
	case <-r.done:
		if err := r.Context.Err(); err != nil {
			return err
		}
		return context.Canceled
	default:
		return nil
	}
}

// end lets go of the request once it is answered.
func (r *request) end() { close(r.over) }

func (r *request) watch() {
	var poll <-chan time.Time
	interrupt := r.interrupt
	for {
		select {
		case <-r.over:
			return
		case <-r.Context.Done():
			close(r.done)
			return
		case <-interrupt:
			interrupt = nil // it stays closed
		case <-poll:
		}
		if dying(r.tid) {
			close(r.done)
			return
		}
		poll = time.After(20 * time.Millisecond)
	}
}

// dying reports whether SIGKILL is pending for the thread tid (proc_pid_status(5),
// SigPnd). A thread that cannot be looked at counts as dying: it is in another
// pid namespace or gone.
func dying(tid uint32) bool {
	if tid == 0 {
		return true
	}
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return true
	}
	for _, field := range []string{"\nSigPnd:\t", "\nShdPnd:\t"} {
		_, rest, ok := bytes.Cut(data, []byte(field))
		if !ok || len(rest) < 16 {
			return true
		}
		mask, err := strconv.ParseUint(string(rest[:16]), 16, 64)
		if err != nil || mask&(1<<(unix.SIGKILL-1)) != 0 {
			return true
		}
	}
	return false
}
