package cache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// A Budget bounds a store. The zero Budget bounds nothing.
type Budget struct {
	Size int64 // bytes on disk that the store may have; 0: any
	Free int64 // bytes of the filesystem to be left free for others
}

func (b Budget) none() bool { return b.Size <= 0 && b.Free <= 0 }

// ErrBudget says that the budget is used up by what cannot be evicted. An
// error that wraps it wraps ENOSPC too.
var ErrBudget = errors.New("the store's budget is used up by images in use")

// usageName is a file with how many bytes the store has on disk, as a decimal
// number, and when that was last counted, as seconds since 1970, 0 for never.
// All processes add to it what they store, so it is right within noteEvery
// for each that runs and that much more for each that was killed; counting
// anew is what eviction begins with. Without the file, or with anything else
// in it, nothing was counted. A process that finds it changed knows that
// another one stores.
const usageName = "usage"

const (
	noteEvery  = 1 << 20          // bytes after which a process adds what it stored
	countEvery = 10 * time.Minute // how long a count is good for when there is a budget
	roomSlack  = 32 << 20         // bytes over the budget while room is being made
	fullPause  = time.Second      // how long Put is refused, at least, before room is looked for again
)

// A meter knows what the store has on disk, about, and keeps it in the budget.
type meter struct {
	s      *Store
	budget Budget

	pending atomic.Int64 // bytes not yet added to the file
	total   atomic.Int64 // what the file said last, -1 before it was first read
	counted atomic.Int64 // when what the file said was counted, seconds since 1970
	others  atomic.Int64 // how often the file was found changed by another process

	mu      sync.Mutex // held while room is being made
	retryAt time.Time  // guarded by mu: not before then, after there was none
	full    atomic.Pointer[error]
}

// blocks returns the room that n bytes take on most filesystems.
func blocks(n int64) int64 { return (n + 4095) &^ 4095 }

// admit makes room for n bytes to be stored, if the store has a budget. An
// error wraps ErrBudget, or says why nothing could be evicted.
func (m *meter) admit(n int64) error {
	n = blocks(n)
	if m.budget.none() {
		m.add(n)
		return nil
	}
	if !m.fits(n) {
		if err := m.makeRoom(n); err != nil {
			return err
		}
	}
	m.add(n)
	return nil
}

// add counts n bytes as stored (or, negative, as removed).
func (m *meter) add(n int64) {
	if p := m.pending.Add(n); p >= noteEvery || p <= -noteEvery {
		m.note()
	}
}

// note adds what is pending to the file. Its errors are none: the file says
// less than there is, until the next count.
func (m *meter) note() {
	p := m.pending.Swap(0)
	m.update(func(total, counted int64) (int64, int64) {
		if total != m.total.Load() {
			m.others.Add(1)
		}
		return max(0, total+p), counted
	})
}

