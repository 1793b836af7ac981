package truth

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

var (
	guest = flag.Bool("guest", false, "run in the machine of e2e/vm: its cases only, on its disk, with fs-verity enforced")
	write = flag.Bool("write", false, "write docs/truth.md")
)

// doc is the table of what was found.
const doc = "../../docs/truth.md"

// A bench is what all cases use.
type bench struct {
	binary   string
	backends []string // that serve before the swap
	flag     bool     // this cfs-fuse has --backend
	roots    string   // where stores are
	mount    []string // flags of every mount
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{binary: os.Getenv("CFS_FUSE_BIN"), roots: t.TempDir(), backends: []string{"fuse"}}
	if *guest {
		b.binary, b.roots = "cfs-fuse", "/disk"
		b.mount = []string{"--verity", "require"}
	}
	if b.binary == "" {
		b.binary = filepath.Join(t.TempDir(), "cfs-fuse")
		if _, err := command("go", "build", "-o", b.binary, "../../cmd/cfs-fuse"); err != nil {
			t.Fatal(err)
		}
	}
	help, err := command(b.binary, "mount", "--help")
	if err != nil {
		t.Fatal(err)
	}
	if b.flag = strings.Contains(help, "--backend "); b.flag {
		b.backends = append(b.backends, "hybrid")
	}
	return b
}

// A result is what was found about a case, by column: "" stands for equal.
type result map[string]string

func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", "4")
	os.Exit(m.Run())
}

func TestTruth(t *testing.T) {
	b := newBench(t)
	var mu sync.Mutex // guards results
	results := map[string]result{}
	t.Run("cases", func(t *testing.T) {
		for _, c := range cases {
			if *guest && !c.guest {
				continue
			}
			if c.large && testing.Short() {
				t.Logf("%s: minutes long, left to 'make truth'", c.name)
				continue
			}
			t.Run(strings.ReplaceAll(c.name, "/", "-"), func(t *testing.T) {
				if !c.large {
					t.Parallel() // they wait more than they work
				}
				r := result{}
				c.run(t, b, r)
				mu.Lock()
				defer mu.Unlock()
				results[c.name] = r
			})
		}
	})
	if len(results) == 0 {
		t.Fatal("no case ran")
	}
	if *guest {
		return
	}
	for _, c := range cases {
		if c.large && testing.Short() {
			results[c.name] = c.noted() // what 'make truth' holds them to
		}
	}
	if t.Failed() || len(results) != len(cases) {
		t.Log("the table is not looked at: there are failures, or not all cases ran")
		return
	}
	text := table(b, results)
	if *write {
		if err := os.WriteFile(doc, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := os.ReadFile(doc); err != nil || string(have) != text {
		t.Errorf("docs/truth.md is not what was found (%v): run 'make truth'", err)
	}
}

// The columns of the table, beside those of the backends.
const (
	stacked   = "overlayfs"
	kernel    = "kernel"
	listing   = "listing"
	inodes    = "inode numbers"
	notTested = "–"
)

// noted is what is known of a case before it runs.
func (c *testCase) noted() result {
	if c.noStack != "" || c.fix != nil {
		return result{stacked: notTested}
	}
	return result{}
}

// run compares one case everywhere.
func (c *testCase) run(t *testing.T, b *bench, r result) {
	work := tmpfs(t)
	if c.large {
		work = t.TempDir()
	}
	if err := c.writeImages(work); err != nil {
		t.Fatal(err)
	}
	reference := filepath.Join(work, "reference")
	if err := unpack(filepath.Join(work, "plain"), reference); err != nil {
		t.Fatal(err)
	}
	if c.fix != nil {
		if err := c.fix(reference); err != nil {
			t.Fatal(err)
		}
	}
	maps.Copy(r, c.noted())
	if r[stacked] != notTested {
		point, err := c.stack(t, work)
		if err != nil {
			t.Fatalf("overlayfs: %v", err)
		}
		// Folders that overlayfs merges have one link.
		c.compare(t, r, stacked, reference, point, treediff.NlinkOfDirs)
	}
	for _, backend := range b.backends {
		c.lifecycle(t, b, r, backend, "oci:"+filepath.Join(work, "lazy")+":t", reference)
	}
}

// lifecycle mounts the image so that nothing but reads fetch, compares it while
// a backend serves it, and again when it was swapped, and compares the listing
// of the sealed image.
func (c *testCase) lifecycle(t *testing.T, b *bench, r result, backend, source, reference string) {
	dir, err := os.MkdirTemp(b.roots, "t")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	root, point := filepath.Join(dir, "root"), filepath.Join(dir, "m")
	if err := os.Mkdir(point, 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.Command(b.binary, append([]string{"--runtime-dir", filepath.Join(dir, "run")}, args...)...)
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("cfs-fuse %s: %v: %s", strings.Join(args, " "), err, errs.String())
		}
		return string(out)
	}
	args := append([]string{"mount", "--root", root, "--fill=false"}, b.mount...)
	if b.flag {
		args = append(args, "--backend", backend)
	}
	run(append(args, source, point)...)
	defer run("umount", point)

	before, err := inodesOf(point)
	if err != nil {
		t.Errorf("%s: %v", backend, err)
	}
	c.compare(t, r, backend, reference, point, 0)
	run("wait", "--for", "swapped", "--timeout", c.patience(), point)
	var s struct{ Backend, Verity string }
	if err := json.Unmarshal([]byte(run("status", "--json", point)), &s); err != nil {
		t.Fatal(err)
	}
	if s.Backend != "kernel" || *guest && s.Verity != "enforced" {
		t.Errorf("after the swap: backend %s, verity %s", s.Backend, s.Verity)
	}
	c.compare(t, r, kernel, reference, point, 0)
	after, err := inodesOf(point)
	if err != nil {
		t.Errorf("kernel: %v", err)
	}
	for path, ino := range before {
		if after[path] != ino {
			t.Errorf("%q: inode %d with %s, %d after the swap", path, ino, backend, after[path])
			r[inodes] = "differ"
		}
	}
	if len(before) != len(after) {
		t.Errorf("%d names with %s, %d after the swap", len(before), backend, len(after))
	}
	sealed, err := filepath.Glob(filepath.Join(root, "images", "*", "sealed.erofs"))
	if err != nil || len(sealed) != 1 {
		t.Fatalf("sealed images: %q, %v", sealed, err)
	}
	c.compareListing(t, r, comparable(run("erofs", "dump", sealed[0])), reference)
	c.rebuild(t, run, sealed[0], dir)
	chain := run("verify", point)
	if *guest && !strings.Contains(chain, ", 0 unproven, 0 wrong\n") || !strings.Contains(chain, " 0 wrong\n") {
		t.Errorf("not all of the chain is proven:\n%s", chain)
	}
}

// compare fails the test for what differs, and notes it.
func (c *testCase) compare(t *testing.T, r result, column, reference, point string, without treediff.Attr) {
	t.Helper()
	diffs, err := treediff.Compare(reference, point, treediff.Options{Without: without})
	if err != nil {
		t.Errorf("%s: %v", column, err)
	}
	n := 0
	for _, d := range diffs {
		if c.loose[d.Path]&d.Attr != 0 {
			continue
		}
		if n++; n <= 10 {
			t.Errorf("%s: want | got: %v", column, d)
		}
	}
	if n > 0 || err != nil {
		r[column] = fmt.Sprintf("%d differences", n)
	}
}

func (c *testCase) compareListing(t *testing.T, r result, got []string, reference string) {
	t.Helper()
	want, err := dumpOf(reference)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Errorf("listing: %d lines, want %d", len(got), len(want))
		r[listing] = "differs"
	}
	bad := 0
	for i := range min(len(got), len(want)) {
		if got[i] == want[i] || c.looseLine(got[i], want[i]) {
			continue
		}
		r[listing] = "differs"
		if bad++; bad <= 5 {
			t.Errorf("listing:\n got %.600q\nwant %.600q", got[i], want[i])
		}
	}
}

