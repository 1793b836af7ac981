package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// A place is one of the status's list of places besides the mount point.
type place struct {
	PID        int    `json:"pid"`
	Mountpoint string `json:"mountpoint"`
	Swapped    bool   `json:"swapped"`
	Note       string `json:"note"`
}

func (b *bench) places(point string) []place {
	b.t.Helper()
	var s struct {
		Elsewhere []place `json:"elsewhere"`
	}
	if err := json.Unmarshal([]byte(b.must("status", "--json", point)), &s); err != nil {
		b.t.Fatal(err)
	}
	return s.Elsewhere
}

// A neighbour is a shell in a mount namespace of its own, which has run a script
// there and waits.
type neighbour struct {
	t   *testing.T
	pid int
	in  io.Closer
	cmd *exec.Cmd
}

// startNeighbour starts a shell in a new mount namespace, with the arguments.
func startNeighbour(t *testing.T, propagation, script string, args ...string) *neighbour {
	t.Helper()
	return awaitNeighbour(t, exec.Command("unshare", append([]string{"--mount", "--propagation", propagation, "sh", "-ec", script + "\necho ready; read x", "sh"}, args...)...))
}

// startPivoted starts a process whose mount namespace has path as its root.
func startPivoted(t *testing.T, path string) *neighbour {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), workerEnv+"="+pivotWorker, "CFS_FUSE_E2E_POINT="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS} // and everything private
	return awaitNeighbour(t, cmd)
}

// pivot is the main of such a process.
func pivot(path string) error {
	if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind: %w", err)
	}
	if err := unix.Chdir(path); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("pivot_root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("detach the old root: %w", err)
	}
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func awaitNeighbour(t *testing.T, cmd *exec.Cmd) *neighbour {
	t.Helper()
	n := &neighbour{t: t, cmd: cmd}
	n.cmd.Stderr = os.Stderr
	in, err := n.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	n.in, n.pid = in, n.cmd.Process.Pid
	t.Cleanup(n.end)
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("a shell in a namespace of its own said %q, %v", line, err)
	}
	return n
}

func (n *neighbour) end() {
	n.in.Close()
	n.cmd.Process.Kill() // it may have ended by the first already
	n.cmd.Wait()
}

// path is a path of the neighbour's, as everybody can look at it.
func (n *neighbour) path(p string) string {
	return filepath.Join(fmt.Sprintf("/proc/%d/root", n.pid), p)
}

// on lists what the neighbour has mounted at path, the first first.
func (n *neighbour) on(path string) (all []string) {
	n.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", n.pid))
	if err != nil {
		n.t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == path {
			all = append(all, strings.TrimSpace(line))
		}
	}
	return all
}

