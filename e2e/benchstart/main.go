// Command benchstart measures how soon a web application answers from an
// image that the machine has never seen, and how soon every byte of the image
// is local, at several speeds of the link to the registry:
//
//	(a) full pull: all layers downloaded in parallel, each unpacked by a tar
//	    of its own as soon as it is there, stacked by overlayfs, then run
//	(b) cfs-fuse, lazily, with an empty store
//	(c) the same, with the access profile of an earlier start
//
// and how long it takes to read the whole image: (a) and then tar, against tar
// through a lazy mount from the first moment on. It prints medians, ratios and
// whether each holds what issue 4 asks for. It decides nothing: no figure here
// fails a build.
//
// The image is Debian with Django, pandas and a database of 100 MB (package
// images, Web). The registry is in this process, and emulates the link.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// A speed is a link to the registry, as issue 4 lists them.
type speed struct {
	name string
	link registrytest.Link
}

// fastest is the loopback device itself: it carries more than 10 Gbit/s.
const fastest = "10gbit"

var speeds = []speed{
	{fastest, registrytest.Link{}},
	{"1gbit", registrytest.Link{Latency: time.Millisecond, BytesPerSecond: 1e9 / 8}},
	{"100mbit", registrytest.Link{Latency: 20 * time.Millisecond, BytesPerSecond: 100e6 / 8}},
	{"20mbit", registrytest.Link{Latency: 80 * time.Millisecond, BytesPerSecond: 20e6 / 8}},
}

func main() {
	var names []string
	for _, s := range speeds {
		names = append(names, s.name)
	}
	b := &bench{}
	bin := flag.String("bin", "bin/cfs-fuse", "the cfs-fuse `command` to measure")
	tmp := flag.String("tmp", "", "`folder` to work in (default: the system's)")
	links := flag.String("links", strings.Join(names, ","), "the links to measure at, comma-separated")
	parts := flag.String("parts", "pull,lazy,profile,tar", "what to measure, comma-separated: pull (a), lazy (b), profile (c), tar (the whole image read)")
	flag.IntVar(&b.runs, "runs", 5, "runs of each, of which the median counts")
	flag.StringVar(&b.form, "form", images.EStargz, "what the lazy image is: estargz, zstdchunked, or gzip, which is the plain one that (a) pulls")
	flag.BoolVar(&b.all, "all", false, "first ask for the page that needs all of the data (/all), not for the one that needs a part (/)")
	flag.StringVar(&b.log, "log", "", "`file` to append the logs of the measured mounts to, at level debug")
	options := flag.String("options", "", "more `options` of the measured mounts, separated by blanks, e.g. '--backend fuse'")
	flag.Parse()
	b.options = strings.Fields(*options)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := b.setUp(ctx, *bin, *tmp, *links, *parts)
	if err == nil {
		err = b.run(ctx)
	}
	err = errors.Join(err, b.tearDown())
	if err != nil {
		fmt.Fprintln(os.Stderr, "benchstart:", err)
		os.Exit(1)
	}
}

type bench struct {
	bin     string
	dir     string // of what is kept between runs
	work    string // where each run has a filesystem of its own
	runs    int
	form    string
	all     bool
	log     string
	options []string
	links   []speed
	parts   map[string]bool

	reg         *registrytest.Registry
	files       []*os.File // the blobs it serves
	plain, lazy imageSize
	profile     string // file of the access profile
}

// An imageSize is what one form of the image has to carry.
type imageSize struct {
	layers []ocispec.Descriptor
	bytes  int64 // of all layers
}

const repository = "bench/web"

func (b *bench) setUp(ctx context.Context, bin, tmp, links, parts string) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting and chroot need root")
	}
	for name := range strings.SplitSeq(links, ",") {
		i := slices.IndexFunc(speeds, func(s speed) bool { return s.name == name })
		if i < 0 {
			return fmt.Errorf("-links: %q is none of them", name)
		}
		b.links = append(b.links, speeds[i])
	}
	b.parts = map[string]bool{}
	for name := range strings.SplitSeq(parts, ",") {
		if !slices.Contains([]string{"pull", "lazy", "profile", "tar"}, name) {
			return fmt.Errorf("-parts: %q is none of them", name)
		}
		b.parts[name] = true
	}
	switch b.form {
	case "gzip":
		b.form = images.Plain
	case images.EStargz, images.ZstdChunked:
	default:
		return fmt.Errorf("-form: %q is neither estargz nor zstdchunked nor gzip", b.form)
	}
	if b.bin, err = filepath.Abs(bin); err != nil {
		return err
	}
	if _, err := os.Stat(b.bin); err != nil {
		return fmt.Errorf("the command to measure: %w (make build)", err)
	}
	cache, err := images.DefaultCache()
	if err != nil {
		return err
	}
	set, err := images.EnsureWeb(ctx, cache, os.Stderr)
	if err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp(tmp, "cfs-fuse-bench-*"); err != nil {
		return err
	}
	b.work = filepath.Join(b.dir, "work")
	b.profile = filepath.Join(b.dir, "profile.json")
	if b.reg, err = registrytest.New(registrytest.Options{}); err != nil {
		return err
	}
	if b.plain, err = b.serve(set, images.Plain); err != nil {
		return err
	}
	b.lazy, err = b.serve(set, b.form)
	return err
}