// update changes the file's numbers under a lock on it.
func (m *meter) update(f func(total, counted int64) (int64, int64)) {
	fd, err := openat(m.s.rootDir.fd, usageName, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if retry(func() error { return unix.Flock(fd, unix.LOCK_EX) }) != nil {
		return
	}
	var b [128]byte
	n, err := pread(fd, b[:], 0)
	if err != nil {
		return
	}
	total, counted := f(parseUsage(b[:n]))
	m.total.Store(total)
	m.counted.Store(counted)
	// Of one length always, so that no write leaves an end of another.
	pwrite(fd, fmt.Appendf(nil, "%020d %020d\n", total, counted), 0)
}

func parseUsage(b []byte) (total, counted int64) {
	f := strings.Fields(string(b))
	if len(f) != 2 {
		return 0, 0
	}
	total, err1 := strconv.ParseInt(f[0], 10, 64)
	counted, err2 := strconv.ParseInt(f[1], 10, 64)
	if err1 != nil || err2 != nil || total < 0 || counted < 0 {
		return 0, 0
	}
	return total, counted
}

// fits reports whether n bytes more are within the budget, as far as is known.
func (m *meter) fits(n int64) bool {
	if m.full.Load() != nil {
		return false
	}
	if p := m.pending.Load(); m.counted.Load() == 0 || p == 0 || p >= noteEvery {
		m.note() // sees what others have stored
	}
	if m.budget.Size > 0 {
		total := m.total.Load()
		if m.counted.Load() == 0 || total+m.pending.Load()+n > m.budget.Size {
			return false
		}
		if total > m.budget.Size/2 && time.Since(time.Unix(m.counted.Load(), 0)) > countEvery {
			return false
		}
	}
	return m.budget.Free <= 0 || m.free() >= m.budget.Free+n
}

// free returns how many bytes of the filesystem are free for us.
func (m *meter) free() int64 {
	var st unix.Statfs_t
	if retry(func() error { return unix.Fstatfs(m.s.rootDir.fd, &st) }) != nil {
		return 1 << 62
	}
	return int64(st.Bavail) * st.Bsize
}

// errMakingRoom is what others get while one makes room.
var errMakingRoom = fmt.Errorf("%w at the moment, room is being made: %w", ErrBudget, unix.ENOSPC)

// makeRoom evicts until n bytes fit with some to spare. While one call does,
// which may take long where there are very many files, others may go over the
// budget by a little, and then fail rather than wait: a reader's chunk can
// be kept in memory.
func (m *meter) makeRoom(n int64) error {
	if !m.mu.TryLock() {
		over := int64(0)
		if m.budget.Size > 0 {
			over = m.total.Load() + m.pending.Load() + n - m.budget.Size
		}
		if m.full.Load() == nil && over <= roomSlack && (m.budget.Free <= 0 || m.free() >= m.budget.Free-roomSlack) {
			return nil
		}
		return errMakingRoom
	}
	defer m.mu.Unlock()
	if time.Now().Before(m.retryAt) {
		return *m.full.Load()
	}
	m.full.Store(nil)
	if m.fits(n) {
		return nil // another call made room
	}
	start := time.Now()
	res, err := m.s.Collect(context.Background(), CollectOptions{Budget: m.budget, spare: max(n, 1<<20)})
	if err == nil && res.Over > 0 {
		err = fmt.Errorf("%w (%d bytes too many): %w", ErrBudget, res.Over, unix.ENOSPC)
		err = hint.Wrap(err, "unmount or unpin images, or give --store-size or --store-free other numbers")
	}
	if err != nil {
		m.full.Store(&err)
		m.retryAt = time.Now().Add(max(fullPause, 5*time.Since(start)))
		return err
	}
	return nil
}

// forget makes the next use of the budget count the store.
func (m *meter) forget() { os.Remove(filepath.Join(m.s.root, usageName)) }

// Level returns, in bytes, what the store has on disk as far as was counted, what
// its budget lets it have (0: any), and what is free of its filesystem.
func (s *Store) Level() (used, budget, free int64) {
	raw, err := os.ReadFile(filepath.Join(s.root, usageName))
	if err == nil {
		used, _ = parseUsage(raw)
	}
	return max(0, used+s.meter.pending.Load()), s.meter.budget.Size, s.meter.free()
}

// Room reports whether the store takes anything: nil promises that about a
// megabyte could be stored just now. It evicts if there is a budget.
func (s *Store) Room() error {
	err := s.meter.room(noteEvery)
	if err == nil {
		err = s.tryWrite(noteEvery)
	}
	if err != nil {
		err = fmt.Errorf("room in store %s: %w", s.root, err)
		if isFull(err) && !errors.Is(err, ErrBudget) {
			err = hint.Wrap(err, "make room on the filesystem of "+s.root)
		}
	}
	return err
}

// room is admit for bytes that are not stored yet.
func (m *meter) room(n int64) error {
	if m.budget.none() || m.fits(n) {
		return nil
	}
	return m.makeRoom(n)
}

// tryWrite allocates n bytes in an unnamed file.
func (s *Store) tryWrite(n int64) error {
	t, err := s.temp()
	if err != nil {
		return err
	}
	defer s.discard(t)
	err = retry(func() error { return unix.Fallocate(t.fd, 0, 0, n) })
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		err = pwrite(t.fd, make([]byte, n), 0)
	}
	return err
}
