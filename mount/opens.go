package mount

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// An openWatch notes for the access profile which whole files programs open of
// a hybrid mount. The kernel reads those from the disk and asks nobody; but it
// tells of each open by fanotify(7).
type openWatch struct {
	group *os.File
	end   *time.Timer
	done  sync.WaitGroup
}

// wholeOpen is up to how many bytes a file that was opened counts as read. Of a
// larger one only the first wholeHead bytes do: which parts were read is not
// known, and a program that opens a database seldom reads all of it.
const (
	wholeOpen = 8 << 20
	wholeHead = 1 << 20
)

// watchOpens begins a watch of the filesystem that the mount over shows. It
// ends after the time that a start may take, when the recorder is full, or with
// Close.
func (m *Mount) watchOpens(over *os.File) (*openWatch, error) {
	const flags = unix.FAN_CLASS_NOTIF | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK
	fd, err := unix.FanotifyInit(flags, unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC|unix.O_NOATIME)
	if err != nil {
		return nil, fmt.Errorf("fanotify_init: %w", err)
	}
	w := &openWatch{group: os.NewFile(uintptr(fd), "fanotify")}
	if err := unix.FanotifyMark(fd, unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, unix.FAN_OPEN, int(over.Fd()), "."); err != nil {
		w.group.Close()
		return nil, fmt.Errorf("fanotify_mark: %w", err)
	}
	w.end = time.AfterFunc(settled, func() { w.group.Close() })
	w.done.Go(func() {
		defer w.group.Close()
		if err := w.read(m.opened); err != nil && !errors.Is(err, os.ErrClosed) {
			m.log.Debug("opens are watched no more", "error", err)
		}
	})
	return w, nil
}

// Close ends the watch.
func (w *openWatch) Close() {
	if w != nil {
		w.end.Stop()
		w.group.Close()
		w.done.Wait()
	}
}

// read gives the inode number of each regular file that is opened to note, once
// for several opens at the same time, until that returns false.
func (w *openWatch) read(note func(ino uint64) bool) error {
	const size = int(unsafe.Sizeof(unix.FanotifyEventMetadata{}))
	buf := make([]byte, 128*size)
	for {
		n, err := w.group.Read(buf)
		if err != nil {
			if err == io.EOF {
				err = os.ErrClosed
			}
			return err
		}
		more := true
		// struct fanotify_event_metadata, fanotify(7): event_len, vers, reserved,
		// metadata_len, mask, fd, pid.
		for b := buf[:n]; len(b) >= size; {
			length := int(binary.NativeEndian.Uint32(b))
			fd := int32(binary.NativeEndian.Uint32(b[16:]))
			if b[4] != unix.FANOTIFY_METADATA_VERSION || length < size || length > len(b) {
				return errors.New("fanotify: an event of an unknown form")
			}
			b = b[length:]
			if fd < 0 {
				continue // FAN_NOFD: more was opened than the queue holds
			}
			var st unix.Stat_t
			err := unix.Fstat(int(fd), &st)
			unix.Close(int(fd))
			if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && more {
				more = note(st.Ino)
			}
		}
		if !more {
			return nil
		}
	}
}

// opened notes that a file was opened, by its inode number, which is that of
// the EROFS image. If it is not whole, FUSE sees what is read. It reports
// whether it wants to know of more.
func (m *Mount) opened(ino uint64) bool {
	inode, err := m.reader.Inode(ino)
	if err != nil || !inode.External() {
		return true
	}
	object, _, err := m.reader.Payload(inode)
	if err != nil {
		return true
	}
	digest, err := parseObject(object)
	if err != nil {
		return true
	}
	if i, ok := m.image.index.Find(digest); ok && m.contents.Whole(i) {
		n := m.image.index.Content(i).Size
		if n > wholeOpen {
			n = wholeHead
		}
		m.record.note(i, 0, n)
	}
	return !m.record.full.Load()
}
