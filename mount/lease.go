package mount

import (
	"os"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
)

// hold keeps the image's folder and contents from being evicted until release.
// The kernel's mount that a swap leaves behind needs no lease: it keeps the
// sealed image open, which eviction sees.
func (m *Mount) hold(digest image.Digest) error {
	if m.lease != nil && m.held == digest {
		return nil
	}
	lease, err := m.store.Lease(digest)
	if err != nil {
		return err
	}
	m.lease.Close()
	m.lease, m.held = lease, digest
	return nil
}

// noteSource writes beside the ref what source it is of, for people who ask
// what the store has.
func (m *Mount) noteSource() {
	text := m.src.String() + "\n"
	if p := m.opts.Source.Platform; p != "" {
		text += p + "\n"
	}
	path := m.refPath() + cache.RefSourceSuffix
	if have, err := os.ReadFile(path); err == nil && string(have) == text {
		return
	}
	if err := durable.WriteFile(path, []byte(text), 0o644); err != nil {
		m.log.Warn("the source could not be noted", "error", err)
	}
}
