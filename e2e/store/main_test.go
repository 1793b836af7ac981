// Package store tests the store as its users meet it: the binary, mounts, a
// registry in the process, filesystems on loop devices, processes that are
// killed. Its images are small and made here. Everything it mounts or starts is
// below one folder, and what is left of it at the end fails the run.
package store

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

var (
	runDir string // everything is below it
	binary string
)

func TestMain(m *testing.M) {
	flag.Parse()
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e/store:", err)
		code = 1
	}
	os.Exit(code)
}

func runAll(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("the tests mount: run them as root")
	}
	if runDir, err = os.MkdirTemp("", "cfsstore"); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(runDir)) }()
	binary = filepath.Join(runDir, "cfs-fuse")
	if out, err := exec.Command("go", "build", "-o", binary, "../../cmd/cfs-fuse").CombinedOutput(); err != nil {
		return 1, fmt.Errorf("build the binary: %w\n%s", err, out)
	}
	code = m.Run()
	return code, cleanLeft()
}

// cleanLeft undoes what tests have left, and returns an error naming it.
func cleanLeft() error {
	var left []error
	deadline := time.Now().Add(2 * time.Second)
	for len(processes()) > 0 && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
	}
	for _, pid := range processes() {
		left = append(left, fmt.Errorf("left behind: process %d", pid))
		unix.Kill(pid, unix.SIGKILL)
	}
	for _, p := range mountsBelow(runDir) {
		left = append(left, fmt.Errorf("left behind: mount %s", p))
		unix.Unmount(p, unix.MNT_DETACH)
	}
	return errors.Join(left...)
}

