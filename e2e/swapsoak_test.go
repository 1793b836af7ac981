package e2e

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// fromEnv is a number from the environment, or another one.
func fromEnv(t *testing.T, name string, otherwise int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("%s=%s: want a number", name, text)
	}
	return n
}

// The kinds of worker that go from mount to mount.
const (
	roamWorker  = "roam"  // uses the paths of one mount after the other
	lodgeWorker = "lodge" // the same, with files, mappings and its working folder held in the one that it is told of
)

const (
	stay = 60                     // paths that such a worker uses before it says that it is there
	rest = 500 * time.Microsecond // between two of them
)

// A lodging is what a lodgeWorker holds of one mount.
type lodging struct{ files []held }

// take holds some files of a mount, its folders, and a working folder in it.
func take(point string, tree []*known, order []int) (*lodging, error) {
	l := new(lodging)
	for _, i := range order {
		k := tree[i]
		if k.content == nil && k.names == nil || len(l.files) >= stay {
			continue
		}
		f, err := os.Open(filepath.Join(point, k.path))
		if err != nil {
			return l, err
		}
		h := held{known: k, f: f}
		l.files = append(l.files, h)
		if len(k.content) == 0 {
			continue
		}
		if h.mapped, err = unix.Mmap(int(f.Fd()), 0, len(k.content), unix.PROT_READ, unix.MAP_SHARED); err != nil {
			return l, err
		}
		l.files[len(l.files)-1] = h
	}
	return l, os.Chdir(filepath.Join(point, "d00"))
}

// use looks at one of the held files.
func (l *lodging) use(i int, r *workerReport) {
	h := &l.files[i%len(l.files)]
	if h.names != nil {
		_, err := h.f.Seek(0, 0)
		r.check("rewind held "+h.path, true, err)
		got, err := h.f.Readdirnames(-1)
		slices.Sort(got)
		r.check("list held "+h.path, slices.Equal(got, h.names), err)
		return
	}
	got := make([]byte, len(h.content))
	_, err := h.f.ReadAt(got, 0)
	r.check("read held "+h.path, bytes.Equal(got, h.content), err)
	r.check("mapping of "+h.path, bytes.Equal(h.mapped, h.content), nil)
	here, err := names(".")
	r.check("list the working folder", err == nil && len(here) > 0, err)
}

func (l *lodging) leave() {
	for _, h := range l.files {
		if h.mapped != nil {
			unix.Munmap(h.mapped)
		}
		h.f.Close()
	}
}

// roam is the main of such workers. Each line of standard input is a mount point
// to go to; the worker says "ready" when it has left the one before and has used
// the new one for a while.
func roam(kind string, tree []*known, r *workerReport) error {
	next := make(chan string)
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			next <- lines.Text()
		}
		close(next)
	}()
	var here *lodging
	defer func() {
		if here != nil {
			here.leave()
		}
	}()
	point, ok := <-next
	for n := 0; ok; n++ {
		order := rand.Perm(len(tree))
		for _, k := range tree {
			k.ino = 0
		}
		if kind == lodgeWorker {
			there, err := take(point, tree, order)
			if here != nil {
				here.leave()
			}
			if here = there; err != nil {
				return err
			}
		}
		r.mark()
		for i, moved := 0, false; !moved; i++ {
			tree[order[i%len(order)]].use(point, r)
			if here != nil {
				here.use(i, r)
			}
			if i == stay {
				fmt.Println("ready")
				r.mark()
			}
			// Eight that never rest would measure how two processors are shared.
			time.Sleep(rest)
			r.mark()
			if i < stay {
				continue
			}
			select {
			case point, ok = <-next:
				moved = true
			default:
			}
		}
	}
	return os.Chdir("/")
}

