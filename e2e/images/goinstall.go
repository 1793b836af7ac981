package images

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// GoInstall has commands built from the Go module proxy ("path@version"), once,
// and returns their folder, cache/name. Flags are of 'go install'.
func GoInstall(ctx context.Context, cache, name string, progress io.Writer, flags []string, commands ...string) (string, error) {
	dir := filepath.Join(cache, name)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	lock, err := os.Create(dir + ".lock")
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return "", fmt.Errorf("build %s: lock: %w", name, err)
	}
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	fmt.Fprintf(progress, "building %s (once, some minutes)\n", name)
	tmp, err := os.MkdirTemp(cache, name+"-*")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	args := append([]string{"install", "-trimpath", "-ldflags", "-s -w"}, flags...)
	cmd := exec.CommandContext(ctx, "go", append(args, commands...)...)
	cmd.Dir = tmp // not a module's
	cmd.Env = append(os.Environ(), "GOBIN="+tmp, "CGO_ENABLED=0", "GOFLAGS=-mod=mod")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w\n%s", strings.Join(commands, " "), err, out)
	}
	return dir, os.Rename(tmp, dir)
}