// The kernel's mount comes also where other mount namespaces have bound the
// first one, with what is mounted on it and with their restrictions; what cannot
// be swapped is said, and goes on working.
func TestSwapNamespaces(t *testing.T) {
	eachBackend(t, func(t *testing.T, b *bench) {
		point := b.mount("oci:"+set.Layout(images.EStargz)+":"+images.Debian, "--swap", "never")
		reference := set.Reference(images.Debian)
		bound, other, upper, work := filepath.Join(b.dir, "bound"), filepath.Join(b.dir, "other"), filepath.Join(b.dir, "u"), filepath.Join(b.dir, "w")
		over := filepath.Join(b.dir, "over")
		for _, d := range []string{bound, other, upper, work, over} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		// Its own copies, two more binds, and tmpfs on a folder of one.
		binder := startNeighbour(t, "private", `mount --bind -o ro,nosuid,noexec "$1/usr/bin" "$2"; mount --bind "$1" "$3"
			mount -t tmpfs tmpfs "$1/mnt"; echo kept >"$1/mnt/file"; exec 3<"$1/etc/passwd"`, point, bound, other)
		pivoted := startPivoted(t, point)
		if out, err := exec.Command("mount", "-t", "overlay", "overlay", "-o", "lowerdir="+point+",upperdir="+upper+",workdir="+work, over).CombinedOutput(); err != nil {
			t.Fatalf("overlay: %v: %s", err, out)
		}
		defer unix.Unmount(over, unix.MNT_DETACH)
		// What is mounted on the mount itself goes along, too.
		if err := unix.Mount("proc", filepath.Join(point, "proc"), "proc", 0, ""); err != nil {
			t.Fatal(err)
		}
		defer unix.Unmount(filepath.Join(point, "proc"), unix.MNT_DETACH)
		b.waitFor("sealed", point)

		same := func(what, path, file string) {
			t.Helper()
			want, err := os.ReadFile(filepath.Join(reference, file))
			got, gerr := os.ReadFile(path)
			if err != nil || gerr != nil || string(got) != string(want) {
				t.Errorf("%s: %d bytes, want %d; %v, %v", what, len(got), len(want), err, gerr)
			}
		}
		look := func(when string) {
			t.Helper()
			same(when+": bound folder", binder.path(bound+"/env"), "usr/bin/env")
			same(when+": the neighbour's mount", binder.path(point+"/etc/passwd"), "etc/passwd")
			same(when+": the neighbour's bind", binder.path(other+"/etc/passwd"), "etc/passwd")
			same(when+": a held file", fmt.Sprintf("/proc/%d/fd/3", binder.pid), "etc/passwd")
			same(when+": the root of a namespace", pivoted.path("/etc/passwd"), "etc/passwd")
			same(when+": an overlayfs over it", filepath.Join(over, "etc/passwd"), "etc/passwd")
			if got, err := os.ReadFile(binder.path(point + "/mnt/file")); err != nil || string(got) != "kept\n" {
				t.Errorf("%s: what the neighbour has mounted on it: %q, %v", when, got, err)
			}
			if _, err := os.Stat(filepath.Join(point, "proc/self/status")); err != nil {
				t.Errorf("%s: what is mounted on it: %v", when, err)
			}
			if err := exec.Command(filepath.Join(point, "usr/bin/true")).Run(); err != nil {
				t.Errorf("%s: run a program: %v", when, err)
			}
		}
		look("sealed")
		inode := func(path string) uint64 {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil {
				t.Error(err)
			}
			return st.Ino
		}
		before := inode(binder.path(bound + "/env"))
		b.must("swap", point)
		look("swapped at the mount point")
		notes := map[string]string{}
		for _, p := range b.places(point) {
			notes[p.Mountpoint] = p.Note
			if p.Swapped {
				t.Errorf("swapped without being asked to: %+v", p)
			}
		}
		for path, word := range map[string]string{bound: "bound there", other: "bound there", "/": "pivot_root", over: "lower", point: "bound there"} {
			if !strings.Contains(notes[path], word) {
				t.Errorf("status says %q of %s, want %q", notes[path], path, word)
			}
		}

		pids := strconv.Itoa(binder.pid) + "," + strconv.Itoa(pivoted.pid)
		b.refused(4, []string{"pivot_root", "keeps working"}, "swap", "--swap-namespaces", pids, point)
		look("swapped in the namespaces")
		for path, root := range map[string]string{bound: "/usr/bin", other: "/", point: "/"} {
			all := binder.on(path)
			if len(all) != 1 || !strings.Contains(all[0], " - overlay ") || !strings.Contains(all[0], "/sealed.erofs") || strings.Fields(all[0])[3] != root {
				t.Errorf("the neighbour has %q at %s, want the kernel's mount of %s", all, path, root)
			}
			if path == bound && len(all) == 1 && !strings.HasPrefix(strings.Fields(all[0])[5], "ro,nosuid,noexec") {
				t.Errorf("%s has lost its restrictions: %s", bound, all[0])
			}
		}
		if after := inode(binder.path(bound + "/env")); after != before {
			t.Errorf("inode number %d, was %d", after, before)
		}
		swapped, holds := 0, false
		for _, p := range b.places(point) {
			holds = holds || p.PID == binder.pid && p.Mountpoint == "" && strings.Contains(p.Note, "open files (1)")
			if p.PID == binder.pid && p.Swapped {
				swapped++
			} else if p.Swapped || p.Note == "" {
				t.Errorf("status: %+v", p)
			}
		}
		if swapped != 3 || !holds {
			t.Errorf("%d places swapped, want 3, and the file that is held (%v): %+v", swapped, holds, b.places(point))
		}
		if out := b.must("status", point); !strings.Contains(out, bound) || !strings.Contains(out, "pivot_root") {
			t.Errorf("status:\n%s", out)
		}
		// What holds the first mount goes; its process, too.
		pivoted.end()
		binder.end()
		for _, p := range []string{over, filepath.Join(point, "proc")} {
			if err := unix.Unmount(p, 0); err != nil {
				t.Errorf("umount %s: %v", p, err)
			}
		}
		eventually(t, 20*time.Second, "the process leaves", func() bool { return len(processesOf(t, point)) == 0 })
		isKernel(t, point)
		b.refused(2, []string{"--swap-namespaces"}, "swap", "--swap-namespaces", "1,x", point)
	})
}

// A namespace that sees the folder above by propagation needs no option, and one
// that is listed when the image is mounted is swapped with the rest.
func TestSwapPropagates(t *testing.T) {
	b := newBench(t)
	// A shared mount, so that there is something to propagate whatever the
	// tests' own namespace is.
	above := filepath.Join(b.dir, "above")
	if err := os.Mkdir(above, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", above, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(above, unix.MNT_DETACH)
	if err := unix.Mount("", above, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	point, bind := filepath.Join(above, "point"), filepath.Join(b.dir, "bind")
	for _, d := range []string{point, bind} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	slave := startNeighbour(t, "slave", ":")
	listed := startNeighbour(t, "slave", `mkfifo "$1"; (read x <"$1"; mount --bind "$2" "$3"; echo done >"$1") &`, filepath.Join(b.dir, "fifo"), point, bind)
	slow := newLink(t, registry.Addr, speed{mbit: 200, delay: time.Millisecond})
	b.mountAt(source(slow, images.Debian, images.ZstdChunked), point, "--swap-namespaces", strconv.Itoa(listed.pid))
	fifo, err := os.OpenFile(filepath.Join(b.dir, "fifo"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer fifo.Close()
	fmt.Fprintln(fifo, "go")
	eventually(t, 20*time.Second, "the neighbour has bound it", func() bool { return len(listed.on(bind)) == 1 })
	if s := b.status(point); s.State == "swapped" {
		t.Fatalf("too late: %+v", s)
	}
	b.waitFor("swapped", point)
	for _, n := range []*neighbour{slave, listed} {
		if all := n.on(point); len(all) != 1 || !strings.Contains(all[0], "/sealed.erofs") {
			t.Errorf("by propagation: %q", all)
		}
	}
	eventually(t, 10*time.Second, "swapped where it was bound", func() bool {
		all := listed.on(bind)
		return len(all) == 1 && strings.Contains(all[0], "/sealed.erofs")
	})
	noProcess(t, point)
	b.must("umount", point)
}