// looseLine reports whether two lines of a dump differ only in what the case
// does not compare: times.
func (c *testCase) looseLine(a, b string) bool {
	f, g := strings.Split(a, " "), strings.Split(b, " ")
	path := clean(f[0])
	if path == "" {
		path = "."
	}
	if c.loose[path]&treediff.Mtime == 0 || len(f) < 11 || len(g) < 11 {
		return false
	}
	f[7], g[7] = "", ""
	return slices.Equal(f, g)
}

// rebuild makes the sealed image again from its own dump, which gives the same
// bytes: what mkcomposefs would make of the tree.
func (c *testCase) rebuild(t *testing.T, run func(...string) string, sealed, dir string) {
	t.Helper()
	dump, again := filepath.Join(dir, "dump"), filepath.Join(dir, "again")
	text := run("erofs", "dump", "--content-paths", sealed)
	if strings.Contains(c.name, "64 KiB") || strings.Contains(c.name, "400 xattrs") && len(text) > 1<<16 {
		return // more than a line of the format may have: composefs's own tools cannot say it
	}
	if err := os.WriteFile(dump, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	run("erofs", "create", "--from-file", "--min-version=1", dump, again)
	if a, b := run("erofs", "digest", sealed), run("erofs", "digest", again); a != b {
		t.Errorf("the sealed image is %s, made again from its dump %s", a, b)
	}
}

// inodesOf returns the inode number of each name.
func inodesOf(root string) (map[string]uint64, error) {
	all := map[string]uint64{}
	var errs []error
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		if err != nil {
			errs = append(errs, err)
			return nil
		}
		all[path[len(root):]] = st.Ino
		return nil
	})
	return all, errors.Join(append(errs, err)...)
}

// patience is how long the swap may take, as the command takes it.
func (c *testCase) patience() string {
	if c.large {
		return "3m"
	}
	return "30s"
}
