package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// A Control answers other commands' questions about a mount, over HTTP on a
// socket of the runtime folder, and keeps the mount's record there:
//
//	GET /status            the Status as JSON
//	GET /profile           the access profile as JSON (image.Profile)
//	GET /metrics           what the process has counted, as delimited protocol buffers
//	GET /start             the Story of the start as JSON
//	POST /swap?namespaces=PID,…
//	                       204 once it is swapped, 409 and the reason when it cannot be
//	GET /wait?for=STATE    204 once STATE is reached, 409 and the reason when it never will be
//	POST /replace?path=P   204 once the program P is ready to go on with the mount, 409 and the reason if not
type Control struct {
	mount *Mount
	files Files
	l     *net.UnixListener
	http  *http.Server
	done  chan struct{}
}

// NewControl writes the record and starts answering. Close ends both.
func NewControl(m *Mount) (*Control, error) {
	files := FilesOf(m.opts.Runtime, m.mountpoint)
	if err := os.MkdirAll(m.opts.Runtime, 0o700); err != nil {
		return nil, fmt.Errorf("runtime folder: %w", err)
	}
	os.Remove(files.Socket) // of a process that has died: the mount point was free
	l, err := net.Listen("unix", files.Socket)
	if err != nil {
		return nil, hint.Wrap(fmt.Errorf("listen for other commands: %w", err), "name another folder with --runtime-dir")
	}
	return answer(m, files, l)
}

// ResumeControl is NewControl for a mount of Resume, with the files that were
// kept: commands that have asked meanwhile get their answer.
func ResumeControl(m *Mount, kept map[string]*os.File) (*Control, error) {
	f := kept[controlFile]
	if f == nil {
		return NewControl(m)
	}
	l, err := net.FileListener(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("listen for other commands: %w", err)
	}
	return answer(m, FilesOf(m.opts.Runtime, m.mountpoint), l)
}

func answer(m *Mount, files Files, listener net.Listener) (*Control, error) {
	l, ok := listener.(*net.UnixListener)
	if !ok {
		return nil, fmt.Errorf("listen for other commands: %s is not a socket of this machine", listener.Addr())
	}
	l.SetUnlinkOnClose(false) // it may be a successor's by then
	m.update(func(s *Status) { s.Log = files.Log })
	c := &Control{mount: m, files: files, l: l, done: make(chan struct{})}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", c.status)
	mux.HandleFunc("GET /wait", c.wait)
	mux.HandleFunc("GET /profile", c.profile)
	mux.HandleFunc("GET /metrics", c.metrics)
	mux.HandleFunc("GET /start", c.story)
	mux.HandleFunc("POST /swap", c.swap)
	mux.HandleFunc("POST /replace", c.replace)
	c.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	if err := files.save(m.Status()); err != nil {
		l.Close()
		return nil, err
	}
	go func() {
		defer close(c.done)
		c.http.Serve(l)
	}()
	return c, nil
}

// file returns a copy of the socket.
func (c *Control) file() (*os.File, error) { return c.l.File() }

// Save writes the record again.
func (c *Control) Save() error { return c.files.save(c.mount.Status()) }

// Leave stops answering, when another process goes on with the mount.
func (c *Control) Leave(ctx context.Context) {
	if c.http.Shutdown(ctx) != nil {
		c.http.Close()
	}
	<-c.done
}

// Close stops answering. The record stays when the image is still mounted, by
// the kernel, and goes otherwise; another process's is left alone.
func (c *Control) Close() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if c.http.Shutdown(ctx) != nil {
		c.http.Close()
	}
	<-c.done
	// A file that was open on FUSE may have kept this process until the mount
	// point belongs to another one.
	if rec, err := c.files.load(); err != nil || rec.PID != os.Getpid() {
		return
	}
	s, err := fromKernel(c.mount.Status())
	if err != nil || s.State < Swapped {
		c.files.remove()
		return
	}
	if err := c.files.save(s); err != nil {
		c.mount.log.Warn("the record of the mount could not be written", "error", err)
	}
	os.Remove(c.files.Socket)
}

