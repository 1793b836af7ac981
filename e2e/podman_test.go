package e2e

import (
	"bytes"
	"compress/gzip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
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

// podmanScript runs in namespaces of its own: the root filesystem in $1 gets
// what is written from the folder $2, pulls $3 and copies the tree that it
// mounts.
const podmanScript = `set -e
root=$1; work=$2; image=$3
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs run "$root/run"
for dir in srv tmp var/tmp etc/containers usr/local/bin; do mount --bind "$work/$dir" "$root/$dir"; done
run() { chroot "$root" /usr/bin/env -i HOME=/tmp PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin PODMAN_IGNORE_CGROUPSV1_WARNING=1 "$@"; }
run podman pull --quiet --tls-verify=false "$image"
tree=$(run podman image mount "$image")
grep " $root$tree " /proc/self/mounts >"$work/mounts"
cp -a "$root$tree/." "$work/tree"
run podman image umount "$image"
`

// TestPodman has Podman of Debian trixie pull a zstd:chunked image with
// use_composefs, which calls our mkcomposefs for it, mounts the image that we
// wrote, and must show the image's tree. One image is skopeo's, one convert's.
func TestPodman(t *testing.T) {
	t.Run("skopeo's", func(t *testing.T) {
		testPodman(t, newBench(t), registry.Addr+"/"+images.Small+":"+images.ZstdChunked, true)
	})
	t.Run("convert's", func(t *testing.T) {
		b := newBench(t)
		image := takingRegistry(t, b).Addr + "/small:1"
		b.must("convert", "-q", "--format", "zstd:chunked", "--plain-http", plain(images.Small), "docker://"+image)
		testPodman(t, b, image, true)
	})
	// As Debian configures it, and with an ordinary layer: Podman makes no composefs of eStargz.
	t.Run("convert's eStargz", func(t *testing.T) {
		b := newBench(t)
		image := takingRegistry(t, b).Addr + "/small:1"
		b.must("convert", "-q", "--plain-http", plain(images.Small), "docker://"+image)
		testPodman(t, b, image, false)
	})
}

func testPodman(t *testing.T, b *bench, image string, composefs bool) {
	cache, err := images.DefaultCache()
	if err != nil {
		t.Fatal(err)
	}
	root, err := images.Podman(t.Context(), cache, os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(b.dir, "work")
	for _, dir := range []string{"srv", "tmp", "var/tmp", "etc/containers", "usr/local/bin", "tree"} {
		if err := os.MkdirAll(filepath.Join(work, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	options := ""
	if composefs {
		options = `[storage.options]
pull_options = {enable_partial_images = "true", convert_images = "true", use_hard_links = "false", ostree_repos = ""}
[storage.options.overlay]
use_composefs = "true"
`
	}
	for path, text := range map[string]string{
		"etc/containers/policy.json": `{"default": [{"type": "insecureAcceptAnything"}]}`,
		"etc/containers/storage.conf": `[storage]
driver = "overlay"
runroot = "/run/storage"
graphroot = "/srv"
` + options} {
		if err := os.WriteFile(filepath.Join(work, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	program, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(work, "usr/local/bin/mkcomposefs"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child",
		"sh", "-c", podmanScript, "sh", root, work, image).CombinedOutput()
	if err != nil {
		t.Fatalf("podman: %v\n%s", err, out)
	}
	if !composefs {
		for _, name := range []string{estargz.TOCTarName, estargz.NoPrefetchLandmark} {
			if err := os.Remove(filepath.Join(work, "tree", name)); err != nil {
				t.Error(err)
			}
		}
		// The layer has no entry for the root, for which Podman then has its own mode.
		if err := os.Chmod(filepath.Join(work, "tree"), 0o755); err != nil {
			t.Error(err)
		}
		sameTree(t, set.Reference(images.Small), filepath.Join(work, "tree"), treediff.Options{Without: treediff.Mtime})
		return
	}
	mounts, err := os.ReadFile(filepath.Join(work, "mounts"))
	if err != nil || !bytes.Contains(mounts, []byte("overlay")) || !bytes.Contains(mounts, []byte("composefs-layers")) {
		t.Errorf("what podman mounted is no composefs: %s, %v", mounts, err)
	}
	blobs, err := filepath.Glob(filepath.Join(work, "srv/overlay/*/composefs-data/composefs.blob"))
	if err != nil || len(blobs) != 1 {
		t.Fatalf("composefs images: %q, %v", blobs, err)
	}
	b.must("erofs", "fsck", blobs[0])
	sameTree(t, set.Reference(images.Small), filepath.Join(work, "tree"), treediff.Options{})
}
