package e2e

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// When the process behind a hybrid mount and its holder die, what is whole goes on being
// read and everything can be listed; what is not whole gives an error, at
// once. Status says so, umount works, and so does mount over it.
func TestHybridDies(t *testing.T) {
	const whole, absent = "usr/bin/perl", "usr/bin/python3.11"
	b, k := newBench(t), newLink(t, registry.Addr, lan)
	src := source(k, images.Debian, images.EStargz)
	point := b.mount(src, "--fill=false")
	reference := set.Reference(images.Debian)
	read := func(name string) error {
		want, err := os.ReadFile(filepath.Join(reference, name))
		if err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(point, name))
		if err == nil && !bytes.Equal(got, want) {
			err = errors.New("other bytes")
		}
		return err
	}
	kill := func() {
		t.Helper()
		b.killAll(point)
	}
	if err := read(whole); err != nil {
		t.Fatal(err)
	}
	held, err := os.Open(filepath.Join(point, absent))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	kill()
	if err := read(whole); err != nil {
		t.Errorf("a file that is whole: %v", err)
	}
	start := time.Now()
	if err := read(absent); !errors.Is(err, unix.ENOTCONN) && !errors.Is(err, unix.EIO) && !errors.Is(err, unix.ECONNABORTED) {
		t.Errorf("a file that is not whole: %v, want an error about the connection", err)
	}
	if _, err := held.Read(make([]byte, 1)); err == nil {
		t.Error("an open file that is not whole could be read")
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("the error came after %v", took)
	}
	sameTree(t, reference, point, treediff.Options{Without: treediff.Content})
	if s := b.status(point); s.PID != 0 || s.State != "lazy" || s.Backend != hybridBackend || !strings.Contains(s.Note, "died") {
		t.Errorf("status: %+v", s)
	}
	b.refused(4, []string{"died"}, "wait", "--for", "swapped", point)
	b.refused(1, []string{"busy"}, "umount", point) // in use by us
	held.Close()

	b.mountAt(src, point, "--fill=false")
	b.isServed(point)
	for _, name := range []string{whole, absent} {
		if err := read(name); err != nil {
			t.Errorf("mounted again: %s: %v", name, err)
		}
	}
	kill()
	b.must("umount", point)
	if all := mountOn(t, point); len(all) > 0 {
		t.Errorf("after umount: %+v", all)
	}
	if out := b.must("status"); !strings.Contains(out, "nothing is mounted") {
		t.Errorf("status said %q", out)
	}
}

// Without a swap and with everything local, nothing that programs do reaches
// the process, and a container that runs from the mount never notices how the
// files came.
func TestHybridIsKernelNative(t *testing.T) {
	b := newBench(t)
	point := b.mount("oci:"+set.Layout(images.EStargz)+":"+images.Debian, "--swap", "never")
	if err := errors.Join(python.run(point), nginx.run(point)); err != nil { // while it fills
		t.Error(err)
	}
	b.waitFor("sealed", point)
	before := b.status(point).FUSERequests
	if before["read"] == 0 || before["lookup"] == 0 {
		t.Errorf("requests while lazy: %v, want some", before)
	}
	if err := errors.Join(python.run(point), nginx.run(point)); err != nil {
		t.Error(err)
	}
	sameTree(t, set.Reference(images.Debian), point, treediff.Options{})
	for op, n := range b.status(point).FUSERequests {
		if n != before[op] {
			t.Errorf("%d requests %s after everything was local", n-before[op], op)
		}
	}
}
