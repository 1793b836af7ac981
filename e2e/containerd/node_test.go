package containerd

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// sumTree prints one digest for the names and bytes of all files of a
// container below some folders.
func sumTree(folders string) string {
	return "find " + folders + " -xdev -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum"
}

// base is the repository of the image that containerd can also unpack.
const base = "base"

// startRegistry serves the base image in three forms, of which plain is no
// lazy one.
func startRegistry(t *testing.T) *images.Registry {
	t.Helper()
	dir, err := os.MkdirTemp(runDir, "r")
	if err != nil {
		t.Fatal(err)
	}
	r, err := images.StartRegistry(t.Context(), images.RegistryOptions{Storage: filepath.Join(dir, "storage"), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	if err := PushBase(t.Context(), set, dir, r.Addr, base, []string{images.Plain, images.EStargz, images.ZstdChunked}); err != nil {
		t.Fatal(err)
	}
	return r
}

// mountsBelow lists what is mounted below a folder, the topmost last.
func mountsBelow(t *testing.T, dir string) []kmount.Info {
	t.Helper()
	all, err := kmount.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	var below []kmount.Info
	for _, m := range all {
		if strings.HasPrefix(m.Mountpoint, dir+"/") {
			below = append(below, m)
		}
	}
	return below
}

// detachBelow takes away everything that is mounted below a folder.
func detachBelow(t *testing.T, dir string) {
	t.Helper()
	all := mountsBelow(t, dir)
	for i := len(all) - 1; i >= 0; i-- {
		if err := kmount.Detach(all[i].Mountpoint); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			t.Error(err)
		}
	}
}

// isMounted reports whether an image of the node is mounted in a folder of that
// name.
func (n *Node) isMounted(t *testing.T, folder string) bool {
	for _, m := range mountsBelow(t, n.Runtime()) {
		if filepath.Base(m.Mountpoint) == folder {
			return true
		}
	}
	return false
}

func must(t *testing.T) func(out string, err error) string {
	return func(out string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
}

// downloads counts the blobs of a media type's size and more that containerd
// has downloaded.
func (n *Node) blobs(t *testing.T) int {
	t.Helper()
	out := must(t)(n.Ctr(t.Context(), "content", "ls", "-q"))
	return len(strings.Fields(out))
}

// An image is pulled without its layers, runs at once, survives that its
// snapshotter is killed, is committed from, outlives its registry and a stop of
// everything; an image that is not lazy works beside it; and when they are
// removed nothing is left.
func TestImages(t *testing.T) {
	t.Run("debian", func(t *testing.T) { testImages(t, "", sumTree("/etc /usr/bin")) })
	t.Run("go", func(t *testing.T) { testImages(t, built, sumTree("/etc /usr/bin /usr/sbin")) })
}

func testImages(t *testing.T, bin, sumTree string) {
	r := startRegistry(t)
	gate := newRelay(t, r.Addr)
	n := start(t, bin, "--read-timeout", "5s")
	ctx := t.Context()
	lazy, zstd, plain := gate.addr+"/base:estargz", gate.addr+"/base:zstdchunked", gate.addr+"/base:plain"
	if err := n.Pull(ctx, lazy); err != nil {
		t.Fatal(err)
	}
	if blobs := n.blobs(t); blobs != 2 {
		t.Errorf("containerd has downloaded %d blobs, want the manifest and the config", blobs)
	}
	// While it is read, the process that serves it dies again and again.
	type result struct {
		sum string
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := n.Run(ctx, lazy, "c1", "sh", "-c", sumTree)
		done <- result{strings.TrimSpace(out), err}
	}()
	eventually(t, time.Minute, "the container runs", func() bool { return n.isMounted(t, "lazy") })
	var first result
	for kills := 0; first.sum == "" && first.err == nil; {
		select {
		case first = <-done:
		case <-time.After(300 * time.Millisecond):
			// containerd's own request at the very start would fail with the
			// process; a container's reads do not.
			if out, err := n.Ctr(ctx, "task", "ls"); err == nil && strings.Contains(out, "RUNNING") && kills < 3 {
				n.Kill()
				kills++
			}
		}
	}
	if first.err != nil {
		t.Fatal(first.err)
	}
	eventually(t, time.Minute, "the image is sealed", func() bool { return n.isMounted(t, "sealed") })
	out := must(t)(n.Run(ctx, lazy, "c2", "sh", "-c", sumTree+"; grep ' / / ' /proc/self/mountinfo"))
	if !strings.HasPrefix(out, first.sum) {
		t.Errorf("lazy and sealed differ: %s and %s", first.sum, out)
	}
	if !strings.Contains(out, "/sealed::") || strings.Contains(out, "/data") {
		t.Errorf("a container of the sealed image is mounted as %s", out)
	}
	if err := n.Pull(ctx, zstd); err != nil {
		t.Fatal(err)
	}
	if blobs := n.blobs(t); blobs != 4 {
		t.Errorf("containerd has downloaded %d blobs, want two manifests and configs", blobs)
	}
	if got := must(t)(n.Run(ctx, zstd, "c3", "sh", "-c", sumTree)); got != first.sum {
		t.Errorf("zstd:chunked and eStargz differ: %s and %s", got, first.sum)
	}
	// By fallback; said once. Its layers have the digests, unpacked, that those
	// of zstd have.
	must(t)(n.Ctr(ctx, "image", "rm", "--sync", zstd))
	if err := n.Pull(ctx, plain); err != nil {
		t.Fatal(err)
	}
	if got := must(t)(n.Run(ctx, plain, "c4", "sh", "-c", sumTree)); got != first.sum {
		t.Errorf("the unpacked image and the lazy one differ: %s and %s", got, first.sum)
	}
	if said := strings.Count(n.Log("cfs-fuse"), "is not served lazily"); said != 1 {
		t.Errorf("the log says %d times that an image is not lazy, want once: %s", said, n.Log("cfs-fuse"))
	}
	testCommit(t, n, lazy)
	testReboot(t, n, gate, lazy, sumTree, first.sum)
	testRemoved(t, n)
}

// What a container has written is committed, seen as a difference, and is there
// in what is made from it.
func testCommit(t *testing.T, n *Node, ref string) {
	ctx := t.Context()
	must(t)(n.Ctr(ctx, "run", "-d", "--snapshotter", "cfs", "--", ref, "writer", "sh", "-c",
		"echo new >/etc/added; chmod 600 /etc/passwd; rm /etc/hostname; mv /etc/apt /etc/moved; sleep 1000"))
	eventually(t, time.Minute, "the container has written", func() bool {
		out, err := n.Ctr(ctx, "task", "exec", "--exec-id", "look", "writer", "ls", "/etc")
		return err == nil && strings.Contains(out, "moved")
	})
	must(t)(n.Ctr(ctx, "task", "kill", "-s", "KILL", "writer"))
	eventually(t, time.Minute, "the task is deleted", func() bool {
		_, err := n.Ctr(ctx, "task", "delete", "writer")
		return err == nil
	})
	diff := filepath.Join(n.o.Dir, "diff.tar")
	text, err := n.Ctr(ctx, "snapshot", "--snapshotter", "cfs", "diff", "--media-type", "application/vnd.oci.image.layer.v1.tar", "writer")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(diff, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	list, err := exec.Command("tar", "tvf", diff).CombinedOutput()
	if err != nil {
		t.Fatalf("tar: %v: %s", err, list)
	}
	for _, want := range []string{"etc/added", "etc/passwd", "etc/.wh.hostname", "etc/.wh.apt", "etc/moved/sources.list"} {
		if !strings.Contains(string(list), want) {
			t.Errorf("the difference has no %s:\n%s", want, list)
		}
	}
	must(t)(n.Ctr(ctx, "snapshot", "--snapshotter", "cfs", "commit", "--", "committed", "writer"))
	passwd, err := os.Stat(filepath.Join(set.Reference(images.Debian), "etc/passwd"))
	if err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(n.o.Dir, "look")
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	// A view that no container has is garbage to containerd: it may go at any
	// time.
	snapshot := func(args ...string) (string, error) {
		return n.Ctr(ctx, append([]string{"snapshot", "--snapshotter", "cfs"}, args...)...)
	}
	eventually(t, time.Minute, "what was committed is looked at", func() bool {
		snapshot("rm", "look")
		if _, err := snapshot("view", "look", "committed"); err != nil {
			return false
		}
		mounts, err := snapshot("mounts", at, "look")
		if err != nil {
			return false
		}
		got, err := exec.Command("sh", "-c", "set -e\n"+mounts+"\ncd "+at+"\ncat etc/added; stat -c %a etc/passwd; wc -c <etc/passwd; "+
			"ls etc/moved | head -1; ls etc/hostname etc/apt 2>&1 | grep -c 'No such'; cd /; umount "+at).CombinedOutput()
		if want := fmt.Sprintf("new\n600\n%d\n", passwd.Size()); err == nil && (!strings.HasPrefix(string(got), want) || !strings.HasSuffix(string(got), "\n2\n")) {
			t.Errorf("what was committed: %s; want %s", got, want)
		}
		return err == nil
	})
	eventually(t, time.Minute, "both are removed", func() bool {
		snapshot("rm", "look")
		_, err := snapshot("rm", "committed")
		return err == nil
	})
	must(t)(n.Ctr(ctx, "container", "delete", "writer"))
}

// With the registry gone, and after everything was ended and unmounted, as by a
// stop of the machine, a sealed image starts.
func testReboot(t *testing.T, n *Node, gate *relay, ref, sumTree, sum string) {
	ctx := t.Context()
	gate.close()
	n.StopDaemon()
	n.StopSnapshotter()
	detachBelow(t, n.Runtime())
	if err := os.RemoveAll(n.Runtime()); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		t.Fatal(err)
	}
	if err := n.StartSnapshotter(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartDaemon(ctx); err != nil {
		t.Fatal(err)
	}
	if got := must(t)(n.Run(ctx, ref, "c5", "sh", "-c", sumTree)); got != sum {
		t.Errorf("after a stop: %s, want %s", got, sum)
	}
	gate.open()
}

// testRemoved removes every image: nothing is left.
func testRemoved(t *testing.T, n *Node) {
	ctx := t.Context()
	for _, ref := range strings.Fields(must(t)(n.Ctr(ctx, "image", "ls", "-q"))) {
		must(t)(n.Ctr(ctx, "image", "rm", "--sync", ref))
	}
	eventually(t, time.Minute, "snapshots are collected", func() bool {
		out, err := n.Ctr(ctx, "snapshot", "--snapshotter", "cfs", "ls")
		return err == nil && len(strings.Fields(out)) == 3
	})
	eventually(t, time.Minute, "mounts are gone", func() bool { return len(mountsBelow(t, "/run")) == 0 })
	for _, dir := range []string{filepath.Join(n.Runtime(), "images"), filepath.Join(n.Root(), "snapshotter", "snapshots")} {
		eventually(t, time.Minute, dir+" is empty", func() bool {
			left, err := os.ReadDir(dir)
			return err == nil && len(left) == 0
		})
	}
	if out, err := exec.Command("losetup", "--list", "--noheadings", "--output", "BACK-FILE").Output(); err != nil || strings.Contains(string(out), n.o.Dir) {
		t.Errorf("loop devices: %s, %v", out, err)
	}
	// Nothing is in use any more: the budget decides.
	eventually(t, time.Minute, "the budget is kept", func() bool {
		out, err := exec.Command(binary, "--runtime-dir", n.Runtime(), "cache", "gc", "--root", n.Root(), "--store-size", "1").CombinedOutput()
		t.Logf("cache gc: %v: %s", err, out)
		return err == nil
	})
	if left, err := os.ReadDir(filepath.Join(n.Root(), "staging")); err != nil || len(left) != 0 {
		t.Errorf("staging files: %v, %v", left, err)
	}
	// What a process that was killed had begun has a dot in front, and goes at
	// the next start of the machine.
	if left, err := filepath.Glob(filepath.Join(n.Root(), "images", "[^.]*")); err != nil || len(left) != 0 {
		t.Errorf("images in the store: %v, %v", left, err)
	}
}

// While the registry is gone a read of what is not there fails in time; when it is
// back the same read works, and nothing was restarted.
func TestRegistryGoneLazy(t *testing.T) {
	gate := newRelay(t, startRegistry(t).Addr)
	n := start(t, built, "--read-timeout", "2s", "--fill=false")
	ctx := t.Context()
	ref := gate.addr + "/base:estargz"
	if err := n.Pull(ctx, ref); err != nil {
		t.Fatal(err)
	}
	must(t)(n.Ctr(ctx, "run", "-d", "--snapshotter", "cfs", "--", ref, "c", "sleep", "1000"))
	read := func(id string) (string, error) {
		return n.Ctr(ctx, "task", "exec", "--exec-id", id, "c", "sh", "-c", "sha256sum </usr/bin/perl 2>&1 || echo failed")
	}
	must(t)(n.Ctr(ctx, "task", "exec", "--exec-id", "warm", "c", "sh", "-c", "sha256sum </dev/null; echo failed"))
	gate.close()
	if out := must(t)(read("r1")); !strings.Contains(out, "Input/output error") {
		t.Errorf("with the registry gone: %s, want an I/O error", out)
	}
	servers := fmt.Sprint(n.Servers(true))
	gate.open()
	eventually(t, time.Minute, "the read works again", func() bool {
		out, err := read(fmt.Sprint("r", time.Now().UnixNano()))
		return err == nil && !strings.Contains(out, "error")
	})
	want, err := exec.Command("sh", "-c", "sha256sum <"+filepath.Join(set.Reference(images.Debian), "usr/bin/perl")).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got := must(t)(read("last")); got != strings.TrimSpace(string(want)) {
		t.Errorf("perl has %s, want %s", got, want)
	}
	if now := fmt.Sprint(n.Servers(true)); now != servers {
		t.Errorf("processes were %s and are %s", servers, now)
	}
	must(t)(n.Ctr(ctx, "task", "kill", "-s", "KILL", "c"))
	eventually(t, time.Minute, "the task is deleted", func() bool {
		_, err := n.Ctr(ctx, "task", "delete", "c")
		return err == nil
	})
	must(t)(n.Ctr(ctx, "container", "delete", "c"))
	testRemoved(t, n)
}
