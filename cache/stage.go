package cache

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A stage is a content of which some chunks are local. Its states:
//
//	reading ──Put, lock free──► filling ──last chunk, right──► done
//	   │                           └──last chunk, wrong──► failed
//	   └──Put, lock taken──► filling, private: in an unnamed file of its own
//
// The last chunk is never marked in a map on disk: a content is whole when it
// has its names.
//
// How a reader tells that map and staging file belong together, without the
// lock: whoever starts a staging file anew removes the old one, then writes
// the map, then makes the new one. So if the staging file still has its name
// after the map was read, the map is that file's.
type stage struct {
	s       *Store
	content image.Digest
	layout  layoutID
	size    int64
	chunks  int
	name    string // in staging/

	mu      sync.Mutex
	settled sync.Cond // a chunk left busy

	// guarded by mu
	state   stageState
	err     error            // of a failed stage
	busy    map[int]struct{} // chunks being written
	ending  bool             // finish is at work, without mu
	bad     map[int]struct{} // chunks that the map on disk has and that were found damaged
	left    int              // chunks not marked
	full    bool             // every byte is written and data cannot be written to
	object  image.Digest     // fs-verity digest, once the content is checked
	mapFile *os.File         // holds the lock; nil while reading, and in a private stage
	epoch   uint64           // changes when have is not what it was with more added

	io sync.RWMutex // taken after mu

	// guarded by io; changed under mu too, save that the writer of the last
	// chunk changes data alone
	data temp   // fd < 0: none
	have bitmap // chunks that may be read from data
	seen bitmap // those of them that this process wrote, or has compared with their digest
}

type stageState uint8

const (
	stageReading stageState = iota
	stageFilling
	stageDone
	stageFailed
)

// chunkAt returns the k-th chunk of a content.
type chunkAt func(k int) image.Chunk

// openStage opens for reading what is staged of a content, which may be
// nothing.
func (s *Store) openStage(ct image.Content, layout layoutID) (*stage, error) {
	st := &stage{
		s:       s,
		content: ct.Digest,
		layout:  layout,
		size:    ct.Size,
		chunks:  ct.Chunks,
		name:    stagingName(ct.Digest),
		busy:    make(map[int]struct{}),
		bad:     make(map[int]struct{}),
		seen:    newBitmap(ct.Chunks),
		data:    temp{fd: -1},
		have:    newBitmap(ct.Chunks),
		epoch:   epochs.Add(1),
	}
	st.settled.L = &st.mu
	fd, err := openat(s.stagingDir.fd, st.name, unix.O_RDONLY|unix.O_NOFOLLOW)
	if errors.Is(err, unix.ENOENT) {
		return st, nil
	}
	if err != nil {
		return nil, err
	}
	m, err := s.readMap(st.name + mapSuffix)
	if err == nil && st.owns(m) && m.boot == s.boot && st.named(fd) {
		have, _ := m.believed()
		st.install(temp{fd: fd}, have)
		return st, nil
	}
	return st, unix.Close(fd)
}

// refresh sees what another process has added to the file since it was opened.
func (st *stage) refresh() error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.state != stageReading {
		return nil
	}
	fd := st.data.fd
	if fd < 0 {
		var err error
		if fd, err = openat(st.s.stagingDir.fd, st.name, unix.O_RDONLY|unix.O_NOFOLLOW); err != nil {
			return ignoreAbsent(err)
		}
	}
	m, err := st.s.readMap(st.name + mapSuffix)
	if err != nil || !st.owns(m) || m.boot != st.s.boot || !st.named(fd) {
		if fd != st.data.fd {
			unix.Close(fd)
		}
		return nil
	}
	have, _ := m.believed()
	for k := range st.bad {
		have.clear(k)
	}
	if fd != st.data.fd {
		st.install(temp{fd: fd}, have)
		return nil
	}
	st.io.Lock()
	st.have = have
	st.io.Unlock()
	st.epoch = epochs.Add(1)
	return nil
}

// owns reports whether m is a map of this content cut into these chunks.
func (st *stage) owns(m *stageMap) bool {
	return m.layout == st.layout && m.content == st.content && m.size == st.size && m.chunks == st.chunks
}

