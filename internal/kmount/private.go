package kmount

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// InPrivate calls fn on a thread in a mount namespace of its own, a copy of
// ours, in which the detached mounts are attached. It is for kernels before
// 6.15, where overlayfs takes only such mounts as lowers that are attached in
// the caller's namespace (clone_private_mount: "failed to clone lowerpath").
// Nobody else sees them meanwhile. What fn builds stays when the namespace goes
// with the thread; the mounts are attached nowhere afterwards, and Path names
// them still.
func InPrivate(fn func() error, mounts ...*os.File) error {
	done := make(chan error)
	go onThread(func() error { return inPrivate(fn, mounts) }, done)
	return <-done
}

// onThread runs fn on a thread that ends with the goroutine, never on the
// process's first: that one would stay, and /proc/self is about it.
func onThread(fn func() error, done chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() != unix.Getpid() {
		done <- fn() // never unlocked
		return
	}
	// While this goroutine holds the first thread, another gets another.
	ended := make(chan error)
	go onThread(fn, ended)
	err := <-ended
	runtime.UnlockOSThread()
	done <- err
}

func inPrivate(fn func() error, mounts []*os.File) error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace to build a mount in: %w", err)
	}
	// What is attached here must not propagate to the namespace we come from.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("mount namespace to build a mount in: %w", err)
	}
	// Over the root, one over the other: paths are looked up beneath them, from
	// the thread's root.
	for _, m := range mounts {
		if err := Attach(m, "/"); err != nil {
			return err
		}
	}
	return fn()
}
