package mount

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/image"
)

// lazyContents gives FUSE the bytes of files: from the store, or first into
// the store from the source.
type lazyContents struct {
	index *image.Index
	local *cache.Contents
	spare *spareChunks
	fetch *fetcher.Fetcher
	seen  *recorder
	story *story
}

var _ fusefs.Objects = (*lazyContents)(nil)

// fetchAttempts bounds how often one read asks for bytes that were put into
// the store and are gone again when it looks.
const fetchAttempts = 5

func (l *lazyContents) ReadAt(ctx context.Context, object string, p []byte, off int64) (int, bool, error) {
	digest, err := parseObject(object)
	if err != nil {
		return 0, false, err
	}
	content, ok := l.index.Find(digest)
	if !ok {
		return 0, false, fmt.Errorf("content %s: not in the image's index of chunks", digest)
	}
	l.seen.note(content, off, int64(len(p)))
	begin := time.Now()
	n, attempts := 0, 0
	for {
		k, err := l.local.ReadAt(content, p[n:], off+int64(n))
		n += k
		if n == len(p) || errors.Is(err, io.EOF) {
			if attempts == 0 {
				l.story.answered(time.Since(begin))
			}
			return n, attempts > 0, nil
		}
		absent, isAbsent := errors.AsType[*cache.AbsentError](err)
		if err != nil && !isAbsent {
			return n, attempts > 0, fmt.Errorf("read content %s: %w", digest, err)
		}
		if k > 0 && err == nil {
			continue // the first absent byte is next
		}
		if k := l.spare.readAt(absent.Chunk, p[n:], off+int64(n)); k > 0 {
			if n += k; n == len(p) {
				return n, attempts > 0, nil
			}
			continue
		}
		if attempts++; attempts > fetchAttempts {
			return n, true, fmt.Errorf("read content %s at %d: fetched %d times, and absent still", digest, off+int64(n), fetchAttempts)
		}
		done := l.spare.want(content, off+int64(n), int64(len(p)-n))
		err = l.fetch.Need(ctx, content, off+int64(n), int64(len(p)-n))
		if err != nil {
			done()
			return n, true, err
		}
		defer done() // what is kept for this read stays until it is answered
	}
}

// Object returns the name and size of content i of the image.
func (l *lazyContents) Object(i int) (string, int64) {
	c := l.index.Content(i)
	return c.Digest.Path(), c.Size
}

// Find returns the number of the content of that name.
func (l *lazyContents) Find(name string) (int, bool) {
	digest, err := parseObject(name)
	if err != nil {
		return 0, false
	}
	return l.index.Find(digest)
}

// parseObject reads the digest that names an object: "ab/cdef…".
func parseObject(object string) (image.Digest, error) {
	var d image.Digest
	h := strings.Replace(object, "/", "", 1)
	if len(object) != 2*len(d)+1 || object[2] != '/' {
		return d, fmt.Errorf("object %.80q: want a digest as ab/cdef…", object)
	}
	if _, err := hex.Decode(d[:], []byte(h)); err != nil {
		return d, fmt.Errorf("object %.80q: %w", object, err)
	}
	return d, nil
}