// named reports whether fd is the file that has the staging file's name, and
// has its size.
func (st *stage) named(fd int) bool {
	var f, n unix.Stat_t
	return unix.Fstat(fd, &f) == nil &&
		unix.Fstatat(st.s.stagingDir.fd, st.name, &n, unix.AT_SYMLINK_NOFOLLOW) == nil &&
		f.Ino == n.Ino && f.Dev == n.Dev && f.Size == st.size
}

// epochs numbers the states of all stages.
var epochs atomic.Uint64

// install makes t the file that is read and written, and have what may be
// read from it. Called with mu held.
func (st *stage) install(t temp, have bitmap) {
	st.io.Lock()
	old := st.data
	st.data, st.have = t, have
	st.io.Unlock()
	st.epoch = epochs.Add(1)
	if old.fd >= 0 {
		unix.Close(old.fd)
	}
}

// readMap reads a map from staging/.
func (s *Store) readMap(name string) (*stageMap, error) {
	fd, err := openat(s.stagingDir.fd, name, unix.O_RDONLY|unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	return loadMap(f)
}

func loadMap(f *os.File) (*stageMap, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() || fi.Size() > maxMapSize {
		return nil, errBadMap
	}
	b := make([]byte, fi.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, err
	}
	return parseMap(b)
}

// readAt reads into p, which lies in chunks k to end-1, as far as they are
// staged without a gap. It returns false if chunk k is not, or is no more. A
// chunk that another process left is compared with its digest once, before its
// first byte is read; one that is not right any more is bad, and absent
// from then on.
func (st *stage) readAt(p []byte, off int64, k, end int, chunk chunkAt) (n int, ok, bad bool, err error) {
	n, ok, worst, err := st.readGood(p, off, k, end, chunk)
	if worst >= 0 {
		st.unmark(worst)
	}
	return n, ok, worst == k, err
}

// readGood is readAt, save that it only tells of the first bad chunk, or -1.
func (st *stage) readGood(p []byte, off int64, k, end int, chunk chunkAt) (n int, ok bool, bad int, err error) {
	st.io.RLock()
	defer st.io.RUnlock()
	stop := k
	for bad = -1; stop < end && st.have.has(stop); stop++ {
		if !st.seen.has(stop) {
			if right, err := checkChunk(st.data.fd, chunk(stop)); err != nil || !right {
				st.s.log.Warn("a chunk is damaged and will be fetched again", "content", st.content.String(), "chunk", stop, "error", err)
				bad = stop
				break
			}
			st.seen.set(stop)
		}
	}
	if stop == k || st.data.fd < 0 {
		return 0, false, bad, nil
	}
	last := chunk(stop - 1)
	p = p[:min(int64(len(p)), last.FileOffset+last.Size-off)]
	n, err = pread(st.data.fd, p, off)
	if errors.Is(err, unix.EIO) {
		for i := k; i < stop; i++ {
			if right, cerr := checkChunk(st.data.fd, chunk(i)); cerr != nil || !right {
				st.seen.clear(i)
				return 0, false, i, nil
			}
		}
	}
	return n, n == len(p) || err != nil, bad, err
}

// has reports whether chunk k can be read from the stage.
func (st *stage) has(k int) bool {
	st.io.RLock()
	defer st.io.RUnlock()
	return st.have.has(k)
}

// private reports whether the stage is in a file that only this process has.
func (st *stage) private() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.state == stageFilling && st.mapFile == nil
}

// over reports whether the stage can no longer be used.
func (st *stage) over() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.state == stageDone || st.state == stageFailed
}

func (st *stage) currentEpoch() uint64 {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.epoch
}

// revive takes the lock, if it is free, and checks what an earlier run of the
// machine left.
func (st *stage) revive(chunk chunkAt) error {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.state != stageReading {
		return nil
	}
	_, err := st.lock(chunk)
	return err
}

