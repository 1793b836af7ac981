package composefs

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A contentReader fills in what a node says of its content: one for each of a
// scan's goroutines.
type contentReader struct {
	s    *scanner
	hash *verity.Hash
	buf  []byte
}

func newContentReader(s *scanner) *contentReader {
	return &contentReader{s, verity.New(s.options.algorithm()), make([]byte, 64*verity.BlockSize)}
}

// fill reads the file of j.
func (r *contentReader) fill(j job) error {
	if err := r.read(j); err != nil {
		return fmt.Errorf("/%s: %w", j.path, err)
	}
	return nil
}

func (r *contentReader) read(j job) error {
	// Should the file have become a fifo meanwhile, O_NONBLOCK keeps the open
	// from waiting for its other end.
	fd, err := unix.Openat(int(r.s.root.Fd()), j.path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	f := os.NewFile(uintptr(fd), j.path)
	defer f.Close()
	var before, after unix.Stat_t
	if err := unix.Fstat(fd, &before); err != nil {
		return err
	}
	if before.Mode != j.node.Mode || uint64(before.Size) != j.node.Size {
		return errChanged
	}
	if before.Size <= MaxInline {
		content := make([]byte, before.Size)
		if _, err := io.ReadFull(f, content); err != nil {
			return err
		}
		j.node.Content = content
	} else if err := r.external(j, f); err != nil {
		return err
	}
	if err := unix.Fstat(fd, &after); err != nil {
		return err
	}
	if before.Size != after.Size || before.Mtim != after.Mtim || before.Ctim != after.Ctim {
		return errChanged
	}
	return nil
}

// errChanged says that a file did not keep still. Its digest would be that of
// no state the file ever had.
var errChanged = errors.New("the file was changed while it was read")

func (r *contentReader) external(j job, f *os.File) error {
	digest, err := r.digest(f, int64(j.node.Size))
	if err != nil {
		return err
	}
	j.node.Digest = digest
	j.node.Target = payload(j.node.Digest)
	if r.s.options.Store == nil {
		return nil
	}
	return r.s.options.Store.Add(f, j.node.Digest)
}

// digest reads the file to its end, which must be at size.
func (r *contentReader) digest(f *os.File, size int64) ([]byte, error) {
	if size >= largeFile {
		digest, err := verity.DigestAt(f, size, r.s.options.algorithm(), r.s.threads)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = errChanged
		}
		return digest, err
	}
	r.hash.Reset()
	if _, err := io.CopyBuffer(r.hash, struct{ io.Reader }{f}, r.buf); err != nil {
		return nil, err
	}
	if r.hash.Size() != size {
		return nil, errChanged
	}
	return r.hash.Sum(), nil
}

// largeFile is the size in bytes from which on a file is left to
// verity.DigestAt: smaller ones are hashed without an allocation.
const largeFile = 32 << 20

// payload returns the path of an object below its store.
func payload(digest []byte) string {
	h := hex.EncodeToString(digest)
	return h[:2] + "/" + h[2:]
}
