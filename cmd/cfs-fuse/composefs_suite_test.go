package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

// The tests of this file use the tools as the composefs project's own test
// scripts do: in this order, with these options, by these words of standard
// error, and beside erofs-utils.

// randomTree makes a folder as those scripts do: some tens of folders, mostly
// small and some large files, a few with the content of others, symbolic links,
// fifos, devices, whiteouts, user xattrs.
func (p *program) randomTree(name string, seed uint64) {
	p.t.Helper()
	r := rand.New(rand.NewPCG(seed, 1))
	must := func(err error) {
		if err != nil {
			p.t.Fatal(err)
		}
	}
	xattrs := func(path string) {
		for range r.IntN(3) {
			must(unix.Lsetxattr(path, fmt.Sprint("user.x", r.IntN(9)), []byte(fmt.Sprint("value", r.IntN(9))), 0))
		}
	}
	dirs := []string{p.path(name)}
	for k := range 30 + r.IntN(20) {
		parent := dirs[max(0, r.IntN(len(dirs)+3)-3)]
		dirs = append(dirs, filepath.Join(parent, fmt.Sprintf("dir_%d", k)))
	}
	var files []string
	for _, dir := range dirs {
		must(os.Mkdir(dir, []os.FileMode{0o777, 0o755, 0o750, 0o700}[r.IntN(4)]))
		xattrs(dir)
		count := r.IntN(25)
		if r.IntN(40) == 0 {
			count = r.IntN(1000)
		}
		for k := range count {
			path := filepath.Join(dir, fmt.Sprintf("%s%d", strings.Repeat("n", r.IntN(30)), k))
			switch mode := uint32([]int{0o644, 0o666, 0o755, 0o777}[r.IntN(4)]); r.IntN(20) {
			case 0, 1, 2:
				must(os.Symlink(strings.Repeat("to/", 1+r.IntN(20)), path))
			case 3:
				must(unix.Mkfifo(path, mode))
			case 4:
				must(unix.Mknod(path, mode|[]uint32{unix.S_IFCHR, unix.S_IFBLK}[r.IntN(2)], int(unix.Mkdev(1+r.Uint32N(254), 1+r.Uint32N(254)))))
			case 5:
				must(unix.Mknod(path, mode|unix.S_IFCHR, 0))
			default:
				data := make([]byte, r.IntN(256))
				switch kind := r.IntN(20); {
				case kind == 0 && len(files) > 0:
					var err error
					data, err = os.ReadFile(files[r.IntN(len(files))])
					must(err)
				case kind == 1:
					data = make([]byte, r.IntN(1<<20))
				}
				for i := range data {
					data[i] = byte(r.Uint32())
				}
				must(os.WriteFile(path, data, os.FileMode(mode)))
				files = append(files, path)
				xattrs(path)
			}
		}
	}
}

