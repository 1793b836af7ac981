package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// A File is a file of the machine: where it is there, and what is put there.
// It is executable.
type File struct{ Guest, Host string }

// Programs returns a program of this machine, found in PATH or sbin, and the
// shared libraries that it needs, as files of the machine at the same places.
func Programs(ctx context.Context, names ...string) ([]File, error) {
	var files []File
	for _, name := range names {
		path, err := exec.LookPath(name)
		for _, dir := range []string{"/usr/sbin", "/sbin"} {
			if err != nil {
				path, err = exec.LookPath(filepath.Join(dir, name))
			}
		}
		if err != nil {
			return nil, fmt.Errorf("%w: install the package that has it (make deps)", err)
		}
		files = append(files, File{"/bin/" + name, path})
		out, err := run(ctx, "/", "ldd", path)
		if err != nil {
			if strings.Contains(err.Error(), "not a dynamic executable") {
				continue
			}
			return nil, err
		}
		for _, m := range libraryPath.FindAllStringSubmatch(string(out), -1) {
			files = append(files, File{m[1], m[1]})
		}
	}
	return files, nil
}

// libraryPath finds the files that ldd(1) names: "libc.so.6 => /lib/… (0x…)".
var libraryPath = regexp.MustCompile(`(/[^ ]+) \(0x`)

// WriteInitrd writes an initramfs with the init program, the kernel's modules
// and the given files. The init program is built by the go command.
func (k *Kernel) WriteInitrd(ctx context.Context, path string, files []File) error {
	tree, err := os.MkdirTemp(filepath.Dir(path), "initrd")
	if err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	defer os.RemoveAll(tree)
	if err := BuildStatic(ctx, filepath.Join(tree, "init"), "build", "github.com/cfs-fuse/cfs-fuse/e2e/vm/init"); err != nil {
		return err
	}
	for _, m := range k.Modules {
		files = append(files, File{"/modules/" + filepath.Base(m), m})
	}
	for _, d := range []string{"dev", "proc", "sys", "tmp", "run", "disk", "etc", "root"} {
		if err := os.Mkdir(filepath.Join(tree, d), 0o755); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := copyFile(filepath.Join(tree, f.Guest), f.Host); err != nil {
			return fmt.Errorf("write initramfs: %w", err)
		}
	}
	out, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write initramfs: %w", err)
	}
	cmd := exec.CommandContext(ctx, "sh", "-c", "find . -print0 | cpio --null --create --format=newc --quiet --owner=0:0")
	cmd.Dir, cmd.Stdout, cmd.Stderr = tree, out, os.Stderr
	if err := errors.Join(cmd.Run(), out.Close()); err != nil {
		return fmt.Errorf("write initramfs: cpio: %w", err)
	}
	return nil
}

// BuildStatic has the go command make a program that needs no library: what is
// "build", or "test" for a package's tests with the -c flag.
func BuildStatic(ctx context.Context, out, what, pkg string) error {
	args := []string{what, "-trimpath", "-o", out, pkg}
	if what == "test" {
		args = []string{what, "-c", "-trimpath", "-o", out, pkg}
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s %s: %w\n%s", what, pkg, err, text)
	}
	return nil
}

func copyFile(to, from string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// MakeDisk makes a disk image of size bytes, sparse, with an empty ext4 that
// has fs-verity.
func MakeDisk(ctx context.Context, path string, size int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return fmt.Errorf("make disk: %w", err)
	}
	mkfs, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		mkfs = "/usr/sbin/mkfs.ext4"
	}
	// Nothing is left for the kernel to initialise in the background.
	_, err = run(ctx, "/", mkfs, "-q", "-O", "verity", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-m", "0", path)
	return err
}
