package keeper

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"
)

// A holder is the state of Hold. All of it belongs to one goroutine.
type holder struct {
	log     *slog.Logger
	over    func(map[string]*os.File) bool
	kept    *Kept
	command []string
	events  chan event
	server  *peer // nil: none lives
	standby *peer
	retry   <-chan time.Time // a successor is due
	shorts  int              // servers in a row that did not live long
}

// A peer is a server that the holder talks to.
type peer struct {
	link    *link
	pid     int
	pidfd   int
	ready   bool      // a standby: it waits for go
	asked   bool      // a server: it was told to leave
	serving time.Time // zero: not yet
	limit   time.Time // when it is killed, if it has not done what it must; zero: never
}

// An event is what one of the holder's goroutines has seen.
type event struct {
	from  *peer
	m     message
	files map[string]*os.File
	dead  bool
}

const (
	// longLife is how long a server must have served for its death not to
	// count towards a pause before the next.
	longLife   = 100 * time.Millisecond
	firstPause = 25 * time.Millisecond
	lastPause  = 10 * time.Second
	// startTime is what a successor has until it serves, or a standby until it
	// is ready; leaveTime what the old server has to leave.
	startTime = 60 * time.Second
	leaveTime = 10 * time.Second
)

// Hold is the main of a holder process. It returns when the server says that
// nothing is to be kept any more, or when over says so of what is kept. It
// touches no file system but /proc: the one that it keeps may have no server.
func Hold(log *slog.Logger, over func(files map[string]*os.File) bool) error {
	// Who ends servers by name or by group means them, not us; they say when
	// it is over.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGPIPE)
	l, err := inherited()
	if err != nil {
		return err
	}
	if l == nil {
		return errors.New("this command is for cfs-fuse itself: a server starts it")
	}
	hurry()
	h := &holder{log: log, over: over, events: make(chan event)}
	pid, err := l.maker()
	if err != nil {
		return err
	}
	if h.server, err = newPeer(l, pid); errors.Is(err, unix.ESRCH) {
		return nil // it has failed already, and left nothing to keep
	} else if err != nil {
		return err
	}
	go h.server.listen(h.events)
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case e := <-h.events:
			if done, err := h.handle(e); done || err != nil {
				return err
			}
		case <-h.retry:
			h.retry = nil
			if h.over(h.kept.Files) {
				return nil
			}
			h.start()
		case <-tick.C:
			for _, p := range []*peer{h.server, h.standby} {
				if p != nil && !p.limit.IsZero() && time.Now().After(p.limit) {
					h.log.Error("a server takes too long, and is killed", "pid", p.pid)
					unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0)
				}
			}
			if h.server == nil && h.kept != nil && h.over(h.kept.Files) {
				return nil
			}
		}
	}
}

func newPeer(l *link, pid int) (*peer, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		l.c.Close()
		return nil, fmt.Errorf("watch process %d: %w", pid, err)
	}
	return &peer{link: l, pid: pid, pidfd: fd}, nil
}

// listen passes a peer's messages on, and last its death. The link's end is
// seen first, as a process closes its files before it is dead.
func (p *peer) listen(events chan<- event) {
	for {
		m, files, err := p.link.receive()
		if err != nil {
			break
		}
		events <- event{from: p, m: m, files: files}
	}
	for {
		_, err := unix.Poll([]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}, -1)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	events <- event{from: p, dead: true}
}

func (h *holder) handle(e event) (over bool, err error) {
	if e.dead {
		return h.died(e.from), nil
	}
	switch e.m.Do {
	case doKeep:
		if h.kept != nil {
			h.kept.Close()
		}
		h.kept, h.command = &Kept{e.m.State, e.files, e.m.Restarts}, e.m.Command
		return false, ignoreGone(e.from.link.send(message{Do: doKept, PID: os.Getpid()}, nil))
	case doOver:
		return true, nil
	case doReplace:
		h.replace(e.m.Path)
	case doReady:
		if e.from == h.standby {
			e.from.ready, e.from.limit = true, time.Time{}
			h.handOver()
		}
	case doServing:
		e.from.serving, e.from.limit = time.Now(), time.Time{}
		h.log.Info("the session is served again", "pid", e.from.pid, "restarts", h.kept.Restarts)
	}
	(&Kept{Files: e.files}).Close()
	return false, nil
}

