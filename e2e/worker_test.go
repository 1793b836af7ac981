package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test binary runs itself again as a worker: a program that uses a mount
// while it is swapped. It is given the mount point and the reference tree, says
// "ready" once it has seen everything, goes on until its standard input ends,
// and prints a workerReport.
const workerEnv = "CFS_FUSE_E2E_WORKER"

// coldEnv, if set, makes workers drop the pages of a file before they read it,
// so that its bytes are asked for each time.
const coldEnv = "CFS_FUSE_E2E_COLD"

var cold = os.Getenv(coldEnv) != ""

// drop drops the pages of a file from the page cache, in a cold worker.
func drop(f *os.File) {
	if cold {
		unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	drop(f)
	return io.ReadAll(f)
}

// The kinds of worker.
const (
	loadWorker  = "load"  // opens, reads, stats, lists by path, over and over
	pivotWorker = "pivot" // has the mount as the root of a mount namespace, and does nothing
	holdWorker  = "hold"  // keeps files, folders, mappings and its working folder open, and uses them
)

// A workerReport says what a worker did, and what failed or was wrong.
type workerReport struct {
	Ops    int      `json:"ops"`
	Wrong  int      `json:"wrong"`
	Errors []string `json:"errors"` // the first of them
	// Slowest is the operation between two marks that took the longest, with
	// what the worker itself does besides.
	Slowest slowest `json:"slowest"`

	marked time.Time
}

// A slowest operation.
type slowest struct {
	What string        `json:"what"`
	Time time.Duration `json:"time"`
}

// mark begins a time that is counted.
func (r *workerReport) mark() { r.marked = time.Now() }

// check counts one operation.
func (r *workerReport) check(what string, ok bool, err error) {
	r.Ops++
	now := time.Now()
	if d := now.Sub(r.marked); !r.marked.IsZero() && d > r.Slowest.Time {
		r.Slowest = slowest{what, d}
	}
	defer r.mark()
	if err == nil && ok {
		return
	}
	r.Wrong++
	if len(r.Errors) < 10 {
		r.Errors = append(r.Errors, fmt.Sprintf("operation %d: %s: %v", r.Ops, what, err))
	}
}

// A known is what the reference says of a path.
type known struct {
	path    string // relative
	st      unix.Stat_t
	content []byte
	target  string
	names   []string // of a folder, sorted
	ino     uint64   // in the mount, once seen
}

// learn reads the reference tree.
func learn(reference string) (all []*known, err error) {
	err = filepath.WalkDir(reference, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(reference, path)
		if err != nil {
			return err
		}
		k := &known{path: rel}
		if err := unix.Lstat(path, &k.st); err != nil {
			return err
		}
		switch d.Type() {
		case 0:
			k.content, err = os.ReadFile(path)
		case fs.ModeSymlink:
			k.target, err = os.Readlink(path)
		case fs.ModeDir:
			k.names, err = names(path)
		}
		all = append(all, k)
		return err
	})
	return all, err
}

func names(dir string) ([]string, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := f.Readdirnames(-1)
	slices.Sort(all)
	return all, err
}

// worker is the main of a worker; it returns its exit code.
func worker(kind string) int {
	if kind == pivotWorker {
		if err := pivot(os.Getenv("CFS_FUSE_E2E_POINT")); err != nil {
			fmt.Fprintln(os.Stderr, "worker:", err)
			return 1
		}
		return 0
	}
	point, reference := os.Getenv("CFS_FUSE_E2E_POINT"), os.Getenv("CFS_FUSE_E2E_REFERENCE")
	tree, err := learn(reference)
	if err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	stop := make(chan struct{})
	if kind == loadWorker || kind == holdWorker {
		go func() {
			io.Copy(io.Discard, os.Stdin)
			close(stop)
		}()
	}
	var r workerReport
	switch kind {
	case roamWorker, lodgeWorker:
		err = roam(kind, tree, &r)
	case holdWorker:
		err = hold(point, tree, &r, stop)
	default:
		load(point, tree, &r, stop)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		return 1
	}
	return 0
}

func load(point string, tree []*known, r *workerReport, stop <-chan struct{}) {
	order := rand.Perm(len(tree))
	for pass := 0; ; pass++ {
		for _, i := range order {
			select {
			case <-stop:
				return
			default:
			}
			tree[i].use(point, r)
		}
		if pass == 0 {
			fmt.Println("ready")
		}
	}
}

// use looks at one path in each way there is.
func (k *known) use(point string, r *workerReport) {
	path := filepath.Join(point, k.path)
	var st unix.Stat_t
	err := unix.Lstat(path, &st)
	r.check("stat "+k.path, st.Mode == k.st.Mode && st.Mtim == k.st.Mtim && st.Nlink == k.st.Nlink && st.Uid == k.st.Uid, err)
	switch {
	case k.content != nil:
		if k.ino == 0 {
			k.ino = st.Ino
		}
		r.check(fmt.Sprintf("inode number of %s: %d, was %d", k.path, st.Ino, k.ino), st.Ino == k.ino, nil)
		got, err := readFile(path)
		r.check(fmt.Sprintf("read %s: %d bytes of %d", k.path, len(got), len(k.content)), bytes.Equal(got, k.content), err)
	case k.names != nil:
		got, err := names(path)
		r.check(fmt.Sprintf("list %s: %d names of %d", k.path, len(got), len(k.names)), slices.Equal(got, k.names), err)
	case k.target != "":
		got, err := os.Readlink(path)
		r.check("readlink "+k.path, got == k.target, err)
	}
}

