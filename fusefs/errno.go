package fusefs

import (
	"context"
	"errors"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// errno gives the errno by which a program learns of err:
//
//	the reader was killed, or the mount goes away   EINTR
//	no space or no quota for the store              ENOSPC, EDQUOT
//	too many open files, no memory                  EMFILE, ENFILE, ENOMEM
//	anything else: the source is lost, a digest is
//	wrong, the image is damaged                     EIO
func errno(err error) fuse.Status {
	switch {
	case err == nil:
		return fuse.OK
	case errors.Is(err, errStopped), errors.Is(err, context.Canceled):
		return fuse.EINTR
	}
	for _, e := range []unix.Errno{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, e) {
			return fuse.Status(e)
		}
	}
	return fuse.EIO
}
