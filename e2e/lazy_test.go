package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// The programs that must run at once, with what they must say.
var (
	python = program{"python3", []string{"python3", "-c", "print(1)"}, "1\n"}
	nginx  = program{"nginx", []string{"nginx", "-t"}, "test is successful"}
)

type program struct {
	name string
	argv []string
	says string
}

func (p program) run(point string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	out, err := inRoot(ctx, point, p.argv...)
	if err == nil && !strings.Contains(out, p.says) {
		err = errors.New(p.name + " said: " + out)
	}
	return err
}

func source(k *link, name, form string) string { return "docker://" + k.addr + "/" + name + ":" + form }

// Programs run from the mount within the first second after the mount command
// was given, over a link of 200 Mbit/s and 20 ms, for less than 15 % of the
// image. With the background fill more arrives meanwhile, but for the reads no
// more than that.
func TestProgramsAtOnce(t *testing.T) {
	for _, form := range []string{images.EStargz, images.ZstdChunked} {
		total, err := set.CompressedSize(form, images.Debian)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			name     string
			link     speed
			flags    []string
			programs []program
		}{
			{"loopback/python3", lan, []string{"--fill=false"}, []program{python}},
			{"loopback/nginx", lan, []string{"--fill=false"}, []program{nginx}},
			{"python3", wan, []string{"--fill=false"}, []program{python}},
			{"nginx", wan, []string{"--fill=false"}, []program{nginx}},
			{"both while filling", wan, nil, []program{python, nginx}},
		} {
			t.Run(form+"/"+c.name, func(t *testing.T) {
				b, k := newBench(t), newLink(t, registry.Addr, c.link)
				start := time.Now()
				point := b.mount(source(k, images.Debian, form), c.flags...)
				mounted := time.Since(start)
				errs := make([]error, len(c.programs))
				var running sync.WaitGroup
				for i, p := range c.programs {
					running.Go(func() { errs[i] = p.run(point) })
				}
				running.Wait()
				took := time.Since(start)
				if err := errors.Join(errs...); err != nil {
					t.Fatal(err)
				}
				s := b.status(point)
				passed := k.bytes()
				if c.flags == nil {
					passed = s.Fetched["demand"].Bytes + s.Fetched["metadata"].Bytes + s.Fetched["prefetch"].Bytes
				}
				share := 100 * float64(passed) / float64(total)
				load, _ := os.ReadFile("/proc/loadavg")
				t.Logf("mounted after %v, answered after %v, %.1f MB of %.1f (%.1f %%), %d requests: %v; load %s", mounted.Round(time.Millisecond),
					took.Round(time.Millisecond), float64(passed)/1e6, float64(total)/1e6, share, len(k.requests()), s.Fetched, bytes.TrimSpace(load))
				// A second is what it takes on a quiet machine. A busy one is
				// no reason to fail, being no better than a full pull is.
				pull := time.Duration(float64(total) * 8 / (wan.mbit * 1e6) * float64(time.Second))
				if took > pull/2 {
					t.Errorf("answered after %v; the link alone needs %v for the whole image", took, pull)
				}
				if share >= 15 {
					t.Errorf("%.1f %% of the image were fetched, want less than 15 %%", share)
				}
				b.must("umount", point)
				noProcess(t, point)
			})
		}
	}
}

// The whole life of an image: lazy, complete, sealed, swapped, unmounted, and
// mounted again with its registry gone.
func TestWholeLife(t *testing.T) {
	for form, backend := range map[string]string{images.EStargz: hybridBackend, images.ZstdChunked: fuseBackend} {
		t.Run(form+"/"+backend, func(t *testing.T) {
			b, k := newBench(t), newLink(t, registry.Addr, wan)
			b.backend = backend
			total, err := set.CompressedSize(form, images.Debian)
			if err != nil {
				t.Fatal(err)
			}
			_, desc, err := set.Manifest(form, images.Debian)
			if err != nil {
				t.Fatal(err)
			}
			src := source(k, images.Debian, form)
			start := time.Now()
			point := b.mount(src)
			b.isServed(point)
			if s := b.status(point); s.State != "lazy" || s.Source != src || s.Mountpoint != point ||
				s.ManifestDigest != desc.Digest.String() || s.Files == 0 || s.BytesLocal >= s.Bytes {
				t.Errorf("status while lazy: %+v", s)
			}
			for _, state := range []string{"complete", "sealed", "swapped"} {
				b.waitFor(state, point)
				t.Logf("%s after %v", state, time.Since(start).Round(time.Millisecond))
			}
			isKernel(t, point)
			s := b.status(point)
			if s.State != "swapped" || s.Backend != "kernel" || s.FilesLocal != s.Files || s.BytesLocal != s.Bytes || len(s.Composefs) != 64 || s.PID != 0 {
				t.Errorf("status when swapped: %+v", s)
			}
			t.Logf("verity: %s; %d bytes passed for %d in %d requests, %d of them twice", s.Verity, k.bytes(), total, len(k.requests()), twice(k.requests()))
			// A twentieth for headers, and what tails and merged gaps read again.
			if limit := total + total/20; k.bytes() > limit {
				t.Errorf("%d bytes passed the link for an image of %d", k.bytes(), total)
			}
			sameTree(t, set.Reference(images.Debian), point, treediff.Options{})
			if err := errors.Join(python.run(point), nginx.run(point)); err != nil {
				t.Error(err)
			}
			b.must("umount", point)

			k.cut()
			asked := len(k.requests())
			again := time.Now()
			b.mountAt(src, point)
			t.Logf("mounted again in %v", time.Since(again).Round(time.Millisecond))
			isKernel(t, point)
			if err := python.run(point); err != nil {
				t.Error(err)
			}
			if after := b.status(point); after.Composefs != s.Composefs || after.State != "swapped" {
				t.Errorf("status when mounted again: %+v, want composefs digest %s", after, s.Composefs)
			}
			b.must("umount", point)
			// The backends need the registry no more than the kernel does.
			for _, b.backend = range []string{fuseBackend, hybridBackend} {
				b.mountAt(src, point, "--swap", "never")
				b.isServed(point)
				sameTree(t, set.Reference(images.Debian), point, treediff.Options{})
				b.must("umount", point)
			}
			if n := len(k.requests()); n != asked {
				t.Errorf("%d requests after sealed, want none: %v", n-asked, k.requests()[asked:])
			}
		})
	}
}

