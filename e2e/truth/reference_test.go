package truth

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// command runs a program, whose output is in the error when it fails.
func command(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, out[max(0, len(out)-2000):])
	}
	return string(out), nil
}

// tmpfs mounts a tmpfs, which has xattrs of 64 KiB, where ext4 has a block
// for all, until the test ends.
func tmpfs(t *testing.T) string {
	t.Helper()
	path := t.TempDir()
	m, err := kmount.New("tmpfs", 0, kmount.String("mode", "755"))
	if err == nil {
		defer m.Close()
		err = kmount.Attach(m, path)
	}
	if err != nil {
		t.Fatalf("%v; root is needed", err)
	}
	t.Cleanup(func() {
		if err := kmount.Unmount(path); err != nil {
			t.Error(err)
			kmount.Detach(path)
		}
	})
	return path
}

// unpack has umoci unpack the image tagged t of a layout to a new folder.
func unpack(layout, to string) error {
	_, err := command("umoci", "raw", "unpack", "--image", layout+":t", to)
	return err
}

// stack unpacks each layer by itself, turns what hides other layers' names into
// what overlayfs understands, and mounts the stack read-only, visible at the
// folder it returns until the test ends.
func (c *testCase) stack(t *testing.T, work string) (string, error) {
	s := &stacker{t: t, dir: filepath.Join(work, "stack"), point: filepath.Join(work, "stacked")}
	for _, d := range []string{s.dir, s.point} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", err
		}
	}
	t.Cleanup(s.unmount)
	for i := range c.layers {
		if err := s.add(i, c.items(i)); err != nil {
			return "", fmt.Errorf("stack layer %d: %w", i, err)
		}
	}
	return s.point, nil
}

// A stacker grows a stack of layers. What the layers so far look like is
// mounted at point.
type stacker struct {
	t          *testing.T
	dir, point string
	lowers     []string // the highest first
}

func (s *stacker) unmount() {
	if err := kmount.Unmount(s.point); err != nil && len(s.lowers) > 0 {
		s.t.Error(err)
		kmount.Detach(s.point)
	}
}

// add unpacks a layer and puts it on top.
func (s *stacker) add(i int, items []imagetest.Item) error {
	own := map[string]bool{} // names that the layer has
	for _, it := range items {
		if _, _, w := isWhiteout(it.Name()); !w {
			own[clean(it.Name())] = true
		}
	}
	var unpacked []imagetest.Item // with what stands for the layers below
	var hidden, opaques []string
	below := func(name string) error {
		if own[name] || len(s.lowers) == 0 {
			return nil
		}
		it, ok, err := itemOf(s.point, name)
		if err == nil && ok {
			own[name] = true
			unpacked = append(unpacked, it)
		}
		return err
	}
	parents := func(name string) error {
		if err := below(""); err != nil {
			return err
		}
		for at, r := range name {
			if r == '/' {
				if err := below(name[:at]); err != nil {
					return err
				}
			}
		}
		return nil
	}
	if err := parents(""); err != nil {
		return err
	}
	// What a whiteout of the layer hides whole, its own entries apart, needs no
	// whiteouts within; in an opaque folder overlayfs would list them.
	var whole []string
	for _, it := range items {
		if target, isOpaque, isW := isWhiteout(it.Name()); isW && (isOpaque || !own[target]) {
			whole = append(whole, target+"/")
		}
	}
	for _, it := range items {
		name := clean(it.Name())
		target, isOpaque, isW := isWhiteout(it.Name())
		if isW {
			name = target
			if !isOpaque && slices.ContainsFunc(whole, func(w string) bool { return strings.HasPrefix(name, w) || w == "/" }) {
				continue
			}
		}
		if err := parents(name); err != nil {
			return err
		}
		switch {
		case isOpaque:
			if err := below(name); err != nil {
				return err
			}
			opaques = append(opaques, name)
		case isW:
			hidden = append(hidden, name)
		default:
			if to := clean(it.LinkTarget()); to != "" && !own[to] {
				if err := errors.Join(parents(to), below(to)); err != nil {
					return err
				}
			}
			unpacked = append(unpacked, it)
		}
	}
	layer := filepath.Join(s.dir, fmt.Sprintf("%03d", i))
	if err := unpackItems(s.dir, layer, unpacked); err != nil {
		return err
	}
	for _, name := range opaques {
		if name == "" {
			s.lowers = nil // overlayfs does not look for the mark on a layer's root
		} else if err := mark(filepath.Join(layer, name)); err != nil {
			return err
		}
	}
	for _, name := range hidden {
		if err := hide(filepath.Join(layer, name)); err != nil {
			return err
		}
	}
	return s.mount(layer)
}

