package fusesession

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Takeover readies a resumed session for Serve, once no other process reads
// it: what the process before had read and not answered is sent again. It
// reports false where the kernel cannot do that (before Linux 6.9); those
// requests were then answered with an error.
func (s *Session) Takeover() (resent bool, err error) {
	if !s.resumed {
		return false, errors.New("take over a FUSE session that is new")
	}
	if s.params.canResend() {
		// A message with ID 0 is a notification, its error field the code.
		if err := s.write(0, -fuse.NOTIFY_RESEND); err != nil {
			return false, fmt.Errorf("FUSE_NOTIFY_RESEND: %w", err)
		}
		return true, nil
	}
	return false, nil
}

// write sends the kernel a message that is a header only.
func (s *Session) write(unique uint64, status int32) error {
	var b [16]byte
	binary.NativeEndian.PutUint32(b[:], uint32(len(b)))
	binary.NativeEndian.PutUint32(b[4:], uint32(status))
	binary.NativeEndian.PutUint64(b[8:], unique)
	_, err := retry(func() (int, error) { return unix.Write(int(s.dev.Fd()), b[:]) })
	return err
}