// describeTree prints what programs see of a folder, a line for each name, user
// xattrs only. Whiteouts are printed as what an image makes of them.
func (p *program) describeTree(name string) string {
	p.t.Helper()
	root := p.path(name)
	lines := map[string]string{}
	marked := map[string]bool{} // folders with whiteouts in them
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		xattrs := map[string]string{}
		if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
			st.Mode = st.Mode&^unix.S_IFMT | unix.S_IFREG
			xattrs["user.overlay.whiteout"] = ""
			marked[filepath.Dir(path)] = true
		}
		line := fmt.Sprintf("%o links %d %d:%d %x %d.%d", st.Mode, st.Nlink, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec, st.Mtim.Nsec)
		switch {
		case st.Mode&unix.S_IFMT == unix.S_IFLNK:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += " -> " + target
		case st.Mode&unix.S_IFMT == unix.S_IFREG && len(xattrs) == 0:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d %x", st.Size, sha256.Sum256(data))
		case st.Mode&unix.S_IFMT == unix.S_IFREG:
			line += fmt.Sprintf(" %d %x", st.Size, sha256.Sum256(nil))
		}
		buf := make([]byte, 1<<16)
		n, err := unix.Llistxattr(path, buf)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		for key := range strings.SplitSeq(string(buf[:n]), "\x00") {
			if strings.HasPrefix(key, "user.") {
				n, err := unix.Lgetxattr(path, key, buf)
				if err != nil {
					return fmt.Errorf("%s: %s: %w", path, key, err)
				}
				xattrs[key] = string(buf[:n])
			}
		}
		for _, key := range slices.Sorted(maps.Keys(xattrs)) {
			line += fmt.Sprintf(" %s=%q", key, xattrs[key])
		}
		lines[path] = line
		return nil
	})
	if err != nil {
		p.t.Fatal(err)
	}
	for dir := range marked {
		for _, x := range []string{` user.overlay.opaque="x"`, ` user.overlay.whiteouts=""`} {
			if !strings.Contains(lines[dir], x) {
				lines[dir] += x
			}
		}
		f := strings.Split(lines[dir], " ")
		slices.Sort(f[6:])
		lines[dir] = strings.Join(f, " ")
	}
	var b strings.Builder
	for _, path := range slices.Sorted(maps.Keys(lines)) {
		f := strings.Split(lines[path], " ")
		if len(f) > 6 && f[0][0] == '4' {
			slices.Sort(f[6:])
		}
		fmt.Fprintf(&b, "%q %s\n", strings.TrimPrefix(path, root), strings.Join(f, " "))
	}
	return b.String()
}

func (p *program) fsck(image string) {
	p.t.Helper()
	if out, err := exec.Command("fsck.erofs", p.path(image)).CombinedOutput(); err != nil {
		p.t.Errorf("fsck.erofs %s: %v\n%s", image, err, out)
	}
	if out := p.ok("cfs-fuse erofs fsck " + image); !strings.Contains(out, "no violations") {
		p.t.Errorf("fsck: %s", out)
	}
}

// TestRandomTrees makes images of random folders, of their FUSE mounts again,
// and has the kernel mount them: the same must be seen everywhere.
func TestRandomTrees(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for k := range uint64(3) {
		p := newProgram(t)
		p.randomTree("root", seed+k)
		want := p.describeTree("root")
		digest := p.ok("mkcomposefs --print-digest --digest-store=objects root root.cfs")
		if got := p.ok("mkcomposefs --print-digest-only root"); got != digest {
			t.Errorf("the digest alone: %s, want %s", got, digest)
		}
		p.fsck("root.cfs")
		p.ok("composefs-dump root.cfs again.cfs")
		if !bytes.Equal(p.read("again.cfs"), p.read("root.cfs")) {
			t.Error("composefs-dump makes another image")
		}
		p.from = p.ok("composefs-info dump root.cfs")
		p.ok("mkcomposefs --from-file - again.cfs")
		if !bytes.Equal(p.read("again.cfs"), p.read("root.cfs")) {
			t.Error("from its dump it is another image")
		}
		if got := p.ok("composefs-info --basedir=objects missing-objects root.cfs"); got != "" {
			t.Errorf("missing: %s", got)
		}

		if err := os.Mkdir(p.path("mnt"), 0o755); err != nil {
			t.Fatal(err)
		}
		same := func(what string) {
			t.Helper()
			if got := p.describeTree("mnt"); got != want {
				a, b := strings.Split(got, "\n"), strings.Split(want, "\n")
				for i := range min(len(a), len(b)) {
					if a[i] != b[i] {
						t.Errorf("%s:\n got %s\nwant %s", what, a[i], b[i])
						break
					}
				}
			}
		}
		p.ok("composefs-fuse -o source=root.cfs,basedir=objects mnt")
		same("through FUSE")
		p.ok("mkcomposefs --digest-store=objects mnt fuse.cfs")
		p.umount("mnt")
		p.fsck("fuse.cfs")
		p.ok("cfs-fuse -o source=fuse.cfs,basedir=objects,noacl mnt") // right after the other
		same("through FUSE, from the FUSE mount")
		p.umount("mnt")

		p.ok("mount.composefs -o basedir=objects root.cfs mnt")
		func() {
			defer p.umount("mnt")
			// The root's link count is overlayfs's.
			first, rest, _ := strings.Cut(want, "\n")
			f := strings.Fields(first)
			var st unix.Stat_t
			if err := unix.Stat(p.path("mnt"), &st); err != nil {
				t.Fatal(err)
			}
			f[3] = fmt.Sprint(st.Nlink)
			want = strings.Join(f, " ") + "\n" + rest
			same("by the kernel")
			if strings.Contains(want, "user.overlay.whiteout") {
				return // it is no whiteout any more to who scans the mount
			}
			if got := p.ok("mkcomposefs --print-digest-only mnt"); got != digest {
				t.Errorf("an image of the kernel's mount has the digest %s, want %s", got, digest)
			}
		}()
	}
}

