package containerd

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// soakEnv is for how long snapshotters are killed; unset: a few seconds, with
// fewer containers.
const soakEnv = "CFS_FUSE_SOAK"

// Many containers of several images start at once and read their whole trees,
// while the snapshotter is killed every two seconds: each has the right bytes.
func TestKillSoak(t *testing.T) {
	length, each, rate, folders := 4*time.Second, 2, "60MB", "/etc /usr/bin /app"
	if text := os.Getenv(soakEnv); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatalf("%s: %v", soakEnv, err)
		}
		// So slow that reading lasts as long as the kills.
		each, rate, folders = 4, "8MB", "/"
	}
	r := startRegistry(t)
	dir, err := os.MkdirTemp(runDir, "s")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	refs := []string{r.Addr + "/base:estargz", r.Addr + "/base:zstdchunked"}
	for i, form := range []string{images.EStargz, images.ZstdChunked, images.EStargz} {
		name := fmt.Sprint("app", i)
		tar := imagetest.Must(imagetest.Tar(imagetest.Dir("app/"), imagetest.Random("app/data", 8<<20, uint64(i)), imagetest.Whiteout("etc/issue")))
		blob := imagetest.Must(imagetest.EStargz(tar, imagetest.Options{}))
		if form == images.ZstdChunked {
			blob = imagetest.Must(imagetest.ContainersZstdChunked(tar, imagetest.Options{}))
		}
		if err := PushBase(t.Context(), set, dir, r.Addr, name, []string{form}, blob); err != nil {
			t.Fatal(err)
		}
		refs = append(refs, r.Addr+"/"+name+":"+form)
	}
	n := start(t, built, "--limit-rate", rate)
	ctx := t.Context()
	var pulls sync.WaitGroup
	for _, ref := range refs {
		pulls.Go(func() {
			if err := n.Pull(ctx, ref); err != nil {
				t.Error(err)
			}
		})
	}
	if pulls.Wait(); t.Failed() {
		t.FailNow()
	}
	// A start that meets a dead snapshotter is containerd's to try again, as
	// kubelet does: what it asked for was not done.
	run := func(ref, id string) (string, error) {
		for try := 0; ; try++ {
			out, err := n.Run(ctx, ref, fmt.Sprint(id, "-", try), "sh", "-c", "mkdir -p /app; "+sumTree(folders))
			if err == nil && out == "" && try < 20 {
				continue // the sum of nothing has a line, too: ctr was too late for a short program's output
			}
			if err == nil || try >= 20 || !strings.Contains(err.Error(), "navailable") && !strings.Contains(err.Error(), "error reading from server") {
				return strings.TrimSpace(out), err
			}
			n.Ctr(ctx, "container", "delete", fmt.Sprint(id, "-", try))
		}
	}
	began := time.Now()
	sums := make([][]string, len(refs))
	var runs sync.WaitGroup
	for i, ref := range refs {
		sums[i] = make([]string, each)
		for j := range each {
			runs.Go(func() {
				sum, err := run(ref, fmt.Sprint("c", i, "-", j))
				if err != nil {
					t.Errorf("%s: %v", ref, err)
				}
				sums[i][j] = sum
			})
		}
	}
	done := make(chan struct{})
	go func() {
		runs.Wait()
		close(done)
	}()
	kills, under := 0, 0
	for end := time.Now().Add(length); time.Now().Before(end); {
		select {
		case <-done:
		default:
			under++
		}
		n.Kill()
		kills++
		time.Sleep(2 * time.Second)
	}
	select {
	case <-done:
	case <-time.After(10 * time.Minute):
		t.Fatal("containers do not end")
	}
	t.Logf("%d containers of %d images, %d kills, %d of them while containers ran; all done after %v", len(refs)*each, len(refs), kills, under, time.Since(began).Round(100*time.Millisecond))
	// What the kernel's mounts of the whole images have is the measure.
	n.Pull(ctx, refs[0])
	for i, ref := range refs {
		eventually(t, 5*time.Minute, "every image is sealed", func() bool { return n.sealed(t) == len(refs) })
		want, err := run(ref, fmt.Sprint("check", i))
		if err != nil {
			t.Error(err)
		}
		for j, got := range sums[i] {
			if got != want || got == "" {
				t.Errorf("%s: container %d has %s, want %s", ref, j, got, want)
			}
		}
	}
	if sums[0][0] != sums[1][0] {
		t.Errorf("eStargz and zstd:chunked of the same image differ: %s, %s", sums[0][0], sums[1][0])
	}
	testRemoved(t, n)
}

// sealed counts the images of the node that the kernel has mounted as whole.
func (n *Node) sealed(t *testing.T) (count int) {
	for _, m := range mountsBelow(t, n.Runtime()) {
		if filepath.Base(m.Mountpoint) == "sealed" {
			count++
		}
	}
	return count
}