// put stores chunk k and, if it is the last, the content. A nil error promises
// that the chunk can be read from the stage, or that the content is whole. The
// data may lie in another file, whose blocks are then shared if they can be.
func (st *stage) put(k int, data []byte, from *extent, chunk chunkAt) (whole, cloned bool, err error) {
	st.mu.Lock()
	defer st.mu.Unlock()
	for {
		switch st.state {
		case stageDone:
			return true, cloned, nil
		case stageFailed:
			return false, false, st.err
		case stageReading:
			if err := st.begin(chunk); err != nil {
				return false, cloned, err
			}
			continue
		}
		if st.have.has(k) {
			return false, false, nil
		}
		if _, taken := st.busy[k]; !taken {
			break
		}
		st.settled.Wait()
	}
	st.busy[k] = struct{}{}
	defer func() {
		delete(st.busy, k)
		st.settled.Broadcast()
	}()
	if !st.full {
		st.mu.Unlock()
		cloned, err = st.write(chunk(k), data, from)
		st.mu.Lock()
		if err != nil {
			return false, cloned, err
		}
	}
	if st.left > 1 {
		return false, cloned, st.mark(k)
	}
	// Every other chunk is marked, so nobody else is writing.
	st.ending = true
	st.mu.Unlock()
	err = st.finish()
	var damaged []int
	if _, wrong := errors.AsType[*DigestError](err); wrong || errors.Is(err, unix.EIO) {
		damaged = st.findDamaged(chunk)
	}
	st.mu.Lock()
	st.ending = false
	if len(damaged) > 0 {
		return false, cloned, st.heal(k, damaged)
	}
	if err == nil {
		st.state = stageDone
		return true, cloned, nil
	}
	if _, wrong := errors.AsType[*DigestError](err); wrong || errors.Is(err, io.ErrUnexpectedEOF) {
		st.state, st.err = stageFailed, err
		if st.mapFile != nil {
			st.removeNames()
		}
		st.install(temp{fd: -1, name: st.data.name}, newBitmap(st.chunks))
	}
	return false, cloned, err
}

func (st *stage) write(c image.Chunk, data []byte, from *extent) (cloned bool, err error) {
	st.io.RLock()
	defer st.io.RUnlock()
	if data == nil {
		return false, st.punch(c)
	}
	if from.clone(st.data.fd, c.FileOffset, c.Size) {
		return true, nil
	}
	return false, pwrite(st.data.fd, data, c.FileOffset)
}

