package verity

import (
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrNotEnabled says that verity is not enabled on a file whose filesystem
// could do it.
var ErrNotEnabled = errors.New("fs-verity is not enabled on the file")

// A NotSupportedError says that the kernel cannot do fs-verity on a file:
// ENOTTY or ENOSYS (kernel or filesystem without it), EOPNOTSUPP (the
// filesystem was made without the feature), ENOPKG (the kernel lacks the hash
// algorithm).
type NotSupportedError struct {
	Op   string // "enable" or "measure"
	Path string
	Err  unix.Errno // as the kernel gave it
}

// Error names the file and gives the kernel's own words.
func (e *NotSupportedError) Error() string {
	return fmt.Sprintf("%s fs-verity on %s: not supported here: %v", e.Op, e.Path, e.Err)
}

// Unwrap returns the kernel's errno.
func (e *NotSupportedError) Unwrap() error { return e.Err }

// kernelError turns an errno into the error that Enable and Measure promise.
func kernelError(op string, f *os.File, errno unix.Errno) error {
	switch errno {
	case unix.ENOTTY, unix.EOPNOTSUPP, unix.ENOSYS, unix.ENOPKG:
		return &NotSupportedError{Op: op, Path: f.Name(), Err: errno}
	case unix.ENODATA:
		return fmt.Errorf("%s fs-verity on %s: %w", op, f.Name(), ErrNotEnabled)
	}
	return fmt.Errorf("%s fs-verity on %s: %w", op, f.Name(), errno)
}

// ioctl does one fs-verity request on f, again if a signal broke it off.
func ioctl(op string, f *os.File, request uint, arg unsafe.Pointer) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return fmt.Errorf("%s fs-verity on %s: %w", op, f.Name(), err)
	}
	var errno unix.Errno
	err = conn.Control(func(fd uintptr) {
		for {
			_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(arg))
			if errno != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return fmt.Errorf("%s fs-verity on %s: %w", op, f.Name(), err)
	}
	if errno != 0 {
		return kernelError(op, f, errno)
	}
	return nil
}

// Enable is EnableWith for SHA-256, which composefs object stores have.
func Enable(f *os.File) error { return EnableWith(f, SHA256) }

// EnableWith makes f a verity file: hashed by alg, 4096-byte blocks, no salt,
// no signature. f must be open for reading only, and nobody may have the file
// open for writing (ETXTBSY). A nil error
// promises that the file can no longer be changed and that the kernel checks
// what is read from it; that it was enabled before, perhaps with other
// parameters, is no error, so ask Measure for the digest. Where the kernel
// cannot do it the error is a *NotSupportedError.
func EnableWith(f *os.File, alg Algorithm) error {
	arg := unix.FsverityEnableArg{Version: 1, Hash_algorithm: uint32(alg), Block_size: BlockSize}
	for try := 0; ; try++ {
		err := ioctl("enable", f, unix.FS_IOC_ENABLE_VERITY, unsafe.Pointer(&arg))
		switch {
		case errors.Is(err, unix.EEXIST):
			return nil
		case errors.Is(err, unix.ETXTBSY) && try < busyTries:
			time.Sleep(busyWait)
		default:
			return err
		}
	}
}

// A program that this process starts holds copies of all descriptors, those
// open for writing too, from its fork until its exec: that long ETXTBSY says
// nothing about the file.
const (
	busyTries = 20
	busyWait  = 5 * time.Millisecond
)

// Measure asks the kernel for the digest of the verity file f. A nil error
// promises that the kernel checks everything read from f against the digest.
// The error wraps ErrNotEnabled if f is an ordinary file, and is a
// *NotSupportedError where the kernel knows no fs-verity.
func Measure(f *os.File) (Algorithm, []byte, error) {
	// struct fsverity_digest: u16 algorithm, u16 size of what follows.
	var arg struct {
		unix.FsverityDigest
		digest [64]byte
	}
	arg.Size = uint16(len(arg.digest))
	if err := ioctl("measure", f, unix.FS_IOC_MEASURE_VERITY, unsafe.Pointer(&arg)); err != nil {
		return 0, nil, err
	}
	alg := Algorithm(arg.Algorithm)
	if alg.Size() == 0 || int(arg.Size) != alg.Size() {
		return 0, nil, fmt.Errorf("measure fs-verity on %s: unknown %v with a digest of %d bytes", f.Name(), alg, arg.Size)
	}
	return alg, arg.digest[:arg.Size:arg.Size], nil
}
