package vm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// bootTime is how long one machine may run; on an idle one it takes a third.
const bootTime = 4 * time.Minute

// programs are what the tests in the machine run beside the binary.
var programs = []string{"fsverity", "debugfs", "umoci", "mkfs.erofs", "sleep"}

// A bench has what machines are booted from.
type bench struct {
	dir    string
	kernel *Kernel
	initrd string
}

// newBench builds the binary and the tests that run in the machine.
func newBench(t *testing.T, ctx context.Context, tests map[string]string) *bench {
	t.Helper()
	cache, err := images.DefaultCache()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{dir: t.TempDir()}
	if b.kernel, err = EnsureKernel(ctx, cache, os.Stderr); err != nil {
		t.Fatal(err)
	}
	files, err := Programs(ctx, programs...)
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(b.dir, "cfs-fuse")
	if err := BuildStatic(ctx, binary, "build", "github.com/cfs-fuse/cfs-fuse/cmd/cfs-fuse"); err != nil {
		t.Fatal(err)
	}
	files = append(files, File{"/bin/cfs-fuse", binary})
	for name, pkg := range tests {
		path := filepath.Join(b.dir, name)
		if err := BuildStatic(ctx, path, "test", "github.com/cfs-fuse/cfs-fuse/"+pkg); err != nil {
			t.Fatal(err)
		}
		files = append(files, File{"/" + name, path})
	}
	b.initrd = filepath.Join(b.dir, "initrd")
	if err := b.kernel.WriteInitrd(ctx, b.initrd, files); err != nil {
		t.Fatal(err)
	}
	return b
}

// disk makes a new disk.
func (b *bench) disk(t *testing.T, ctx context.Context, name string) string {
	t.Helper()
	path := filepath.Join(b.dir, name)
	if err := MakeDisk(ctx, path, 1<<30); err != nil {
		t.Fatal(err)
	}
	return path
}

func (b *bench) boot(t *testing.T, ctx context.Context, disk string, args ...string) *Machine {
	t.Helper()
	m, err := Start(ctx, Config{Kernel: b.kernel, Initrd: b.initrd, Disk: disk, Args: args, Console: filepath.Join(b.dir, "console")})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// topRun is how 'go test -v' begins a test that is nobody's subtest, result
// how it ends any.
var (
	topRun = regexp.MustCompile(`^=== RUN   (\w+)$`)
	result = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): \S+ \(`)
)

// tests boots a machine that runs a test binary, and makes each of its tests
// one of t: one that was skipped, or none at all, fails.
func (b *bench) tests(t *testing.T, ctx context.Context, name string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	b.run(t, ctx, b.disk(t, ctx, name+".disk"), name, args...)
}

// run is tests with a given disk.
func (b *bench) run(t *testing.T, ctx context.Context, disk, name string, args ...string) {
	t.Helper()
	start := time.Now()
	m := b.boot(t, ctx, disk, append([]string{"/" + name, "-test.v"}, args...)...)
	code, err := m.Wait()
	if err != nil {
		t.Error(err)
	}
	// Each test of the machine, from its "=== RUN" to the next one's, with the
	// results of its subtests.
	var groups [][]string
	ran := 0
	for _, line := range m.Lines() {
		if topRun.MatchString(line) || len(groups) == 0 {
			groups = append(groups, nil)
		}
		groups[len(groups)-1] = append(groups[len(groups)-1], line)
		if result.MatchString(line) {
			ran++
		}
	}
	for _, g := range groups {
		f := topRun.FindStringSubmatch(g[0])
		if f == nil {
			continue
		}
		t.Run(f[1], func(t *testing.T) {
			text := strings.Join(g, "\n")
			bad := !strings.Contains(text, "--- PASS: "+f[1]+" (") || strings.Contains(text, "--- SKIP") || strings.Contains(text, "--- FAIL")
			if bad {
				t.Fail()
			}
			if bad || testing.Verbose() {
				t.Log("in the machine:\n" + text)
			}
		})
	}
	t.Logf("%d tests in the machine, %v", ran, time.Since(start).Round(time.Second))
	all := strings.Join(m.Lines(), "\n")
	if code != 0 || err != nil || ran == 0 || strings.Contains(all, "--- SKIP") || strings.Contains(all, "--- FAIL") {
		t.Errorf("%s ended with code %d after %d tests, want each to pass and none to be skipped", name, code, ran)
		t.Log(m.failure(errors.New("tests failed")))
	}
}

// guestTests are the test binaries that the machine has.
var guestTests = map[string]string{
	"guest.test": "e2e/vm/guest", "verity.test": "verity", "cache.test": "cache", "mount.test": "mount", "kmount.test": "internal/kmount",
	"truth.test": "e2e/truth",
}

func TestMachine(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	b := newBench(t, ctx, guestTests)
	t.Run("Guest", func(t *testing.T) { b.tests(t, ctx, "guest.test", "-test.skip=^TestPower") })
	t.Run("Truth", func(t *testing.T) { b.tests(t, ctx, "truth.test", "-guest") })
	t.Run("PowerCut", func(t *testing.T) { b.powerCut(t, ctx) })
	t.Run("Crash", func(t *testing.T) { b.crash(t, ctx) })
}

// powerCut seals an image, takes the power away without a sync, and boots
// again with what the disk has.
func (b *bench) powerCut(t *testing.T, ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	disk := b.disk(t, ctx, "power.disk")
	m := b.boot(t, ctx, disk, "/guest.test", "-test.v", "-test.run=^TestPowerBefore$")
	err := m.Await(ctx, "now cut the power")
	m.Kill()
	if err != nil {
		t.Fatalf("%v\n%s", err, strings.Join(m.Lines(), "\n"))
	}
	if _, err := m.Wait(); err == nil {
		t.Error("a machine whose power was cut has an exit code")
	}
	b.run(t, ctx, disk, "guest.test", "-test.run=^TestPowerAfter$")
}

// crash sees that a machine without a result, and one whose program fails, are
// failures.
func (b *bench) crash(t *testing.T, ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, bootTime)
	defer cancel()
	m := b.boot(t, ctx, "", "/no/such/program")
	if code, err := m.Wait(); err != nil || code == 0 {
		t.Errorf("a program that is not there: code %d, %v; want a code of failure", code, err)
	}
	if _, err := Start(ctx, Config{Kernel: b.kernel, Args: []string{"two words"}}); err == nil {
		t.Error("an argument with a blank was taken")
	}
}
