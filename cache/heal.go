package cache

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// Chunks of a staging file can be damaged after they were checked and written:
// by the disk, or by somebody who wrote into the file. That shows when another
// process's chunk is first read, and when the whole file is hashed. The mark
// is then taken away and the chunk is fetched again; the rest stays.

// unmark makes a chunk absent that was found damaged: in the map on disk too,
// at once or when its lock is had.
func (st *stage) unmark(k int) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for st.ending {
		st.settled.Wait() // finish finds it too
	}
	if !st.has(k) || st.seen.has(k) {
		return // somebody was faster
	}
	st.forget(k)
	if st.state == stageFilling {
		if err := st.reopen(); err != nil {
			st.s.log.Warn("a damaged chunk cannot be written again", "content", st.content.String(), "error", err)
		}
	}
}

// forget takes the mark from chunk k. Called with mu held.
func (st *stage) forget(k int) {
	st.io.Lock()
	st.have.clear(k)
	st.seen.clear(k)
	st.io.Unlock()
	st.epoch = epochs.Add(1)
	switch {
	case st.state == stageReading:
		st.bad[k] = struct{}{}
	case st.state == stageFilling:
		st.left++
		st.object = image.Digest{}
		if err := st.writeMap(k); err != nil {
			st.s.log.Warn("the mark of a damaged chunk stays", "content", st.content.String(), "error", err)
		}
	}
}

// reopen undoes stopWriting.
func (st *stage) reopen() (err error) {
	if !st.full {
		return nil
	}
	t := st.data
	if st.mapFile != nil {
		t.fd, err = openat(st.s.stagingDir.fd, st.name, unix.O_RDWR|unix.O_NOFOLLOW)
	} else {
		t.fd, err = openat(unix.AT_FDCWD, procFD(st.data.fd), unix.O_RDWR)
	}
	if err != nil {
		return err // fs-verity is on, and the file must be started anew
	}
	st.io.Lock()
	old := st.data
	st.data = t
	st.io.Unlock()
	st.full = false
	return os.NewSyscallError("close", unix.Close(old.fd))
}

// findDamaged returns the chunks whose bytes in the file are not theirs.
func (st *stage) findDamaged(chunk chunkAt) (bad []int) {
	for k := range st.chunks {
		if right, err := checkChunk(st.data.fd, chunk(k)); err != nil || !right {
			bad = append(bad, k)
		}
	}
	return bad
}

// heal takes the marks from damaged chunks, so that they are fetched again, and
// sets that of chunk k, which was to be the last, if it is none of them.
// Called with mu held.
func (st *stage) heal(k int, damaged []int) error {
	st.s.log.Warn("chunks of a file are damaged and will be fetched again", "content", st.content.String(), "chunks", len(damaged))
	if err := st.reopen(); err != nil {
		// Nothing can be mended in it.
		st.state, st.err = stageFailed, fmt.Errorf("mend %s: %w", st.name, err)
		if st.mapFile != nil {
			st.removeNames()
		}
		st.install(temp{fd: -1, name: st.data.name}, newBitmap(st.chunks))
		return st.err
	}
	var again bool
	for _, bad := range damaged {
		if bad == k {
			again = true
		} else {
			st.forget(bad)
		}
	}
	if again {
		return fmt.Errorf("chunk %d: %w after it was written", k, unix.EIO)
	}
	return st.mark(k)
}
