package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// A fixture is an image that was sealed on the disk, and what is in it.
type fixture struct {
	dir, root, layout string
	want              map[string]string // content by path
	record            record
}

// A record is what sealed.json holds.
type record struct {
	Composefs string `json:"composefs_digest"`
	Verity    string `json:"verity"`
	Reason    string `json:"reason"`
}

const tag = ":t"

func (f *fixture) source() string { return "oci:" + f.layout + tag }

// image is the path of the sealed image.
func (f *fixture) image(t *testing.T) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(f.root, "images", "*", "sealed.erofs"))
	if err != nil || len(found) != 1 {
		t.Fatalf("sealed images: %q, %v", found, err)
	}
	return found[0]
}

// object is the path of the object of a file of the image, by the image's own
// listing.
func (f *fixture) object(t *testing.T, name string) string {
	t.Helper()
	for line := range strings.Lines(must(t, "cfs-fuse", "erofs", "ls", f.image(t))) {
		if path, object, ok := strings.Cut(strings.TrimSpace(line), "\t@ "); ok && path == "/"+name {
			return filepath.Join(f.root, "objects", object)
		}
	}
	t.Fatalf("no object of %s in the listing of the image", name)
	return ""
}

// seal makes an image of two layers in a new folder of the disk, mounts it with
// fs-verity required, and unmounts it when it was swapped.
func seal(t *testing.T) *fixture {
	t.Helper()
	dir, err := os.MkdirTemp(disk, "f")
	check(t, err)
	f := &fixture{dir: dir, root: filepath.Join(dir, "root"), layout: filepath.Join(dir, "layout"), want: map[string]string{
		"bin/first":  string(imagetest.RandomBytes(3000, 1)),
		"bin/second": string(imagetest.RandomBytes(3000, 2)),
		"bin/twin":   string(imagetest.RandomBytes(3000, 3)), // of second's size
		"lib/large":  string(imagetest.RandomBytes(300_000, 4)),
		"lib/link":   string(imagetest.RandomBytes(300_000, 4)),
		"lib/block":  string(imagetest.RandomBytes(4096, 5)),
		"etc/empty":  "",
	}}
	file := func(name string) imagetest.Item { return imagetest.File(name, f.want[name]) }
	lower := imagetest.Must(imagetest.Tar(imagetest.Dir("bin"), file("bin/first"), file("bin/second"), imagetest.File("bin/gone", "x"),
		imagetest.Dir("lib"), file("lib/large"), imagetest.Hardlink("lib/link", "lib/large")))
	upper := imagetest.Must(imagetest.Tar(imagetest.Dir("bin"), file("bin/twin"), imagetest.Whiteout("bin/gone"),
		imagetest.Dir("lib"), file("lib/block"), imagetest.Dir("etc"), file("etc/empty")))
	o := imagetest.Options{ChunkSize: 100_000, Level: 1}
	im := imagetest.Must(imagetest.Image(imagetest.Must(imagetest.EStargz(lower, o)), imagetest.Must(imagetest.EStargz(upper, o))))
	check(t, im.WriteLayout(f.layout, tag[1:]))
	mnt := point(t)
	f.mount(t, mnt, "--verity", "require", "--swap", "require")
	must(t, "cfs-fuse", "wait", "--for", "swapped", "--timeout", "60s", mnt)
	if s := statusOf(t, mnt); s.State != "swapped" || s.Backend != "kernel" || s.Verity != "enforced" {
		t.Fatalf("status after the swap with fs-verity required: %+v", s)
	}
	f.same(t, mnt)
	data, err := os.ReadFile(filepath.Join(filepath.Dir(f.image(t)), "sealed.json"))
	check(t, err)
	check(t, json.Unmarshal(data, &f.record))
	unmount(t, mnt)
	return f
}

func (f *fixture) mount(t *testing.T, mnt string, flags ...string) {
	t.Helper()
	must(t, "cfs-fuse", append(append([]string{"mount", "--root", f.root}, flags...), f.source(), mnt)...)
}

// read reads every file, and fails the test for any that is there with other
// bytes. It returns the errors of those that cannot be read.
func (f *fixture) read(t *testing.T, mnt string) map[string]error {
	t.Helper()
	failed := map[string]error{}
	for name, want := range f.want {
		got, err := os.ReadFile(filepath.Join(mnt, name))
		switch {
		case err != nil:
			failed[name] = err
		case string(got) != want:
			t.Errorf("%s: other bytes than the image's were read, without an error", name)
		}
	}
	if _, err := os.Lstat(filepath.Join(mnt, "bin/gone")); err == nil {
		t.Error("bin/gone, which a whiteout hides, is there")
	}
	return failed
}

