package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const mountHelp = `Mount the image SOURCE at the folder MOUNTPOINT, and return when the mount
serves. A process goes on in the background until the mount is swapped for the
kernel's, or unmounted.

SOURCE is one of
  docker://HOST/NAME[:TAG][@DIGEST]   an image in a registry; docker:// may be left out
  oci:DIR[:TAG|@DIGEST]               an OCI image layout in a folder
  oci-archive:FILE[:TAG|@DIGEST]      an OCI image layout in a tar
  layer:FILE                          one layer blob
  composefs:IMAGE                     a composefs image, with --objects DIR

Layers that are eStargz or zstd:chunked are read as programs need them. Ordinary
ones, tars with gzip, zstd or no compression, are read first, as a pull would,
and then are all here. A tag that the store knows is not asked for again (--pull
always does). An image that the store has sealed is mounted
by the kernel at once, without its registry.

Should that process die, another one goes on where it was, and programs see a
pause. With --foreground this is so under systemd only, if the unit has
FileDescriptorStoreMax= and Restart=.`

const mountExample = `  # look inside an image
  cfs-fuse mount registry.example.com/debian:12 /mnt

  # from a folder, for FUSE only, fetching only what is read
  cfs-fuse mount --swap never --fill=false oci:./layout:latest /mnt

  # only this image and no other, with fs-verity enforced
  cfs-fuse mount --verity require --digest 9f3c… docker://registry.example.com/app@sha256:… /mnt

  cfs-fuse wait --for swapped /mnt && cfs-fuse umount /mnt`

type mountFlags struct {
	opts             mount.Options
	swap, verity     string
	backend          string
	namespaces       string
	options          []string
	digest, pull     string
	profile          string
	index            string
	indexTrust       []string
	fill, foreground bool
	quiet            bool
	metricsAddr      string
	memory, rate     bytesFlag
}

func newMount(g *global) *cobra.Command {
	var f mountFlags
	cmd := &cobra.Command{
		Use:     "mount [flags] SOURCE MOUNTPOINT",
		Short:   "Mount an image",
		Long:    mountHelp,
		Example: mountExample,
		Args:    exactArgs("SOURCE", "MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd.Context(), g, args[0], args[1])
		},
	}
	f.define(cmd)
	return cmd
}