// TestSwapSoak swaps mounts under eight workers, of which two are in mount
// namespaces of their own, slaves of this one, and four hold files, mappings
// and working folders. No operation fails or gives something else, and the
// longest time that any one took is printed, beside that of the same work
// without swaps.
func TestSwapSoak(t *testing.T) {
	swaps := fromEnv(t, "CFS_FUSE_E2E_SWAPS", 12)
	b := newBench(t)
	above := sharedFolder(t, b)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Small
	sealed := b.mount(source)
	b.waitFor("swapped", sealed)
	b.must("umount", sealed)

	reference := set.Reference(images.Small)
	var workers []*running
	for i := range 8 {
		kind := []string{roamWorker, lodgeWorker}[i%2]
		var in []string
		if i >= 6 {
			in = []string{"unshare", "--mount", "--propagation", "slave"}
		}
		workers = append(workers, startWorkerIn(t, in, kind, "", reference))
	}
	goTo := func(point string) {
		t.Helper()
		for _, w := range workers {
			if _, err := fmt.Fprintln(w.lines, point); err != nil {
				t.Fatal(err)
			}
		}
		for _, w := range workers {
			if err := w.ready(); err != nil {
				t.Fatal(err)
			}
		}
	}
	last := ""
	var swap *exec.Cmd // it waits a moment for the process to leave, which what is held keeps
	leave := func() {
		t.Helper()
		if last == "" {
			return
		}
		if err := swap.Wait(); err != nil {
			t.Fatalf("swap %s: %v", last, err)
		}
		eventually(t, 20*time.Second, "the process leaves when everybody has gone", func() bool { return len(processesOf(t, last)) == 0 })
		b.must("umount", last)
		if all := mountOn(t, last); len(all) != 0 {
			t.Fatalf("mounted: %+v", all)
		}
	}
	start := time.Now()
	for i := range swaps {
		b.backend = []string{fuseBackend, hybridBackend}[i/2%2]
		point := filepath.Join(above, strconv.Itoa(i%2))
		b.mountAt(source, point, "--swap", "never")
		goTo(point)
		leave()
		last = point
		swap = exec.Command(binary, "--runtime-dir", b.runtime, "swap", point)
		swap.Stderr = os.Stderr
		if err := swap.Start(); err != nil {
			t.Fatal(err)
		}
		eventually(t, 20*time.Second, "the kernel's mount", func() bool {
			all := mountOn(t, point)
			return len(all) == 1 && strings.HasSuffix(all[0].source, "/sealed.erofs")
		})
		time.Sleep(rest * 10) // of use on it
	}
	took := time.Since(start)
	goTo(last) // once more: everybody uses the kernel's mount
	ops, longest := 0, slowest{}
	for _, w := range workers {
		r, err := w.stop()
		if err != nil {
			t.Fatal(err)
		}
		ops += r.Ops
		if r.Slowest.Time > longest.Time {
			longest = r.Slowest
		}
		if r.Wrong > 0 {
			t.Errorf("%s worker: %d of %d operations failed or were wrong: %q", w.kind, r.Wrong, r.Ops, r.Errors)
		}
	}
	leave()
	t.Logf("%d swaps in %v, %d operations, the longest took %v (%s)", swaps, took.Round(time.Second), ops, longest.Time, longest.What)
	if ops < 8*stay*swaps {
		t.Errorf("%d operations: too few to say anything", ops)
	}
	quiet := quietWork(t, b, source, reference, took)
	t.Logf("the same work without a swap: the longest took %v (%s)", quiet.Time, quiet.What)
}

// quietWork has eight workers use the kernel's mount for a quarter of the time
// given, at most half a minute.
func quietWork(t *testing.T, b *bench, source, reference string, d time.Duration) (longest slowest) {
	t.Helper()
	point := b.mount(source)
	var workers []*running
	for i := range 8 {
		w := startWorkerIn(t, nil, []string{roamWorker, lodgeWorker}[i%2], "", reference)
		workers = append(workers, w)
		fmt.Fprintln(w.lines, point)
	}
	for _, w := range workers {
		if err := w.ready(); err != nil {
			t.Fatal(err)
		}
	}
	time.Sleep(min(d/4, 30*time.Second))
	for _, w := range workers {
		r, err := w.stop()
		if err != nil {
			t.Fatal(err)
		}
		if r.Slowest.Time > longest.Time {
			longest = r.Slowest
		}
	}
	b.must("umount", point)
	return longest
}

