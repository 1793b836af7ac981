package main

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// files measures the image of files.
func (b *bench) files() error {
	source, err := b.fileImage()
	if err != nil {
		return err
	}
	// Everything becomes local and sealed once; then each backend is mounted.
	if err := b.mountImage(source, "fill", fuseMount); err != nil {
		return err
	}
	if _, err := b.cfs("wait", "--for", "sealed", b.path("fill")); err != nil {
		return err
	}
	plain := b.path("plain")
	if _, err := output(exec.CommandContext(b.ctx, "cp", "-a", b.path("fill"), plain)); err != nil {
		return err
	}
	for _, backend := range []string{fuseMount, hybridMount} {
		if err := b.mountImage(source, backend, backend); err != nil {
			return err
		}
	}
	if err := b.handMade(source); err != nil {
		return err
	}
	if err := os.MkdirAll(b.path("empty"), 0o755); err != nil {
		return err
	}
	if err := b.mountBy(b.path(overlayExt4), "-t", "overlay", "-o", "ro,lowerdir="+plain+":"+b.path("empty"), "overlay"); err != nil {
		return err
	}
	if err := b.loopback(plain, b.path(passthrough)); err != nil {
		return err
	}
	unix.Sync()
	b.all = []contender{{ext4, plain}}
	for _, name := range []string{overlayExt4, byHand, passthrough, fuseMount, hybridMount} {
		b.all = append(b.all, contender{name, b.path(name)})
	}
	everyone := []string{ext4, byHand, passthrough, fuseMount, hybridMount}
	big := func(c string) string { return filepath.Join(b.at(c), "big") }
	warm := func(c string) error { _, err := sequential(big(c)); return err }
	cold := func(c string) error {
		// What a file's pages are copies of goes as well: the object's, and
		// what the loopback is over.
		return errors.Join(dropFile(big(c)), dropFile(big(ext4)), b.dropObjects())
	}
	threads := func(n int, f func(c string, n int) (float64, error)) func(string) (float64, error) {
		return func(c string) (float64, error) { return f(c, n) }
	}
	random := func(c string, n int) (float64, error) { return randomReads(big(c), n, b.sized(100_000)) }
	small := func(c string, n int) (float64, error) { return b.openReadClose(b.at(c), n) }
	smallWarm := func(c string) error { _, err := b.openReadClose(b.at(c), 2); return err }
	find := func(c string) (float64, error) {
		return timed(func() error {
			_, err := output(exec.CommandContext(b.ctx, "find", filepath.Join(b.at(c), "entries"), "-type", "f", "-size", "+0", "-fprintf", "/dev/null", "x"))
			return err
		})
	}
	dropAll := func(string) error {
		unix.Sync()
		return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
	}
	walkers := []string{ext4, overlayExt4, byHand, passthrough, fuseMount, hybridMount}
	for _, r := range []row{
		{name: "sequential read of 1 GiB, cold", unit: "MB/s", who: everyone, prepare: cold,
			measure: func(c string) (float64, error) { return sequential(big(c)) },
			want:    []condition{{of: fuseMount, to: ext4, atLeast: 0.7}, {of: hybridMount, to: ext4, atLeast: 0.95}}},
		{name: "sequential read of 1 GiB, warm", unit: "MB/s", who: everyone, prepare: warm,
			measure: func(c string) (float64, error) { return sequential(big(c)) },
			want:    []condition{{of: fuseMount, to: ext4, atLeast: 0.45}, {of: hybridMount, to: ext4, atLeast: 0.95}}},
		{name: "random 4 KiB reads of it, warm, 1 thread", unit: "reads/s", who: everyone, prepare: warm, measure: threads(1, random),
			want: []condition{{of: fuseMount, to: ext4, atLeast: 0.8}, {of: hybridMount, to: ext4, atLeast: 0.85}}},
		{name: "random 4 KiB reads of it, warm, 4 threads", unit: "reads/s", who: everyone, prepare: warm, measure: threads(4, random),
			want: []condition{{of: fuseMount, to: ext4, atLeast: 0.8}, {of: hybridMount, to: ext4, atLeast: 0.85}}},
		{name: "open+read+close of 50,000 files of 4 KiB, warm, 1 thread", unit: "files/s", who: everyone, prepare: smallWarm, measure: threads(1, small),
			want: []condition{{of: fuseMount, to: byHand, atLeast: 0.7}, {of: hybridMount, to: byHand, atLeast: 0.8}}},
		{name: "open+read+close of 50,000 files of 4 KiB, warm, 4 threads", unit: "files/s", who: everyone, prepare: smallWarm, measure: threads(4, small),
			want: []condition{{of: fuseMount, to: byHand, atLeast: 0.7}, {of: hybridMount, to: byHand, atLeast: 0.8}}},
		{name: "find -type f -size +0 over 100,000 entries, cold", unit: "s", who: walkers, prepare: dropAll, measure: find,
			want: []condition{{of: fuseMount, to: overlayExt4, atMost: 3}, {of: hybridMount, to: overlayExt4, atMost: 1.1}}},
		{name: "find -type f -size +0 over 100,000 entries, warm", unit: "s", who: walkers, prepare: func(c string) error { _, err := find(c); return err }, measure: find,
			want: []condition{{of: fuseMount, to: overlayExt4, atMost: 3}}},
	} {
		if err := b.measure(r); err != nil {
			return err
		}
	}
	return nil
}

