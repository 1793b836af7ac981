package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// cfs runs the command that is measured.
func (b *bench) cfs(args ...string) ([]byte, error) {
	return output(exec.CommandContext(b.ctx, b.bin, append([]string{"--runtime-dir", b.path("run")}, args...)...))
}

func output(cmd *exec.Cmd) ([]byte, error) {
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, &errs)
	}
	return out, err
}

// mountImage mounts an image with a backend until the end.
func (b *bench) mountImage(source, name, backend string, flags ...string) error {
	dir := b.path(name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	args := append([]string{"mount", "--root", b.path("root"), "--backend", backend, "--swap", "never"}, flags...)
	if _, err := b.cfs(append(args, source, dir)...); err != nil {
		return err
	}
	b.undo = append(b.undo, func() error {
		_, err := output(exec.Command(b.bin, "--runtime-dir", b.path("run"), "umount", dir))
		return err
	})
	return nil
}

func (b *bench) status(dir string) (s mount.Status, err error) {
	out, err := b.cfs("status", "--json", dir)
	if err == nil {
		err = json.Unmarshal(out, &s)
	}
	return s, err
}

// requests is what the server of a contender was asked so far.
func (b *bench) requests(name string) map[string]int64 {
	if name != fuseMount && name != hybridMount {
		return nil
	}
	for _, c := range b.all {
		if c.name == name {
			s, err := b.status(c.dir)
			if err == nil {
				return s.FUSERequests
			}
		}
	}
	return nil
}

func difference(before, after map[string]int64) string {
	var parts []string
	for op, n := range after {
		if d := n - before[op]; d > 0 {
			parts = append(parts, fmt.Sprintf("%s %d", op, d))
		}
	}
	slices.Sort(parts)
	if len(parts) == 0 {
		return "nothing"
	}
	return strings.Join(parts, ", ")
}

// mountBy mounts by mount(8) until the end.
func (b *bench) mountBy(dir string, args ...string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if _, err := output(exec.CommandContext(b.ctx, "mount", append(args, dir)...)); err != nil {
		return err
	}
	b.undo = append(b.undo, func() error { return unix.Unmount(dir, 0) })
	return nil
}

// handMade stacks an overlayfs over the image that was sealed in the store and
// the objects, as composefs does.
func (b *bench) handMade(source string) error {
	digest, err := b.digestOf(source)
	if err != nil {
		return err
	}
	sealed := b.path("root", "images", digest, "sealed.erofs")
	if err := b.mountBy(b.path("erofs-image"), "-t", "erofs", "-o", "ro", sealed); err != nil {
		return err
	}
	return b.mountBy(b.path(byHand), "-t", "overlay", "-o",
		"ro,metacopy=on,redirect_dir=on,lowerdir="+b.path("erofs-image")+"::"+b.path("root", "objects"), "overlay")
}

// digestOf finds the only image of the layout that source names.
func (b *bench) digestOf(source string) (string, error) {
	data, err := os.ReadFile(filepath.Join(strings.TrimSuffix(strings.TrimPrefix(source, "oci:"), ":latest"), "index.json"))
	if err != nil {
		return "", err
	}
	var index struct {
		Manifests []struct{ Digest string }
	}
	if err := json.Unmarshal(data, &index); err != nil || len(index.Manifests) != 1 {
		return "", fmt.Errorf("index of %s: %d manifests, %w", source, len(index.Manifests), err)
	}
	return strings.TrimPrefix(index.Manifests[0].Digest, "sha256:"), nil
}

// loopback has this program serve a folder by go-fuse's loopback filesystem,
// which passes reads through to the kernel.
func (b *bench) loopback(from, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(exe, "-loopback", from, dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	b.undo = append(b.undo, func() error {
		err := unix.Unmount(dir, unix.MNT_DETACH)
		return errors.Join(err, cmd.Wait())
	})
	for range 100 {
		var a, z unix.Stat_t
		if unix.Stat(dir, &a) == nil && unix.Stat(b.dir, &z) == nil && a.Dev != z.Dev {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.New("the loopback does not mount")
}

func serveLoopback(from, dir string) error {
	root, err := fs.NewLoopbackRoot(from)
	if err != nil {
		return err
	}
	long := 24 * time.Hour
	srv, err := fs.Mount(dir, root, &fs.Options{
		EntryTimeout: &long, AttrTimeout: &long, NegativeTimeout: &long,
		MountOptions: fuse.MountOptions{DirectMountStrict: true, Name: "loopback", Options: []string{"ro"}},
	})
	if err != nil {
		return err
	}
	srv.Wait()
	return nil
}
