// Command bench measures the composefs tools under their own names, beside
// what Debian has (mkfs.erofs, fsverity), in one run, and prints medians and
// ratios. It decides nothing: no figure here fails a build.
package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

func main() {
	bin := flag.String("bin", "bin/cfs-fuse", "the cfs-fuse `command` to measure")
	runs := flag.Int("runs", 5, "runs of each, of which the median counts")
	entries := flag.Int("entries", 1_000_000, "entries of the large image")
	usr := flag.String("usr", "/usr", "`folder` to make images of")
	tmp := flag.String("tmp", "", "`folder` to work in (default: the system's)")
	flag.Parse()
	b := &bench{runs: *runs, entries: *entries, usr: *usr}
	err := b.setUp(*bin, *tmp)
	if err == nil {
		err = b.run()
	}
	os.RemoveAll(b.dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type bench struct {
	dir           string
	runs, entries int
	usr           string
}

func (b *bench) path(name string) string { return filepath.Join(b.dir, name) }

func (b *bench) setUp(bin, tmp string) (err error) {
	if b.dir, err = os.MkdirTemp(tmp, "cfs-fuse-bench-*"); err != nil {
		return err
	}
	if bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	for _, name := range []string{"mkcomposefs", "composefs-info"} {
		if err := os.Symlink(bin, b.path(name)); err != nil {
			return err
		}
	}
	return nil
}

// A cost is what one run of a program took.
type cost struct {
	wall time.Duration
	peak int64 // resident memory in bytes
}

// measure runs a program several times and returns medians. before, if not
// nil, is run before each and not counted.
func (b *bench) measure(before func() error, argv ...string) (cost, error) {
	var walls []time.Duration
	var peaks []int64
	for range b.runs {
		if before != nil {
			if err := before(); err != nil {
				return cost{}, err
			}
		}
		cmd := exec.Command(argv[0], argv[1:]...)
		var errs bytes.Buffer
		cmd.Stderr = &errs
		start := time.Now()
		if err := cmd.Run(); err != nil {
			return cost{}, fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, &errs)
		}
		walls = append(walls, time.Since(start))
		peaks = append(peaks, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss<<10)
	}
	slices.Sort(walls)
	slices.Sort(peaks)
	return cost{walls[len(walls)/2], peaks[len(peaks)/2]}, nil
}

func row(what string, c cost, beside string) {
	fmt.Printf("%-52s %8.2f s %6d MB  %s\n", what, c.wall.Seconds(), c.peak>>20, beside)
}

func (b *bench) run() error {
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err
	}
	fmt.Printf("%d cores, medians of %d, load at the start %s", runtime.NumCPU(), b.runs, load)
	// The look-ups come last: what this process holds counts as the peak of
	// the programs that it starts.
	return errors.Join(b.dumps(), b.folders(), b.tree(), b.verity(), b.lookups(b.path("large.cfs")))
}

// dumps measures images from dumps, and back.
func (b *bench) dumps() error {
	mk, img := b.path("mkcomposefs"), b.path("large.cfs")
	if err := writeDump(b.path("plain"), b.entries, 0); err != nil {
		return err
	}
	plain, err := b.measure(nil, mk, "--from-file", b.path("plain"), img)
	if err != nil {
		return err
	}
	row(fmt.Sprintf("mkcomposefs --from-file, %d entries", b.entries), plain, fmt.Sprintf("%d bytes an entry", plain.peak/int64(b.entries)))
	if err := writeDump(b.path("links"), b.entries, 9); err != nil {
		return err
	}
	links, err := b.measure(nil, mk, "--from-file", b.path("links"), b.path("links.cfs"))
	if err != nil {
		return err
	}
	row("  the same with 9 % hard links", links, fmt.Sprintf("%.2f times", ratio(links, plain)))
	dump, err := b.measure(nil, b.path("composefs-info"), "dump", img)
	if err != nil {
		return err
	}
	row("composefs-info dump of it", dump, "")
	return nil
}

// lookups finds every path of an image by its names, as a filesystem would.
func (b *bench) lookups(img string) error {
	r, err := erofs.OpenFile(img)
	if err != nil {
		return err
	}
	defer r.Close()
	var paths []string
	if err := r.Walk(func(path string, _ erofs.Inode) error {
		paths = append(paths, path)
		return nil
	}); err != nil {
		return err
	}
	rand.New(rand.NewPCG(1, 1)).Shuffle(len(paths), func(i, j int) { paths[i], paths[j] = paths[j], paths[i] })
	start := time.Now()
	for _, path := range paths {
		ino, err := r.Inode(r.Root())
		for name := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
			if name == "" || err != nil {
				break
			}
			var nid uint64
			if nid, err = r.Lookup(ino, name); err == nil {
				ino, err = r.Inode(nid)
			}
		}
		if err != nil {
			return fmt.Errorf("look up %s: %w", path, err)
		}
	}
	took := time.Since(start)
	row("look up every path of the large image", cost{wall: took}, fmt.Sprintf("%.1f µs each", took.Seconds()*1e6/float64(len(paths))))
	return nil
}