// punch makes a chunk zeros. Called with io held.
func (st *stage) punch(c image.Chunk) error {
	// A hole already, unless a chunk was found damaged here.
	err := retry(func() error {
		return unix.Fallocate(st.data.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, c.FileOffset, c.Size)
	})
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return err
	}
	var zero [64 << 10]byte
	for off, end := c.FileOffset, c.FileOffset+c.Size; off < end; off += int64(len(zero)) {
		if err := pwrite(st.data.fd, zero[:min(int64(len(zero)), end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// mark notes on disk and in memory that chunk k is written.
func (st *stage) mark(k int) error {
	st.have.set(k)
	if err := st.writeMap(k); err != nil {
		st.have.clear(k)
		return err
	}
	st.seen.set(k)
	st.left--
	return nil
}

// writeMap writes the byte of the map that has the mark of chunk k.
func (st *stage) writeMap(k int) error {
	if st.mapFile == nil {
		return nil
	}
	var b [1]byte
	for i := k &^ 7; i < min(k|7+1, st.chunks); i++ {
		if st.have.has(i) {
			b[0] |= 1 << (i % 8)
		}
	}
	return pwrite(int(st.mapFile.Fd()), b[:], mapHeaderSize+int64(k/8))
}

// begin makes a reading stage one that can be filled: the content's staging
// file if its lock is free, else a private one. Called with mu held.
func (st *stage) begin(chunk chunkAt) error {
	locked, err := st.lock(chunk)
	if err != nil || locked || st.state == stageDone {
		return err
	}
	t, err := st.s.temp()
	if err != nil {
		return err
	}
	err = retry(func() error { return unix.Ftruncate(t.fd, st.size) })
	if err == nil {
		err = st.copyTo(t.fd, chunk)
	}
	if err != nil {
		st.s.discard(t)
		return err
	}
	st.left = st.chunks
	for k := range st.chunks {
		if st.have.has(k) {
			st.left--
		}
	}
	st.install(t, st.have)
	st.state = stageFilling
	return nil
}

// copyTo copies the chunks that are staged to fd.
func (st *stage) copyTo(fd int, chunk chunkAt) error {
	buf := hashBuffers.Get().(*[64 * verity.BlockSize]byte)
	defer hashBuffers.Put(buf)
	for k := range st.chunks {
		if !st.have.has(k) {
			continue
		}
		c := chunk(k)
		if c.Zero {
			continue
		}
		for off, end := c.FileOffset, c.FileOffset+c.Size; off < end; {
			n, err := pread(st.data.fd, buf[:min(int64(len(buf)), end-off)], off)
			if err == nil && n == 0 {
				err = io.ErrUnexpectedEOF
			}
			if err == nil {
				err = pwrite(fd, buf[:n], off)
			}
			if err != nil {
				return err
			}
			off += int64(n)
		}
	}
	return nil
}

// lock takes the lock of the content's staging file, if nobody has it, and
// makes the stage one that is filled there. If the content turns out to be
// whole the stage is done instead. Called with mu held, while reading.
func (st *stage) lock(chunk chunkAt) (locked bool, err error) {
	f, err := st.s.lockMap(st.name + mapSuffix)
	if f == nil || err != nil {
		return false, err
	}
	defer func() {
		if st.mapFile == nil {
			f.Close()
		}
	}()
	m, merr := loadMap(f)
	if merr != nil || !st.owns(m) {
		return st.startAnew(f)
	}
	var t temp
	t.fd, err = openat(st.s.stagingDir.fd, st.name, unix.O_RDWR|unix.O_NOFOLLOW)
	full := errors.Is(err, unix.EPERM) // fs-verity is on: it was about to be named
	if full {
		t.fd, err = openat(st.s.stagingDir.fd, st.name, unix.O_RDONLY|unix.O_NOFOLLOW)
	}
	if errors.Is(err, unix.ENOENT) {
		return st.startAnew(f)
	}
	if err != nil {
		return false, err
	}
	if !st.named(t.fd) {
		unix.Close(t.fd)
		return st.startAnew(f)
	}
	if m.boot != st.s.boot {
		err = st.recheck(f, m, t.fd, chunk)
	} else if len(st.bad) > 0 {
		for k := range st.bad {
			m.bits[k/8] &^= 1 << (k % 8)
		}
		_, err = f.WriteAt(m.bits, mapHeaderSize)
	}
	if err != nil {
		unix.Close(t.fd)
		return false, err
	}
	clear(st.bad)
	have, left := m.believed()
	if full && left > 1 {
		unix.Close(t.fd)
		return st.startAnew(f)
	}
	st.install(t, have)
	st.left, st.full, st.mapFile, st.state = left, full, f, stageFilling
	return true, nil
}

// lockMap opens and locks a map, making it if need be. It returns nil if
// another process has the lock or the filesystem has no locks.
func (s *Store) lockMap(name string) (*os.File, error) {
	for {
		fd, err := openat(s.stagingDir.fd, name, unix.O_RDWR|unix.O_CREAT|unix.O_NOFOLLOW)
		if err != nil {
			return nil, err
		}
		if unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) != nil {
			return nil, unix.Close(fd)
		}
		// Whoever had the lock before may have removed the map.
		var f, n unix.Stat_t
		if err := unix.Fstat(fd, &f); err != nil {
			unix.Close(fd)
			return nil, err
		}
		err = unix.Fstatat(s.stagingDir.fd, name, &n, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && f.Ino == n.Ino {
			return os.NewFile(uintptr(fd), name), nil
		}
		unix.Close(fd)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, err
		}
	}
}

// startAnew makes an empty staging file under the lock f.
func (st *stage) startAnew(f *os.File) (locked bool, err error) {
	dir := st.s.stagingDir.fd
	if err := unix.Unlinkat(dir, st.name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return false, err
	}
	defer func() {
		if err != nil || st.state == stageDone {
			st.removeNames()
		}
	}()
	if ok, err := hasSize(st.s.contentsDir.fd, st.content.Path(), st.size); ok || err != nil {
		if ok {
			st.state = stageDone
		}
		return false, err
	}
	m := &stageMap{content: st.content, layout: st.layout, boot: st.s.boot, size: st.size, chunks: st.chunks}
	if err := f.Truncate(0); err != nil {
		return false, err
	}
	if _, err := f.WriteAt(m.marshal(), 0); err != nil {
		return false, err
	}
	t := temp{}
	if t.fd, err = openat(dir, st.name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW); err != nil {
		return false, err
	}
	if st.s.chmod {
		err = unix.Fchmod(t.fd, objectMode)
	}
	if err == nil {
		err = retry(func() error { return unix.Ftruncate(t.fd, st.size) })
	}
	if err != nil {
		unix.Close(t.fd)
		return false, err
	}
	st.io.Lock()
	st.seen = newBitmap(st.chunks)
	st.io.Unlock()
	st.install(t, newBitmap(st.chunks))
	st.left, st.full, st.mapFile, st.state = st.chunks, false, f, stageFilling
	return true, nil
}

// removeNames takes the staging names away. Called by the holder of the lock;
// a private stage has none of these names.
func (st *stage) removeNames() {
	unix.Unlinkat(st.s.stagingDir.fd, st.name, 0)
	unix.Unlinkat(st.s.stagingDir.fd, st.name+mapSuffix, 0)
}

// recheck reads the chunks that a map of an earlier run of the machine
// marks, and takes the marks from those that are damaged. The boot id is
// written last, so that a map is believed only when this came to its end.
func (st *stage) recheck(f *os.File, m *stageMap, fd int, chunk chunkAt) error {
	var bad int
	for k := range m.chunks {
		if !m.has(k) {
			continue
		}
		ok, err := checkChunk(fd, chunk(k))
		if err != nil {
			return err
		}
		if !ok {
			m.bits[k/8] &^= 1 << (k % 8)
			bad++
		}
	}
	if bad > 0 {
		st.s.log.Info("chunks were damaged when the machine went down", "content", st.content.String(), "chunks", bad)
	}
	if _, err := f.WriteAt(m.bits, mapHeaderSize); err != nil {
		return err
	}
	m.boot = st.s.boot
	_, err := f.WriteAt(m.boot[:], 80)
	return err
}

// checkChunk reports whether the bytes of a chunk are in the file.
func checkChunk(fd int, c image.Chunk) (bool, error) {
	buf := hashBuffers.Get().(*[64 * verity.BlockSize]byte)
	defer hashBuffers.Put(buf)
	h := sha256.New()
	for off, end := c.FileOffset, c.FileOffset+c.Size; off < end; {
		b := buf[:min(int64(len(buf)), end-off)]
		n, err := pread(fd, b, off)
		if err != nil || n < len(b) {
			return false, err
		}
		if c.Zero {
			if len(bytes.TrimLeft(b, "\x00")) > 0 {
				return false, nil
			}
		} else {
			h.Write(b)
		}
		off += int64(n)
	}
	return c.Zero || image.Digest(h.Sum(nil)) == c.Digest, nil
}

// finish checks the content, gives it its names and takes the staging names
// away. It is called without mu, by the only writer left.
func (st *stage) finish() error {
	if st.object.IsZero() {
		if !st.full {
			if err := st.stopWriting(); err != nil {
				return err
			}
		}
		object, content, err := hashFile(st.data.fd, st.size, true, true)
		if err != nil {
			return fmt.Errorf("check content %s: %w", st.content, err)
		}
		if content != st.content {
			return &DigestError{Want: st.content, Got: content}
		}
		st.object = object
	}
	st.s.setXattr(st.data.fd, st.object)
	if err := st.s.enable(st.data.fd); err != nil {
		return err
	}
	t := st.data
	if st.mapFile != nil {
		t.name = st.name
	}
	if err := st.s.name(t, st.content, st.object, st.size); err != nil {
		return err
	}
	if st.mapFile != nil {
		st.removeNames()
	}
	return nil
}

// stopWriting changes data to a descriptor that cannot write, without which
// fs-verity cannot be enabled.
func (st *stage) stopWriting() (err error) {
	t := st.data
	switch {
	case st.mapFile != nil:
		t.fd, err = openat(st.s.stagingDir.fd, st.name, unix.O_RDONLY|unix.O_NOFOLLOW)
	case t.name != "":
		t.fd, err = openat(st.s.stagingDir.fd, t.name, unix.O_RDONLY|unix.O_NOFOLLOW)
	default:
		t.fd, err = openat(unix.AT_FDCWD, procFD(t.fd), unix.O_RDONLY)
	}
	if err != nil {
		return err
	}
	st.io.Lock()
	old := st.data
	st.data = t
	st.io.Unlock()
	st.full = true
	return os.NewSyscallError("close", unix.Close(old.fd))
}

// close ends the stage; what is in a named staging file stays there.
func (st *stage) close() {
	if st.data.name != "" {
		unix.Unlinkat(st.s.stagingDir.fd, st.data.name, 0)
	}
	if st.data.fd >= 0 {
		unix.Close(st.data.fd)
	}
	if st.mapFile != nil {
		st.mapFile.Close()
	}
}
