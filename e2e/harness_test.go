package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// A bench is where one test works: a store, a runtime folder, mount points.
type bench struct {
	t       testing.TB
	dir     string // short: sockets have their names below it
	root    string
	runtime string
	backend string // of the mounts to come
	mounts  int
}

// The backends, as --backend names them.
const (
	fuseBackend   = "fuse"
	hybridBackend = "hybrid"
)

// eachBackend runs a test with each of the backends.
func eachBackend(t *testing.T, test func(t *testing.T, b *bench)) {
	for _, backend := range []string{fuseBackend, hybridBackend} {
		t.Run(backend, func(t *testing.T) {
			b := newBench(t)
			b.backend = backend
			test(t, b)
		})
	}
}

// newBench makes an empty bench, whose mounts are hybrid. When the test ends everything mounted below
// it is unmounted, which must work by 'cfs-fuse umount'.
func newBench(t testing.TB) *bench {
	t.Helper()
	dir, err := os.MkdirTemp(runDir, "b")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, root: filepath.Join(dir, "root"), runtime: filepath.Join(dir, "run"), backend: hybridBackend}
	t.Cleanup(b.close)
	return b
}

func (b *bench) close() {
	if b.t.Failed() {
		b.tellLogs()
	}
	left, err := mountsBelow(b.dir)
	if err != nil {
		b.t.Error(err)
	}
	for _, m := range left {
		if _, err := b.run("umount", m.point); err == nil {
			continue
		} else if !b.t.Failed() {
			b.t.Errorf("unmount at the end of the test: %v", err)
		}
		if err := unix.Unmount(m.point, unix.MNT_DETACH); err != nil {
			b.t.Errorf("umount -l %s: %v", m.point, err)
		}
	}
	if err := os.RemoveAll(b.dir); err != nil {
		b.t.Error(err)
	}
}

// tellLogs prints the ends of the background processes' logs.
func (b *bench) tellLogs() {
	logs, _ := filepath.Glob(filepath.Join(b.runtime, "*"))
	for _, l := range logs {
		fi, err := os.Stat(l)
		if err != nil || !fi.Mode().IsRegular() {
			continue
		}
		text, _ := os.ReadFile(l)
		b.t.Logf("%s:\n%s", l, text[max(0, len(text)-4000):])
	}
}

// commandTime is how long any one command may take.
const commandTime = 3 * time.Minute

// A commandError is a command that did not end with code 0.
type commandError struct {
	args   []string
	code   int // -1 when it did not end by itself
	stderr string
}

func (e *commandError) Error() string {
	return fmt.Sprintf("cfs-fuse %s: exit code %d: %s", strings.Join(e.args, " "), e.code, e.stderr)
}

// run runs a cfs-fuse command and returns its standard output.
func (b *bench) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandTime)
	defer cancel()
	args = append([]string{"--runtime-dir", b.runtime}, args...)
	cmd := exec.CommandContext(ctx, binary, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		code := -1
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			code = exit.ExitCode()
		}
		return out.String(), &commandError{args, code, strings.TrimSpace(errs.String())}
	}
	return out.String(), nil
}

// must runs a command that has to succeed.
func (b *bench) must(args ...string) string {
	b.t.Helper()
	out, err := b.run(args...)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

// refused runs a command that has to fail with the given code and say all of
// words, in one line, which is returned.
func (b *bench) refused(code int, words []string, args ...string) string {
	b.t.Helper()
	_, err := b.run(args...)
	ce, ok := errors.AsType[*commandError](err)
	if !ok {
		b.t.Errorf("cfs-fuse %s: ended with %v, want exit code %d", strings.Join(args, " "), err, code)
		return ""
	}
	if ce.code != code {
		b.t.Errorf("%v; want exit code %d", err, code)
	}
	for _, w := range words {
		if !strings.Contains(ce.stderr, w) {
			b.t.Errorf("%v; want it to say %q", err, w)
		}
	}
	if strings.Count(ce.stderr, "\n") > 0 {
		b.t.Errorf("%v; want one line", err)
	}
	return ce.stderr
}

// point makes a new mount point.
func (b *bench) point() string {
	b.t.Helper()
	b.mounts++
	p := filepath.Join(b.dir, fmt.Sprintf("m%d", b.mounts))
	if err := os.Mkdir(p, 0o755); err != nil {
		b.t.Fatal(err)
	}
	return p
}

// mount mounts source at a new mount point, from the bench's store, with its
// backend unless the flags name another one.
func (b *bench) mount(source string, flags ...string) string {
	b.t.Helper()
	p := b.point()
	b.mountAt(source, p, flags...)
	return p
}

func (b *bench) mountAt(source, point string, flags ...string) {
	b.t.Helper()
	args := append([]string{"mount", "--root", b.root, "--plain-http", "--backend", b.backend}, flags...)
	b.must(append(args, source, point)...)
}

// A status is what 'cfs-fuse status --json' says.
type status struct {
	Source         string           `json:"source"`
	Mountpoint     string           `json:"mountpoint"`
	ManifestDigest string           `json:"manifest_digest"`
	State          string           `json:"state"`
	Backend        string           `json:"backend"`
	BackendReason  string           `json:"backend_reason"`
	FUSERequests   map[string]int64 `json:"fuse_requests"`
	Files          int              `json:"files"`
	FilesLocal     int              `json:"files_local"`
	Bytes          int64            `json:"bytes"`
	BytesLocal     int64            `json:"bytes_local"`
	Fetched        map[string]struct {
		Requests int64 `json:"requests"`
		Bytes    int64 `json:"bytes"`
	} `json:"fetched"`
	Verity     string  `json:"verity"`
	Composefs  string  `json:"composefs_digest"`
	OldestWait float64 `json:"oldest_wait_seconds"`
	Note       string  `json:"swap_note"`
	PID        int     `json:"pid"`
	Keeper     string  `json:"keeper"`
	KeeperPID  int     `json:"keeper_pid"`
	Restarts   int     `json:"restarts"`
	Log        string  `json:"log"`
}

func (b *bench) status(point string) status {
	b.t.Helper()
	out := b.must("status", "--json", point)
	var s status
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		b.t.Fatalf("status --json printed %s: %v", out, err)
	}
	return s
}