// folders measures one large folder, in order and shuffled.
func (b *bench) folders() error {
	const n = 300_000
	var sorted cost
	for _, shuffled := range []bool{false, true} {
		path := b.path("folder")
		if err := writeFolder(path, n, shuffled); err != nil {
			return err
		}
		c, err := b.measure(nil, b.path("mkcomposefs"), "--from-file", path, b.path("folder.cfs"))
		if err != nil {
			return err
		}
		if !shuffled {
			sorted = c
			row(fmt.Sprintf("one folder of %d, in order", n), c, "")
		} else {
			row("  the same, shuffled", c, fmt.Sprintf("%.2f times", ratio(c, sorted)))
		}
	}
	return nil
}

// tree measures images of a folder, without and with a store.
func (b *bench) tree() error {
	mk, store := b.path("mkcomposefs"), b.path("store")
	peer, err := b.measure(nil, "mkfs.erofs", "--quiet", b.path("mkfs.img"), b.usr)
	if err != nil {
		return err
	}
	row("mkfs.erofs "+b.usr+" (with its data)", peer, "")
	os.Remove(b.path("mkfs.img"))
	bare, err := b.measure(nil, mk, b.usr, b.path("usr.cfs"))
	if err != nil {
		return err
	}
	row("mkcomposefs "+b.usr, bare, fmt.Sprintf("%.2f times mkfs.erofs", ratio(bare, peer)))
	fill, err := b.measure(func() error { return os.RemoveAll(store) }, mk, "--digest-store="+store, b.usr, b.path("usr.cfs"))
	if err != nil {
		return err
	}
	row("  the same, filling a store", fill, fmt.Sprintf("%.2f times mkfs.erofs", ratio(fill, peer)))
	return os.RemoveAll(store)
}

// verity measures the fs-verity digest of a file in the page cache.
func (b *bench) verity() error {
	const size = 1 << 30
	path := b.path("gib")
	if err := writeLines(path, func(w *bufio.Writer) {
		for range size / 16 {
			w.WriteString("0123456789abcde\n")
		}
	}); err != nil {
		return err
	}
	ours, err := b.measure(nil, b.path("composefs-info"), "measure-file", path)
	if err != nil {
		return err
	}
	start := time.Now()
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(sha256.New(), f); err != nil {
		return err
	}
	plain := time.Since(start)
	row("composefs-info measure-file, 1 GiB", ours, fmt.Sprintf("%.0f %% of crypto/sha256 times %d cores",
		100*plain.Seconds()/ours.wall.Seconds()/float64(runtime.NumCPU()), runtime.NumCPU()))
	peer, err := b.measure(nil, "fsverity", "digest", path)
	if err != nil {
		return err
	}
	row("fsverity digest, the same", peer, fmt.Sprintf("ours takes %.2f times", ratio(ours, peer)))
	return nil
}

func ratio(a, b cost) float64 { return a.wall.Seconds() / b.wall.Seconds() }

// writeDump writes a composefs-dump of n entries: folders of 100, files with
// payload and digest, and of each hundred so many hard links.
func writeDump(path string, n, links int) error {
	return writeLines(path, func(w *bufio.Writer) {
		fmt.Fprintln(w, "/ 4096 40755 2 0 0 0 0.0 - - -")
		for i, dirs := 1, 0; i < n; dirs++ {
			top, dir := fmt.Sprintf("/d%03d", dirs/100), fmt.Sprintf("/d%03d/e%05d", dirs/100, dirs)
			if dirs%100 == 0 {
				fmt.Fprintf(w, "%s 4096 40755 2 0 0 0 1700000000.0 - - -\n", top)
				i++
			}
			fmt.Fprintf(w, "%s 4096 40755 2 0 0 0 1700000000.0 - - -\n", dir)
			i++
			for k := 0; k < 100 && i < n; k, i = k+1, i+1 {
				if k > 0 && k <= links {
					fmt.Fprintf(w, "%s/link%02d 0 @100644 - - - - 0.0 %s/file00 - -\n", dir, k, dir)
					continue
				}
				d := sha256.Sum256(fmt.Append(nil, i))
				fmt.Fprintf(w, "%s/file%02d %d 100644 %d %d 0 0 %d.%d %x/%x - %x\n", dir, k, 100+i, 1+links*(1-min(k, 1)), i%3, 1700000000+i%1000, i%7, d[:1], d[1:], d)
			}
		}
	})
}

func writeFolder(path string, n int, shuffled bool) error {
	order := make([]int, n)
	for i := range order {
		order[i] = i
	}
	if shuffled {
		rand.New(rand.NewPCG(5, 6)).Shuffle(n, func(i, j int) { order[i], order[j] = order[j], order[i] })
	}
	return writeLines(path, func(w *bufio.Writer) {
		fmt.Fprintln(w, "/ 4096 40755 2 0 0 0 0.0 - - -")
		for _, i := range order {
			fmt.Fprintf(w, "/file%06d 0 100644 1 0 0 0 0.0 - - -\n", i)
		}
	})
}

func writeLines(path string, write func(*bufio.Writer)) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	write(w)
	return errors.Join(w.Flush(), f.Close())
}
