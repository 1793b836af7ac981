package main

import (
	"context"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/progress"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// newBar makes a bar on standard error, or one that shows nothing.
func newBar(quiet bool) *progress.Bar {
	switch {
	case quiet:
		return progress.New(io.Discard, "", nil)
	case isTerminal(os.Stderr):
		return progress.New(os.Stderr, "", columns)
	}
	return progress.New(os.Stderr, "cfs-fuse: ", nil)
}

// columns is the width of the terminal on standard error.
func columns() int {
	ws, err := unix.IoctlGetWinsize(int(os.Stderr.Fd()), unix.TIOCGWINSZ)
	if err != nil || ws.Col == 0 {
		return 80
	}
	return int(ws.Col)
}

// between is the time between two looks at a mount.
const between = 200 * time.Millisecond

// awaitState waits for a state, and shows meanwhile how far it is.
func awaitState(ctx context.Context, runtimeDir, mountpoint string, state mount.State, quiet bool) error {
	bar := newBar(quiet)
	defer bar.Done()
	done := make(chan error, 1)
	go func() { done <- mount.Await(ctx, runtimeDir, mountpoint, state) }()
	tick := time.NewTicker(between)
	defer tick.Stop()
	for {
		select {
		case err := <-done:
			return err
		case <-tick.C:
		}
		if quiet {
			continue
		}
		s, err := mount.Query(ctx, runtimeDir, mountpoint)
		switch {
		case err != nil: // Await says what is wrong
		case s.State == mount.Lazy:
			bar.Set("filling "+s.Mountpoint, progress.Bytes, s.BytesLocal, s.Bytes)
		case s.State == mount.Complete:
			bar.Set("sealing "+s.Mountpoint, progress.Items, s.FilesSealed, max(int64(s.Files), s.FilesSealed))
		default:
			bar.Set("waiting for the swap of "+s.Mountpoint, progress.Items, 0, 0)
		}
	}
}
