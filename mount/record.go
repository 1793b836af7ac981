package mount

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// Files are the paths, in the runtime folder, of what belongs to one mount
// point. Like the mounts themselves they do not outlive a reboot.
type Files struct {
	Record string // the Status as JSON
	Socket string // where the serving process answers (package comment of control.go)
	Log    string // what that process logs, when it is in the background
	Lock   string // a folder, locked while a mount is being made
}

// FilesOf returns the files of a mount point, given by its absolute path.
func FilesOf(runtimeDir, mountpoint string) Files {
	sum := sha256.Sum256([]byte(mountpoint))
	base := filepath.Join(runtimeDir, hex.EncodeToString(sum[:8]))
	return Files{Record: base + ".json", Socket: base + ".sock", Log: base + ".log", Lock: base + ".lock"}
}

func (f Files) remove() {
	os.Remove(f.Record)
	os.Remove(f.Socket)
	os.Remove(f.Log)
	os.Remove(f.Lock)
}

func (f Files) save(s Status) error {
	data, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(f.Record, append(data, '\n'), 0o600)
}

func (f Files) load() (Status, error) {
	var s Status
	data, err := os.ReadFile(f.Record)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal(data, &s); err != nil {
		return s, fmt.Errorf("record %s: %w", f.Record, err)
	}
	return s, nil
}

// abandoned reports whether there is a record whose process cannot be reached
// because there is none.
func (f Files) abandoned() bool {
	if _, err := os.Stat(f.Record); err != nil {
		return false
	}
	c, err := net.DialTimeout("unix", f.Socket, time.Second)
	if err == nil {
		c.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist)
}

// errNoMount says that a path is no mount of ours.
func errNoMount(path string) error {
	return hint.Wrap(fmt.Errorf("%s: %w of cfs-fuse", path, kmount.ErrNotMounted), "'cfs-fuse status' lists what is mounted")
}

// fromKernel corrects what a record says by what the kernel says is mounted.
// It fails with ErrNotMounted when that is nothing of ours.
func fromKernel(s Status) (Status, error) {
	info, err := kmount.At(s.Mountpoint)
	s.PID = 0
	switch {
	case err != nil:
		return s, err
	case isSealedMount(info):
		s.State, s.Backend, s.BackendReason = Swapped, "kernel", ""
		s.Keeper, s.KeeperPID = "", 0
	case isHybridMount(info):
		s.Note = "the process that served it has died; files that are whole can be read, others cannot; mount the image again"
	case ours(info):
		s.Note = "the process that served it has died; mount the image again"
	default:
		return s, errNoMount(s.Mountpoint)
	}
	return s, nil
}

// isSealedMount reports whether a mount is the kernel's mount of an image that
// was sealed here: its source is the sealed image.
func isSealedMount(i kmount.Info) bool {
	return i.FSType == "overlay" && strings.HasSuffix(i.Source, "/"+sealedName)
}

// ResolveMountpoint returns the absolute path by which a mount point was
// recorded. It looks at links, never at what they lead to: a mount without a
// server cannot be looked at.
func ResolveMountpoint(path string) (string, error) {
	abs, err := filepath.Abs(path)
	for range 40 { // as many links as the kernel follows
		var dir, target string
		if err == nil {
			dir, err = filepath.EvalSymlinks(filepath.Dir(abs))
		}
		if err != nil {
			return "", fmt.Errorf("mount point %s: %w", path, err)
		}
		abs = filepath.Join(dir, filepath.Base(abs))
		if target, err = os.Readlink(abs); err != nil {
			return abs, nil // not a link
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(dir, target)
		}
		abs = target
	}
	return "", fmt.Errorf("mount point %s: %w", path, unix.ELOOP)
}

// records lists the mount points that have a record in the runtime folder.
func records(runtimeDir string) ([]Files, error) {
	all, err := filepath.Glob(filepath.Join(runtimeDir, "*.json"))
	if err != nil {
		return nil, err
	}
	var files []Files
	for _, path := range all {
		f := Files{Record: path}
		s, err := f.load()
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		files = append(files, FilesOf(runtimeDir, s.Mountpoint))
	}
	return files, nil
}

// oneLine makes one line of another program's message.
func oneLine(s string) string {
	return strings.Join(strings.Fields(strings.TrimSpace(s)), " ")
}
