package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// Names in the store's folder, besides the folders.
const (
	versionName = "version" // layout of the store: versionPrefix and a number
	readmeName  = "README"
	bootName    = "boot"   // boot id of the run of the machine that last checked the store
	syncedName  = "synced" // a stamp: files older than it are durable
)

const (
	versionPrefix = "cfs-fuse store "
	version       = 1
)

const readme = `This folder is a store of cfs-fuse: files of container images, kept by digest.

  objects/    whole files, named by their fs-verity SHA-256 digest
  contents/   hard links to the same files, named by the SHA-256 of their content
  staging/    files of which a part has arrived
  images/     one folder for each image: its manifest and its metadata images
  refs/       what names of images stood for when they were last asked for
  leases/     which images are in use, and when they last were
  pins/       which images are kept whatever happens
  quarantine/ damaged files that were moved aside
  snapshotter/ what 'cfs-fuse snapshotter' has of containerd's containers

Nothing here but what containers have written, in snapshotter/, is the only copy
of anything: what is missing is fetched again from the image's registry when it
is needed. To free space, run
'cfs-fuse cache gc', or unmount every image ('cfs-fuse status' lists them) and
delete the whole folder. Do not
change files in place: mounted images read them directly.
`

// open makes or checks the layout, under a lock that other processes' open
// waits for.
func (s *Store) open() (err error) {
	if err := os.MkdirAll(s.root, 0o700); err != nil {
		return err
	}
	if s.rootDir, err = openFolder(s.root); err != nil {
		return err
	}
	if err := retry(func() error { return unix.Flock(s.rootDir.fd, unix.LOCK_EX) }); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	defer unix.Flock(s.rootDir.fd, unix.LOCK_UN)

	have, err := os.ReadFile(filepath.Join(s.root, versionName))
	switch {
	case err == nil:
		err = checkVersion(have)
	case errors.Is(err, os.ErrNotExist):
		err = s.claim()
	}
	if err != nil {
		return err
	}
	if err := s.makeFolders(); err != nil {
		return err
	}
	err = s.probe()
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) || errors.Is(err, unix.EROFS) {
		// What is here can be read all the same.
		s.log.Warn("nothing can be written to the store", "root", s.root, "error", err)
		err = nil
	}
	if err != nil {
		return fmt.Errorf("make a temporary file: %w", err)
	}
	return s.firstOfBoot()
}

// checkVersion accepts the marker of this layout, the only one so far.
func checkVersion(marker []byte) error {
	digits, ok := strings.CutPrefix(string(marker), versionPrefix)
	digits, nl := strings.CutSuffix(digits, "\n")
	n, err := strconv.ParseUint(digits, 10, 31)
	if !ok || !nl || err != nil || n == 0 {
		return hint.Wrap(fmt.Errorf("%s: %.40q is not a layout version", versionName, marker),
			"give --root the folder of a cfs-fuse store, or an empty one")
	}
	if n > version {
		return hint.Wrap(fmt.Errorf("layout version %d is newer than this program knows (%d)", n, version),
			"use the cfs-fuse that made the store, or a newer one, or another --root")
	}
	return nil
}

// claim makes an empty folder a store. The marker comes first and whole, so
// that what a crash leaves is either an empty folder or a store.
func (s *Store) claim() error {
	if _, err := durable.Clean(s.root); err != nil {
		return err
	}
	entries, err := os.ReadDir(s.root)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Name() != "lost+found" { // an empty filesystem's root
			return hint.Wrap(fmt.Errorf("the folder holds %q and is not a cfs-fuse store", e.Name()),
				"give --root an empty folder or one that does not exist yet")
		}
	}
	if err := os.Chmod(s.root, 0o700); err != nil {
		return err
	}
	marker := fmt.Sprintf("%s%d\n", versionPrefix, version)
	return durable.WriteFile(filepath.Join(s.root, versionName), []byte(marker), 0o600)
}