func (c *Control) status(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	s := c.mount.Status()
	s.Elsewhere = c.mount.elsewhere()
	json.NewEncoder(w).Encode(s)
}

func (c *Control) wait(w http.ResponseWriter, r *http.Request) {
	var state State
	if err := state.UnmarshalText([]byte(r.FormValue("for"))); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := c.mount.WaitFor(r.Context(), state); err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	if err := c.files.save(c.mount.Status()); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (c *Control) swap(w http.ResponseWriter, r *http.Request) {
	pids, err := ParsePIDs(r.FormValue("namespaces"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	err = fmt.Errorf("it is %s, and only a sealed image can be swapped", c.mount.state())
	if c.mount.state() >= Sealed {
		err = c.mount.swapNow(pids)
	}
	if c.mount.state() >= Swapped {
		err = errors.Join(err, c.files.save(c.mount.Status()))
	}
	if err != nil {
		http.Error(w, withHint(err), http.StatusConflict)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (c *Control) replace(w http.ResponseWriter, r *http.Request) {
	c.mount.mu.Lock()
	k := c.mount.keeper
	c.mount.mu.Unlock()
	if k == nil {
		http.Error(w, "nothing keeps the session of this mount", http.StatusConflict)
		return
	}
	if err := k.Replace(r.FormValue("path")); err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// ask asks the process that serves a mount.
func (f Files) ask(ctx context.Context, method, path string) (*http.Response, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", f.Socket)
		},
	}}
	req, err := http.NewRequestWithContext(ctx, method, "http://cfs-fuse"+path, nil)
	if err != nil {
		return nil, err
	}
	return client.Do(req)
}

// answerTime is how long a mount's process may take to answer, or its
// successor to come up.
const answerTime = 10 * time.Second

// query asks the serving process, and where there is none the kernel.
func (f Files) query(ctx context.Context) (Status, error) {
	limited, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	gone := false
	for {
		s, err := f.askStatus(limited)
		if err == nil {
			return s, nil
		}
		// A process that dies while it is asked may have a successor; where
		// there is none, nobody listens.
		gone = errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist)
		if limited.Err() != nil || gone {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if ctx.Err() != nil {
		return Status{}, ctx.Err()
	}
	s, err := f.load()
	if err != nil {
		return s, err
	}
	if gone {
		s.Keeper, s.KeeperPID = "", 0 // the keeper had the socket too
	}
	mountpoint := s.Mountpoint
	if s, err = fromKernel(s); errors.Is(err, kmount.ErrNotMounted) {
		f.remove()
		return s, errNoMount(mountpoint)
	}
	return s, err
}

func (f Files) askStatus(ctx context.Context) (s Status, err error) {
	res, err := f.ask(ctx, http.MethodGet, "/status")
	if err != nil {
		return s, err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&s); err != nil {
		return s, fmt.Errorf("ask the process that serves the mount: %w", err)
	}
	return s, nil
}

// Query returns the status of the mount at mountpoint. It fails with
// kmount.ErrNotMounted when there is none of ours.
func Query(ctx context.Context, runtimeDir, mountpoint string) (Status, error) {
	abs, err := ResolveMountpoint(mountpoint)
	if err != nil {
		return Status{}, err
	}
	s, err := FilesOf(runtimeDir, abs).query(ctx)
	if errors.Is(err, os.ErrNotExist) {
		err = errNoMount(abs)
	}
	return s, err
}

// List returns the status of every mount in the runtime folder.
func List(ctx context.Context, runtimeDir string) ([]Status, error) {
	files, err := records(runtimeDir)
	if err != nil {
		return nil, err
	}
	var all []Status
	for _, f := range files {
		s, err := f.query(ctx)
		if errors.Is(err, kmount.ErrNotMounted) {
			continue
		}
		if err != nil {
			return all, err
		}
		all = append(all, s)
	}
	return all, nil
}

// How long a process is given to leave before a command that waits for it goes
// on: after an unmount it has nothing left to do, after a swap files may be
// open that keep it for as long as they are.
const (
	leaveTime  = 5 * time.Second
	lingerTime = time.Second
)

// How long an unmount bears that the mount is busy: a swap, or somebody's look
// at the mount point, holds it for an instant.
const busyTime = 500 * time.Millisecond

// Await returns nil when the mount at mountpoint has reached state; for
// Swapped also when the process that served it has left, unless open files
// keep it. It fails with ErrStuck when the state never will be reached, and
// with ctx's error.
func Await(ctx context.Context, runtimeDir, mountpoint string, state State) error {
	s, err := Query(ctx, runtimeDir, mountpoint)
	if err != nil {
		return err
	}
	files := FilesOf(runtimeDir, s.Mountpoint)
	if s.PID == 0 {
		if s.State >= state {
			return nil
		}
		return fmt.Errorf("%s: state %s %w: %s", s.Mountpoint, state, ErrStuck, s.Note)
	}
	left := watch(s)
	defer left.Close()
	res, err := files.ask(ctx, http.MethodGet, "/wait?for="+state.String())
	if err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("%s: wait for state %s: %w", s.Mountpoint, state, ctx.Err())
		}
		// It has left in between: the kernel knows how far it came, or a
		// successor goes on.
		if s, err = files.query(ctx); err == nil && s.State < state {
			if s.PID != 0 {
				time.Sleep(10 * time.Millisecond)
				return Await(ctx, runtimeDir, mountpoint, state)
			}
			err = fmt.Errorf("%s: state %s %w: the process that served the mount ended", mountpoint, state, ErrStuck)
		}
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		if ctx.Err() == nil && res.StatusCode == http.StatusConflict && strings.TrimSpace(string(text)) == context.Canceled.Error() {
			return Await(ctx, runtimeDir, mountpoint, state) // the process is leaving to a successor
		}
		return fmt.Errorf("%s: %w", s.Mountpoint, stuck(oneLine(string(text))))
	}
	if state == Swapped {
		left.wait(lingerTime)
	}
	return nil
}

// SwapNow swaps the sealed image at mountpoint to the kernel's mount, also where
// it was mounted to stay on FUSE, or an earlier attempt failed. A nil error
// promises that the kernel's mount is in place, in the mount namespaces of the
// given processes too, wherever they have it. It fails with ErrStuck, wrapped
// with the reason, when the image is not sealed yet or the kernel refuses, and
// FUSE then goes on serving.
func SwapNow(ctx context.Context, runtimeDir, mountpoint string, pids ...int) error {
	s, err := Query(ctx, runtimeDir, mountpoint)
	if err != nil || s.State >= Swapped && (len(pids) == 0 || s.PID == 0) {
		return err
	}
	if s.PID == 0 {
		return fmt.Errorf("%s: state %s %w: %s", s.Mountpoint, Swapped, ErrStuck, s.Note)
	}
	left := watch(s)
	defer left.Close()
	res, err := FilesOf(runtimeDir, s.Mountpoint).ask(ctx, http.MethodPost, "/swap?namespaces="+formatPIDs(pids))
	if err != nil {
		// It has ended in between, or has left to a successor, which finishes
		// what it has begun.
		if after, qerr := Query(ctx, runtimeDir, mountpoint); qerr == nil && after.PID != s.PID {
			return SwapNow(ctx, runtimeDir, mountpoint, pids...)
		}
		return fmt.Errorf("%s: ask the process that serves the mount to swap: %w", s.Mountpoint, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		return fmt.Errorf("%s: swap: %w", s.Mountpoint, stuck(oneLine(string(text))))
	}
	left.wait(lingerTime)
	return nil
}

// stuck is what another process said of a state that will not be reached.
type stuck string

func (s stuck) Error() string { return string(s) }

// Is makes it an ErrStuck.
func (s stuck) Is(target error) bool { return target == ErrStuck }

// Unmount takes the image off mountpoint and waits for the process that served
// it to leave. It fails with unix.EBUSY, and changes nothing, while a program
// uses the mount.
func Unmount(ctx context.Context, runtimeDir, mountpoint string) error {
	abs, err := ResolveMountpoint(mountpoint)
	if err != nil {
		return err
	}
	files := FilesOf(runtimeDir, abs)
	info, err := kmount.At(abs)
	switch {
	case errors.Is(err, kmount.ErrNotMounted):
		files.remove()
		return errNoMount(abs)
	case err != nil:
		return err
	case !ours(info) && !isSealedMount(info):
		return errNoMount(abs)
	}
	var left processes
	if s, err := files.query(ctx); err == nil {
		left = watch(s)
	}
	defer left.Close()
	err = kmount.Unmount(abs)
	for end := time.Now().Add(busyTime); errors.Is(err, unix.EBUSY) && time.Now().Before(end); err = kmount.Unmount(abs) {
		time.Sleep(busyTime / 50)
	}
	if errors.Is(err, unix.EPERM) {
		if out, ferr := exec.CommandContext(ctx, "fusermount3", "-u", abs).CombinedOutput(); ferr != nil {
			err = fmt.Errorf("unmount %s: fusermount3: %s", abs, oneLine(string(out)))
		} else {
			err = nil
		}
	}
	switch {
	case errors.Is(err, unix.EBUSY):
		return hint.Wrap(err, "end the programs that use it ('fuser -vm "+abs+"' lists them)")
	case err != nil:
		return err
	}
	if isSealedMount(info) {
		files.remove()
	}
	left.wait(leaveTime)
	// A process that was killed in the middle of a swap left the kernel's mount
	// beneath FUSE.
	if info, err := kmount.At(abs); err == nil && isSealedMount(info) {
		return Unmount(ctx, runtimeDir, mountpoint)
	}
	return nil
}

// Replace has the program at path, an absolute one, go on with the mount at
// mountpoint in place of the process that serves it now, and returns when it
// does. With an error, the old process goes on.
func Replace(ctx context.Context, runtimeDir, mountpoint, path string) error {
	before, err := Query(ctx, runtimeDir, mountpoint)
	if err != nil {
		return err
	}
	files := FilesOf(runtimeDir, before.Mountpoint)
	if before.PID == 0 {
		if before.State == Swapped {
			return nil // the kernel serves it
		}
		return fmt.Errorf("%s: %s", before.Mountpoint, before.Note)
	}
	res, err := files.ask(ctx, http.MethodPost, "/replace?path="+url.QueryEscape(path))
	if err != nil {
		return fmt.Errorf("%s: ask the process that serves the mount: %w", before.Mountpoint, err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 64<<10))
		return hint.Wrap(fmt.Errorf("%s: %s does not go on with the mount: %s", before.Mountpoint, path, oneLine(string(text))),
			"process "+strconv.Itoa(before.PID)+" goes on serving; read "+before.Log)
	}
	for {
		s, err := Query(ctx, runtimeDir, mountpoint)
		if err != nil || s.PID != before.PID {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", before.Mountpoint, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// processes are those of one mount, in the order in which they end.
type processes []process

func watch(s Status) (all processes) {
	for _, pid := range []int{s.PID, s.KeeperPID} {
		if pid != 0 {
			all = append(all, watchProcess(pid))
		}
	}
	return all
}

// wait returns when all have ended, at the latest after d.
func (p processes) wait(d time.Duration) {
	end := time.Now().Add(d)
	for _, one := range p {
		one.wait(time.Until(end))
	}
}

func (p processes) Close() {
	for _, one := range p {
		one.Close()
	}
}

// A process is watched through a descriptor, which no later process of the
// same number can inherit (pidfd_open(2)).
type process struct{ fd int }

func watchProcess(pid int) process {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return process{-1}
	}
	return process{fd}
}

// wait returns when the process has ended, at the latest after d.
func (p process) wait(d time.Duration) {
	end := time.Now().Add(d)
	for p.fd >= 0 && time.Now().Before(end) {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}, int(time.Until(end).Milliseconds())+1)
		if !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

func (p process) Close() {
	if p.fd >= 0 {
		unix.Close(p.fd)
	}
}