// same fails the test unless every file can be read and is right.
func (f *fixture) same(t *testing.T, mnt string) {
	t.Helper()
	for name, err := range f.read(t, mnt) {
		t.Errorf("%s: %v", name, err)
	}
}

// The kernel's measurement, fsverity(1)'s computation and our digests are the
// same, of every object and of the image; and the record says what was got.
func TestDigests(t *testing.T) {
	f := seal(t)
	if f.record.Verity != "enforced" || f.record.Reason != "" {
		t.Errorf("sealed.json: %+v, want verity enforced", f.record)
	}
	compare := func(path, want string) {
		t.Helper()
		for _, args := range [][]string{{"measure", path}, {"digest", "--hash-alg=sha256", "--block-size=4096", path}} {
			got, _, _ := strings.Cut(must(t, "fsverity", args...), " ")
			if got != "sha256:"+want {
				t.Errorf("fsverity %s: %s, ours is sha256:%s", strings.Join(args, " "), got, want)
			}
		}
	}
	objects, err := filepath.Glob(filepath.Join(f.root, "objects", "??", "*"))
	check(t, err)
	if len(objects) != 5 {
		t.Errorf("%d objects, want 5: %q", len(objects), objects)
	}
	for _, o := range objects {
		compare(o, filepath.Base(filepath.Dir(o))+filepath.Base(o))
	}
	compare(f.image(t), f.record.Composefs)

	// A pinned digest is compared; enabling what is enabled is no error.
	mnt := point(t)
	f.mount(t, mnt, "--verity", "require", "--digest", f.record.Composefs)
	if s := statusOf(t, mnt); s.Verity != "enforced" || s.Composefs != f.record.Composefs {
		t.Errorf("status with the right --digest: %+v", s)
	}
	unmount(t, mnt)
	wrong := strings.Repeat("00", 31) + "01"
	if _, err := command("cfs-fuse", "mount", "--root", f.root, "--digest", wrong, f.source(), mnt); err == nil || !strings.Contains(err.Error(), f.record.Composefs) {
		t.Errorf("mount with a wrong --digest: %v, want a refusal with the right one", err)
	}
	check(t, os.Remove(filepath.Join(filepath.Dir(f.image(t)), "sealed.json")))
	f.mount(t, mnt, "--verity", "require", "--swap", "require")
	must(t, "cfs-fuse", "wait", "--for", "swapped", "--timeout", "60s", mnt)
	f.same(t, mnt)
}

// A damage is what is done to the files of a sealed image. Either it is done
// beneath the filesystem or by putting other files in their place: verity
// files themselves cannot be written.
type damage struct {
	name    string
	victims []string // whose bytes cannot be had afterwards
	do      func(t *testing.T, f *fixture) (undo func())
}

var damages = []damage{
	{"a byte of a small object", []string{"bin/second"}, func(t *testing.T, f *fixture) func() {
		return flipped(t, f.object(t, "bin/second"), 1234)
	}},
	{"the first byte of an object", []string{"bin/twin"}, func(t *testing.T, f *fixture) func() {
		return flipped(t, f.object(t, "bin/twin"), 0)
	}},
	{"the last byte of a large object", []string{"lib/large", "lib/link"}, func(t *testing.T, f *fixture) func() {
		return flipped(t, f.object(t, "lib/large"), 299_999)
	}},
	{"a byte of the Merkle tree of an object", []string{"lib/large", "lib/link"}, func(t *testing.T, f *fixture) func() {
		// ext4 puts the tree at the next 64 KiB after the data (Documentation,
		// ext4, "Verity files"): its top block first, then the leaves.
		return flipped(t, f.object(t, "lib/large"), (300_000+65535)/65536*65536+4096)
	}},
	{"two objects of one size swapped", []string{"bin/second", "bin/twin"}, func(t *testing.T, f *fixture) func() {
		a, b := f.object(t, "bin/second"), f.object(t, "bin/twin")
		swap := func() { check(t, unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE)) }
		swap()
		return swap
	}},
	{"an object replaced by one cut short, with fs-verity of its own", []string{"bin/first"}, func(t *testing.T, f *fixture) func() {
		return replaced(t, f.object(t, "bin/first"), f.want["bin/first"][:2000], true)
	}},
	{"an object replaced by one cut short, without fs-verity", []string{"bin/first"}, func(t *testing.T, f *fixture) func() {
		return replaced(t, f.object(t, "bin/first"), f.want["bin/first"][:2000], false)
	}},
	{"an object replaced by its equal without fs-verity", []string{"lib/block"}, func(t *testing.T, f *fixture) func() {
		return replaced(t, f.object(t, "lib/block"), f.want["lib/block"], false)
	}},
}