// serve gives one form of the image to the registry, under a tag of its name.
func (b *bench) serve(set *images.Set, form string) (s imageSize, err error) {
	m, desc, err := set.Manifest(form, images.Web)
	if err != nil {
		return s, err
	}
	blobs := filepath.Join(set.Layout(form), "blobs", "sha256")
	raw, err := os.ReadFile(filepath.Join(blobs, desc.Digest.Encoded()))
	if err != nil {
		return s, err
	}
	b.reg.AddManifest(repository, form, desc.MediaType, raw)
	for _, d := range append([]ocispec.Descriptor{m.Config}, m.Layers...) {
		f, err := os.Open(filepath.Join(blobs, d.Digest.Encoded()))
		if err != nil {
			return s, err
		}
		b.files = append(b.files, f)
		b.reg.Add(d.Digest, f, d.Size)
		if _, err := io.Copy(io.Discard, io.NewSectionReader(f, 0, d.Size)); err != nil { // into the page cache
			return s, err
		}
	}
	s.layers = m.Layers
	for _, l := range m.Layers {
		s.bytes += l.Size
	}
	return s, nil
}

func (b *bench) tearDown() error {
	if b.reg != nil {
		b.reg.Close()
	}
	for _, f := range b.files {
		f.Close()
	}
	if b.dir == "" {
		return nil
	}
	return os.RemoveAll(b.dir)
}

// A sample is what one run of one part took, from its first request on.
type sample struct {
	answer  time.Duration // the application's first answer
	local   time.Duration // every byte local
	sealed  time.Duration // synced too, and swapped when the kernel can
	tar     time.Duration // the whole image read
	mounted time.Duration
	bytes   int64         // received until the answer
	cpu     time.Duration // until every byte was local: of the pull or of cfs-fuse, and of the registry
	modules int
	work    string // what had been asked for until the answer, by class
}

func (b *bench) run(ctx context.Context) error {
	b.printMachine()
	for _, s := range b.links {
		r := &result{speed: s, limit: b.limit(s, b.lazy.bytes), samples: map[string][]sample{}}
		if b.parts["profile"] {
			if _, err := b.once(ctx, speeds[0], b.record); err != nil {
				return fmt.Errorf("record an access profile: %w", err)
			}
		}
		for i := range b.runs {
			for _, part := range []struct {
				name string
				do   func(context.Context) (sample, error)
			}{{"pull", b.measurePull}, {"lazy", b.measureLazy}, {"profile", b.measureProfile}, {"tar", b.measureTar}} {
				if !b.parts[part.name] {
					continue
				}
				sm, err := b.once(ctx, s, part.do)
				if err != nil {
					return fmt.Errorf("%s at %s, run %d: %w", part.name, s.name, i+1, err)
				}
				fmt.Fprintf(os.Stderr, "%s %d/%d %-8s %s\n", s.name, i+1, b.runs, part.name, sm)
				r.samples[part.name] = append(r.samples[part.name], sm)
			}
		}
		r.print()
	}
	fmt.Printf("load at the end: %s\n", loadavg())
	return nil
}

// once does one run at a speed, on a filesystem of its own.
func (b *bench) once(ctx context.Context, s speed, do func(context.Context) (sample, error)) (_ sample, err error) {
	end, err := b.disk(ctx)
	if err != nil {
		return sample{}, err
	}
	defer func() { err = errors.Join(err, end()) }()
	b.reg.SetLink(s.link)
	return do(ctx)
}

func (s sample) String() string {
	return fmt.Sprintf("answer %.2f s, local %.2f s, sealed %.2f s, tar %.2f s, mounted %.2f s, %.1f MB before the answer%s, cpu %.2f s",
		s.answer.Seconds(), s.local.Seconds(), s.sealed.Seconds(), s.tar.Seconds(), s.mounted.Seconds(), float64(s.bytes)/1e6, s.work, s.cpu.Seconds())
}

// limit is what the link alone takes for n bytes.
func (b *bench) limit(s speed, n int64) time.Duration {
	if s.link.BytesPerSecond == 0 {
		return 0
	}
	return time.Duration(float64(n) / float64(s.link.BytesPerSecond) * float64(time.Second))
}

func (b *bench) printMachine() {
	var u syscall.Utsname
	syscall.Uname(&u)
	release := make([]byte, 0, len(u.Release))
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	fmt.Printf("Machine: %d cores, Linux %s, %s; load at the start %s\n", runtime.NumCPU(), release, runtime.Version(), loadavg())
	fmt.Printf("Image: %d layers, %.0f MB as gzip, %.0f MB as %s. Medians of %d, in brackets the least and the most.\n",
		len(b.plain.layers), float64(b.plain.bytes)/1e6, float64(b.lazy.bytes)/1e6, b.form, b.runs)
}

func loadavg() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err.Error()
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

// output runs a program, and puts what it complains of into the error.
func output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err, bytes.TrimSpace(errs.Bytes()))
	}
	return out, err
}