// define gives a command the flags of a mount, and f their defaults.
func (f *mountFlags) define(cmd *cobra.Command) {
	f.memory = fetcher.DefaultMemory
	fl := cmd.Flags()
	fl.StringVar(&f.opts.Root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVar(&f.opts.Source.Platform, "platform", "", "`os/arch` to take of a multi-platform image (default this machine's)")
	fl.BoolVar(&f.opts.Source.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to registries")
	fl.StringVar(&f.opts.Source.HostsDir, "hosts-dir", "/etc/containerd/certs.d", "`folder` of containerd's hosts.toml files")
	fl.StringVar(&f.pull, "pull", "missing", "ask what a tag stands for if the store does not know it (missing) or always: `policy`")
	fl.StringVar(&f.backend, "backend", "auto", "`backend` until the swap: fuse, hybrid (the kernel's mount, with FUSE for what is not there yet; root), or auto")
	fl.StringVar(&f.swap, "swap", "auto", "`policy` of the swap to a kernel mount: auto, never or require")
	fl.StringSliceVarP(&f.options, "options", "o", nil, "`list` of mount(8)'s ro, nosuid, nodev, noexec, and allow_other for mounts without root")
	fl.StringVar(&f.opts.View.IDMap, "idmap", "", "map the image's owners: `UIDS:GIDS`, each a list of IMAGE-HOST-COUNT, or a user namespace (/proc/PID/ns/user)")
	fl.StringVar(&f.opts.View.Upper, "upperdir", "", "make the mount writable: what changes goes to the `folder`, which with --workdir is overlayfs's")
	fl.StringVar(&f.opts.View.Work, "workdir", "", "an empty `folder` beside --upperdir, on the same filesystem")
	fl.StringVar(&f.opts.View.Context, "context", "", "SELinux `context` of all files")
	fl.StringVar(&f.verity, "verity", "try", "`policy` of enforcing fs-verity after the swap: require, try or off")
	fl.StringVar(&f.digest, "digest", "", "fs-verity `SHA256` digest that the sealed image must have")
	fl.StringVar(&f.index, "index", "never", "`policy` of reading an ordinary layer by an index that another has made: auto (if one is attached to it), require, or never")
	defineIndexTrust(cmd, &f.indexTrust)
	fl.StringVar(&f.profile, "profile", "store", "fetch first what the access profile says: the store's own; auto, if that has none of the image, the one attached to it; or `FILE`")
	fl.BoolVar(&f.fill, "fill", true, "fetch in the background what nobody has read yet")
	fl.Var(&f.memory, "fetch-memory", "`size` of what may be in memory of what is being fetched, e.g. 64MiB")
	fl.Var(&f.rate, "limit-rate", "fetch no more than `size` a second, e.g. 10MB, what programs wait for first (default no limit)")
	fl.DurationVar(&f.opts.Source.ReadTimeout, "read-timeout", time.Minute, "`time` after which a read fails that no registry answers; 0 to wait for ever")
	fl.StringVar(&f.metricsAddr, "metrics", "", "serve Prometheus metrics at `address`/metrics, e.g. 127.0.0.1:9100")
	fl.BoolVar(&f.opts.InsecureTOC, "insecure-toc", false, "take layers whose table of contents the manifest does not vouch for")
	fl.StringArrayVar(&f.opts.Objects, "objects", nil, "`folder` of objects of a composefs: source (may be repeated)")
	addBudget(cmd, &f.opts.Budget)
	addSwapNamespaces(cmd, &f.namespaces)
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "show no progress")
	fl.BoolVar(&f.foreground, "foreground", false, "stay in the foreground, log to standard error, unmount on Ctrl-C")
}

// minMemory is what two chunks of the usual size take.
const minMemory = 8 << 20

// mountAttributes are the words of --options. A mount without --upperdir is
// read-only anyway.
var mountAttributes = map[string]int{
	"ro": 0, "allow_other": 0,
	"nosuid": unix.MOUNT_ATTR_NOSUID, "nodev": unix.MOUNT_ATTR_NODEV, "noexec": unix.MOUNT_ATTR_NOEXEC,
}

// check turns the flags into Options, before anything is touched.
func (f *mountFlags) check(g *global) error {
	err := errors.Join(
		oneOf("backend", f.backend, "auto", "fuse", "hybrid"),
		oneOf("swap", f.swap, "auto", "never", "require"),
		oneOf("verity", f.verity, "require", "try", "off"),
		oneOf("index", f.index, "auto", "never", "require"),
		oneOf("pull", f.pull, "missing", "always"))
	if err != nil {
		return usageError{err}
	}
	if f.memory < minMemory {
		return usageError{fmt.Errorf("--fetch-memory %s: want at least %s", &f.memory, size(minMemory))}
	}
	switch t := &f.opts.Source.ReadTimeout; {
	case *t < 0:
		return usageError{fmt.Errorf("--read-timeout %v: negative", *t)}
	case *t == 0:
		*t = -1 // for ever
	}
	f.opts.Share = fetcher.NewShare(int64(f.memory), int64(f.rate))
	f.opts.Swap, f.opts.Verity, f.opts.Index = mount.Policy(f.swap), mount.Policy(f.verity), mount.Policy(f.index)
	for _, word := range f.options {
		attr, ok := mountAttributes[word]
		if !ok {
			return usageError{fmt.Errorf("--options %s: want ro, nosuid, nodev, noexec, allow_other", word)}
		}
		f.opts.Attributes |= attr
		f.opts.AllowOther = f.opts.AllowOther || word == "allow_other"
		f.opts.View.ReadOnly = f.opts.View.ReadOnly || word == "ro"
	}
	if err := mount.CheckIDMap(f.opts.View.IDMap); err != nil {
		return usageError{fmt.Errorf("--idmap: %w", err)}
	}
	if f.opts.SwapNamespaces, err = mount.ParsePIDs(f.namespaces); err != nil {
		return usageError{fmt.Errorf("--swap-namespaces: %w", err)}
	}
	if (f.opts.View.Upper == "") != (f.opts.View.Work == "") {
		return usageError{errors.New("--upperdir and --workdir go together: name both, or none")}
	}
	f.opts.Backend = mount.Backend(f.backend)
	f.opts.Refresh, f.opts.NoFill = f.pull == "always", !f.fill
	if f.digest != "" {
		if f.opts.Digest, err = toc.ParseDigest("sha256:" + strings.TrimPrefix(f.digest, "sha256:")); err != nil {
			return usageError{fmt.Errorf("--digest: %w", err)}
		}
	}
	if f.opts.Root, err = filepath.Abs(f.opts.Root); err != nil {
		return err
	}
	if f.opts.Runtime, err = filepath.Abs(g.runtimeDir); err != nil {
		return err
	}
	f.opts.Logger, err = g.logger()
	return err
}

func (f *mountFlags) run(ctx context.Context, g *global, source, mountpoint string) error {
	if err := f.check(g); err != nil {
		return err
	}
	before, err := findSession(f.foreground, f.opts.Logger)
	if err != nil {
		return err
	}
	if !before.resumes() { // the start of one that is continued is over
		if f.opts.Profile, err = f.startProfile(source); err != nil {
			return err
		}
		attached, done := attachedIndexes(source, f.indexTrust, f.opts.Source)
		defer done()
		f.opts.AttachedIndex = attached
	}
	ready := readyPipe()
	if !f.foreground && ready == nil && !before.resumes() {
		if err := checkSource(source, f.opts.Source); err != nil {
			return err
		}
		return background(ctx, f.opts.Runtime, mountpoint, f.capabilities(), f.quiet)
	}
	err = f.serve(ctx, source, mountpoint, ready, before)
	if before.resumes() && err != nil {
		f.opts.Logger.Error("the mount cannot be continued", "error", err)
	}
	ready.report(err)
	if ready != nil {
		return nil // the foreground command has said it
	}
	return err
}

// capabilities are those that the mount needs besides the usual ones.
func (f *mountFlags) capabilities() (all []int) {
	if f.opts.View.IDMap != "" {
		all = append(all, forMapping...)
	}
	if f.opts.View.Upper != "" {
		all = append(all, forWriting...)
	}
	return all
}

// startProfile makes of --profile what mount asks.
func (f *mountFlags) startProfile(source string) (func(context.Context, image.Digest, bool) (*image.Profile, error), error) {
	switch f.profile {
	case "store":
		return nil, nil
	case "auto":
		return func(ctx context.Context, manifest image.Digest, own bool) (*image.Profile, error) {
			if own {
				return nil, nil
			}
			return pullProfile(ctx, source, digest.Digest(manifest.String()), f.opts.Source)
		}, nil
	}
	p, err := readProfileFile(f.profile, nil)
	if err != nil {
		return nil, err
	}
	return func(context.Context, image.Digest, bool) (*image.Profile, error) { return p, nil }, nil
}

// checkSource refuses a source that cannot be one before a process is started
// for it.
func checkSource(source string, o fetcher.Options) error {
	if strings.HasPrefix(source, "composefs:") {
		return nil
	}
	s, err := fetcher.OpenSource(source, o)
	if err != nil {
		return err
	}
	return s.Close()
}

// stopTime is how long a mount that is told to end waits for open files.
const stopTime = 10 * time.Second

// leaveTime is how long a process that is replaced has to come to a good end
// of what it does in the background.
const leaveTime = 2 * time.Second

// serve mounts, or goes on with a mount, and stays until nothing is left to do,
// ctx ends, or a successor is ready.
func (f *mountFlags) serve(ctx context.Context, source, mountpoint string, ready *readiness, before *session) error {
	limitHeap(int64(f.memory))
	f.opts.SpareMemory = func(bytes int64) { limitHeap(max(int64(f.memory), bytes)) }
	reg := prometheus.NewRegistry()
	f.opts.Metrics = metrics.New(reg)
	if f.metricsAddr != "" {
		reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	}
	if err := f.opts.Metrics.Spool(spoolDir(f.opts.Runtime)); err != nil {
		f.opts.Logger.Warn("what this mount counts will be missing in the node's metrics", "error", err)
	}
	defer f.opts.Metrics.Retire() // what it lost is in nobody's way
	f.opts.Began, f.opts.Progress = commandBegan(), ready.step
	var m *mount.Mount
	var control *mount.Control
	var err error
	if before.resumes() {
		m, control, err = before.resume(source, mountpoint, f.opts)
	} else if err = before.begin(mountpoint); err == nil {
		m, err = mount.Start(ctx, source, mountpoint, f.opts)
	}
	if err != nil {
		return err
	}
	endpoint, err := f.listen(reg, before.resumes())
	if err == nil {
		defer endpoint.Close()
		if control == nil {
			control, err = mount.NewControl(m)
		}
	}
	if err == nil {
		err = before.keep(m, control)
	}
	if err == nil {
		ready.report(nil)
		served := make(chan struct{})
		go func() {
			m.Wait()
			close(served)
		}()
		select {
		case <-served:
		case <-ctx.Done():
		case <-before.leave():
			end, cancel := context.WithTimeout(context.Background(), leaveTime)
			defer cancel()
			m.Leave(end)
			control.Leave(end)
			return nil
		}
	}
	end, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	err = errors.Join(err, m.Close(end))
	before.over()
	if control != nil {
		control.Close()
	}
	return err
}

// listen serves the metrics, if that is wanted. A successor does without
// rather than not to serve the mount.
func (f *mountFlags) listen(reg *prometheus.Registry, resumed bool) (*metricsServer, error) {
	if f.metricsAddr == "" {
		return nil, nil
	}
	endpoint, err := serveMetrics(f.metricsAddr, reg)
	if err != nil && resumed {
		f.opts.Logger.Warn("metrics are not served", "error", err)
		return nil, nil
	}
	return endpoint, hint.Wrap(err, "name a free address with --metrics")
}
