package e2e

import (
	"bytes"
	"compress/gzip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// The dumps are what containers/storage 1.59.1 (Podman's use_composefs) sends
// through `mkcomposefs --from-file - -`: its own pkg/chunked/dump made them of
// the TOCs that skopeo gave the zstd:chunked images of these tests. Under its
// name, our binary has to make blobs of them that mount and read.
func TestPodmanDumps(t *testing.T) {
	b := newBench(t)
	for _, tool := range []string{"mkcomposefs", "mount.composefs"} {
		if err := os.Symlink(binary, filepath.Join(b.dir, tool)); err != nil {
			t.Fatal(err)
		}
	}
	blob := func(name string) string {
		f, err := os.Open(filepath.Join("testdata", "containers-storage-"+name+".dump.gz"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		dump, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(b.dir, "mkcomposefs"), "--from-file", "-", "-")
		cmd.Stdin = dump
		var errs bytes.Buffer
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: mkcomposefs: %v: %s", name, err, &errs)
		}
		path := filepath.Join(b.dir, name)
		if err := os.WriteFile(path, out, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for _, name := range []string{"odd-0", "odd-1"} {
		if out, err := exec.Command("fsck.erofs", blob(name)).CombinedOutput(); err != nil {
			t.Errorf("%s: fsck.erofs: %v: %s", name, err, out)
		}
	}

	// Its payloads are content digests, which is what our contents/sha256 has.
	point := b.mount("oci:" + set.Layout(images.ZstdChunked) + ":" + images.Small)
	b.must("wait", "--for", "swapped", point)
	b.must("umount", point)
	point = filepath.Join(b.dir, "podman")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(filepath.Join(b.dir, "mount.composefs"),
		"-o", "basedir="+filepath.Join(b.root, "contents/sha256"), blob("small-0"), point).CombinedOutput()
	if err != nil {
		t.Fatalf("mount.composefs: %v: %s", err, out)
	}
	defer func() {
		if err := unix.Unmount(point, 0); err != nil {
			t.Error(err)
		}
	}()
	// The image is made anew on each machine, of the same files at other times.
	sameTree(t, set.Reference(images.Small), point, treediff.Options{Without: treediff.Mtime})
}
