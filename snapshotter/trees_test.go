package snapshotter

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	ours "github.com/cfs-fuse/cfs-fuse/mount"
)

// Who cannot list the images says so, and has the keeper keep what it has.
func TestResumeWithoutMetadata(t *testing.T) {
	o := testOptions(t, t.TempDir())
	s, err := New(o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	meta := s.path("metadata.db")
	if err := os.RemoveAll(meta); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(meta, 0o700); err != nil {
		t.Fatal(err)
	}
	o.Keeper = noKeeper{t}
	s, err = New(o, &Sessions{State: []byte("[]")})
	if err == nil {
		s.Close()
		t.Fatal("no error")
	}
	if !strings.Contains(err.Error(), meta) || hint.Of(err) == "" {
		t.Errorf("%v, hint %q", err, hint.Of(err))
	}
}

type noKeeper struct{ t *testing.T }

func (k noKeeper) Keep(state []byte, _ map[string]*os.File) error {
	k.t.Errorf("the keeper is to keep %s", state)
	return nil
}

// An image that is wanted again while it is given up gets mounts that stay.
func TestOpenWhileClosing(t *testing.T) {
	n := newNode(t)
	low := layer(t, imagetest.File("name", "low"))
	n.push("app", low)
	_, parent := n.pull("app", low)
	began, goOn, over := make(chan struct{}), make(chan struct{}), make(chan struct{})
	n.s.trees.closeOne = func(l *ours.Lowers, ctx context.Context) error {
		close(began)
		<-goOn
		defer close(over)
		return l.Close(ctx)
	}
	remote, _, err := n.s.origins(t.Context())
	if err != nil || len(remote) != 1 {
		t.Fatalf("%+v, %v", remote, err)
	}
	if err := n.s.Remove(t.Context(), parent); err != nil {
		t.Fatal(err)
	}
	<-began
	var stack ours.Stack
	var done func()
	opened := make(chan error, 1)
	go func() {
		l, d, err := n.s.trees.open(t.Context(), remote[0])
		if err == nil {
			done = d
			stack, err = l.Best(t.Context())
		}
		opened <- err
	}()
	select {
	case err = <-opened: // while the other one is being closed: these mounts must stay all the same
		opened <- err
	case <-time.After(100 * time.Millisecond):
	}
	n.s.trees.closeOne = (*ours.Lowers).Close
	close(goOn)
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
	<-over
	if _, err := kmount.At(stack.Tree); err != nil {
		t.Errorf("%s of an image that is in use: %v", stack.Tree, err)
	}
	done()
}

// What a process was making when it was killed goes at the next start.
func TestUnfinished(t *testing.T) {
	o := testOptions(t, t.TempDir())
	s, err := New(o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(s.path("snapshots"), "new-123", "fs"), 0o755); err != nil {
		t.Fatal(err)
	}
	if s, err = New(o, nil); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if dirs, err := os.ReadDir(s.path("snapshots")); err != nil || len(dirs) > 0 {
		t.Errorf("left: %v, %v", dirs, err)
	}
}
