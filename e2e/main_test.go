package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// What every test uses, made by TestMain.
var (
	set      *images.Set
	registry *images.Registry // read-only, over the cached storage
	runDir   string           // of this run: all mounts, stores and the binary are below it
	binary   string           // our own copy: a process that runs it is of this run
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(workerEnv); mode != "" {
		os.Exit(worker(mode))
	}
	flag.Parse()
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

// runAll prepares, runs the tests, and checks that nothing of them is left.
func runAll(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("the tests mount and chroot: run them as root")
	}
	ctx := context.Background()
	cache, err := images.DefaultCache()
	if err != nil {
		return 1, err
	}
	if set, err = images.Ensure(ctx, cache, os.Stderr); err != nil {
		return 1, err
	}
	if runDir, err = os.MkdirTemp("", "cfse2e"); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(runDir)) }()
	if err := prepareBinary(ctx); err != nil {
		return 1, err
	}
	if registry, err = images.StartRegistry(ctx, images.RegistryOptions{Storage: set.Storage(), Dir: runDir, ReadOnly: true}); err != nil {
		return 1, err
	}
	code = m.Run()
	err = errors.Join(registry.Close(), cleanLeft())
	return code, err
}

func prepareBinary(ctx context.Context) error {
	binary = filepath.Join(runDir, "cfs-fuse")
	if given := os.Getenv("CFS_FUSE_BIN"); given != "" {
		in, err := os.Open(given)
		if err != nil {
			return fmt.Errorf("CFS_FUSE_BIN: %w", err)
		}
		defer in.Close()
		out, err := os.OpenFile(binary, os.O_CREATE|os.O_WRONLY, 0o755)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, in)
		return errors.Join(err, out.Close())
	}
	out, err := exec.CommandContext(ctx, "go", "build", "-o", binary, "../cmd/cfs-fuse").CombinedOutput()
	if err != nil {
		return fmt.Errorf("build the binary: %w\n%s", err, out)
	}
	return nil
}

// cleanLeft undoes what the tests left behind and returns an error naming it.
func cleanLeft() error {
	time.Sleep(100 * time.Millisecond) // processes that were told to end
	var left []error
	pids, err := processes()
	left = append(left, err)
	for _, pid := range pids {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		left = append(left, fmt.Errorf("left behind: process %d: %s", pid, strings.ReplaceAll(string(line), "\x00", " ")))
		unix.Kill(pid, unix.SIGKILL)
	}
	mounts, err := mountsBelow(runDir)
	left = append(left, err)
	for _, m := range mounts {
		left = append(left, fmt.Errorf("left behind: mount %s (%s)", m.point, m.fstype))
		unix.Unmount(m.point, unix.MNT_DETACH)
	}
	loops, err := loopsBelow(runDir)
	left = append(left, err)
	for device, file := range loops {
		left = append(left, fmt.Errorf("left behind: loop device %s of %s", device, file))
		exec.Command("losetup", "--detach", device).Run()
	}
	return errors.Join(left...)
}

// processes are those that run this run's binary.
func processes() ([]int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, d := range dirs {
		exe, err := os.Readlink(filepath.Join(d, "exe"))
		if err != nil || strings.TrimSuffix(exe, " (deleted)") != binary {
			continue // ended meanwhile, a kernel thread, or another's
		}
		pid, err := strconv.Atoi(filepath.Base(d))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// A mounted is one line of mountinfo.
type mounted struct{ point, fstype, source, options string }

// mountsBelow lists the mounts at dir or below it, the newest first.
func mountsBelow(dir string) ([]mounted, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	// proc(5): id parent major:minor root point options [optional...] - type source options
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var all []mounted
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(strings.TrimSpace(line), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 3 {
			return nil, fmt.Errorf("mountinfo: %q", line)
		}
		m := mounted{point: unescape.Replace(f[4]), fstype: g[0], source: unescape.Replace(g[1]), options: f[5] + "," + unescape.Replace(g[2])}
		if m.point == dir || strings.HasPrefix(m.point, dir+"/") {
			all = append([]mounted{m}, all...)
		}
	}
	return all, nil
}

// loopsBelow lists the loop devices whose file is below dir.
func loopsBelow(dir string) (map[string]string, error) {
	paths, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	all := map[string]string{}
	for _, p := range paths {
		text, err := os.ReadFile(p)
		if err != nil {
			continue // detached meanwhile
		}
		if file := strings.TrimSpace(string(text)); strings.HasPrefix(file, dir+"/") {
			all["/dev/"+strings.Split(p, "/")[3]] = file
		}
	}
	return all, nil
}