// unpackItems has umoci unpack an image of one layer.
func unpackItems(work, to string, items []imagetest.Item) error {
	w, err := writeLayer(work, items)
	if err != nil {
		return err
	}
	defer os.Remove(w.f.Name())
	defer w.f.Close()
	blob, err := imagetest.BuildGzip(w.section())
	if err != nil {
		return err
	}
	im, err := imagetest.Image(blob)
	if err != nil {
		return err
	}
	layout := to + ".layout"
	defer os.RemoveAll(layout)
	if err := im.WriteLayout(layout, "t"); err != nil {
		return err
	}
	return unpack(layout, to)
}

// mount mounts the stack with one more layer in place of the last.
func (s *stacker) mount(layer string) error {
	if len(s.lowers) > 0 || isMountpoint(s.point) {
		if err := kmount.Unmount(s.point); err != nil {
			return err
		}
	}
	s.lowers = append([]string{layer}, s.lowers...)
	params := []kmount.Param{kmount.Flag("ro")}
	for _, l := range s.lowers {
		params = append(params, kmount.String("lowerdir+", l))
	}
	if len(s.lowers) == 1 { // overlayfs wants two without an upper
		empty := filepath.Join(s.dir, "empty")
		if err := os.MkdirAll(empty, 0o755); err != nil {
			return err
		}
		params = append(params, kmount.String("lowerdir+", empty))
	}
	m, err := kmount.New("overlay", unix.MOUNT_ATTR_RDONLY, params...)
	if err != nil {
		return err
	}
	defer m.Close()
	return kmount.Attach(m, s.point)
}

func isMountpoint(path string) bool {
	_, err := kmount.At(path)
	return err == nil
}

// itemOf makes an item of what a tree has at a name; ok is false if there is
// nothing.
func itemOf(tree, name string) (it imagetest.Item, ok bool, err error) {
	path := filepath.Join(tree, name)
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return it, false, nil
	} else if err != nil {
		return it, false, err
	}
	attrs := []imagetest.Attr{mode(int64(st.Mode & 0o7777)), owner(int(st.Uid), int(st.Gid)), mtime(time.Unix(st.Mtim.Unix()))}
	xs, err := xattrsOf(path)
	if err != nil {
		return it, false, err
	}
	for n, v := range xs {
		attrs = append(attrs, xattr(n, v))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if name == "" {
			name = "."
		}
		return dir(name, attrs...), true, nil
	case unix.S_IFREG:
		data, err := os.ReadFile(path)
		return file(name, string(data), attrs...), err == nil, err
	}
	return it, false, nil // no parent of anything
}

// mark makes a folder opaque.
func mark(path string) error {
	return keepingTime(path, func() error { return unix.Lsetxattr(path, "trusted.overlay.opaque", []byte("y"), 0) })
}

// hide puts a whiteout at path. If the layer has something there itself, it
// hides a folder below by being opaque, and anything else anyway.
func hide(path string) error {
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	switch {
	case err == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR:
		return mark(path)
	case err == nil, errors.Is(err, unix.ENOTDIR):
		return nil
	}
	parent := filepath.Dir(path)
	if _, err := os.Lstat(parent); err != nil {
		return nil // the folder is nowhere: there is nothing to hide
	}
	return keepingTime(parent, func() error { return unix.Mknod(path, unix.S_IFCHR, 0) })
}

// keepingTime does something to a folder that keeps its mtime.
func keepingTime(path string, do func() error) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return err
	}
	if err := do(); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{st.Mtim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW)
}
