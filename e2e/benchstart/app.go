package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// An app is the web application, running in a root filesystem.
type app struct {
	cmd  *exec.Cmd
	hold io.Closer // its standard input
	errs bytes.Buffer
	addr string
	done chan error
}

// startApp runs the application by chroot into root. End it with stop.
func (b *bench) startApp(root string) (*app, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close()
	a := &app{addr: addr.String(), done: make(chan error, 1)}
	// chroot(1) and not this process executes the application: until a vfork's
	// child has done so its parent's thread stands still, and with it Go's
	// garbage collection and the registry, which that may have to wait for.
	a.cmd = exec.Command("chroot", root, "/usr/bin/python3", images.WebServer, strconv.Itoa(addr.Port))
	a.cmd.Env = []string{"PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1", "OPENBLAS_NUM_THREADS=1"}
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	a.cmd.Stderr = &a.errs
	if a.hold, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := a.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the application in %s: %w", root, err)
	}
	go func() { a.done <- a.cmd.Wait() }()
	return a, nil
}

func (a *app) stop() {
	a.hold.Close()
	a.cmd.Process.Kill()
	<-a.done
	a.done <- nil // for a second stop
}

// page is what is asked for first.
func (b *bench) page() string {
	if b.all {
		return "/all"
	}
	return "/"
}

const minModules = 300 // that issue 4 wants the application to import

var modulesPattern = regexp.MustCompile(`data-modules="(\d+)"`)

// answer waits for the application's first answer, and returns how many
// modules it has imported for it.
func (a *app) answer(ctx context.Context, page string) (modules int, err error) {
	client := &http.Client{Timeout: 10 * time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	for {
		var text []byte
		text, err = get(ctx, client, "http://"+a.addr+page, nil)
		if err == nil {
			m := modulesPattern.FindSubmatch(text)
			if m == nil {
				return 0, fmt.Errorf("the application answered %.300q", text)
			}
			if modules, err = strconv.Atoi(string(m[1])); err == nil && modules < minModules {
				err = fmt.Errorf("the application has imported %d modules, want %d", modules, minModules)
			}
			return modules, err
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			return 0, fmt.Errorf("%w: %s", err, a.errs.Bytes())
		}
		select {
		case <-ctx.Done():
			return 0, ctx.Err()
		case err := <-a.done:
			a.done <- err
			return 0, fmt.Errorf("the application ended: %w: %s", err, a.errs.Bytes())
		case <-time.After(2 * time.Millisecond):
		}
	}
}
