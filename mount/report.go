package mount

import (
	"errors"
	"sync"
	"time"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
)

// reports remembers what was logged lately: the kernel repeats a read that
// failed, and programs do too.
type reports struct {
	mu   sync.Mutex
	last map[string]time.Time
}

const (
	reportEvery = 10 * time.Second
	reportsKept = 1024
)

func (r *reports) due(key string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if t, ok := r.last[key]; ok && now.Sub(t) < reportEvery {
		return false
	}
	if r.last == nil || len(r.last) >= reportsKept {
		r.last = map[string]time.Time{}
	}
	r.last[key] = now
	return true
}

// reportReadError logs an error that a program is about to get, once per
// cause: one line with the image, the path, the chunk and both digests when a
// digest is wrong.
func (m *Mount) reportReadError(nid uint64, object string, err error) {
	if !m.reports.due(object + err.Error()) {
		return
	}
	log := m.log.With("path", m.pathOf(nid, object), "object", object)
	if d, ok := errors.AsType[*fetcher.DigestError](err); ok {
		log.Error("a chunk does not have its digest: the read fails, nothing is stored",
			"layer", d.LayerDigest, "chunk", d.Chunk, "want", d.Want, "got", d.Got)
		return
	}
	log.Error("read failed", "error", err)
}

// pathOf returns a path of the inode nid, or if that is 0 of a file that has
// its bytes in the object; "?" if there is none.
func (m *Mount) pathOf(nid uint64, object string) string {
	found := "?"
	m.reader.Walk(func(path string, ino erofs.Inode) error {
		if nid == 0 && ino.External() {
			if payload, _, err := m.reader.Payload(ino); err != nil || payload != object {
				return nil
			}
		} else if ino.NID != nid {
			return nil
		}
		found = path
		return errFound
	})
	return found
}