// dropObjects takes the store's copy of the big file out of the page cache.
func (b *bench) dropObjects() error {
	return filepath.WalkDir(b.path("root", "objects"), func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		fi, err := d.Info()
		if err != nil || fi.Size() < 1<<20 {
			return err
		}
		return dropFile(path)
	})
}

func dropFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
}

func timed(f func() error) (seconds float64, err error) {
	start := time.Now()
	err = f()
	return time.Since(start).Seconds(), err
}

// sequential reads a file and returns MB/s.
func sequential(path string) (float64, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	buf := make([]byte, 1<<20)
	var total int64
	s, err := timed(func() error {
		for {
			n, err := unix.Read(fd, buf)
			if err != nil || n == 0 {
				return err
			}
			total += int64(n)
		}
	})
	return float64(total) / 1e6 / s, err
}

// parallel runs f in n threads, and returns the first error.
func parallel(n int, f func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			errs[i] = f(i)
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// randomReads makes reads of 4 KiB, in all, by n threads, and returns reads/s.
func randomReads(path string, n, reads int) (float64, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	pages := fi.Size() / 4096
	s, err := timed(func() error {
		return parallel(n, func(i int) error {
			fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			rng := rand.New(rand.NewPCG(1, uint64(i)))
			buf := make([]byte, 4096)
			for range reads / n {
				if k, err := unix.Pread(fd, buf, rng.Int64N(pages)*4096); err != nil || k != len(buf) {
					return fmt.Errorf("read %d bytes: %w", k, err)
				}
			}
			return nil
		})
	})
	return float64(reads/n*n) / s, err
}

// openReadClose reads every small file by n threads and returns files/s.
func (b *bench) openReadClose(dir string, n int) (float64, error) {
	files := b.sized(smallFiles)
	paths := make([]string, files)
	for i := range paths {
		paths[i] = filepath.Join(dir, smallName(i))
	}
	s, err := timed(func() error {
		return parallel(n, func(i int) error {
			buf := make([]byte, 2*smallSize)
			for k := i; k < files; k += n {
				fd, err := unix.Open(paths[k], unix.O_RDONLY|unix.O_CLOEXEC, 0)
				if err != nil {
					return fmt.Errorf("open %s: %w", paths[k], err)
				}
				got, err := unix.Read(fd, buf)
				unix.Close(fd)
				if err != nil || got != smallSize {
					return fmt.Errorf("read %s: %d bytes: %w", paths[k], got, err)
				}
			}
			return nil
		})
	})
	return float64(files) / s, err
}

// importAll imports 300 modules of the standard library and what they need.
const importAll = `
import importlib, sys
n = 0
for name in sorted(sys.stdlib_module_names):
    if name.startswith("_") or name in ("antigravity", "this", "idlelib", "turtledemo", "turtle", "tkinter"): continue
    try: importlib.import_module(name)
    except ImportError: continue
    n = len(sys.modules)
    if n >= 500: break
assert n >= 300, n
`

// python measures a start of python3 from the mount, as its root.
func (b *bench) python() error {
	cache, err := images.DefaultCache()
	if err != nil {
		return err
	}
	set, err := images.Ensure(b.ctx, cache, os.Stderr)
	if err != nil {
		return err
	}
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Debian
	plain := b.path("python-plain")
	if _, err := output(exec.CommandContext(b.ctx, "cp", "-a", set.Reference(images.Debian), plain)); err != nil {
		return err
	}
	b.all = []contender{{ext4, plain}}
	for _, backend := range []string{fuseMount, hybridMount} {
		if err := b.mountImage(source, "python-"+backend, backend); err != nil {
			return err
		}
		if _, err := b.cfs("wait", "--for", "sealed", b.path("python-"+backend)); err != nil {
			return err
		}
		b.all = append(b.all, contender{backend, b.path("python-" + backend)})
	}
	if err := os.MkdirAll(b.path("empty"), 0o755); err != nil {
		return err
	}
	if err := b.mountBy(b.path("python-overlay"), "-t", "overlay", "-o", "ro,lowerdir="+plain+":"+b.path("empty"), "overlay"); err != nil {
		return err
	}
	if err := b.loopback(plain, b.path("python-loopback")); err != nil {
		return err
	}
	b.all = append(b.all, contender{overlayExt4, b.path("python-overlay")}, contender{passthrough, b.path("python-loopback")})
	start := func(script string) func(c string) (float64, error) {
		return func(c string) (float64, error) {
			return timed(func() error {
				_, err := output(exec.CommandContext(b.ctx, "chroot", b.at(c), "/usr/bin/python3", "-c", script))
				return err
			})
		}
	}
	who := []string{ext4, overlayExt4, passthrough, fuseMount, hybridMount}
	for _, r := range []row{
		{name: "python3 -c 'import <300 modules>', warm", unit: "s", who: who, measure: start(importAll),
			prepare: func(c string) error { _, err := start(importAll)(c); return err },
			want:    []condition{{of: fuseMount, to: overlayExt4, atMost: 1.15}, {of: hybridMount, to: overlayExt4, atMost: 1.05}}},
		{name: "python3 -c 'print(1)', warm", unit: "s", who: who, measure: start("print(1)"),
			prepare: func(c string) error { _, err := start("print(1)")(c); return err }},
	} {
		if err := b.measure(r); err != nil {
			return err
		}
	}
	return nil
}

// million measures memory and mount time with an image of a million files.
func (b *bench) million() error {
	source, err := b.millionImage()
	if err != nil {
		return err
	}
	dir := b.path("million")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	umount := func() error { _, err := b.cfs("umount", dir); return err }
	mountAs := func(backend string) error {
		_, err := b.cfs("mount", "--root", b.path("root"), "--backend", backend, "--swap", "never", "--fill=false", source, dir)
		return err
	}
	first, err := timed(func() error { return mountAs(fuseMount) })
	if err != nil {
		return err
	}
	fmt.Printf("\na million files: the first mount, which makes the EROFS file, %.1f s\n", first)
	b.undo = append(b.undo, func() error {
		unix.Unmount(dir, unix.MNT_DETACH) // of a run that was cut short
		return nil
	})
	if err := umount(); err != nil {
		return err
	}
	for _, backend := range []string{fuseMount, hybridMount} {
		var times []float64
		for range b.runs {
			s, err := timed(func() error { return mountAs(backend) })
			if err != nil {
				return err
			}
			times = append(times, s)
			if err := umount(); err != nil {
				return err
			}
		}
		b.told(backend+": mount of a million files once its EROFS file exists", "ms", 1000*median(times), 50)
		if err := mountAs(backend); err != nil {
			return err
		}
		walk, err := timed(func() error {
			_, err := output(exec.CommandContext(b.ctx, "find", dir, "-type", "f", "-size", "+0", "-fprintf", "/dev/null", "x"))
			return err
		})
		if err != nil {
			return err
		}
		s, err := b.status(dir)
		if err != nil {
			return err
		}
		mem, err := memory(s.PID)
		if err != nil {
			return err
		}
		b.told(fmt.Sprintf("%s: resident memory after a walk of %.1f s (anonymous %.1f, of files %.1f)", backend, walk, mem["RssAnon"], mem["RssFile"]), "MiB", mem["VmRSS"], 48)
		if err := umount(); err != nil {
			return err
		}
	}
	return nil
}

func median(v []float64) float64 {
	slices.Sort(v)
	return v[len(v)/2]
}

// told prints a figure that has a bound of its own.
func (b *bench) told(what, unit string, v, atMost float64) {
	verdict := "ok"
	if v > atMost {
		verdict = "MISSED"
		b.misses++
	}
	fmt.Printf("\n%s: %s %s   (at most %s)  %s\n", what, short(v), unit, short(atMost), verdict)
}

// memory reads a process's memory, in MiB, by the names of proc_pid_status(5).
func memory(pid int) (map[string]float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all := map[string]float64{}
	for sc := bufio.NewScanner(f); sc.Scan(); {
		name, rest, _ := strings.Cut(sc.Text(), ":")
		if kb, ok := strings.CutSuffix(strings.TrimSpace(rest), " kB"); ok {
			if n, err := strconv.ParseFloat(kb, 64); err == nil {
				all[name] = n / 1024
			}
		}
	}
	return all, nil
}