// waitFor waits until a mount has reached a state.
func (b *bench) waitFor(state, point string) {
	b.t.Helper()
	b.must("wait", "--for", state, "--timeout", commandTime.String(), point)
}

// eventually polls until ok, at most limit.
func eventually(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// killAll kills the process that serves a mount and the one that would start
// another.
func (b *bench) killAll(point string) {
	b.t.Helper()
	s := b.status(point)
	if s.KeeperPID == 0 {
		b.t.Fatalf("nothing keeps the session of %s: %+v", point, s)
	}
	// Stopped, it cannot start another holder.
	for _, kill := range []struct {
		pid int
		sig unix.Signal
	}{{s.PID, unix.SIGSTOP}, {s.KeeperPID, unix.SIGKILL}, {s.PID, unix.SIGKILL}} {
		if err := unix.Kill(kill.pid, kill.sig); err != nil {
			b.t.Fatalf("kill %d: %v", kill.pid, err)
		}
	}
	eventually(b.t, 10*time.Second, "the killed processes are gone", func() bool { return ended(s.PID) && ended(s.KeeperPID) })
}

// processesOf returns the processes of this run's binary that have path in
// their arguments.
func processesOf(t testing.TB, path string) []int {
	t.Helper()
	all, err := processes()
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, pid := range all {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if strings.Contains(string(line), path) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// noProcess waits a moment for the last process of a mount to leave.
func noProcess(t testing.TB, point string) {
	t.Helper()
	eventually(t, 5*time.Second, "no cfs-fuse process is left for "+point, func() bool { return len(processesOf(t, point)) == 0 })
}

// ended reports whether a process has ended: its files are closed then, which
// is later than that its program is gone from /proc.
func ended(pid int) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(text), ") ") // proc(5): pid (comm) state
	return err != nil || strings.HasPrefix(after, "Z") || strings.HasPrefix(after, "X")
}

// mountOn returns what is mounted at point, the topmost first.
func mountOn(t testing.TB, point string) []mounted {
	t.Helper()
	all, err := mountsBelow(point)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// isKernel checks what is said of a mount after the swap: by the kernel, by
// findmnt, and by the list of processes.
func isKernel(t testing.TB, point string) {
	t.Helper()
	noProcess(t, point)
	all := mountOn(t, point)
	if len(all) != 1 || all[0].fstype != "overlay" {
		t.Errorf("mounted at %s: %+v, want one overlay", point, all)
	}
	out, err := exec.Command("findmnt", "--noheadings", "--output", "FSTYPE,SOURCE,OPTIONS", "--mountpoint", point).CombinedOutput()
	if text := string(out); err != nil || !strings.HasPrefix(text, "overlay") || !strings.Contains(text, "sealed.erofs") {
		t.Errorf("findmnt says %q (%v), want an overlay over EROFS", text, err)
	}
}

// isServed checks that point is served by a process of ours, with the bench's
// backend.
func (b *bench) isServed(point string) {
	b.t.Helper()
	fstype, source := "fuse.cfs-fuse", ""
	if b.backend == hybridBackend {
		fstype, source = "overlay", "/lazy.erofs"
	}
	all := mountOn(b.t, point)
	if len(all) != 1 || all[0].fstype != fstype || !strings.HasSuffix(all[0].source, source) {
		b.t.Errorf("mounted at %s: %+v, want one mount of the %s backend", point, all, b.backend)
	}
	if s := b.status(point); s.Backend != b.backend || s.BackendReason == "" || s.PID == 0 {
		b.t.Errorf("status of a mount of the %s backend: %+v", b.backend, s)
	}
}

// sameTree fails the test for each way (at most 30) in which the mount is not
// the reference.
func sameTree(t testing.TB, reference, point string, o treediff.Options) {
	t.Helper()
	diffs, err := treediff.Compare(reference, point, o)
	if err != nil {
		t.Fatal(err)
	}
	for i, d := range diffs {
		if i == 30 {
			t.Errorf("and %d more differences", len(diffs)-i)
			break
		}
		t.Errorf("want | got: %v", d)
	}
}

// freeAddr finds a loopback address that nobody listens on.
func freeAddr(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// inRoot runs a program with the mount as its root, as a runtime would: with
// /dev, and what must be writable on tmpfs. The namespace ends with it.
func inRoot(ctx context.Context, point string, argv ...string) (string, error) {
	const script = `set -e
root=$1; shift
mount --bind /dev "$root/dev"
for d in run tmp var/log/nginx; do mount -t tmpfs tmpfs "$root/$d"; done
exec chroot "$root" "$@"`
	args := append([]string{"--mount", "--propagation", "private", "sh", "-c", script, "sh", point}, argv...)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LC_ALL=C.UTF-8"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s in %s: %w: %s", strings.Join(argv, " "), point, err, out)
	}
	return string(out), nil
}
