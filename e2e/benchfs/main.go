// Command benchfs measures what programs feel of a mount, with every byte of
// the image local: the fuse and the hybrid backend beside ext4, overlayfs on
// ext4, a hand-made overlayfs over EROFS and ext4, and a loopback filesystem
// of go-fuse that passes reads through to the kernel. All are measured in one
// run, in turns, and medians count. Beside each ratio stands what issue 6 asks
// of it. It needs root and a quiet machine; it decides nothing.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	bin := flag.String("bin", "bin/cfs-fuse", "the cfs-fuse `command` to measure")
	runs := flag.Int("runs", 5, "runs of each, of which the median counts")
	scale := flag.Float64("scale", 1, "size of the test data; conditions are about 1")
	only := flag.String("only", "", "rows whose name contains this `text`")
	tmp := flag.String("tmp", "", "`folder` to work in, on ext4 (default: the system's)")
	loopback := flag.String("loopback", "", "serve a loopback of this `folder` at the argument, for this program itself")
	flag.Parse()
	var err error
	if *loopback != "" {
		err = serveLoopback(*loopback, flag.Arg(0))
	} else {
		ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
		b := &bench{ctx: ctx, runs: *runs, scale: *scale, only: *only}
		if err = b.setUp(*bin, *tmp); err == nil {
			err = b.run()
		}
		err = errors.Join(err, b.tearDown())
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchfs:", err)
		os.Exit(1)
	}
}

// A contender is one way to have the files below a folder.
type contender struct {
	name string
	dir  string
}

// The contenders' names.
const (
	ext4        = "ext4"
	overlayExt4 = "overlay"     // overlayfs on ext4
	byHand      = "erofs"       // overlayfs over EROFS and ext4, by mount(8)
	passthrough = "passthrough" // a loopback by go-fuse
	fuseMount   = "fuse"
	hybridMount = "hybrid"
)

type bench struct {
	ctx    context.Context
	dir    string
	bin    string
	runs   int
	scale  float64
	only   string
	undo   []func() error // in reverse order
	all    []contender
	misses int
}

func (b *bench) path(elem ...string) string {
	return filepath.Join(append([]string{b.dir}, elem...)...)
}

func (b *bench) at(name string) string {
	for _, c := range b.all {
		if c.name == name {
			return c.dir
		}
	}
	panic("no contender " + name)
}

func (b *bench) sized(n int) int { return max(1, int(float64(n)*b.scale)) }

func (b *bench) setUp(bin, tmp string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root")
	}
	if b.bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	b.dir, err = os.MkdirTemp(tmp, "cfs-benchfs-*")
	b.undo = append(b.undo, func() error { return os.RemoveAll(b.dir) })
	return err
}

func (b *bench) tearDown() error {
	var errs []error
	for _, f := range slices.Backward(b.undo) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func (b *bench) run() error {
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	fmt.Printf("Linux %s, %d cores, medians of %d, scale %g, load at the start %s", unix.ByteSliceToString(uts.Release[:]), runtime.NumCPU(), b.runs, b.scale, load)
	for _, part := range []struct {
		name string
		do   func() error
	}{
		{"files", b.files}, {"python", b.python}, {"million", b.million},
	} {
		if b.only != "" && !strings.Contains(part.name, b.only) {
			continue
		}
		if err := part.do(); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
		if err := b.ctx.Err(); err != nil {
			return err
		}
	}
	fmt.Printf("\n%d conditions missed\n", b.misses)
	return nil
}

// A condition is what a ratio of two contenders' medians must be.
type condition struct {
	of, to  string
	atLeast float64 // speeds
	atMost  float64 // times
}

// A row is one line of the table: a measurement of several contenders.
type row struct {
	name string
	unit string
	want []condition
	who  []string
	// prepare is run before each measurement and not counted; it may be nil.
	prepare func(c string) error
	measure func(c string) (float64, error)
}

// measure fills a row, one run of each contender after the other, and prints it
// with what FUSE was asked in the last run of each.
func (b *bench) measure(r row) error {
	got := map[string][]float64{}
	asked := map[string]string{}
	for i := range b.runs {
		for _, c := range r.who {
			if err := b.ctx.Err(); err != nil {
				return err
			}
			if r.prepare != nil {
				if err := r.prepare(c); err != nil {
					return fmt.Errorf("%s, %s: %w", r.name, c, err)
				}
			}
			before := b.requests(c)
			v, err := r.measure(c)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", r.name, c, err)
			}
			got[c] = append(got[c], v)
			if i == b.runs-1 {
				asked[c] = difference(before, b.requests(c))
			}
		}
	}
	var line strings.Builder
	for _, c := range r.who {
		fmt.Fprintf(&line, "  %s %s", c, short(median(got[c])))
	}
	fmt.Printf("\n%s [%s]\n %s\n", r.name, r.unit, line.String())
	for _, w := range r.want {
		ratio := median(got[w.of]) / median(got[w.to])
		bound, ok := fmt.Sprintf("at least %.2f", w.atLeast), ratio >= w.atLeast
		if w.atMost > 0 {
			bound, ok = fmt.Sprintf("at most %.2f", w.atMost), ratio <= w.atMost
		}
		verdict := "ok"
		if !ok {
			verdict = "MISSED"
			b.misses++
		}
		fmt.Printf("    %s : %s = %.2f   (%s)  %s\n", w.of, w.to, ratio, bound, verdict)
	}
	for _, c := range []string{fuseMount, hybridMount} {
		if text, ok := asked[c]; ok {
			fmt.Printf("    %s was asked: %s\n", c, text)
		}
	}
	return nil
}

func short(v float64) string {
	switch {
	case v >= 1000:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3f", v)
}