// special has every kind of entry that the format treats in a way of its own.
var special = "/ 4096 40555 2 0 0 0 1633950376.0 - - - trusted.foo1=bar-1 user.foo2=bar-2\n" +
	"/blockdev 0 60777 1 0 0 107690 1633950376.0 - - - trusted.bar=bar-2\n" +
	"/chardev 0 20777 1 0 0 10769 1633950376.0 - - - trusted.foo=bar-2\n" +
	`/escaped 0 100777 1 0 0 0 1633950376.0 - - - trusted.overlay.redirect=/foo\n user.overlay.redirect=/foo\n` + "\n" +
	"/fifo 0 10777 1 0 0 0 1633950376.0 - - - trusted.bar=bar-2\n" +
	`/inline 15 100777 1 0 0 0 1633950376.0 - FOOBAR\nINAFILE\n - user.foo=bar-2` + "\n" +
	"/inline-4095 4095 100777 1 0 0 0 1633950376.0 - " + strings.Repeat("a", 4095) + " -\n" +
	"/inline-4096 4096 100777 1 0 0 0 1633950376.0 - " + strings.Repeat("b", 4096) + " -\n" +
	"/inline-4097 4097 100777 1 0 0 0 1633950376.0 - " + strings.Repeat("c", 4097) + " -\n" +
	"/large 9000000000000000 100777 1 0 0 0 0.0 - - -\n" +
	"/link 5 120777 1 0 0 0 0.0 " + strings.Repeat("l", 4095) + " - -\n" +
	"/whiteout 0 20777 1 0 0 0 1633950376.0 - - - trusted.foo=bar-2"

// TestSpecial makes an image of special in both versions and turns it back in
// two ways.
func TestSpecial(t *testing.T) {
	p := newProgram(t)
	p.write("special.dump", special)
	for _, flags := range []string{"", "--min-version=0 --max-version=0", "--min-version 1 --max-version 1"} {
		p.from = special
		p.ok("mkcomposefs " + flags + " --from-file - out.cfs")
		p.fsck("out.cfs")
		p.ok("composefs-dump out.cfs again.cfs")
		if !bytes.Equal(p.read("again.cfs"), p.read("out.cfs")) {
			t.Errorf("%s: composefs-dump makes another image", flags)
		}
		p.from = p.ok("composefs-info dump out.cfs")
		p.ok("mkcomposefs " + flags + " --from-file - again.cfs")
		if !bytes.Equal(p.read("again.cfs"), p.read("out.cfs")) {
			t.Errorf("%s: from its dump it is another image", flags)
		}
	}
	got := p.ok("composefs-info --filter=chardev --filter inline --filter=whiteout dump out.cfs")
	want := []string{"/ 4096 40555 2 0 0 0 1633950376.0 - - - ", "/chardev 0 20777 ", "/inline 15 100777 ", "/whiteout 0 20777 "}
	lines := strings.Split(strings.TrimSuffix(got, "\n"), "\n")
	if len(lines) != len(want) {
		t.Fatalf("filtered: %q", lines)
	}
	for i := range want {
		if !strings.HasPrefix(lines[i], want[i]) {
			t.Errorf("filtered: %q, want %q…", lines[i], want[i])
		}
	}
}

