// Package sandbox runs a program in an image's tree: with a root of its own,
// writable in memory, and in mount and process namespaces of its own, so that
// nothing that it mounts or starts outlives it. It isolates no more than
// that: network, host name and users are the caller's, and a program of root
// can leave it. It is for recording what a start reads, not for running containers.
//
//	/      overlayfs: the image below, a tmpfs above
//	/proc  of the new process namespace
//	/sys   the caller's, read-only
//	/dev   a tmpfs with null, zero, full, random, urandom, tty, pts, shm
//	/tmp, /run  tmpfs
//	/etc/resolv.conf, /etc/hosts  the caller's
//
// It is two processes: Run starts the program's own binary again, as Init, which
// sets all this up as the first process of the namespace, starts the program, reaps
// what others leave, and ends with the program's exit status.
package sandbox

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// A Command is what to run.
type Command struct {
	Root string   // where the image is mounted
	Temp string   // an empty folder of the caller's, on a filesystem that can be mounted over
	Args []string // the program, looked for in the image's PATH, and its arguments
	Env  []string // "NAME=value"; the caller's environment is not passed on
	Dir  string   // working directory in the image; empty: /
	User string   // user[:group] in the image, names or numbers; empty: root
}

// Statuses of Run for a program that could not be started, as shells have them.
const (
	StatusCannotRun = 126
	StatusNotFound  = 127
)

// initEnv marks a process as Init; its value is the Command in JSON.
const initEnv = "CFS_FUSE_SANDBOX"

// killed is added to the number of the signal that ended a program.
const killed = 128

// Run runs the command with this process's standard input, output and error, and
// returns its exit status, 128 + n if signal n ended it. When ctx ends
// the program gets SIGTERM, and SIGKILL if it stays. An error says that
// the sandbox could not be made. It wants root.
func Run(ctx context.Context, c Command, signals <-chan os.Signal) (status int, err error) {
	text, err := json.Marshal(c)
	if err != nil {
		return 0, err
	}
	report, w, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	defer report.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args[0] = "cfs-fuse-sandbox"
	cmd.Env = []string{initEnv + "=" + string(text)}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC, Pdeathsig: syscall.SIGKILL}
	// The parent of Pdeathsig is the thread.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err = cmd.Start()
	w.Close()
	if err != nil {
		return 0, fmt.Errorf("start a process in namespaces of its own: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	message, _ := io.ReadAll(io.LimitReader(report, 4096)) // until the program runs, or cannot
	for waiting := true; waiting; {
		select {
		case err = <-done:
			waiting = false
		case s := <-signals:
			cmd.Process.Signal(s)
		case <-ctx.Done():
			cmd.Process.Signal(unix.SIGTERM) // Init passes it on, and kills after a while
			ctx = context.Background()
		}
	}
	if len(message) > 0 {
		return 0, errors.New(string(message))
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			return killed + int(ws.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return 0, err
}