// A held file is open, and mapped when it has any bytes.
type held struct {
	*known
	f      *os.File
	mapped []byte
}

func hold(point string, tree []*known, r *workerReport, stop <-chan struct{}) error {
	var files, dirs []held
	for i, k := range tree {
		if k.names == nil && (k.content == nil || i%5 != 0) {
			continue
		}
		f, err := os.Open(filepath.Join(point, k.path))
		if err != nil {
			return err
		}
		h := held{known: k, f: f}
		if k.names != nil {
			dirs = append(dirs, h)
			continue
		}
		if len(k.content) > 0 {
			if h.mapped, err = unix.Mmap(int(f.Fd()), 0, len(k.content), unix.PROT_READ, unix.MAP_SHARED); err != nil {
				return err
			}
		}
		files = append(files, h)
	}
	const cwd = "d00"
	if err := os.Chdir(filepath.Join(point, cwd)); err != nil {
		return err
	}
	for pass := 0; ; pass++ {
		for i := range files {
			h := &files[i]
			if cold && h.mapped != nil { // mapped pages are not dropped
				var err error
				unix.Munmap(h.mapped)
				drop(h.f)
				if h.mapped, err = unix.Mmap(int(h.f.Fd()), 0, len(h.content), unix.PROT_READ, unix.MAP_SHARED); err != nil {
					return err
				}
				r.check("mapping of "+h.path, bytes.Equal(h.mapped, h.content), nil)
				unix.Munmap(h.mapped)
				drop(h.f)
				if h.mapped, err = unix.Mmap(int(h.f.Fd()), 0, len(h.content), unix.PROT_READ, unix.MAP_SHARED); err != nil {
					return err
				}
			}
			got := make([]byte, len(h.content))
			_, err := h.f.ReadAt(got, 0)
			r.check("read held "+h.path, bytes.Equal(got, h.content), err)
			r.check("mapping of "+h.path, bytes.Equal(h.mapped, h.content), nil)
			var st unix.Stat_t
			err = unix.Fstat(int(h.f.Fd()), &st)
			r.check("fstat held "+h.path, st.Size == int64(len(h.content)), err)
		}
		for _, h := range dirs {
			_, err := h.f.Seek(0, io.SeekStart)
			r.check("rewind held "+h.path, true, err)
			got, err := h.f.Readdirnames(-1)
			slices.Sort(got)
			r.check("list held "+h.path, slices.Equal(got, h.names), err)
		}
		for _, k := range tree {
			if k.content != nil && filepath.Dir(k.path) == cwd {
				got, err := os.ReadFile(filepath.Base(k.path))
				r.check("read in working folder "+k.path, bytes.Equal(got, k.content), err)
			}
		}
		select {
		case <-stop:
			return nil
		default:
		}
		if pass == 0 {
			fmt.Println("ready")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// A running worker.
type running struct {
	kind  string
	cmd   *exec.Cmd
	in    io.Closer
	lines io.Writer // in
	out   *bufio.Reader
	errs  bytes.Buffer
}

// startWorker starts a worker on a mount; it is killed when the test ends.
func startWorker(t *testing.T, kind, point, reference string) *running {
	t.Helper()
	return startWorkerIn(t, nil, kind, point, reference)
}

// startWorkerIn is startWorker by a program that runs it, with its arguments.
func startWorkerIn(t *testing.T, by []string, kind, point, reference string) *running {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	argv := append(slices.Clone(by), self)
	w := &running{kind: kind, cmd: exec.Command(argv[0], argv[1:]...)}
	w.cmd.Env = append(os.Environ(), workerEnv+"="+kind, "CFS_FUSE_E2E_POINT="+point, "CFS_FUSE_E2E_REFERENCE="+reference, "GOMAXPROCS=1")
	w.cmd.Stderr = &w.errs
	in, err := w.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := w.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	w.in, w.lines, w.out = in, in, bufio.NewReader(out)
	if err := w.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		w.cmd.Process.Kill() // done already, unless the test failed
		w.cmd.Wait()
	})
	return w
}

// ready waits until the worker has seen everything once.
func (w *running) ready() error {
	line, err := w.out.ReadString('\n')
	if err != nil || line != "ready\n" {
		w.cmd.Process.Kill()
		err = errors.Join(err, w.cmd.Wait())
		return fmt.Errorf("%s worker said %q: %w: %s", w.kind, line, err, w.errs.Bytes())
	}
	return nil
}

// stop ends the worker and returns its report.
func (w *running) stop() (r workerReport, err error) {
	w.in.Close()
	err = json.NewDecoder(w.out).Decode(&r)
	if err := errors.Join(err, w.cmd.Wait()); err != nil {
		return r, fmt.Errorf("%s worker: %w: %s", w.kind, err, w.errs.Bytes())
	}
	return r, nil
}
