package e2e

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// makeDeb builds the Debian package from the sources in dir.
func makeDeb(t *testing.T, dir, dist string) string {
	t.Helper()
	cmd := exec.Command("make", "-C", dir, "deb", "DIST="+dist, "ARCH=amd64", "VERSION=1.2.3", "REVISION=abc", "SOURCE_DATE_EPOCH=1700000000")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return filepath.Join(dist, "cfs-fuse_1.2.3_amd64.deb")
}

// copySources copies what git has, or would take, to another folder.
func copySources(t *testing.T, to string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", `git ls-files -z --cached --others --exclude-standard | xargs -0 sh -c 'for f; do [ -e "$f" ] && cp --parents -d "$f" "$0" || :; done' "$1"`, "sh", to)
	cmd.Dir = ".."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("copy the sources: %v\n%s", err, out)
	}
}

// useScript uses the package in a Debian, as its only argument says, and takes
// it away again.
const useScript = `set -e
export PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8
dpkg -i /package.deb >/dev/null
cfs-fuse version --json
mount -t cfs-fuse -o nosuid,swap=never oci:/layout:$1 /mnt
sha256sum </mnt/d07/f07
grep -c ' /mnt .*nosuid' /proc/self/mountinfo
umount /mnt
echo "oci:/layout:$1 /mnt cfs-fuse defaults,ro,nofail,x-systemd.automount 0 0" >/etc/fstab
mount /mnt
sha256sum </mnt/d07/f07
cfs-fuse wait --for sealed /mnt
dpkg -P cfs-fuse >/dev/null 2>/tmp/kept; grep -o 'images are mounted' /tmp/kept
umount /mnt
dpkg -i /package.deb >/dev/null
. /usr/share/bash-completion/completions/cfs-fuse; complete -p cfs-fuse
rm -r /etc/fstab /tmp/kept
dpkg -P cfs-fuse >/dev/null
echo purged
`

// The Debian package is the same wherever it is built; what is in it is found,
// works by mount(8) and fstab, and goes without a trace.
func TestPackage(t *testing.T) {
	b := newBench(t)
	deb := makeDeb(t, "..", filepath.Join(b.dir, "dist"))
	elsewhere := filepath.Join(b.dir, "elsewhere")
	if err := os.Mkdir(elsewhere, 0o755); err != nil {
		t.Fatal(err)
	}
	copySources(t, elsewhere)
	first, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	again, err := os.ReadFile(makeDeb(t, elsewhere, filepath.Join(b.dir, "dist2")))
	if err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(first) != sha256.Sum256(again) {
		t.Errorf("two builds, in two places, of the same source differ")
	}
	root := filepath.Join(b.dir, "dist/root-amd64")
	arm := filepath.Join(b.dir, "cfs-fuse-arm64")
	if out, err := exec.Command("make", "-C", "..", "build", "ARCH=arm64", "BIN="+arm).CombinedOutput(); err != nil {
		t.Errorf("build for arm64: %v\n%s", err, out)
	}
	isStatic(t, arm)
	isStatic(t, filepath.Join(root, "usr/bin/cfs-fuse"))
	checkManual(t, filepath.Join(b.dir, "dist/man"))
	units, err := filepath.Glob(root + "/usr/lib/systemd/system/*.service")
	if err != nil || len(units) < 2 {
		t.Errorf("units: %v, %v", units, err)
	}

	upper := filepath.Join(b.dir, "upper")
	setup := `set -e
b=$1; root=$b/chroot
mkdir "$b/upper" "$b/work" "$root"
mount -t overlay overlay -o "lowerdir=$2,upperdir=$b/upper,workdir=$b/work" "$root"
mount -t proc proc "$root/proc"; mount --bind /dev "$root/dev"; mount -t tmpfs tmpfs "$root/tmp"
touch "$root/package.deb"; mkdir "$root/layout"
mount --bind "$3" "$root/package.deb"; mount --bind "$4" "$root/layout"
chroot "$root" /bin/bash -c "$5" bash "$6"
rm "$root/../upper/etc/fstab" 2>/dev/null || :
umount "$root/package.deb" "$root/layout"; rm "$root/package.deb"; rmdir "$root/layout"
`
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "sh", "-c", setup, "sh",
		b.dir, set.Reference(images.Debian), deb, set.Layout(images.EStargz), useScript, images.Small)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s%s", err, out, said.Bytes())
	}
	decoder := json.NewDecoder(bytes.NewReader(out))
	var version struct{ Version, Revision, Go, Platform string }
	if err := decoder.Decode(&version); err != nil || version.Version != "1.2.3" || version.Revision != "abc" || version.Platform != "linux/amd64" {
		t.Errorf("version: %+v, %v", version, err)
	}
	lines := strings.Split(strings.TrimSpace(string(out[decoder.InputOffset():])), "\n")
	if len(lines) != 6 || lines[0] != lines[2] || lines[1] != "1" || lines[3] != "images are mounted" ||
		!strings.HasPrefix(lines[4], "complete ") || lines[5] != "purged" {
		t.Errorf("said:\n%s\n%s", strings.Join(lines, "\n"), said.Bytes())
	}
	var left []string
	err = filepath.WalkDir(upper, func(path string, d os.DirEntry, err error) error {
		if name := strings.TrimPrefix(path, upper); err == nil && !d.IsDir() && !bookkeeping(name) {
			left = append(left, name)
		}
		return err
	})
	if err != nil || len(left) > 0 {
		t.Errorf("left after the purge: %v (%v)", left, err)
	}
	for _, dir := range []string{"/var/lib/cfs-fuse", "/run/cfs-fuse", "/usr/share/doc/cfs-fuse"} {
		if _, err := os.Lstat(filepath.Join(upper, dir)); err == nil {
			t.Errorf("%s is left after the purge", dir)
		}
	}
}