// inFlight is what may be on its way when a process dies: it has left the
// registry and is not in the store yet.
const inFlight = 16 << 20

// Processes that die take with them nothing but what was in flight, whether a
// successor goes on or the image is mounted again.
func TestKilledWhileLazy(t *testing.T) {
	for form, backend := range map[string]string{images.EStargz: hybridBackend, images.ZstdChunked: fuseBackend} {
		t.Run(form+"/"+backend, func(t *testing.T) {
			b, k := newBench(t), newLink(t, registry.Addr, wan)
			b.backend = backend
			total, err := set.CompressedSize(form, images.Debian)
			if err != nil {
				t.Fatal(err)
			}
			src := source(k, images.Debian, form)
			point := b.mount(src)
			eventually(t, 30*time.Second, "half of the image has passed", func() bool { return k.bytes() > total/2 })
			before := b.status(point)
			passed := k.bytes()
			if backend == fuseBackend {
				b.killAll(point)
				passed = k.bytes()
				b.mountAt(src, point)
			} else if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
				t.Fatalf("kill %d: %v", before.PID, err)
			}
			after := b.status(point)
			if after.BytesLocal < before.BytesLocal {
				t.Errorf("%d bytes were local before the kill, %d after", before.BytesLocal, after.BytesLocal)
			}
			b.waitFor("swapped", point)
			again := twice(k.requests())
			t.Logf("killed after %d bytes (%d local) of %d; %d passed in all, %d of them twice", passed, before.BytesLocal, total, k.bytes(), again)
			if again > inFlight {
				t.Errorf("%d bytes were fetched twice, want at most the %d in flight", again, inFlight)
			}
			if limit := total + total/20 + inFlight; k.bytes() > limit {
				t.Errorf("%d bytes passed the link, want at most %d", k.bytes(), limit)
			}
			isKernel(t, point)
			sameTree(t, set.Reference(images.Debian), point, treediff.Options{})
		})
	}
}

// Ctrl-C ends a program that reads what a stalled registry does not give, at
// once; the same read succeeds when the registry is back.
func TestInterruptedRead(t *testing.T) { eachBackend(t, testInterruptedRead) }

func testInterruptedRead(t *testing.T, b *bench) {
	const file = "usr/bin/perl"
	k := newLink(t, registry.Addr, wan)
	point := b.mount(source(k, images.Debian, images.EStargz), "--fill=false")
	want, err := os.ReadFile(filepath.Join(set.Reference(images.Debian), file))
	if err != nil {
		t.Fatal(err)
	}
	k.stall()
	for _, sig := range []syscall.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGKILL} {
		cmd := exec.Command("cat", filepath.Join(point, file))
		var out bytes.Buffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- cmd.Wait() }()
		select {
		case err := <-done:
			t.Fatalf("cat ended (%v) with the registry stalled, %d bytes", err, out.Len())
		case <-time.After(500 * time.Millisecond):
		}
		if s := b.status(point); s.OldestWait < 0.1 || s.OldestWait > 60 {
			t.Errorf("oldest wait %v s while a read waits", s.OldestWait)
		}
		start := time.Now()
		cmd.Process.Signal(sig)
		select {
		case <-done:
			if took := time.Since(start); took > 500*time.Millisecond {
				t.Errorf("%v: cat ended after %v", sig, took)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("%v: cat did not end within 10 s", sig)
			k.resume()
			<-done
		}
		if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); ws.Signal() != sig {
			t.Errorf("%v: cat ended with %v", sig, cmd.ProcessState)
		}
	}
	if err := exec.Command("ls", "-lR", filepath.Join(point, "etc")).Run(); err != nil {
		t.Errorf("listing with the registry stalled: %v", err)
	}
	k.resume()
	got, err := os.ReadFile(filepath.Join(point, file))
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("after the registry is back: %d bytes, %v", len(got), err)
	}
	eventually(t, 5*time.Second, "no read waits", func() bool { return b.status(point).OldestWait == 0 })
	b.must("umount", point)
	noProcess(t, point)
}
