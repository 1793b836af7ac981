package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// A Config says what to boot. Args are the program and its arguments, none of
// which may hold blanks or be "--": they go through the kernel's command line.
type Config struct {
	Kernel *Kernel
	Initrd string
	Disk   string // "": none
	Memory int    // MiB; 0: 1024
	Args   []string
	// Console is the file that the kernel's messages are written to.
	Console string
	// Output, if set, gets what the program prints, line by line.
	Output io.Writer
}

// exitPrefix begins the line by which the init program ends its output.
const exitPrefix = "vm-exit: "

// A Machine runs. It ends by itself when its program has ended, by Kill, or
// with the context that it was started with.
type Machine struct {
	cmd     *exec.Cmd
	console string

	mu    sync.Mutex
	lines []string
	code  string        // of the program, once there is one
	news  chan struct{} // closed and replaced at each line
	done  chan struct{} // closed when qemu has ended
	err   error         // how it ended; after done
}

// Start boots a machine. It ends with the process that started it, even if
// that is killed.
func Start(ctx context.Context, c Config) (*Machine, error) {
	for _, a := range c.Args {
		if a == "" || a == "--" || strings.ContainsAny(a, " \t\n\"") {
			return nil, fmt.Errorf("start machine: argument %q cannot go through the kernel's command line", a)
		}
	}
	if c.Memory == 0 {
		c.Memory = 1024
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", "tcg", "-cpu", "max", "-smp", "1", "-m", strconv.Itoa(c.Memory),
		"-kernel", c.Kernel.Image, "-initrd", c.Initrd,
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off -- " + strings.Join(c.Args, " "),
		"-serial", "file:" + c.Console, "-serial", "stdio",
	}
	if c.Disk != "" {
		args = append(args, "-drive", "if=none,id=disk,format=raw,cache=none,file="+strings.ReplaceAll(c.Disk, ",", ",,"),
			"-device", "virtio-blk-pci,drive=disk")
	}
	m := &Machine{console: c.Console, news: make(chan struct{}), done: make(chan struct{})}
	m.cmd = exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var errs strings.Builder
	m.cmd.Stderr = &errs
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	if err := m.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	go func() {
		defer close(m.done)
		rerr := m.read(out, c.Output)
		err := m.cmd.Wait()
		if err == nil {
			err = rerr
		}
		if err != nil && errs.Len() > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(errs.String()))
		}
		m.err = err
	}()
	return m, nil
}

// read keeps the lines of the serial line.
func (m *Machine) read(r io.Reader, also io.Writer) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		line := strings.TrimRight(s.Text(), "\r")
		if also != nil {
			fmt.Fprintln(also, line)
		}
		m.mu.Lock()
		if code, ok := strings.CutPrefix(line, exitPrefix); ok {
			m.code = code
		} else {
			m.lines = append(m.lines, line)
		}
		close(m.news)
		m.news = make(chan struct{})
		m.mu.Unlock()
	}
	return s.Err()
}

// Await returns when the program has printed line, whole and by itself. It
// fails when the machine ends first, or ctx.
func (m *Machine) Await(ctx context.Context, line string) error {
	for seen := 0; ; {
		m.mu.Lock()
		lines, news := m.lines, m.news
		m.mu.Unlock()
		for ; seen < len(lines); seen++ {
			if lines[seen] == line {
				return nil
			}
		}
		select {
		case <-news:
		case <-m.done:
			m.mu.Lock()
			more := len(m.lines) > seen
			m.mu.Unlock()
			if !more {
				return m.failure(fmt.Errorf("it ended before it printed %q", line))
			}
		case <-ctx.Done():
			return m.failure(fmt.Errorf("wait for the line %q: %w", line, ctx.Err()))
		}
	}
}

// Kill takes the machine's power away, and returns when it is off.
func (m *Machine) Kill() {
	m.cmd.Process.Kill()
	<-m.done
}

// Wait returns the exit code of the program when the machine has ended. An
// error says that there is none: it crashed, was killed, or ran out of time.
// The kernel's last messages are in it.
func (m *Machine) Wait() (int, error) {
	<-m.done
	code, err := strconv.Atoi(m.code)
	if err != nil {
		return 0, m.failure(errors.Join(errors.New("it ended without an exit code of its program"), m.err))
	}
	return code, nil
}

// Lines returns what the program has printed until now.
func (m *Machine) Lines() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lines[:len(m.lines):len(m.lines)]
}

func (m *Machine) failure(err error) error {
	console, _ := os.ReadFile(m.console)
	return fmt.Errorf("machine: %w\nthe kernel's last messages:\n%s", err, console[max(0, len(console)-3000):])
}
