// Command demo tells the whole story of cfs-fuse on one machine, with no
// network and no other service: it makes an eStargz image of the Go toolchain
// that it was built with, serves it from a registry inside this process over
// an emulated link, mounts it, runs a program from the mount at once, watches
// the rest arrive, and compares what the kernel serves in the end with the
// original.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

func main() {
	bin := flag.String("bin", "bin/cfs-fuse", "the cfs-fuse `command` to show")
	tree := flag.String("tree", "", "the `folder` to make the image of (default: the Go toolchain)")
	mbit := flag.Float64("mbit", 200, "speed of the link in Mbit/s")
	latency := flag.Duration("latency", 20*time.Millisecond, "round trip of the link")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	defer stop()
	if err := demo(ctx, *bin, *tree, *mbit, *latency); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

// A story is one run of the demo.
type story struct {
	ctx   context.Context
	bin   string // absolute
	tmp   string
	mnt   string
	tree  string
	link  *link
	start time.Time // of the mount command
}

func demo(ctx context.Context, bin, tree string, mbit float64, latency time.Duration) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("the kernel's part needs root: run it as root, e.g. 'sudo make demo'")
	}
	if tree == "" {
		out, err := output(exec.CommandContext(ctx, "go", "env", "GOROOT"))
		if err != nil {
			return err
		}
		tree = strings.TrimSpace(string(out))
	}
	if tree, err = filepath.EvalSymlinks(tree); err != nil {
		return fmt.Errorf("the tree to show: %w", err)
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "cfs-fuse-demo-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	s := &story{ctx: ctx, bin: bin, tmp: tmp, mnt: filepath.Join(tmp, "mnt"), tree: tree}
	if err := os.Mkdir(s.mnt, 0o755); err != nil {
		return err
	}
	if s.link, err = serveImage(ctx, tree, tmp, mbit, latency); err != nil {
		return err
	}
	defer s.link.Close()
	defer func() {
		// Whatever happened, nothing stays mounted. The context may be over.
		if _, e := mount.Query(context.Background(), s.runtimeDir(), s.mnt); e == nil {
			err = errors.Join(err, mount.Unmount(context.Background(), s.runtimeDir(), s.mnt))
		}
	}()
	return s.tell()
}

func (s *story) runtimeDir() string { return filepath.Join(s.tmp, "run") }

// cfs runs the command with the demo's own folders.
func (s *story) cfs(args ...string) ([]byte, error) {
	args = append([]string{"--runtime-dir", s.runtimeDir()}, args...)
	return output(exec.CommandContext(s.ctx, s.bin, args...))
}

func output(cmd *exec.Cmd) ([]byte, error) {
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(errs.String()))
	}
	return out, err
}

func (s *story) status() (st mount.Status, err error) {
	out, err := s.cfs("status", "--json", s.mnt)
	if err == nil {
		err = json.Unmarshal(out, &st)
	}
	return st, err
}

// tell mounts, runs, waits, swaps, compares and unmounts, and prints each step
// with its time and what had come over the link by then.
func (s *story) tell() error {
	step("Mounting %s", s.link.reference)
	s.start = time.Now()
	if _, err := s.cfs("mount", "--plain-http", "--root", filepath.Join(s.tmp, "root"), s.link.reference, s.mnt); err != nil {
		return err
	}
	s.mark("mounted; the whole tree is there")

	goBin := filepath.Join(s.mnt, "bin/go")
	version, err := s.goVersion(goBin)
	if err != nil {
		return err
	}
	s.mark("bin/go version from the mount said: " + version)
	if err := s.showMount("before the swap"); err != nil {
		return err
	}

	step("The rest arrives behind it")
	if err := s.watch(); err != nil {
		return err
	}
	s.mark("every byte is local and checked")
	if _, err := s.cfs("wait", "--for", "sealed", s.mnt); err != nil {
		return err
	}
	s.mark("sealed")
	if _, err := s.cfs("wait", "--for", "swapped", s.mnt); err != nil {
		return err
	}
	s.mark("swapped")
	if err := s.showMount("after the swap"); err != nil {
		return err
	}
	st, err := s.status()
	if err != nil {
		return err
	}
	fmt.Printf("    verity: %s\n    composefs digest: %s\n", st.Verity, st.ComposefsDigest)

	step("Comparing the kernel's mount with the original")
	diffs, err := treediff.Compare(s.tree, s.mnt, s.link.compare)
	if err != nil {
		return err
	}
	for _, d := range diffs[:min(len(diffs), 20)] {
		fmt.Println("    DIFFERENT", d)
	}
	if len(diffs) > 0 {
		return fmt.Errorf("%d differences between %s and the mount", len(diffs), s.tree)
	}
	fmt.Printf("    no difference in %s (%d files)\n", s.tree, s.link.files)
	again, err := s.goVersion(goBin)
	if err != nil {
		return err
	}
	if again != version {
		return fmt.Errorf("bin/go version said %q before the swap and %q after it", version, again)
	}
	fmt.Println("    bin/go version says the same")

	step("Unmounting")
	if _, err := s.cfs("umount", s.mnt); err != nil {
		return err
	}
	fmt.Println("    nothing of it is left")
	return nil
}

func (s *story) goVersion(bin string) (string, error) {
	cmd := exec.CommandContext(s.ctx, bin, "version")
	cmd.Env = append(os.Environ(), "GOTOOLCHAIN=local", "GOROOT="+s.mnt)
	out, err := output(cmd)
	return strings.TrimSpace(string(out)), err
}

// watch shows a bar until every byte is local.
func (s *story) watch() error {
	st, err := s.status()
	if err != nil {
		return err
	}
	bar := progressbar.NewOptions64(st.Bytes,
		progressbar.OptionSetDescription("    "),
		progressbar.OptionShowBytes(true),
		progressbar.OptionUseIECUnits(true),
		progressbar.OptionSetWidth(40),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionSetWriter(os.Stdout))
	for st.State < mount.Complete {
		if st.Note != "" {
			return errors.New(st.Note)
		}
		select {
		case <-s.ctx.Done():
			return s.ctx.Err()
		case <-time.After(100 * time.Millisecond): // a rate needs some time behind it
		}
		if st, err = s.status(); err != nil {
			return err
		}
		bar.Set64(st.BytesLocal)
	}
	bar.Set64(st.Bytes)
	fmt.Println()
	return nil
}

// showMount prints what the kernel has at the mount point.
func (s *story) showMount(when string) error {
	out, err := output(exec.CommandContext(s.ctx, "findmnt", "-o", "FSTYPE,SOURCE", s.mnt))
	if err != nil {
		return err
	}
	fmt.Printf("    findmnt %s:\n", when)
	for line := range strings.Lines(string(out)) {
		fmt.Print("      " + line)
	}
	return nil
}

func step(format string, args ...any) { fmt.Printf("\n"+format+"\n", args...) }

// mark prints a moment of the story.
func (s *story) mark(what string) {
	fmt.Printf("  %7.0f ms, %6.1f MB fetched: %s\n",
		float64(time.Since(s.start).Microseconds())/1000, float64(s.link.Bytes())/1e6, what)
}