// TestGetopt: options as getopt_long(3) takes them, in any order.
func TestGetopt(t *testing.T) {
	p := newProgram(t)
	p.sourceTree()
	want := p.ok("mkcomposefs --print-digest-only --use-epoch --skip-xattrs tree")
	for _, line := range []string{
		"mkcomposefs tree --print-digest-o --use-e --skip-x",
		"mkcomposefs --thr 2 --use-epoch tree --min 0 --max=1 --print-digest-only --skip-xattrs",
		"mkcomposefs --skip-xattrs --use-epoch --print-digest-only -- tree",
		"mkcomposefs --digest-st objects --print-digest --skip-x --use-e tree image",
	} {
		if got := p.ok(line); got != want {
			t.Errorf("%s: %s, want %s", line, got, want)
		}
	}
	if got, all := p.ok("composefs-info dump image --filt etc"), p.ok("composefs-info dump image"); strings.Count(got, "\n") != 5 || !strings.Contains(all, "/usr") {
		t.Errorf("composefs-info --filt: %q of %q", got, all)
	}
	if got := p.ok("composefs-info missing-objects --base objects image"); got != "" {
		t.Errorf("missing: %s", got)
	}
	for line, text := range map[string]string{
		"mkcomposefs --skip tree a":         "unknown flag: --skip",
		"mkcomposefs --print-digest-x tree": "unknown flag: --print-digest-x",
	} {
		if _, stderr, code := p.run(line); code != 1 || !strings.Contains(stderr, text) {
			t.Errorf("%s: exit code %d, %q; want 1, %s", line, code, stderr, text)
		}
	}
}

