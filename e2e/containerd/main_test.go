package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

var (
	set    *images.Set
	built  string // containerd's commands, from the Go module proxy
	binary string // cfs-fuse
	runDir string
)

func TestMain(m *testing.M) {
	code, err := runAll(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e/containerd:", err)
		code = 1
	}
	os.Exit(code)
}

func runAll(m *testing.M) (code int, err error) {
	if os.Geteuid() != 0 {
		return 1, errors.New("the tests run containers: run them as root")
	}
	if err := Isolate(); err != nil {
		return 1, err
	}
	ctx := context.Background()
	cache, err := images.DefaultCache()
	if err != nil {
		return 1, err
	}
	if set, err = images.Ensure(ctx, cache, os.Stderr); err != nil {
		return 1, err
	}
	if built, err = Build(ctx, cache, os.Stderr); err != nil {
		return 1, err
	}
	if runDir, err = os.MkdirTemp("", "cfsctr"); err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(runDir)) }()
	binary = os.Getenv("CFS_FUSE_BIN")
	if binary == "" {
		binary = filepath.Join(runDir, "cfs-fuse")
		if out, err := exec.Command("go", "build", "-o", binary, "../../cmd/cfs-fuse").CombinedOutput(); err != nil {
			return 1, fmt.Errorf("build the binary: %w\n%s", err, out)
		}
	}
	return m.Run(), nil
}

// start starts a node that ends with the test, which fails if it leaves
// anything behind.
func start(t *testing.T, bin string, args ...string) *Node {
	t.Helper()
	dir, err := os.MkdirTemp(runDir, "n")
	if err != nil {
		t.Fatal(err)
	}
	n, err := Start(t.Context(), Options{Dir: dir, Bin: bin, Binary: binary, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("containerd: %s\ncfs-fuse: %s", n.Log("containerd"), n.Log("cfs-fuse"))
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		detachBelow(t, "/run/containerd")
		detachBelow(t, "/run/cfs-fuse")
		os.RemoveAll("/run/containerd")
		os.RemoveAll("/run/cfs-fuse")
		os.RemoveAll(dir)
	})
	return n
}

// eventually waits until ok, at most for limit.
func eventually(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", limit, what)
		}
	}
}
