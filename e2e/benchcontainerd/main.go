// Command benchcontainerd measures how long it takes from 'ctr image pull' on a
// node that has nothing to the first output of 'ctr run': with cfs-fuse, with
// containerd's overlayfs snapshotter, and with any other proxy snapshotter that
// listens, on a link of 100 Mbit/s and 20 ms and on the loopback device. Run it
// as root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/containerd"
	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// A contender is a snapshotter with the form of the image that it likes.
type contender struct{ snapshotter, address, form string }

// A link is what lies before the registry, and what cfs-fuse may take of the
// time of overlayfs there.
type link struct {
	name string
	link registrytest.Link
	most float64
}

var links = []link{
	{"100mbit, 20 ms", registrytest.Link{Latency: 20 * time.Millisecond, BytesPerSecond: 100_000_000 / 8}, 0.25},
	{"loopback", registrytest.Link{}, 1},
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "benchcontainerd:", err)
		os.Exit(1)
	}
}

func run() error {
	binary := flag.String("bin", "bin/cfs-fuse", "the command")
	runs := flag.Int("runs", 5, "how often each is measured")
	command := flag.String("command", "cat /etc/os-release", "what runs in the container, by sh -c")
	other := flag.String("snapshotter", "", "another snapshotter: name=socket, with =form for the form of the image it wants (estargz)")
	flag.Parse()
	if os.Geteuid() != 0 {
		return errors.New("it runs containers, and needs root")
	}
	path, err := filepath.Abs(*binary)
	if err != nil {
		return err
	}
	contenders := []contender{{"overlayfs", "", images.Plain}, {"cfs", "", images.EStargz}, {"cfs", "", images.ZstdChunked}}
	if *other != "" {
		f := append(strings.Split(*other, "="), images.EStargz)
		if len(f) < 3 {
			return fmt.Errorf("-snapshotter %s: want name=socket", *other)
		}
		contenders = append(contenders, contender{f[0], f[1], f[2]})
	}
	if err := containerd.Isolate(); err != nil {
		return err
	}
	ctx := context.Background()
	cache, err := images.DefaultCache()
	if err != nil {
		return err
	}
	set, err := images.Ensure(ctx, cache, os.Stderr)
	if err != nil {
		return err
	}
	bin, err := containerd.Build(ctx, cache, os.Stderr)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "benchctr")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	reg, err := registrytest.New(registrytest.Options{})
	if err != nil {
		return err
	}
	defer reg.Close()
	for _, form := range []string{images.Plain, images.EStargz, images.ZstdChunked} {
		if err := containerd.AddBase(reg, set, dir, "base", form); err != nil {
			return err
		}
	}
	fmt.Printf("%-16s %-24s %10s %23s %s\n", "link", "snapshotter", "median", "(least - most)", "to overlayfs")
	for _, l := range links {
		reg.SetLink(l.link)
		var full time.Duration
		for _, c := range contenders {
			var all []time.Duration
			for i := range *runs {
				d, err := measure(ctx, filepath.Join(dir, fmt.Sprint(c.snapshotter, i)), path, bin, reg.Host()+"/base:"+c.form, c, *command)
				if err != nil {
					return fmt.Errorf("%s: %w", c.snapshotter, err)
				}
				all = append(all, d)
			}
			slices.Sort(all)
			median := all[len(all)/2]
			if c.snapshotter == "overlayfs" {
				full = median
			}
			ratio := median.Seconds() / full.Seconds()
			verdict := ""
			if c.snapshotter == "cfs" {
				verdict = fmt.Sprintf("(at most %.2f: met)", l.most)
				if ratio > l.most {
					verdict = fmt.Sprintf("(at most %.2f: NOT MET)", l.most)
				}
			}
			fmt.Printf("%-16s %-24s %8.2f s %12.2f - %.2f s %8.2f %s\n", l.name, c.snapshotter+", "+c.form, median.Seconds(), all[0].Seconds(), all[len(all)-1].Seconds(), ratio, verdict)
		}
	}
	return nil
}

// measure returns the time from the pull to the first byte of output, on a
// node that has nothing.
func measure(ctx context.Context, dir, binary, bin, ref string, c contender, command string) (_ time.Duration, err error) {
	n, err := containerd.Start(ctx, containerd.Options{Dir: dir, Bin: bin, Binary: binary, Snapshotter: c.snapshotter, Address: c.address})
	if err != nil {
		return 0, err
	}
	defer func() {
		err = errors.Join(err, n.Close(), clean("/run/containerd"), clean("/run/cfs-fuse"), os.RemoveAll(dir))
	}()
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := n.Pull(ctx, ref); err != nil {
		return 0, err
	}
	cmd := n.Command(ctx, "run", "--rm", "--snapshotter", c.snapshotter, "--", ref, "bench", "sh", "-c", command)
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	var text strings.Builder
	cmd.Stderr = &text
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if _, err := out.Read(make([]byte, 1)); err != nil {
		return 0, errors.Join(fmt.Errorf("no output: %w: %s", err, text.String()), cmd.Wait())
	}
	took := time.Since(began)
	buf := make([]byte, 4096)
	for {
		if _, err := out.Read(buf); err != nil {
			break
		}
	}
	err = cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		err = fmt.Errorf("%w: %s", exit, text.String())
	}
	return took, err
}

// clean takes away what is mounted below a folder, and the folder.
func clean(dir string) error {
	all, err := kmount.Mounts()
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(all) {
		if strings.HasPrefix(m.Mountpoint, dir+"/") {
			kmount.Detach(m.Mountpoint) // it may have gone with one above
		}
	}
	return os.RemoveAll(dir)
}
