// Command init is the first process of a test machine (package e2e/vm). It
// mounts what programs expect, loads the modules of the initramfs in their
// order, mounts the disk (if there is one) at /disk, and runs the program that
// is given as its arguments. It tells the program's exit code on the serial
// line, and ends the machine.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// output is the serial line that the host reads; the kernel has the other.
const output = "/dev/ttyS1"

func main() {
	code, err := start()
	if err != nil {
		fmt.Println("init:", err)
		code = 1
	}
	fmt.Printf("vm-exit: %d\n", code)
	unix.Sync()
	unix.IoctlSetInt(int(os.Stdout.Fd()), unix.TCSBRK, 1) // tcdrain(3)
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)            // qemu ends: -no-reboot
	select {}
}

func start() (int, error) {
	os.Setenv("PATH", "/bin")
	os.Setenv("HOME", "/root")
	os.Setenv("TMPDIR", "/tmp")
	for _, m := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/tmp"}, {"tmpfs", "/run"}} {
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return 1, fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := openOutput(); err != nil {
		return 1, err
	}
	modules, err := filepath.Glob("/modules/*.ko")
	if err != nil {
		return 1, err
	}
	slices.Sort(modules)
	for _, m := range modules {
		if err := load(m); err != nil {
			return 1, fmt.Errorf("load %s: %w", m, err)
		}
	}
	if _, err := os.Stat("/dev/vda"); err == nil {
		if err := unix.Mount("/dev/vda", "/disk", "ext4", 0, ""); err != nil {
			return 1, fmt.Errorf("mount the disk: %w", err)
		}
	}
	if len(os.Args) < 2 {
		return 1, errors.New("no program given")
	}
	return run(os.Args[1:])
}

// run runs a program, and buries the processes that lose their parents
// meanwhile, until it has ended.
func run(args []string) (int, error) {
	program, err := os.StartProcess(args[0], args, &os.ProcAttr{
		Dir: "/root", Env: os.Environ(), Files: []*os.File{nil, os.Stdout, os.Stdout},
	})
	if err != nil {
		return 1, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return 1, fmt.Errorf("wait for %s: %w", args[0], err)
		case pid != program.Pid:
		case status.Signaled():
			return 128 + int(status.Signal()), nil
		default:
			return status.ExitStatus(), nil
		}
	}
}

// openOutput makes the serial line standard output, without the translation
// of newlines that terminals do.
func openOutput() error {
	f, err := os.OpenFile(output, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	t, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		return fmt.Errorf("%s: %w", output, err)
	}
	t.Oflag &^= unix.OPOST
	t.Lflag &^= unix.ECHO | unix.ICANON | unix.ISIG
	t.Cflag = t.Cflag&^unix.CBAUD | unix.B115200
	if err := unix.IoctlSetTermios(int(f.Fd()), unix.TCSETS, t); err != nil {
		return fmt.Errorf("%s: %w", output, err)
	}
	os.Stdout, os.Stderr = f, f
	return nil
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.FinitModule(int(f.Fd()), "", 0)
}