// processes are those that run the binary.
func processes() (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, d := range dirs {
		exe, _ := os.Readlink(filepath.Join(d, "exe"))
		var pid int
		if exe == binary {
			fmt.Sscan(filepath.Base(d), &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

func mountsBelow(dir string) (points []string) {
	all, _ := kmount.Mounts()
	for _, m := range all {
		if strings.HasPrefix(m.Mountpoint, dir+"/") {
			points = append([]string{m.Mountpoint}, points...)
		}
	}
	return points
}

// A bench is where one test works.
type bench struct {
	t       testing.TB
	dir     string
	root    string // of the store
	runtime string
	points  int
	after   []func() // when everything is unmounted
}

func newBench(t testing.TB) *bench {
	t.Helper()
	dir, err := os.MkdirTemp(runDir, "b")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, root: filepath.Join(dir, "root"), runtime: filepath.Join(dir, "run")}
	t.Cleanup(func() {
		if t.Failed() {
			logs, _ := filepath.Glob(filepath.Join(b.runtime, "*.log"))
			for _, l := range logs {
				text, _ := os.ReadFile(l)
				t.Logf("%s:\n%s", l, text[max(0, len(text)-3000):])
			}
		}
		for _, p := range mountsBelow(dir) {
			if _, err := b.run("umount", p); err != nil && len(b.after) == 0 {
				unix.Unmount(p, unix.MNT_DETACH)
			}
		}
		for _, f := range b.after {
			f()
		}
		eventually(t, 10*time.Second, "processes have left", func() bool { return len(b.processes()) == 0 })
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return b
}

// processes are those of the bench.
func (b *bench) processes() (pids []int) {
	for _, pid := range processes() {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if strings.Contains(string(line), b.dir+"/") {
			pids = append(pids, pid)
		}
	}
	return pids
}

// run runs a command and returns what it says on standard output.
func (b *bench) run(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append([]string{"--runtime-dir", b.runtime}, args...)...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	cmd.WaitDelay = time.Second
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("cfs-fuse %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out.String(), nil
}

func (b *bench) must(args ...string) string {
	b.t.Helper()
	out, err := b.run(args...)
	if err != nil {
		b.t.Fatal(err)
	}
	return out
}

// cache runs a 'cache' command and reads its JSON into v.
func (b *bench) cache(v any, args ...string) {
	b.t.Helper()
	out := b.must(append([]string{"cache", "--root", b.root, "--json"}, args...)...)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		b.t.Fatalf("cache %v printed %s: %v", args, out, err)
	}
}

func (b *bench) point() string {
	b.t.Helper()
	b.points++
	p := filepath.Join(b.dir, fmt.Sprintf("m%d", b.points))
	if err := os.Mkdir(p, 0o755); err != nil {
		b.t.Fatal(err)
	}
	return p
}

func (b *bench) mountArgs(source, point string, flags ...string) []string {
	return append(append([]string{"mount", "--root", b.root, "--plain-http"}, flags...), source, point)
}

func (b *bench) mount(source string, flags ...string) string {
	b.t.Helper()
	p := b.point()
	b.must(b.mountArgs(source, p, flags...)...)
	return p
}

// unmount unmounts, and waits while a swap has the mount in hand.
func (b *bench) unmount(point string) (err error) {
	for range 100 {
		if _, err = b.run("umount", point); err == nil || !strings.Contains(err.Error(), "busy") {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
	return err
}

// A status is what 'status --json' says.
type status struct {
	State      string `json:"state"`
	Digest     string `json:"manifest_digest"`
	Files      int    `json:"files"`
	FilesLocal int    `json:"files_local"`
	Bytes      int64  `json:"bytes"`
	BytesLocal int64  `json:"bytes_local"`
	Note       string `json:"swap_note"`
	StoreNote  string `json:"store_note"`
	PID        int    `json:"pid"`
	Fetched    map[string]struct {
		Requests int64 `json:"requests"`
		Bytes    int64 `json:"bytes"`
	} `json:"fetched"`
}

func (b *bench) status(point string) (s status) {
	b.t.Helper()
	if err := json.Unmarshal([]byte(b.must("status", "--json", point)), &s); err != nil {
		b.t.Fatal(err)
	}
	return s
}

func (b *bench) waitFor(state, point string) {
	b.t.Helper()
	b.must("wait", "--for", state, "--timeout", "2m", point)
}

func eventually(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// A file of an image: so many random bytes, from a seed.
type file struct {
	name string
	size int
	seed uint64

	fixed []byte // if not nil, instead
}

func (f file) data() []byte {
	if f.fixed != nil {
		return f.fixed
	}
	return imagetest.RandomBytes(f.size, f.seed)
}

// files makes n files of about size bytes below dir, from seeds of their own.
func files(dir string, seed uint64, n, size int) (all []file) {
	for i := range n {
		all = append(all, file{name: fmt.Sprintf("%s/f%04d", dir, i), size: size + i%7, seed: seed<<32 + uint64(i)})
	}
	return all
}

// A built image.
type built struct {
	name  string
	files []file
	blobs map[string]int64 // sizes by digest
}

// serve starts a registry; it ends with the test.
func serve(t testing.TB) *registrytest.Registry {
	t.Helper()
	r, err := registrytest.New(registrytest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// push builds an image of layers and gives it to the registry. The writer is
// eStargz with chunks of chunkSize bytes (0: its own).
func push(t testing.TB, r *registrytest.Registry, name string, chunkSize int, layers ...[]file) built {
	t.Helper()
	b := built{name: "docker://" + r.Host() + "/" + name + ":latest", blobs: map[string]int64{}}
	var blobs []*imagetest.Blob
	for _, l := range layers {
		dirs := map[string]bool{}
		var items []imagetest.Item
		for _, f := range l {
			if d := filepath.Dir(f.name); !dirs[d] {
				dirs[d] = true
				items = append(items, imagetest.Dir(d))
			}
			items = append(items, imagetest.Random(f.name, f.size, f.seed))
		}
		tar := imagetest.Must(imagetest.Tar(items...))
		blob := imagetest.Must(imagetest.EStargz(tar, imagetest.Options{ChunkSize: chunkSize, Level: 1}))
		blobs = append(blobs, blob)
		b.files = append(b.files, l...)
		b.blobs[blob.Desc.Digest.String()] = blob.Desc.Size
	}
	o := imagetest.Must(imagetest.Image(blobs...))
	for d, data := range o.Blobs {
		r.Add(d, bytes.NewReader(data), int64(len(data)))
	}
	r.AddManifest(name, "latest", o.Desc.MediaType, o.Raw)
	return b
}

// readAll reads every file of an image at a mount point and compares it.
func readAll(point string, image built) error {
	for _, f := range image.files {
		if err := f.compare(point); err != nil {
			return err
		}
	}
	return nil
}

func (f file) compare(point string) error {
	got, err := os.ReadFile(filepath.Join(point, f.name))
	if err != nil {
		return err
	}
	if !bytes.Equal(got, f.data()) {
		return fmt.Errorf("%s: %d bytes, and not the right ones", f.name, len(got))
	}
	return nil
}

// onFilesystem puts the bench's store on a new filesystem of mib MiB, on a loop
// device.
func (b *bench) onFilesystem(mib int, mkfs ...string) {
	b.t.Helper()
	image, dir := filepath.Join(b.dir, "disk"), filepath.Join(b.dir, "fs")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, int64(mib)<<20), os.Mkdir(dir, 0o755)); err != nil {
		b.t.Fatal(err)
	}
	for _, args := range [][]string{append(mkfs, image), {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			b.t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
	b.root = filepath.Join(dir, "root")
}
