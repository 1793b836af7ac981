package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// A user without root mounts through fusermount3, reads, reaches Sealed, is
// told why there is no swap, and unmounts. It happens in a mount namespace with
// a /dev/fuse for everybody, as udev makes it on ordinary machines.
func TestUnprivileged(t *testing.T) {
	b := newBench(t)
	const script = `set -e
dir=$1 binary=$2 source=$3
mknod "$dir/fuse" c 10 229
chmod 666 "$dir/fuse"
mount --bind "$dir/fuse" /dev/fuse
mkdir "$dir/home" "$dir/home/mnt"
cp "$binary" "$dir/home/cfs-fuse"
chown -R nobody:nogroup "$dir/home"
exec setpriv --reuid=nobody --regid=nogroup --clear-groups sh -e -c '
cd "$1"
mnt=$1/mnt
cfs() { ./cfs-fuse --runtime-dir "$mnt-run" "$@"; }
cfs mount --root "$1/root" "$2" "$mnt"
ls "$mnt" >/dev/null
find "$mnt" -type f -exec cat {} + | wc -c
cfs wait --for sealed --timeout 60s "$mnt"
code=0
cfs wait --for swapped --timeout 10s "$mnt" 2>&1 || code=$?
echo "wait for swapped: $code"
cfs status "$mnt"
! touch "$mnt/x" 2>/dev/null
cfs umount "$mnt"
cfs status
' sh "$dir/home" "$source"
`
	if err := os.Chmod(b.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Dir(b.dir), 0o755); err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(b.dir, "layout")
	if out, err := exec.Command("cp", "-r", set.Layout(images.EStargz), layout).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh",
		b.dir, binary, "oci:"+layout+":"+images.Small)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{
		"wait for swapped: 4", "needs root", "sealed", "fuse (process", "nothing is mounted",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("output lacks %q:\n%s", want, out)
		}
	}
}
