package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/progress"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// readyEnv names the descriptor on which a process in the background reports
// to the command that started it.
const readyEnv = "CFS_FUSE_READY_FD"

// A report is what the background process says: how far it has come, as often as
// it likes, and then once that it serves, or why not.
type report struct {
	Step  string `json:"step,omitempty"`
	Done  int64  `json:"done,omitempty"`
	Total int64  `json:"total,omitempty"`

	Error string `json:"error,omitempty"`
	Hint  string `json:"hint,omitempty"`
	Code  int    `json:"code"`
}

// reportedError is an error that the background process met.
type reportedError struct{ report }

func (e *reportedError) Error() string { return e.report.Error }

// ExitCode returns the code that the background process would have ended with.
func (e *reportedError) ExitCode() int { return e.Code }

// readiness is the background process's end of the pipe; nil elsewhere.
type readiness struct {
	mu sync.Mutex
	w  *os.File
}

func readyPipe() *readiness {
	fd, err := strconv.Atoi(os.Getenv(readyEnv))
	if err != nil {
		return nil
	}
	os.Unsetenv(readyEnv)
	syscall.CloseOnExec(fd)
	return &readiness{w: os.NewFile(uintptr(fd), "ready")}
}

// report says how the start ended; later calls do nothing.
func (r *readiness) report(err error) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.w == nil {
		return
	}
	var rep report
	if err != nil {
		rep = report{Error: oneLine(err.Error()), Hint: hint.Of(err), Code: exitCode(err)}
	}
	json.NewEncoder(r.w).Encode(rep)
	r.w.Close()
	r.w = nil
}

// background runs this command line again in a session of its own, which
// outlives us and has the given capabilities besides the usual ones, and returns
// when that process reports.
func background(ctx context.Context, runtimeDir, mountpoint string, capabilities []int, quiet bool) error {
	abs, err := mount.ResolveMountpoint(mountpoint)
	if err != nil {
		return hint.Wrap(err, "name an existing folder (mkdir -p "+mountpoint+")")
	}
	if err := os.MkdirAll(runtimeDir, 0o700); err != nil {
		return hint.Wrap(fmt.Errorf("runtime folder: %w", err), "name another folder with --runtime-dir")
	}
	logPath := mount.FilesOf(runtimeDir, abs).Log
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("log of the background process: %w", err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), readyEnv+"=3", beganEnv+"="+strconv.FormatInt(processStart.UnixNano(), 10))
	cmd.ExtraFiles = []*os.File{w}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = startRestricted(cmd, capabilities)
	w.Close()
	if err != nil {
		return fmt.Errorf("start the background process: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	bar := newBar(quiet)
	rep, err := readReport(r, bar)
	bar.Done()
	if err != nil {
		state := "gone"
		if werr := cmd.Wait(); werr != nil {
			state = werr.Error()
		}
		if errors.Is(err, io.EOF) {
			err = fmt.Errorf("it ended first (%s)", state)
		}
		return hint.Wrap(fmt.Errorf("start the background process: %w", err), "read "+logPath)
	}
	if rep.Error != "" {
		cmd.Wait()
		os.Remove(logPath)
		return hint.Wrap(&reportedError{rep}, rep.Hint)
	}
	return cmd.Process.Release()
}

// readReport shows how far the background process has come, until it says the
// last word.
func readReport(r io.Reader, bar *progress.Bar) (report, error) {
	reports := make(chan report)
	failed := make(chan error, 1)
	go func() {
		dec := json.NewDecoder(r)
		for {
			var rep report
			if err := dec.Decode(&rep); err != nil {
				failed <- err
				return
			}
			reports <- rep
			if rep.Step == "" {
				return
			}
		}
	}()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var at report
	for {
		select {
		case rep := <-reports:
			if rep.Step == "" {
				return rep, nil
			}
			at = rep
		case err := <-failed:
			return report{}, err
		case <-tick.C: // time passes, too
		}
		if at.Step != "" {
			bar.Set(at.Step, progress.Items, at.Done, at.Total)
		}
	}
}

// step says how far the start has come.
func (r *readiness) step(what string, done, total int64) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.w != nil {
		json.NewEncoder(r.w).Encode(report{Step: what, Done: done, Total: total})
	}
}

// beganEnv has the time at which the command of a background process was given,
// in nanoseconds since 1970.
const beganEnv = "CFS_FUSE_BEGAN"

// processStart is when this process began, so far as it can know.
var processStart = time.Now()

// commandBegan returns when the command was given.
func commandBegan() time.Time {
	n, err := strconv.ParseInt(os.Getenv(beganEnv), 10, 64)
	os.Unsetenv(beganEnv)
	if err != nil || time.Since(time.Unix(0, n)) > time.Minute {
		return processStart
	}
	return time.Unix(0, n)
}
