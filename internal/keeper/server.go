package keeper

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A Holder is a server's view of its holder process.
type Holder struct {
	command []string // that starts a holder
	log     *slog.Logger
	run     sync.WaitGroup
	leave   chan struct{}

	mu      sync.Mutex
	link    *link
	pid     int
	kept    *Kept    // what it was given last; Files are ours
	success []string // the command of a successor
	over    bool
	replies chan message // of the holder that lives now
}

// Started reports whether this process was started by a holder or as one.
func Started() bool { return os.Getenv(linkEnv) != "" }

// replyTime bounds how long a holder may take to answer.
const replyTime = 10 * time.Second

// StartHolder starts a holder process: this program with the arguments
// command, which must call Hold.
func StartHolder(command []string, log *slog.Logger) (*Holder, error) {
	h := &Holder{command: command, log: log, leave: make(chan struct{})}
	if err := h.start(); err != nil {
		return nil, err
	}
	return h, nil
}

// start starts a holder. Called with mu held, or before h is shared.
func (h *Holder) start() error {
	l, theirs, err := newLink()
	if err != nil {
		return fmt.Errorf("start a holder: %w", err)
	}
	defer theirs.Close()
	cmd, err := spawn("/proc/self/exe", h.command, theirs, true)
	if err != nil {
		l.c.Close()
		return fmt.Errorf("start a holder: %w", err)
	}
	h.attach(l, cmd.Process.Pid)
	h.run.Go(func() { cmd.Wait() })
	return nil
}

// attach begins to listen to a holder.
func (h *Holder) attach(l *link, pid int) {
	replies := make(chan message, 1)
	h.link, h.pid, h.replies = l, pid, replies
	h.run.Go(func() { h.listen(l, replies) })
}

// listen passes on what a holder says, and replaces it when it dies.
func (h *Holder) listen(l *link, replies chan message) {
	began := time.Now()
	for {
		m, files, err := l.receive()
		if err != nil {
			break
		}
		(&Kept{Files: files}).Close()
		if m.Do == doLeave {
			close(h.leave)
			return
		}
		select {
		case replies <- m:
		default: // nobody asked
		}
	}
	l.c.Close()
	close(replies)
	young := time.Since(began) < time.Second
	for {
		h.mu.Lock()
		if h.over || h.link != l || h.kept == nil {
			h.mu.Unlock()
			return
		}
		if young { // something kills holders
			h.mu.Unlock()
			time.Sleep(time.Second)
			young = false
			continue
		}
		h.log.Warn("the process that keeps the session has died; another is started", "pid", h.pid)
		err := h.start()
		if err == nil {
			if err = h.give(); err != nil {
				h.log.Warn("the new keeper did not take the session", "error", err)
				h.link.c.Close() // its own listen goes on from here
			}
			h.mu.Unlock()
			return
		}
		h.mu.Unlock()
		h.log.Warn("nothing keeps the session: it ends if this process dies", "error", err)
		time.Sleep(time.Second)
	}
}

// Keep gives the holder what a successor needs, in place of what it was given
// before. Command are a successor's arguments. A nil error promises that the
// holder has it. The Holder makes its own copies of the descriptors.
func (h *Holder) Keep(k Kept, command []string) error {
	files, err := copies(k.Files)
	if err != nil {
		return err
	}
	mine := Kept{State: k.State, Restarts: k.Restarts, Files: files}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.kept != nil {
		h.kept.Close()
	}
	h.kept, h.success = &mine, command
	return h.give()
}

// give sends what is kept and waits for the answer. Called with mu held.
func (h *Holder) give() error {
	m := message{Do: doKeep, State: h.kept.State, Restarts: h.kept.Restarts, Command: h.success, PID: os.Getpid()}
	if err := h.link.send(m, h.kept.Files); err != nil {
		return fmt.Errorf("give the session to its holder: %w", err)
	}
	_, err := h.reply(doKept, replyTime)
	return err
}

func (h *Holder) reply(want string, limit time.Duration) (message, error) {
	select {
	case m, ok := <-h.replies:
		switch {
		case !ok:
			return m, errors.New("the holder has ended")
		case m.Do == doRefused:
			return m, errors.New(m.Text)
		case m.Do != want:
			return m, fmt.Errorf("the holder said %q, not %q", m.Do, want)
		}
		return m, nil
	case <-time.After(limit):
		return message{}, fmt.Errorf("the holder (process %d) does not answer", h.pid)
	}
}

// PID returns the holder's process.
func (h *Holder) PID() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pid
}

