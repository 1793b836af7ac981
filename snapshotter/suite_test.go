package snapshotter

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// containerd's own tests of what a snapshotter is.
func TestSuite(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test mounts, and needs root")
	}
	testsuite.SnapshotterSuite(t, "cfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := New(testOptions(t, root), nil)
		if err != nil {
			return nil, nil, err
		}
		return s, s.Close, nil
	})
}

func testOptions(t *testing.T, root string) Options {
	log := slog.New(slog.NewTextHandler(testLog{t}, nil))
	return Options{Mount: mount.Options{Root: filepath.Join(root, "store"), Runtime: filepath.Join(root, "run"), Logger: log}}
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", p)
	return len(p), nil
}