// ignoreGone makes nothing of a peer that has died: listen says so.
func ignoreGone(err error) error {
	if errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET) {
		return nil
	}
	return err
}

// died deals with the death of a peer; it reports true if nothing is left to
// hold.
func (h *holder) died(p *peer) bool {
	unix.Close(p.pidfd)
	p.link.c.Close()
	switch p {
	case h.standby:
		h.standby = nil
		h.refuse("the new program has ended; its reason is in the log")
		if h.server == nil {
			h.retry = time.After(0)
		}
	case h.server:
		h.server = nil
		if h.kept == nil || h.over(h.kept.Files) {
			return true
		}
		h.kept.Restarts++
		if h.standby != nil {
			h.handOver()
			return false
		}
		if !p.serving.IsZero() && time.Since(p.serving) < longLife || p.serving.IsZero() && h.kept.Restarts > 1 {
			h.shorts++
		} else {
			h.shorts = 0
		}
		pause := time.Duration(0)
		if h.shorts > 0 {
			pause = min(firstPause<<min(h.shorts-1, 20), lastPause)
		}
		h.log.Warn("the server has died; a successor is started", "pid", p.pid, "restarts", h.kept.Restarts, "after", pause.String())
		h.retry = time.After(pause)
	}
	return false
}

// start starts a successor of a dead server.
func (h *holder) start() {
	p, err := h.spawn("/proc/self/exe", false)
	if err != nil {
		h.shorts++
		pause := min(firstPause<<min(h.shorts, 20), lastPause)
		h.log.Error("a successor could not be started", "error", err, "next attempt in", pause.String())
		h.retry = time.After(pause)
		return
	}
	h.server = p
}

// spawn starts a server with what is kept.
func (h *holder) spawn(path string, standby bool) (*peer, error) {
	l, theirs, err := newLink()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	cmd, err := spawn(path, h.command, theirs, false)
	if err != nil {
		l.c.Close()
		return nil, err
	}
	p, err := newPeer(l, cmd.Process.Pid)
	go cmd.Wait() // ends with the process
	if err != nil {
		cmd.Process.Kill()
		return nil, err
	}
	p.limit = time.Now().Add(startTime)
	m := message{Do: doResume, State: h.kept.State, Restarts: h.kept.Restarts, Command: h.command, Standby: standby}
	if standby {
		m.Restarts++
	}
	if err := ignoreGone(l.send(m, h.kept.Files)); err != nil {
		unix.PidfdSendSignal(p.pidfd, unix.SIGKILL, nil, 0)
		l.c.Close()
		unix.Close(p.pidfd)
		return nil, err
	}
	go p.listen(h.events)
	return p, nil
}

// replace starts a new program beside the server.
func (h *holder) replace(path string) {
	if h.standby != nil {
		h.refuse("another new program is being started")
		return
	}
	p, err := h.spawn(path, true)
	if err != nil {
		h.refuse(err.Error())
		return
	}
	h.standby = p
}

func (h *holder) refuse(text string) {
	if h.server != nil {
		h.server.link.send(message{Do: doRefused, Text: text}, nil)
	}
}

// handOver lets a standby that is ready go on once there is no other server.
func (h *holder) handOver() {
	p := h.standby
	switch {
	case !p.ready:
	case h.server != nil:
		if !h.server.asked {
			h.server.asked, h.server.limit = true, time.Now().Add(leaveTime)
			h.server.link.send(message{Do: doLeave}, nil)
		}
	default:
		h.server, h.standby = p, nil
		p.limit = time.Now().Add(startTime)
		p.link.send(message{Do: doGo}, nil)
	}
}