// TestHardlinks: kept with --hardlinks only, for files and symbolic links.
func TestHardlinks(t *testing.T) {
	p := newProgram(t)
	p.write("tree/a1", strings.Repeat("a", 4096))
	for _, err := range []error{
		os.Link(p.path("tree/a1"), p.path("tree/a2")),
		os.Symlink("nowhere", p.path("tree/l1")),
		unix.Linkat(unix.AT_FDCWD, p.path("tree/l1"), unix.AT_FDCWD, p.path("tree/l2"), 0),
		unix.Mknod(p.path("tree/w1"), unix.S_IFCHR, 0),
		os.Link(p.path("tree/w1"), p.path("tree/w2")),
		os.Link(p.path("tree/a1"), p.path("outside")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for flag, want := range map[string]string{
		"":            "/a1 100644 1,/a2 100644 1,/l1 120777 1,/l2 120777 1,/w1 20000 1,/w2 20000 1",
		"--hardlinks": "/a1 100644 2,/a2 @100644 2,/l1 120777 2,/l2 @120777 2,/w1 20000 1,/w2 20000 1",
	} {
		p.ok("mkcomposefs " + flag + " tree image")
		var got []string
		for line := range strings.Lines(p.ok("composefs-info dump image")) {
			if f := strings.Fields(line); f[0] != "/" {
				got = append(got, strings.Join([]string{f[0], f[2], f[3]}, " "))
			}
		}
		if strings.Join(got, ",") != want {
			t.Errorf("%q: %q, want %s", flag, got, want)
		}
		p.fsck("image")
	}
}

// TestToDescriptor writes an image to a file that the caller has open, as
// sandboxes do: its bytes have to arrive there and not under the file's name.
func TestToDescriptor(t *testing.T) {
	p := newProgram(t)
	p.from = special
	want := p.ok("mkcomposefs --from-file - -")
	for _, image := range []string{"/proc/self/fd/3", "/dev/fd/3", "/dev/stdout"} {
		f, err := os.CreateTemp(p.dir, "out-*")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := os.Remove(f.Name()); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(filepath.Join(p.bin, "mkcomposefs"), "--from-file", "-", image)
		cmd.Env = append(os.Environ(), programEnv+"=1")
		cmd.Stdin = strings.NewReader(special)
		cmd.Stdout = f
		cmd.ExtraFiles = []*os.File{f}
		var errs bytes.Buffer
		cmd.Stderr = &errs
		if err := cmd.Run(); err != nil {
			t.Fatalf("%s: %v: %s", image, err, &errs)
		}
		got := make([]byte, len(want)+1)
		if n, _ := f.ReadAt(got, 0); string(got[:n]) != want {
			t.Errorf("%s: %d bytes, want %d", image, n, len(want))
		}
	}
}

// TestRefusedByWriter: what only the writing of an image brings to light is
// blamed on its line too.
func TestRefusedByWriter(t *testing.T) {
	p := newProgram(t)
	p.from = "/ 4096 40755 2 0 0 0 0.0 - - -\n" +
		"/b 0 20000 1 0 0 0 0.0 - - -\n" +
		"/a 0 40755 1 0 0 0 0.0 - - - user.overlay.whiteouts=" + strings.Repeat("long", 50) + "\n" +
		"/a/w 0 20000 1 0 0 0 0.0 - - -\n"
	_, stderr, code := p.run("mkcomposefs --from-file - image")
	if code != 1 || !strings.Contains(stderr, "dump line 3: ") || !strings.Contains(stderr, "/a: ") {
		t.Errorf("exit code %d, %q; want 1 and line 3", code, stderr)
	}
}

// TestImageDigestWords are the words that scripts look for.
func TestImageDigestWords(t *testing.T) {
	p := newProgram(t)
	p.sourceTree()
	p.ok("mkcomposefs --digest-store=objects tree image")
	if err := os.Mkdir(p.path("mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, digest := range []string{strings.Repeat("a", 64), strings.TrimSpace(p.ok("composefs-info measure-file image"))} {
		_, stderr, code := p.run("mount.composefs -o basedir=objects,digest=" + digest + " image mnt")
		if code != 1 || !strings.Contains(stderr, "Image has no fs-verity") {
			t.Errorf("digest=%s: exit code %d, %q", digest, code, stderr)
		}
	}
}

// TestSHA512: the same layout with digests of 64 bytes.
func TestSHA512(t *testing.T) {
	p := newProgram(t)
	p.sourceTree()
	digest := p.ok("cfs-fuse erofs create --algorithm sha512 --print-digest --digest-store=objects tree image")
	if got := p.ok("cfs-fuse erofs digest --algorithm sha512 image"); got != digest || len(got) != 129 {
		t.Errorf("digest %q, want %q", digest, got)
	}
	p.fsck("image")
	objects := strings.Fields(p.ok("composefs-info objects image"))
	if len(objects) != 2 {
		t.Errorf("objects: %q", objects)
	}
	for _, o := range objects {
		got := strings.TrimSpace(p.ok("cfs-fuse erofs digest --algorithm sha512 objects/" + o))
		if len(o) != 129 || got != strings.Replace(o, "/", "", 1) {
			t.Errorf("object %s has the digest %s", o, got)
		}
	}
	r, err := erofs.OpenFile(p.path("image"))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	err = r.Walk(func(path string, i erofs.Inode) error {
		if !i.External() {
			return nil
		}
		metacopy, err := r.Xattr(i, "trusted.overlay.metacopy")
		if err != nil || len(metacopy) != 68 || string(metacopy[:4]) != "\x00\x44\x00\x02" {
			t.Errorf("%s: metacopy %x, %v", path, metacopy, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	p.from = p.ok("composefs-info dump image")
	p.ok("mkcomposefs --from-file - again")
	if !bytes.Equal(p.read("again"), p.read("image")) {
		t.Error("from its dump it is another image")
	}
	if err := os.Mkdir(p.path("mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	p.ok("mount.composefs -o basedir=objects image mnt")
	defer p.umount("mnt")
	if got, want := p.describeTree("mnt"), p.describeTree("tree"); !strings.Contains(got, strings.SplitAfter(want, "\n")[1]) {
		t.Errorf("mounted:\n%s\nwant\n%s", got, want)
	}
}