// flipped flips a byte of a file beneath its filesystem, and back.
func flipped(t *testing.T, path string, off int64) func() {
	t.Helper()
	at := onDevice(t, path, off)
	flip(t, at)
	return func() { flip(t, at) }
}

// replaced puts another file in the place of one, and back.
func replaced(t *testing.T, path, data string, verity bool) func() {
	t.Helper()
	kept, made := path+".kept", path+".made"
	check(t, os.WriteFile(made, []byte(data), 0o644))
	if verity {
		must(t, "fsverity", "enable", made)
	}
	check(t, os.Rename(path, kept))
	check(t, os.Rename(made, path))
	return func() { check(t, os.Rename(kept, path)) }
}

// While a mount that enforces fs-verity is in use, whatever is done to an
// object gives an error to whoever reads it, and right bytes of all others.
func TestDamageUnderMount(t *testing.T) {
	f := seal(t)
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			mnt := point(t)
			f.mount(t, mnt, "--verity", "require", "--swap", "require")
			f.same(t, mnt)
			dropCaches(t)
			undo := d.do(t, f)
			dropCaches(t)
			failed := f.read(t, mnt)
			for _, v := range d.victims {
				if err := failed[v]; err == nil {
					t.Errorf("%s can be read", v)
				} else if errno := errnoOf(err); errno != unix.EIO {
					t.Errorf("%s: %v, want EIO", v, err)
				}
				delete(failed, v)
			}
			for name, err := range failed {
				t.Errorf("%s, which was left alone: %v", name, err)
			}
			undo()
			dropCaches(t)
			f.same(t, mnt)
		})
	}
}

func errnoOf(err error) unix.Errno {
	if p, ok := err.(*os.PathError); ok {
		if e, ok := p.Err.(unix.Errno); ok {
			return e
		}
	}
	return 0
}

// What was done to a store while nothing was mounted is met by a mount that is
// refused, by one that gives errors, or is mended; never by other bytes. The
// source is gone, so that the store is all there is.
func TestDamageBeforeMount(t *testing.T) {
	f := seal(t)
	check(t, os.Rename(f.layout, f.layout+".away"))
	for _, d := range damages {
		t.Run(d.name, func(t *testing.T) {
			undo := d.do(t, f)
			defer undo()
			f.coldMount(t, d.victims, false)
		})
	}
}

// coldMount mounts a damaged store with fs-verity required, and reads. It
// says how that ended.
func (f *fixture) coldMount(t *testing.T, victims []string, heals bool) {
	t.Helper()
	mnt := point(t)
	dropCaches(t)
	_, err := command("cfs-fuse", "mount", "--root", f.root, "--verity", "require", f.source(), mnt)
	if err != nil {
		t.Logf("the mount is refused: %v", err)
		return
	}
	_, werr := command("cfs-fuse", "wait", "--for", "swapped", "--timeout", "5s", mnt)
	s := statusOf(t, mnt)
	dropCaches(t)
	failed := f.read(t, mnt)
	t.Logf("%s, verity %s (%v); cannot be read: %v", s.Backend, s.Verity, werr, failed)
	if s.Backend == "kernel" && s.Verity != "enforced" {
		t.Errorf("mounted by the kernel with verity %q, and it is required", s.Verity)
	}
	for name := range failed {
		known := false
		for _, v := range victims {
			known = known || v == name
		}
		if !known {
			t.Errorf("%s, which was left alone: %v", name, failed[name])
		}
	}
	if heals && len(failed) > 0 {
		t.Errorf("not mended though the source is there: %v", failed)
	}
}

