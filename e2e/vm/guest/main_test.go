package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Getppid() != 1 || !onDisk() {
		fmt.Fprintln(os.Stderr, "guest: these tests run in the machine that package e2e/vm boots: make test-vm")
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// disk is where the ext4 with fs-verity is mounted.
const (
	disk   = "/disk"
	device = "/dev/vda"
)

func onDisk() bool {
	table, err := os.ReadFile("/proc/self/mounts")
	return err == nil && strings.Contains(string(table), device+" "+disk+" ext4 ")
}

// command runs a program and returns its output. What it said on standard
// error is in the error.
func command(name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

func must(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := command(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// check fails the test if there is an error.
func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A status is what 'cfs-fuse status --json' says.
type status struct {
	State     string `json:"state"`
	Backend   string `json:"backend"`
	Verity    string `json:"verity"`
	Composefs string `json:"composefs_digest"`
	Note      string `json:"swap_note"`
}

func statusOf(t *testing.T, point string) status {
	t.Helper()
	var s status
	check(t, json.Unmarshal([]byte(must(t, "cfs-fuse", "status", "--json", point)), &s))
	return s
}

// point makes a mount point; what is mounted there is unmounted at the end of
// the test.
func point(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "mnt")
	check(t, err)
	t.Cleanup(func() { unmount(t, dir) })
	return dir
}

// unmount takes away what is mounted at point, if anything is, and waits for
// its process to leave.
func unmount(t *testing.T, point string) {
	t.Helper()
	_, err := command("cfs-fuse", "umount", point)
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 3) { // 3: nothing is mounted
		t.Error(err)
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		pids := processes(t)
		if len(pids) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("processes %v of cfs-fuse are left after %s was unmounted", pids, point)
		}
	}
}

// processes are those of cfs-fuse.
func processes(t *testing.T) []string {
	t.Helper()
	comms, err := filepath.Glob("/proc/[0-9]*/comm")
	check(t, err)
	var pids []string
	for _, c := range comms {
		if name, err := os.ReadFile(c); err == nil && strings.HasPrefix(string(name), "cfs-fuse") {
			pids = append(pids, c)
		}
	}
	return pids
}

// dropCaches makes the kernel forget what it has read, and what it has
// verified.
func dropCaches(t *testing.T) {
	t.Helper()
	unix.Sync()
	check(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0))
}

// remount unmounts the disk, does something to it, and mounts it again.
func remount(t *testing.T, between func()) {
	t.Helper()
	unix.Sync()
	if err := unix.Unmount(disk, 0); err != nil {
		t.Fatalf("unmount %s: %v", disk, err)
	}
	if between != nil {
		between()
	}
	if err := unix.Mount(device, disk, "ext4", 0, ""); err != nil {
		t.Fatalf("mount %s again: %v", disk, err)
	}
}