// Outdated reports whether the holder runs another program than this process.
func (h *Holder) Outdated() bool {
	mine, err := os.Stat("/proc/self/exe")
	theirs, err2 := os.Stat(fmt.Sprintf("/proc/%d/exe", h.PID()))
	return err == nil && err2 == nil && !os.SameFile(mine, theirs)
}

// Renew replaces the holder by one of this program.
func (h *Holder) Renew() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.link
	if err := h.start(); err != nil {
		return err
	}
	err := h.give()
	old.send(message{Do: doOver}, nil)
	return err
}

// Replace starts the program at path as a successor. It fails, and nothing has
// changed, if that one could not go on; otherwise Leave is closed soon.
func (h *Holder) Replace(path string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.link.send(message{Do: doReplace, Path: path}, nil); err != nil {
		return err
	}
	select {
	case m, ok := <-h.replies:
		if !ok {
			return errors.New("the holder has ended")
		}
		return errors.New(m.Text)
	case <-h.leave:
		return nil
	case <-time.After(startTime + replyTime):
		return fmt.Errorf("the holder (process %d) does not answer", h.pid)
	}
}

// Leave is closed when a successor is ready: this process must end soon,
// without unmounting.
func (h *Holder) Leave() <-chan struct{} { return h.leave }

// Over tells the holder that nothing is to be kept any more, which ends it.
func (h *Holder) Over() {
	h.mu.Lock()
	h.over = true
	h.link.send(message{Do: doOver}, nil)
	h.mu.Unlock()
	done := make(chan struct{})
	go func() {
		h.run.Wait() // its end is seen by listen
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(replyTime):
		h.log.Warn("the process that kept the session does not end", "pid", h.pid)
	}
	if h.kept != nil {
		h.kept.Close()
	}
}

// A Successor is a process that was started to go on for another one.
type Successor struct {
	Kept
	Standby bool // the other one still lives
	link    *link
	command []string
}

// FromHolder returns what this process was started with by a holder, and nil
// if it was not.
func FromHolder() (*Successor, error) {
	l, err := inherited()
	if l == nil || err != nil {
		return nil, err
	}
	m, files, err := l.receive()
	if err == nil && m.Do != doResume {
		err = fmt.Errorf("a holder said %q", m.Do)
	}
	if err != nil {
		return nil, fmt.Errorf("what the holder keeps: %w", err)
	}
	return &Successor{Kept: Kept{m.State, files, m.Restarts}, Standby: m.Standby, link: l, command: m.Command}, nil
}

// Wait returns when this process may touch the descriptors: at once if the one
// before is dead, else when that has left, after this one has said that it is
// ready.
func (s *Successor) Wait() error {
	if !s.Standby {
		return nil
	}
	if err := s.link.send(message{Do: doReady}, nil); err != nil {
		return err
	}
	m, _, err := s.link.receive()
	if err == nil && m.Do != doGo {
		err = fmt.Errorf("a holder said %q", m.Do)
	}
	return err
}

// Holder returns the Holder of this process, which says nothing to it before
// Serving. HolderCommand is what StartHolder takes.
func (s *Successor) Holder(holderCommand []string, log *slog.Logger) (*Holder, error) {
	files, err := copies(s.Files)
	if err != nil {
		return nil, err
	}
	kept := &Kept{State: s.State, Restarts: s.Restarts, Files: files}
	return &Holder{command: holderCommand, log: log, leave: make(chan struct{}), kept: kept, success: s.command}, nil
}

// Serving tells the holder that this process serves. From then on the holder
// is watched.
func (h *Holder) Serving(s *Successor) {
	relax()
	if err := s.link.send(message{Do: doServing}, nil); err != nil {
		h.log.Warn("tell the process that keeps the session", "error", err) // its end is seen next
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	pid, err := s.link.maker()
	if err != nil {
		h.log.Warn("who keeps the session is not known", "error", err)
	}
	h.attach(s.link, pid)
}

// spawn starts a process with its end of a link, in a session of its own or in
// ours.
func spawn(path string, args []string, theirs *os.File, session bool) (*exec.Cmd, error) {
	cmd := exec.Command(path, args...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), linkEnv+"=3")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: session}
	return cmd, cmd.Start()
}

// envDescriptor returns the descriptor that an environment variable names, and
// -1 if there is none, and takes the variable away.
func envDescriptor(name string) (int, error) {
	text := os.Getenv(name)
	if text == "" {
		return -1, nil
	}
	os.Unsetenv(name)
	fd, err := strconv.Atoi(text)
	if err != nil || fd < 3 {
		return -1, fmt.Errorf("%s=%s: not a descriptor", name, text)
	}
	unix.CloseOnExec(fd)
	return fd, nil
}