// bookkeeping reports whether a file is dpkg's or mount(8)'s own, or stands for
// one that was made for the test.
func bookkeeping(name string) bool {
	return strings.HasPrefix(name, "/var/lib/dpkg/") || strings.HasPrefix(name, "/var/log/") || strings.HasPrefix(name, "/run/mount/") || slices.Contains([]string{"/package.deb", "/layout", "/etc/fstab"}, name)
}

// isStatic checks that a program needs no interpreter and no library.
func isStatic(t *testing.T, path string) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP || p.Type == elf.PT_DYNAMIC {
			t.Errorf("%s is not static: %v", path, p.Type)
		}
	}
}

// checkManual checks every manual page as man(1) and mandoc(1) read it.
func checkManual(t *testing.T, dir string) {
	t.Helper()
	pages, err := filepath.Glob(dir + "/*")
	if err != nil || len(pages) < 30 {
		t.Fatalf("manual pages: %d, %v", len(pages), err)
	}
	out, err := exec.Command("mandoc", append([]string{"-T", "lint", "-W", "warning"}, pages...)...).CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("mandoc: %v\n%s", err, out)
	}
	for name, wants := range map[string][]string{
		"cfs-fuse.1":       {"NAME\n       cfs-fuse - mount container images", "COMMANDS", "cfs-fuse-mount(1)", "EXIT STATUS", "FILES"},
		"cfs-fuse-mount.1": {"SYNOPSIS\n       cfs-fuse mount [flags] SOURCE MOUNTPOINT", "  oci:DIR[:TAG|@DIGEST]  ", "--swap policy", "(default auto)", "EXAMPLES"},
		"mount.cfs-fuse.8": {"mount -t cfs-fuse registry.example.com/debian:12 /mnt", "fstab(5)"},
	} {
		cmd := exec.Command("man", "--warnings", "-E", "UTF-8", "-l", filepath.Join(dir, name))
		cmd.Env = append(os.Environ(), "MANWIDTH=100", "LC_ALL=C.UTF-8", "MANROFFOPT=-c")
		var warned bytes.Buffer
		cmd.Stderr = &warned
		out, err := cmd.Output()
		if err != nil || warned.Len() > 0 {
			t.Errorf("man %s: %v %s", name, err, warned.Bytes())
		}
		col := exec.Command("col", "-bx")
		col.Stdin = bytes.NewReader(out)
		text, err := col.Output()
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range wants {
			if !strings.Contains(string(text), want) {
				t.Errorf("man %s has no %q:\n%s", name, want, text[:min(len(text), 2000)])
			}
		}
	}
}
