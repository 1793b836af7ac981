package mount

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// loopAttempts bounds how often a free loop device is asked for: another
// process may take the one that was named first.
const loopAttempts = 16

// loopDevice attaches a file read-only to a free loop device, with direct I/O
// so that its pages are cached once, and autoclear: the device is free again
// when its last user closes it. The caller closes the file that is returned.
func loopDevice(path string) (*os.File, error) {
	img, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("loop device: %w", err)
	}
	defer img.Close()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, hint.Wrap(fmt.Errorf("loop device: %w", err), "load the loop module (modprobe loop)")
	}
	defer control.Close()
	for range loopAttempts {
		var n int
		if n, err = unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE); err != nil {
			break
		}
		var dev *os.File
		if dev, err = os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDONLY, 0); err != nil {
			break
		}
		cfg := unix.LoopConfig{Fd: uint32(img.Fd()), Size: 4096}
		cfg.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
		copy(cfg.Info.File_name[:len(cfg.Info.File_name)-1], path)
		if err = unix.IoctlLoopConfigure(int(dev.Fd()), &cfg); err == nil {
			return dev, nil
		}
		dev.Close()
		if !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	return nil, fmt.Errorf("attach %s to a loop device: %w", path, err)
}
