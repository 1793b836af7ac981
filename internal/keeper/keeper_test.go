package keeper

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary runs itself again, as a server and as what servers and
// holders start, by its arguments.
func TestMain(m *testing.M) {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 2 && args[0] == "hold":
		err = Hold(quiet, over)
	case len(args) == 2 && args[0] == "serve":
		err = actor(args[1])
	default:
		os.Exit(m.Run())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

var quiet = slog.New(slog.NewTextHandler(os.Stderr, nil))

// over is what is kept being the read end of a pipe without a writer.
func over(files map[string]*os.File) bool {
	fds := []unix.PollFd{{Fd: int32(files["pipe"].Fd())}}
	n, err := unix.Poll(fds, 0)
	return err == nil && n == 1 && fds[0].Revents&unix.POLLHUP != 0
}

// actor is the main of a server: it tells what it does in a file of lines, and
// does what it is told over a pipe that is kept.
func actor(dir string) error {
	tell := func(format string, args ...any) {
		f, err := os.OpenFile(filepath.Join(dir, "told"), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
		if err == nil {
			fmt.Fprintf(f, format+"\n", args...)
			f.Close()
		}
	}
	command := []string{"hold", dir}
	var h *Holder
	var pipe *os.File
	if _, err := os.Stat(filepath.Join(dir, "fail")); err == nil {
		return errors.New("told to fail")
	}
	s, err := FromHolder()
	switch {
	case err != nil:
		return err
	case s != nil:
		if h, err = s.Holder(command, quiet); err != nil {
			return err
		}
		if err := s.Wait(); err != nil {
			return err
		}
		pipe = s.Files["pipe"]
		h.Serving(s)
		tell("resumed %d %d %s %d", os.Getpid(), h.PID(), s.State, s.Restarts)
	default:
		if pipe, err = os.Open(filepath.Join(dir, "fifo")); err != nil {
			return err
		}
		if h, err = StartHolder(command, quiet); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(dir, "nothing")); err == nil {
			tell("%d", h.PID())
			return nil
		}
		k := Kept{State: json.RawMessage(`"words"`), Files: map[string]*os.File{"pipe": pipe}}
		if err := h.Keep(k, os.Args[1:]); err != nil {
			return err
		}
		tell("started %d %d", os.Getpid(), h.PID())
	}
	lines := make(chan string)
	go func() {
		in := bufio.NewScanner(pipe)
		for in.Scan() {
			lines <- in.Text()
		}
		close(lines)
	}()
	for {
		select {
		case <-h.Leave():
			tell("left %d", os.Getpid())
			return nil
		case line, ok := <-lines:
			switch {
			case !ok || line == "over":
				h.Over()
				tell("over %d", os.Getpid())
				return nil
			case line == "holder":
				tell("holder %d", h.PID())
			case strings.HasPrefix(line, "replace "):
				go func() {
					err := h.Replace(strings.TrimPrefix(line, "replace "))
					if err != nil {
						tell("refused %v", err)
					}
				}()
			}
		}
	}
}

// A stage is a folder in which actors play.
type stage struct {
	t    *testing.T
	dir  string
	pipe *os.File // tells the actor
	read int      // lines of what was told
}

func newStage(t *testing.T) *stage {
	t.Helper()
	s := &stage{t: t, dir: t.TempDir()}
	fifo := filepath.Join(s.dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if s.pipe, err = os.OpenFile(fifo, os.O_RDWR, 0); err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self, "serve", s.dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go cmd.Wait()
	// Our end was open for reading too, so that the actor's open found it.
	t.Cleanup(func() { s.pipe.Close() })
	return s
}

func (s *stage) tell(line string) {
	s.t.Helper()
	if _, err := fmt.Fprintln(s.pipe, line); err != nil {
		s.t.Fatal(err)
	}
}

// next waits for a line that begins with word, and returns the rest of it.
func (s *stage) next(word string) []string {
	s.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		text, _ := os.ReadFile(filepath.Join(s.dir, "told"))
		lines := strings.Split(strings.TrimSuffix(string(text), "\n"), "\n")
		for s.read < len(lines) && lines[s.read] != "" {
			line := lines[s.read]
			s.read++
			if rest, ok := strings.CutPrefix(line, word+" "); ok {
				return strings.Fields(rest)
			}
		}
	}
	text, _ := os.ReadFile(filepath.Join(s.dir, "told"))
	s.t.Fatalf("no %q; told so far:\n%s", word, text)
	return nil
}

func kill(t *testing.T, pid string, sig syscall.Signal) {
	t.Helper()
	n, err := strconv.Atoi(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(n, sig); err != nil {
		t.Fatalf("kill %s: %v", pid, err)
	}
}

func gone(t *testing.T, pids ...string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		var left []string
		for _, pid := range pids {
			text, err := os.ReadFile("/proc/" + pid + "/stat")
			if _, after, _ := strings.Cut(string(text), ") "); err == nil && !strings.HasPrefix(after, "Z") {
				left = append(left, pid)
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("processes %v are still there", left)
		}
	}
}

// Each server that dies has a successor with the same state; the holder is one
// through it all, does not mind to be told to end, and leaves when it is over.
func TestServersDie(t *testing.T) {
	s := newStage(t)
	first := s.next("started")
	server, holder := first[0], first[1]
	kill(t, holder, unix.SIGTERM)
	for i := range 5 {
		kill(t, server, unix.SIGKILL)
		r := s.next("resumed")
		if r[1] != holder || r[2] != `"words"` || r[3] != strconv.Itoa(i+1) {
			t.Errorf("resumed with %q, want holder %s, state \"words\", %d restarts", r, holder, i+1)
		}
		server = r[0]
	}
	s.tell("over")
	s.next("over")
	gone(t, server, holder)
}

// A holder that dies is replaced, with what it held.
func TestHolderDies(t *testing.T) {
	s := newStage(t)
	first := s.next("started")
	server, holder := first[0], first[1]
	kill(t, holder, unix.SIGKILL)
	other := holder
	for end := time.Now().Add(10 * time.Second); other == holder && time.Now().Before(end); {
		s.tell("holder")
		other = s.next("holder")[0]
	}
	if other == holder {
		t.Fatal("the dead holder was not replaced")
	}
	time.Sleep(200 * time.Millisecond) // it has been given everything
	kill(t, server, unix.SIGKILL)
	r := s.next("resumed")
	if r[1] != other || r[2] != `"words"` {
		t.Errorf("resumed with %q, want holder %s and state \"words\"", r, other)
	}
	s.tell("over")
	gone(t, holder, r[0], other)
}

// What is over while nobody serves it ends the holder.
// A server that ends before it has given its holder anything, and perhaps
// before the holder has looked around, leaves none behind.
func TestFailedAtOnce(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"fifo", "nothing"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 20 {
		if out, err := exec.Command(os.Args[0], "serve", dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	told, err := os.ReadFile(filepath.Join(dir, "told"))
	if err != nil {
		t.Fatal(err)
	}
	holders := strings.Fields(string(told))
	if len(holders) != 20 {
		t.Fatalf("%d holders, want 20: %q", len(holders), told)
	}
	gone(t, holders...)
}

func TestOverWithoutServer(t *testing.T) {
	s := newStage(t)
	first := s.next("started")
	if err := os.WriteFile(filepath.Join(s.dir, "fail"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	kill(t, first[0], unix.SIGKILL)
	time.Sleep(300 * time.Millisecond) // successors start, and fail
	s.pipe.Close()
	gone(t, first...)
}

// A new program takes over in order; one that fails changes nothing.
func TestReplace(t *testing.T) {
	s := newStage(t)
	first := s.next("started")
	server, holder := first[0], first[1]
	s.tell("replace /bin/false")
	s.next("refused")
	s.tell("replace /nonexistent/program")
	s.next("refused")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	s.tell("replace " + self)
	if left := s.next("left"); left[0] != server {
		t.Errorf("process %s left, want %s", left[0], server)
	}
	r := s.next("resumed")
	if r[0] == server || r[1] != holder || r[3] != "1" {
		t.Errorf("resumed with %q", r)
	}
	kill(t, r[0], unix.SIGKILL)
	if r = s.next("resumed"); r[3] != "2" {
		t.Errorf("resumed with %q, want 2 restarts", r)
	}
	s.tell("over")
	gone(t, server, holder, r[0])
}

// Messages that are no messages are refused, and nothing of them stays open.
func TestReceiveRefuses(t *testing.T) {
	l, theirs, err := newLink()
	if err != nil {
		t.Fatal(err)
	}
	defer l.c.Close()
	other, err := linkOf(theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer other.c.Close()
	for _, text := range []string{"{", `{"do":"keep","names":["a","b"]}`, "\x00"} {
		if _, _, err := other.c.WriteMsgUnix([]byte(text), unix.UnixRights(0), nil); err != nil {
			t.Fatal(err)
		}
		if _, files, err := l.receive(); err == nil || len(files) > 0 {
			t.Errorf("%q: %v, %v; want an error and no files", text, files, err)
		}
	}
	if err := l.send(message{Do: doKeep, Text: strings.Repeat("x", maxMessage)}, nil); err == nil {
		t.Error("a message that is too long was sent")
	}
	other.c.Close()
	if _, _, err := l.receive(); !errors.Is(err, net.ErrClosed) && !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

// systemd is played by a socket, and by the environment of a process that it
// starts (sd_listen_fds(3)): what was stored comes back.
func TestSystemdStore(t *testing.T) {
	dir := t.TempDir()
	addr := filepath.Join(dir, "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: addr, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	stored := map[string]*os.File{}
	var ready bool
	receive := func(n int) {
		t.Helper()
		for range n {
			data, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			k, oobn, _, _, err := c.ReadMsgUnix(data, oob)
			if err != nil {
				t.Fatal(err)
			}
			fields := map[string]string{}
			for line := range strings.Lines(string(data[:k])) {
				key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
				fields[key] = value
			}
			name := fields["FDNAME"]
			switch {
			case fields["FDSTORE"] == "1":
				messages, err := unix.ParseSocketControlMessage(oob[:oobn])
				if err != nil || len(messages) != 1 {
					t.Fatalf("%q: %v, %v", data[:k], messages, err)
				}
				fds, err := unix.ParseUnixRights(&messages[0])
				if err != nil || len(fds) != 1 {
					t.Fatal(fds, err)
				}
				stored[name] = os.NewFile(uintptr(fds[0]), name)
			case fields["FDSTOREREMOVE"] == "1":
				stored[name].Close()
				delete(stored, name)
			case fields["READY"] == "1":
				ready = true
			default:
				t.Errorf("systemd was told %q", data[:k])
			}
		}
	}
	if s, _, err := FromSystemd(); s != nil || err != nil {
		t.Errorf("without systemd: %v, %v", s, err)
	}
	t.Setenv("NOTIFY_SOCKET", addr)
	t.Setenv("FDSTORE", "0")
	if s, _, err := FromSystemd(); s != nil || err != nil {
		t.Errorf("with a store of nothing: %v, %v", s, err)
	}
	t.Setenv("FDSTORE", "2")
	s, kept, err := FromSystemd()
	if s == nil || kept != nil || err != nil {
		t.Fatalf("with an empty store: %v, %v, %v", s, kept, err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := s.Keep(Kept{State: []byte("some\nwords"), Files: map[string]*os.File{"pipe": r}, Restarts: 3}); err != nil {
		t.Fatal(err)
	}
	two := map[string]*os.File{"pipe": r, "another": w}
	if err := s.Keep(Kept{Files: two}); err == nil || !strings.Contains(err.Error(), "FileDescriptorStoreMax=3") {
		t.Errorf("more than the unit allows: %v, want how many it must", err)
	}
	r.Close()
	if err := s.Ready(); err != nil {
		t.Fatal(err)
	}
	receive(3)
	if !ready || len(stored) != 2 {
		t.Fatalf("ready %t, stored %v", ready, stored)
	}
	// The service's next process, as systemd starts it.
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0" -test.run TestSystemdSuccessor -test.v`, self)
	cmd.Env = append(os.Environ(), "LISTEN_FDS=2", "LISTEN_FDNAMES=cfs-fuse-state:cfs-fuse-pipe", successorEnv+"=1")
	cmd.ExtraFiles = []*os.File{stored["cfs-fuse-state"], stored["cfs-fuse-pipe"]}
	if _, err := w.WriteString("through the pipe"); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	receive(2) // it took everything out
	if len(stored) != 0 {
		t.Errorf("stored at the end: %v", stored)
	}
}

const successorEnv = "CFS_FUSE_TEST_SUCCESSOR"

// TestSystemdSuccessor is the second process of TestSystemdStore, which starts
// it; by itself it is a process without a store.
func TestSystemdSuccessor(t *testing.T) {
	s, kept, err := FromSystemd()
	if os.Getenv(successorEnv) == "" {
		if s != nil || kept != nil || err != nil {
			t.Errorf("without systemd: %v, %v, %v", s, kept, err)
		}
		return
	}
	if err != nil || kept == nil {
		t.Fatalf("FromSystemd: %v, %v, %v", s, kept, err)
	}
	if string(kept.State) != "some\nwords" || kept.Restarts != 4 || len(kept.Files) != 1 {
		t.Errorf("kept %q, %d restarts, %v", kept.State, kept.Restarts, kept.Files)
	}
	buf := make([]byte, 100)
	n, err := kept.Files["pipe"].Read(buf)
	if string(buf[:n]) != "through the pipe" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	if err := s.Over(); err != nil {
		t.Error(err)
	}
}