// A byte of the image, anywhere: under the mount it gives errors, before the
// mount the image is refused or made anew; other names, attributes or bytes
// are never shown.
func TestDamagedImage(t *testing.T) {
	f := seal(t)
	fi, err := os.Stat(f.image(t))
	check(t, err)
	unreadable := 0
	for _, off := range []int64{1152 + 4, 4096 + 100, fi.Size() / 2} {
		t.Run(fmt.Sprintf("byte %d under the mount", off), func(t *testing.T) {
			mnt := point(t)
			f.mount(t, mnt, "--verity", "require", "--swap", "require")
			before := f.listing(t, mnt)
			dropCaches(t)
			undo := flipped(t, f.image(t), off)
			dropCaches(t)
			failed := f.read(t, mnt)
			for path, line := range f.listing(t, mnt) {
				if before[path] != line && !strings.HasPrefix(line, "error ") {
					t.Errorf("%s is shown as %s, was %s", path, line, before[path])
				}
			}
			t.Logf("cannot be read: %d of %d files", len(failed), len(f.want))
			unreadable += len(failed)
			undo()
			dropCaches(t)
			f.same(t, mnt)
		})
		t.Run(fmt.Sprintf("byte %d before the mount", off), func(t *testing.T) {
			undo := flipped(t, f.image(t), off)
			image := f.image(t)
			before, err := os.Stat(image)
			check(t, err)
			f.coldMount(t, nil, true)
			if after, err := os.Stat(image); err == nil && os.SameFile(before, after) {
				undo() // else it was made anew, and the blocks are free
			}
		})
	}
	if unreadable == 0 {
		t.Error("no damage to the image under the mount was noticed: the kernel read nothing of it again")
	}
}

// listing is what lstat says of every name below mnt that can be listed.
func (f *fixture) listing(t *testing.T, mnt string) map[string]string {
	t.Helper()
	all := map[string]string{}
	filepath.WalkDir(mnt, func(path string, d os.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err != nil {
			all[path] = "error " + err.Error()
			return nil
		}
		all[path] = fmt.Sprintf("%o %d:%d %d bytes, %v, inode %d, %d links", st.Mode, st.Uid, st.Gid, st.Size, st.Mtim, st.Ino, st.Nlink)
		return nil
	})
	return all
}

// An object that was cut short on the disk itself, by changing its inode.
func TestTruncatedInode(t *testing.T) {
	for _, away := range []bool{true, false} {
		t.Run(fmt.Sprintf("source gone %v", away), func(t *testing.T) {
			f := seal(t)
			if away {
				check(t, os.Rename(f.layout, f.layout+".away"))
			}
			for name, size := range map[string]int{"bin/first": 1000, "lib/large": 200_000} {
				object := f.object(t, name)
				fi, err := os.Stat(object)
				check(t, err)
				inode := fi.Sys().(*syscall.Stat_t).Ino
				remount(t, func() {
					must(t, "debugfs", "-w", "-R", fmt.Sprintf("set_inode_field <%d> size %d", inode, size), device)
				})
				if fi, err := os.Stat(object); err != nil || fi.Size() != int64(size) {
					t.Fatalf("debugfs left %s with %v, %v", object, fi, err)
				}
			}
			f.coldMount(t, []string{"bin/first", "lib/large", "lib/link"}, !away)
		})
	}
}

// Where there is no fs-verity, "require" is refused with the reason, and "try"
// says what it got.
func TestWithoutVerity(t *testing.T) {
	f := seal(t)
	root, err := os.MkdirTemp("/tmp", "root") // tmpfs
	check(t, err)
	defer os.RemoveAll(root)
	mnt := point(t)
	_, err = command("cfs-fuse", "mount", "--root", root, "--verity", "require", "--swap", "require", f.source(), mnt)
	if err == nil {
		_, err = command("cfs-fuse", "wait", "--for", "swapped", "--timeout", "60s", mnt)
	}
	if err == nil || !strings.Contains(err.Error(), "--verity require") || !strings.Contains(err.Error(), "inappropriate ioctl") {
		t.Errorf("fs-verity required on tmpfs: %v, want a refusal with the kernel's reason", err)
	}
	unmount(t, mnt)
	must(t, "cfs-fuse", "mount", "--root", root, "--verity", "try", f.source(), mnt)
	must(t, "cfs-fuse", "wait", "--for", "swapped", "--timeout", "60s", mnt)
	if s := statusOf(t, mnt); s.Backend != "kernel" || !strings.HasPrefix(s.Verity, "not enforced (kernel: ") || !strings.Contains(s.Verity, "inappropriate ioctl") {
		t.Errorf("status on tmpfs: %+v, want it to say that the kernel enforces nothing, and why", s)
	}
	f.same(t, mnt)
}
