package mount

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// Whatever point a process died at, its successor makes one mount of it.
func TestSettle(t *testing.T) { eachBackend(t, testSettle) }

func testSettle(t *testing.T, backend Backend) {
	m, mnt := start(t, twoLayers(t), Options{Swap: Never, Backend: backend})
	waitFor(t, m, Sealed)
	id := m.server.MountID()
	if wanted, err := m.settle(id); !wanted || err != nil || m.state() == Swapped {
		t.Errorf("before the swap: wanted %t, %v, state %v", wanted, err, m.state())
	}
	held, err := os.Open(mnt + "/big")
	if err != nil {
		t.Fatal(err)
	}
	rec, ok := m.sealedRecord()
	if !ok {
		t.Fatal("not sealed")
	}
	f, _, err := m.sealedMount(rec)
	if err != nil {
		t.Fatal(err)
	}
	err = kmount.AttachBeneath(f, mnt)
	f.Close()
	if err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"in the middle of the swap", "after it"} {
		wanted, err := m.settle(id)
		if s := m.Status(); wanted || err != nil || s.State != Swapped || s.Backend != "kernel" || s.ComposefsDigest != rec.Composefs.String() {
			t.Errorf("%s: wanted %t, %v, status %+v", when, wanted, err, s)
		}
		if top, err := kmount.At(mnt); err != nil || !isSealedMount(top) {
			t.Errorf("%s: %+v is mounted (%v), want the sealed image", when, top, err)
		}
	}
	checkFiles(t, mnt)
	held.Close()
	m.Wait() // nothing holds FUSE any more
	if err := kmount.Unmount(mnt); err != nil {
		t.Error(err)
	}
	if _, err := kmount.At(mnt); !errors.Is(err, kmount.ErrNotMounted) {
		t.Errorf("one Unmount later: %v, want nothing mounted", err)
	}
}

// A state that is none, or that lacks a descriptor, is refused.
func TestResumeRefuses(t *testing.T) {
	wait := func() error { return errors.New("it went on") }
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for state, files := range map[string]map[string]*os.File{
		`{`:  {fuseFile: file},
		`{}`: {fuseFile: file},
		`{"backend":"fuse","mount_id":1,"fuse":{}}`: nil,
	} {
		if _, err := Resume("oci:/nonexistent:latest", t.TempDir(), Options{Root: t.TempDir()}, []byte(state), files, wait); err == nil {
			t.Errorf("%s with %v was taken", state, files)
		}
	}
}

// A successor of who has sealed the image takes it for that without another
// look at the source or for room in the store, which there may be none of.
func TestSuccessorOfSealed(t *testing.T) {
	m, mnt := start(t, twoLayers(t), Options{Swap: Never})
	waitFor(t, m, Sealed)
	m.stop()
	m.run.Wait()
	m.update(func(s *Status) { s.State, s.ComposefsDigest = Lazy, "" })
	nothing, cancel := context.WithCancel(t.Context())
	cancel()
	m.conduct(nothing)
	if m.state() != Lazy {
		t.Errorf("not a successor, and told to stop: %v, want Lazy", m.state())
	}
	m.resumed = true
	m.conduct(nothing)
	if s := m.Status(); s.State != Sealed || s.ComposefsDigest == "" {
		t.Errorf("a successor: %+v, want it Sealed", s)
	}
	end(t, m, mnt)
}
