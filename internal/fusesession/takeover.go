package fusesession

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Takeover readies a resumed session for Serve, once no other process reads
// it: the kernel sends again what the process before had read and not
// answered. It does nothing in a session whose requests are kept.
func (s *Session) Takeover() error {
	if !s.resumed {
		return errors.New("take over a FUSE session that is new")
	}
	if s.params.Journal {
		return nil
	}
	// A message with ID 0 is a notification, its error field the code.
	if err := s.write(0, -fuse.NOTIFY_RESEND); err != nil {
		return fmt.Errorf("FUSE_NOTIFY_RESEND: %w", err)
	}
	return nil
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
