package mount

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// checkedName is there once the image's chunks were checked since the machine
// was started. It holds a checkedFile.
const checkedName = "chunks.checked"

// A checkedFile names a file as it was when it was checked. Whoever changes
// the file changes its ctime, which cannot be set.
type checkedFile struct {
	Boot string // boot_id of random(4)
	Ino  uint64
	Size int64
	Sec  int64 // ctime
	Nsec int64
}

// nameFile describes the file at path as it is now.
func nameFile(path string) (checkedFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return checkedFile{}, err
	}
	defer f.Close()
	c, err := nameOpen(f)
	if err != nil {
		return c, err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	c.Boot = string(bytes.TrimSpace(boot))
	return c, err
}

// nameOpen is nameFile but for Boot.
func nameOpen(f *os.File) (c checkedFile, err error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return c, fmt.Errorf("stat %s: %w", f.Name(), err)
	}
	return checkedFile{Ino: st.Ino, Size: st.Size, Sec: int64(st.Ctim.Sec), Nsec: int64(st.Ctim.Nsec)}, nil
}

// openIndex opens the index in p.mapped. To check all of it takes a fifth of a
// second for a million files, so it is done once in a run of the machine, as
// objects are.
func (p *preparedImage) openIndex(log *slog.Logger) (*image.Index, error) {
	now, err := nameFile(p.path(chunksName))
	if err == nil {
		var then checkedFile
		data, err := os.ReadFile(p.path(checkedName))
		if err == nil && json.Unmarshal(data, &then) == nil && then == now && now.Size == int64(len(p.mapped)) {
			return image.OpenCheckedIndex(p.mapped)
		}
	}
	x, err := image.OpenIndex(p.mapped)
	trimMap(p.mapped) // what was read once for the check
	if err != nil {
		return nil, err
	}
	if err := p.noteChecked(now); err != nil {
		log.Debug("the next mount checks the image's chunks again", "error", err)
	}
	return x, nil
}

// noteChecked notes that the chunks were checked, if they are now as they were
// before.
func (p *preparedImage) noteChecked(before checkedFile) error {
	after, err := nameFile(p.path(chunksName))
	if err != nil || after != before {
		return fmt.Errorf("they changed meanwhile: %w", err)
	}
	data, err := json.Marshal(after)
	if err != nil {
		return err
	}
	// Of no use after a crash, so nothing is synced.
	f, err := os.CreateTemp(filepath.Dir(p.path(checkedName)), ".checked-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), p.path(checkedName))
}

// mapsResident is how much of files a process may have in memory before it
// lets go of its maps. The program itself is some 15 MiB of it.
const mapsResident = 24 << 20

// trim lets go of the maps of the image and its index when they have grown in
// memory. Nothing is lost: the pages stay in the page cache.
func (m *Mount) trim() {
	if residentFiles() < mapsResident {
		return
	}
	if err := m.reader.Trim(); err != nil {
		m.log.Debug("memory", "error", err)
	}
	trimMap(m.image.mapped)
}

func trimMap(b []byte) { unix.Madvise(b, unix.MADV_DONTNEED) }

// residentFiles is how many bytes of files this process has mapped and in
// memory: the third field of proc_pid_statm(5).
func residentFiles() int64 {
	data, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := bytes.Fields(data)
	if len(fields) < 3 {
		return 0
	}
	pages, err := strconv.ParseInt(string(fields[2]), 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}