// sharedFolder makes a folder of mount points that other namespaces see, with
// the folders 0 and 1 in it, whatever the tests' own namespace is.
func sharedFolder(t *testing.T, b *bench) string {
	t.Helper()
	above := filepath.Join(b.dir, "above")
	err := errors.Join(os.Mkdir(above, 0o755), unix.Mount("tmpfs", above, "tmpfs", 0, ""), unix.Mount("", above, "", unix.MS_SHARED, ""),
		os.Mkdir(filepath.Join(above, "0"), 0o755), os.Mkdir(filepath.Join(above, "1"), 0o755))
	t.Cleanup(func() {
		if err := unix.Unmount(above, 0); err != nil {
			t.Errorf("umount %s: %v", above, err)
			unix.Unmount(above, unix.MNT_DETACH)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return above
}

// TestSwapKilled kills servers by -9 at a random instant of a swap: afterwards
// either another one serves what was mounted, or the kernel does, and nothing
// else is mounted. (That no loop device and no process is left, TestMain
// looks at.)
func TestSwapKilled(t *testing.T) {
	kills := fromEnv(t, "CFS_FUSE_E2E_SWAP_KILLS", 12)
	b := newBench(t)
	above := sharedFolder(t, b)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Small
	sealed := b.mount(source)
	b.waitFor("swapped", sealed)
	b.must("umount", sealed)
	reference := set.Reference(images.Small)
	outcomes := map[string]int{}
	for i := range kills {
		b.backend = []string{fuseBackend, hybridBackend}[i%2]
		point := filepath.Join(above, strconv.Itoa(i/2%2))
		b.mountAt(source, point, "--swap", "never")
		pid := b.status(point).PID
		worker := startWorkerIn(t, nil, roamWorker, "", reference)
		fmt.Fprintln(worker.lines, point)
		if err := worker.ready(); err != nil {
			t.Fatal(err)
		}
		swap := exec.Command(binary, "--runtime-dir", b.runtime, "swap", point)
		if err := swap.Start(); err != nil {
			t.Fatal(err)
		}
		// The command is up after some 10 ms, the swap done after 2 more.
		time.Sleep(time.Duration(rand.Int64N(int64(25 * time.Millisecond))))
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Fatal(err)
		}
		if i%3 == 0 { // else it asks the successor
			swap.Process.Kill()
		}
		said := swap.Wait()
		var s status
		eventually(t, 20*time.Second, "served again, or the kernel's", func() bool {
			s = b.status(point)
			all := mountOn(t, point)
			return len(all) == 1 && (s.State == "swapped") == strings.HasSuffix(all[0].source, "/sealed.erofs") && (s.State == "swapped" || s.PID != 0 && s.PID != pid)
		})
		log, _ := os.ReadFile(s.Log)
		outcome := fmt.Sprintf("%s, restarted %d times", s.State, s.Restarts)
		if bytes.Contains(log, []byte("cut short")) {
			outcome += ", finished by the successor"
		}
		outcomes[outcome]++
		if said == nil && s.State != "swapped" {
			t.Errorf("kill %d: 'swap' promised what is not so: %+v", i, s)
		}
		// Everybody's view, and what the worker saw meanwhile.
		fmt.Fprintln(worker.lines, point)
		if err := worker.ready(); err != nil {
			t.Fatal(err)
		}
		r, err := worker.stop()
		if err != nil || r.Wrong > 0 {
			t.Fatalf("kill %d, %+v: %d of %d operations failed or were wrong: %q, %v", i, s, r.Wrong, r.Ops, r.Errors, err)
		}
		b.must("umount", point)
		noProcess(t, point)
		if all := mountOn(t, point); len(all) != 0 {
			t.Fatalf("kill %d: mounted: %+v", i, all)
		}
	}
	text, err := json.Marshal(outcomes)
	t.Logf("%d kills: %s, %v", kills, text, err)
}
