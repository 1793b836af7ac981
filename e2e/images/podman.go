package images

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// podmanSuite is the Debian release whose Podman knows use_composefs.
const podmanSuite = "trixie"

// Podman returns a root filesystem with Podman of Debian trixie in it, made by
// debootstrap from this machine's mirror under the folder cache if it is not
// there (a minute). A nil error promises that it is complete. Nobody should
// write to it.
func Podman(ctx context.Context, cache string, progress io.Writer) (rootfs string, err error) {
	lock, err := os.OpenFile(filepath.Join(cache, "podman.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", fmt.Errorf("lock cache folder: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("lock cache folder %s: %w", cache, err)
	}
	final := filepath.Join(cache, "podman-"+podmanSuite)
	rootfs = filepath.Join(final, "rootfs")
	if _, err := os.Stat(final); err == nil {
		return rootfs, nil
	}
	tmp := final + ".building"
	if err := os.RemoveAll(tmp); err != nil {
		return "", fmt.Errorf("remove interrupted build: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(tmp, "rootfs"), 0o755); err != nil {
		return "", fmt.Errorf("build podman: %w", err)
	}
	tools, err := os.Create(filepath.Join(tmp, "build.log"))
	if err != nil {
		return "", fmt.Errorf("build podman: %w", err)
	}
	defer tools.Close()
	b := &builder{dir: tmp, progress: log.New(progress, "images: ", log.Ltime), tools: tools}
	b.progress.Printf("podman of Debian %s", podmanSuite)
	if err := b.bootstrap(ctx, podmanSuite, b.path("rootfs"), "--include=podman,ca-certificates"); err != nil {
		return "", fmt.Errorf("build podman: %w", err)
	}
	if err := os.Rename(tmp, final); err != nil {
		return "", fmt.Errorf("finish build: %w", err)
	}
	return rootfs, nil
}
