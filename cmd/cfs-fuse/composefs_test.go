package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// programEnv makes the test binary behave as the program, under the name that
// it is called by.
const programEnv = "CFS_FUSE_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(programEnv) != "" {
		main()
	}
	os.Exit(m.Run())
}

// A program runs command lines of the tools in a folder.
type program struct {
	t    *testing.T
	bin  string // the folder with the links
	dir  string
	env  []string
	from string // standard input
}

func newProgram(t *testing.T) *program {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := &program{t: t, bin: t.TempDir(), dir: t.TempDir()}
	for _, name := range []string{"cfs-fuse", "mkcomposefs", "composefs-info", "composefs-dump", "composefs-fuse", "mount.composefs"} {
		if err := os.Symlink(exe, filepath.Join(p.bin, name)); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

// run runs one command line, split at spaces.
func (p *program) run(line string) (stdout, stderr string, code int) {
	p.t.Helper()
	args := strings.Fields(line)
	cmd := exec.Command(filepath.Join(p.bin, args[0]), args[1:]...)
	cmd.Dir = p.dir
	// Under the race detector a process waits a second before it ends, in case
	// a goroutine still races; that is too long for so many processes.
	cmd.Env = append(append(os.Environ(), programEnv+"=1", "GORACE=atexit_sleep_ms=0"), p.env...)
	cmd.Stdin = strings.NewReader(p.from)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		p.t.Fatalf("%s: %v", line, err)
	} else if ok {
		code = exit.ExitCode()
	}
	return out.String(), errs.String(), code
}

// ok runs a command line that must succeed without a word on standard error.
func (p *program) ok(line string) string {
	p.t.Helper()
	stdout, stderr, code := p.run(line)
	if code != 0 || stderr != "" {
		p.t.Fatalf("%s: exit code %d, %s", line, code, stderr)
	}
	return stdout
}

func (p *program) path(name string) string { return filepath.Join(p.dir, name) }

func (p *program) read(name string) []byte {
	p.t.Helper()
	b, err := os.ReadFile(p.path(name))
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

func (p *program) write(name, data string) {
	p.t.Helper()
	path := p.path(name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

const goldenDir = "../../erofs/testdata/composefs"

// TestGoldenDumps sends each golden dump through mkcomposefs as a filter, and
// holds the image to the C tool's, and to erofs-utils' fsck.
func TestGoldenDumps(t *testing.T) {
	index, err := os.Open(filepath.Join(goldenDir, "INDEX"))
	if err != nil {
		t.Fatal(err)
	}
	defer index.Close()
	p := newProgram(t)
	cases := 0
	for in := bufio.NewScanner(index); in.Scan(); cases++ {
		var name, result, digest string
		var min, max, size int
		fmt.Sscanf(in.Text(), "%s min=%d max=%d %s", &name, &min, &max, &result)
		p.from = gunzip(t, filepath.Join(goldenDir, name))
		image, stderr, code := p.run(fmt.Sprintf("mkcomposefs --min-version=%d --max-version=%d --from-file - -", min, max))
		if result == "reject" {
			if code != 1 || image != "" || !strings.Contains(stderr, "line ") && !strings.Contains(stderr, "make image: /") {
				t.Errorf("%s: exit code %d, %d bytes, %q; want 1 and what is wrong with which line", name, code, len(image), stderr)
			}
			continue
		}
		if _, err := fmt.Sscanf(result, "size=%d", &size); err != nil {
			t.Fatalf("INDEX: %q: %v", in.Text(), err)
		}
		_, digest, _ = strings.Cut(in.Text(), "fsverity=")
		sum, err := verity.Digest(strings.NewReader(image), verity.SHA256)
		if err != nil || code != 0 || len(image) != size || hex.EncodeToString(sum) != digest {
			t.Errorf("%s: exit code %d, %d bytes, digest %x; want %d, %s\n%s", name, code, len(image), sum, size, digest, stderr)
			continue
		}
		if cases%8 == 0 { // each is read by Reader.Check elsewhere
			p.write("image", image)
			if out := p.ok("cfs-fuse erofs fsck image"); !strings.Contains(out, "no violations") {
				t.Errorf("%s: fsck: %s", name, out)
			}
			p.ok("composefs-dump image again")
			// What a hostile dump says in the markers' names is lost when an
			// image is read (section 2.14), so the two need not be equal.
			p.ok("cfs-fuse erofs fsck again")
		}
	}
	if cases < 60 {
		t.Errorf("only %d cases in INDEX", cases)
	}
}

func gunzip(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// sourceTree makes the folder "tree" with every kind of file.
func (p *program) sourceTree() {
	p.t.Helper()
	p.write("tree/usr/lib/large", strings.Repeat("large ", 100_000))
	p.write("tree/usr/lib/more", strings.Repeat("more ", 20))
	p.write("tree/etc/small", "small")
	p.write("tree/etc/empty", "")
	var err error
	for _, e := range []error{
		os.Symlink("../usr/lib/more", p.path("tree/etc/link")),
		unix.Mkfifo(p.path("tree/pipe"), 0o640),
		unix.Mknod(p.path("tree/null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mknod(p.path("tree/far"), unix.S_IFBLK|0o660, int(unix.Mkdev(300, 70000))),
		unix.Setxattr(p.path("tree/usr"), "user.colour", []byte("blue"), 0),
		unix.Setxattr(p.path("tree/etc/small"), "security.capability", []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"), 0),
		os.Chown(p.path("tree/etc/small"), 1234, 70000),
		os.Chmod(p.path("tree/usr/lib/more"), os.ModeSetgid|0o755),
	} {
		err = errors.Join(err, e)
	}
	if err != nil {
		p.t.Fatal(err)
	}
}

func (p *program) umount(dir string) {
	p.t.Helper()
	if err := unix.Unmount(p.path(dir), 0); err != nil {
		p.t.Error(err)
		unix.Unmount(p.path(dir), unix.MNT_DETACH)
	}
}

// TestTreeToMount makes an image and a store of a folder, and has the kernel
// mount them: the same tree must appear.
func TestTreeToMount(t *testing.T) {
	p := newProgram(t)
	p.sourceTree()
	p.write("image", "what is replaced")
	digest := p.ok("mkcomposefs --threads=3 --print-digest --digest-store=store tree image")
	for _, line := range []string{"composefs-info measure-file image", "cfs-fuse erofs digest image",
		"mkcomposefs --print-digest-only tree", "cfs-fuse erofs create --print-digest-only tree"} {
		if got := p.ok(line); got != digest {
			t.Errorf("%s: %s, want %s", line, got, digest)
		}
	}
	if got := p.ok("cfs-fuse erofs digest --algorithm sha512 image"); len(got) != 129 {
		t.Errorf("SHA-512: %s", got)
	}
	if out, err := exec.Command("fsck.erofs", p.path("image")).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v\n%s", err, out)
	}
	objects := p.ok("composefs-info objects image")
	if strings.Count(objects, "\n") != 2 || objects != p.ok("cfs-fuse erofs objects image") {
		t.Errorf("objects:\n%s", objects)
	}
	if got := p.ok("composefs-info --basedir=store missing-objects image image"); got != "" {
		t.Errorf("missing: %s", got)
	}
	if got := p.ok("cfs-fuse erofs objects --missing --basedir tree image"); got != objects {
		t.Errorf("missing from another folder: %s", got)
	}
	if got, again := p.ok("composefs-info --filter=etc ls image"), p.ok("cfs-fuse erofs ls --filter etc image"); got != again ||
		got != "/etc/\t\n/etc/empty\n/etc/link\t-> ../usr/lib/more\n/etc/small\n" {
		t.Errorf("ls: %q", got)
	}
	p.from = p.ok("composefs-info dump image")
	if image := p.ok("mkcomposefs --from-file - -"); image != string(p.read("image")) {
		t.Error("the dump of the image makes another image")
	}

	p.ok("composefs-dump image again")
	if !bytes.Equal(p.read("again"), p.read("image")) {
		t.Error("read and written again it is another image")
	}
	for _, dir := range []string{"mnt", "nothing"} {
		if err := os.Mkdir(p.path(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.ok("mount.composefs image mnt -o basedir=nothing:store,ro")
	t.Cleanup(func() { p.umount("mnt") })
	diff, err := treediff.Compare(p.path("tree"), p.path("mnt"), treediff.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range diff {
		t.Error(d)
	}
}

// TestCommandLines runs command lines that fail. Each is: exit code | command
// line | text on standard error.
func TestCommandLines(t *testing.T) {
	p := newProgram(t)
	p.sourceTree()
	p.ok("mkcomposefs tree image")
	p.write("dump", "/ 0 40755 2 0 0 0 1.0 - - -\n/f 1 100644 1 0 0 0 1.0 - - -\n/f 1 100644 1 0 0 0 1.0 - - -\n")
	p.write("loose", "/ 0 40755 2 0 0 0 1.0 - - -\n/f 0 100644 1 0 0 7 1.0 - - -")
	p.write("noise", strings.Repeat("noise", 10000))
	p.write("keep", "keep me")
	for line := range strings.Lines(`
		1 | mkcomposefs                                       | SOURCE is missing
		1 | mkcomposefs tree                                  | IMAGE is missing
		1 | mkcomposefs tree a b                              | unexpected argument "b"
		1 | mkcomposefs --print-digest-only tree a            | writes no image
		1 | mkcomposefs --colour tree a                       | unknown flag: --colour (hint: see 'mkcomposefs --help')
		1 | mkcomposefs --min-version=2 tree a                | format version 2: want 0 to 1
		1 | mkcomposefs --max-version=-1 tree a               | format version -1
		1 | mkcomposefs --threads=0 tree a                    | --threads 0
		1 | mkcomposefs absent a                              | No such file or directory
		1 | mkcomposefs dump a                                | add --from-file if it is a dump
		1 | mkcomposefs tree absent/a                         | absent
		1 | mkcomposefs --digest-store=dump tree a            | store of objects
		1 | mkcomposefs --from-file dump keep                 | dump line 3
		1 | mkcomposefs --from-file absent a                  | No such file
		1 | composefs-info                                    | COMMAND is missing
		1 | composefs-info ls                                 | FILE is missing
		1 | composefs-info sing image                         | unknown command "sing"
		1 | composefs-info ls absent                          | No such file
		1 | composefs-info ls noise                           | noise: 
		1 | composefs-info --filter=a/b ls image              | --filter a/b
		1 | composefs-info missing-objects image              | add --basedir=DIR
		1 | composefs-info --basedir=absent missing-objects image | folder of objects
		1 | composefs-info measure-file absent                | No such file
		1 | composefs-dump image                              | IMAGE is missing
		1 | composefs-dump noise a                            | noise: 
		1 | mount.composefs image mnt                         | no folder of objects (hint: add -o basedir=DIR)
		1 | mount.composefs -o basedir=tree image             | MOUNTPOINT is missing
		1 | mount.composefs -t ext4 -o basedir=. image mnt    | want composefs
		1 | mount.composefs -o basedir=.,sunny image mnt      | unknown option "sunny"
		1 | mount.composefs -o basedir=. absent mnt           | No such file
		1 | mount.composefs -o basedir=. image absent         | No such file
		1 | mount.composefs -o basedir=. noise tree           | noise: 
		0 | mount.composefs -f -o basedir=. image mnt         |
		2 | cfs-fuse erofs create tree                        | IMAGE is missing (hint: see 'cfs-fuse erofs create --help')
		2 | cfs-fuse erofs sing                               | unknown command "sing"
		2 | cfs-fuse erofs ls                                 | IMAGE is missing
		2 | cfs-fuse erofs digest --algorithm md5 image       | want sha256, sha512
		1 | cfs-fuse erofs fsck absent                        | no such file
		0 | mkcomposefs --from-file loose a                   |
		0 | cfs-fuse erofs                                    |
		0 | mkcomposefs --help                                |
		0 | composefs-info --help                             |
		0 | mount.composefs -h                                |`) {
		f := strings.SplitN(line, "|", 3)
		if len(f) < 3 {
			continue // the blank line at the start
		}
		want, command, text := strings.TrimSpace(f[0]), strings.TrimSpace(f[1]), strings.TrimSpace(f[2])
		_, stderr, code := p.run(command)
		if fmt.Sprint(code) != want || !strings.Contains(stderr, text) || code != 0 && strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit code %d, %q; want %s, %q", command, code, stderr, want, text)
		}
		if code != 0 && !strings.HasPrefix(stderr, strings.Fields(command)[0]+": ") {
			t.Errorf("%s: %q does not say who says it", command, stderr)
		}
	}
	if got := p.read("keep"); string(got) != "keep me" {
		t.Errorf("a failed run left %q in its image's place", got)
	}
	for _, name := range []string{".", "absent"} {
		entries, err := os.ReadDir(p.path(name))
		if err != nil && name == "." {
			t.Fatal(err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".tmp") {
				t.Errorf("left behind: %s", e.Name())
			}
		}
	}

	p.env = []string{"CFS_PARSE_STRICT=1"}
	if _, stderr, code := p.run("mkcomposefs --from-file loose a"); code != 1 || !strings.Contains(stderr, "line 2") {
		t.Errorf("strict: exit code %d, %q", code, stderr)
	}
}

// TestVersions: no flag is (0,1), one flag makes the other 0 (section 2.3).
func TestVersions(t *testing.T) {
	p := newProgram(t)
	p.write("plain", "/ 0 40755 2 0 0 0 1.0 - - -\n")
	p.write("hides", "/ 0 40755 2 0 0 0 1.0 - - -\n/w 0 20000 1 0 0 0 1.0 - - -\n")
	for _, c := range []struct {
		flags        string
		plain, hides uint32
	}{
		{"", 0, 1},
		{"--min-version=0", 0, 0},
		{"--max-version=0", 0, 0},
		{"--max-version=1", 0, 1},
		{"--min-version=1", 1, 1},
		{"--min-version=1 --max-version=0", 1, 1},
		{"--min-version=0 --max-version=1", 0, 1},
	} {
		for name, want := range map[string]uint32{"plain": c.plain, "hides": c.hides} {
			p.ok("mkcomposefs --from-file " + c.flags + " " + name + " image")
			r, err := erofs.OpenFile(p.path("image"))
			if err != nil {
				t.Fatal(err)
			}
			if got := r.Header().Version; got != want {
				t.Errorf("%s %s: version %d, want %d", c.flags, name, got, want)
			}
			r.Close()
		}
	}
}

// TestFsck damages an image in two places; both must be named.
func TestFsck(t *testing.T) {
	p := newProgram(t)
	p.sourceTree()
	p.ok("mkcomposefs tree image")
	good := p.read("image")
	r, err := erofs.OpenBytes(good)
	if err != nil {
		t.Fatal(err)
	}
	bad := bytes.Clone(good)
	err = r.Walk(func(path string, i erofs.Inode) error {
		if path == "/etc" || path == "/usr" {
			at := i.NID*32 + 44 // the link count of an extended inode
			if bad[i.NID*32]&1 == 0 {
				at = i.NID*32 + 6 // of a compact one
			}
			bad[at] ^= 0x55
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	p.write("bad", string(bad))
	p.write("noise", strings.Repeat("noise", 10000))
	stdout, stderr, code := p.run("cfs-fuse erofs fsck bad image noise")
	if code != 1 || !strings.Contains(stderr, "2 of 3 images are damaged") {
		t.Errorf("exit code %d, %q", code, stderr)
	}
	for _, want := range []string{`bad: `, `"/etc"`, `"/usr"`, "at byte", "image: no violations", "noise: "} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %s in\n%s", want, stdout)
		}
	}
	if n := strings.Count(stdout, "bad: "); n != 2 {
		t.Errorf("%d lines about two faults:\n%s", n, stdout)
	}
	if !bytes.Equal(p.read("bad"), bad) {
		t.Error("the image was changed")
	}
}