func (s *Store) makeFolders() (err error) {
	for _, name := range []string{"objects", "contents", "contents/sha256", "staging", "images", "refs", leasesName, pinsName, asideName} {
		err := os.Mkdir(filepath.Join(s.root, name), 0o700)
		if (isFull(err) || errors.Is(err, unix.EROFS)) && (name == leasesName || name == pinsName || name == asideName) {
			continue // a store of an earlier program, of which nothing will be removed
		}
		if err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if _, err := os.Stat(filepath.Join(s.root, readmeName)); errors.Is(err, os.ErrNotExist) {
		if err := os.WriteFile(filepath.Join(s.root, readmeName), []byte(readme), 0o600); err != nil {
			return err
		}
	}
	for _, dir := range []string{s.root, filepath.Join(s.root, "staging")} {
		n, err := durable.Clean(dir)
		if err != nil {
			return err
		}
		if n > 0 {
			s.log.Info("removed temporary files of dead processes", "folder", dir, "files", n)
		}
	}
	if s.objectsDir, err = openFolder(s.Objects()); err != nil {
		return err
	}
	if s.contentsDir, err = openFolder(s.ContentsDir()); err != nil {
		return err
	}
	s.stagingDir, err = openFolder(filepath.Join(s.root, "staging"))
	return err
}

// probe finds out, by doing it, how files can be made here.
func (s *Store) probe() error {
	t, err := s.temp()
	if err != nil && (errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EISDIR) || errors.Is(err, unix.EINVAL)) {
		s.noTmpfile = true
		t, err = s.temp()
	}
	if err != nil {
		return err
	}
	defer func() { s.discard(t) }()
	var st unix.Stat_t
	if err := unix.Fstat(t.fd, &st); err != nil {
		return err
	}
	s.chmod = s.noTmpfile || st.Mode&0o7777 != objectMode
	if s.noTmpfile {
		return nil
	}
	name := durable.TempPrefix + "probe" + strconv.Itoa(os.Getpid())
	unix.Unlinkat(s.stagingDir.fd, name, 0)
	s.linkEmpty = true
	if s.link(t, s.stagingDir.fd, name) != nil {
		s.linkEmpty = false
		if err := s.link(t, s.stagingDir.fd, name); err != nil {
			s.log.Info("unnamed files cannot be linked", "error", err)
			s.noTmpfile = true
			return nil
		}
	}
	if err := unix.Unlinkat(s.stagingDir.fd, name, 0); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil // another process has swept the folder
}

// A bootID names one run of the machine.
type bootID [16]byte

// readBootID returns the kernel's boot id (random(4)), or one made from
// the given name.
func readBootID(name string) (bootID, error) {
	var id bootID
	if name != "" {
		sum := sha256.Sum256([]byte(name))
		copy(id[:], sum[:])
		return id, nil
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return id, fmt.Errorf("read the boot id: %w", err)
	}
	h := bytes.ReplaceAll(bytes.TrimSpace(b), []byte("-"), nil)
	if n, err := hex.Decode(id[:], h[:min(len(h), 2*len(id))]); err != nil || n != len(id) || len(h) != 2*len(id) {
		return id, fmt.Errorf("boot id %.50q: want 32 hexadecimal digits", b)
	}
	return id, nil
}

// firstOfBoot checks the store if no process did so since the machine was
// started. Processes of this run of the machine need no check: what they
// wrote is in the kernel's page cache, whether or not they were killed.
func (s *Store) firstOfBoot() error {
	path := filepath.Join(s.root, bootName)
	want := hex.EncodeToString(s.boot[:]) + "\n"
	have, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var since stamp
	if b, err := os.ReadFile(filepath.Join(s.root, syncedName)); err == nil {
		since = parseStamp(b)
	}
	if string(have) == want && time.Time(since).Before(time.Now().Add(-clockSlack)) {
		return nil // nothing to compare, and nothing to write, on a full disk too
	}
	now, err := s.now()
	if err != nil {
		return err
	}
	// A stamp in the future means that the clock was set back: what is
	// written until then would pass for older than the stamp.
	ahead := time.Time(since).After(time.Time(now))
	if string(have) != want {
		if ahead {
			since = stamp{}
		}
		if err := s.recheck(since); err != nil {
			return err
		}
		s.meter.forget()
	}
	if ahead {
		if err := unix.Syncfs(s.rootDir.fd); err != nil {
			return err
		}
		if err := durable.WriteFile(filepath.Join(s.root, syncedName), now.marshal(), 0o600); err != nil {
			return err
		}
	}
	if string(have) == want {
		return nil
	}
	// Not synced: lost or torn it costs no more than another check.
	return os.WriteFile(path, []byte(want), 0o600)
}

// clockSlack is by how much the filesystem's clock may be behind ours: it
// ticks with the kernel's timer.
const clockSlack = time.Second

// A stamp is a time of the filesystem's clock. The zero stamp is before any
// file's time.
type stamp time.Time

// marshal returns seconds since 1970, a point, nine digits and a newline.
func (t stamp) marshal() []byte {
	return fmt.Appendf(nil, "%d.%09d\n", time.Time(t).Unix(), time.Time(t).Nanosecond())
}

// parseStamp reads what marshal wrote, and anything else as the zero stamp,
// which makes everything be checked.
func parseStamp(b []byte) stamp {
	s, n, ok := strings.Cut(strings.TrimSuffix(string(b), "\n"), ".")
	sec, err := strconv.ParseInt(s, 10, 64)
	nsec, nerr := strconv.ParseUint(n, 10, 30)
	if !ok || err != nil || nerr != nil || len(n) != 9 {
		return stamp{}
	}
	return stamp(time.Unix(sec, int64(nsec)))
}

// durable reports whether a file with modification time mtime was written
// before the stamp was taken. The clock is coarse, so equal is not before.
func (t stamp) durable(mtime unix.Timespec) bool {
	return time.Unix(mtime.Unix()).Before(time.Time(t))
}

// retry calls f again while a signal interrupts it.
func retry(f func() error) error {
	for {
		if err := f(); err != unix.EINTR {
			return err
		}
	}
}
