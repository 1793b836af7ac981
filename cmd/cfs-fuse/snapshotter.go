package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/internal/criauth"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/keeper"
	"github.com/cfs-fuse/cfs-fuse/metrics"
	"github.com/cfs-fuse/cfs-fuse/mount"
	"github.com/cfs-fuse/cfs-fuse/snapshotter"
)

const snapshotterHelp = `Serve containerd as a proxy snapshotter: containers start before their images
are there.

containerd's config.toml names the socket (docs/containerd.md has the whole):

  [proxy_plugins.cfs]
    type = "snapshot"
    address = "/run/cfs-fuse/snapshotter.sock"

An image whose layers are all eStargz or zstd:chunked is not downloaded by
containerd: it is fetched as it is read, and the rest behind. When it is whole,
new containers of it are mounted by the kernel alone. Any other image containerd
downloads and unpacks as it does with its overlayfs snapshotter.

Should this process die, another one goes on where it was, and containers see a
pause: systemd starts it if the unit has FileDescriptorStoreMax= and Restart=, and
without systemd a process that is started beside this one.`

const snapshotterExample = `  # as containerd's [proxy_plugins.cfs] has it
  cfs-fuse snapshotter --address /run/cfs-fuse/snapshotter.sock

  # at most 50 GB of images that no container uses
  cfs-fuse snapshotter --store-size 50GB

  ctr image pull --snapshotter cfs registry.example.com/app:1
  ctr run --rm --snapshotter cfs registry.example.com/app:1 app`

// The hidden command that keeps the snapshotter's sessions without systemd.
const nodeHolderName = "hold-snapshotter"

type snapshotterFlags struct {
	mountFlags
	address  string
	cri      string
	remapIDs bool
}

func newSnapshotter(g *global) *cobra.Command {
	var f snapshotterFlags
	cmd := &cobra.Command{
		Use:     "snapshotter [flags]",
		Short:   "Serve containerd as a snapshotter",
		Long:    snapshotterHelp,
		Example: snapshotterExample,
		Args:    exactArgs(),
		RunE:    func(cmd *cobra.Command, _ []string) error { return f.run(cmd.Context(), g) },
	}
	f.define(cmd)
	return cmd
}

// define gives the command its flags, and f their defaults; those of mount that
// it does not have get values that change nothing.
func (f *snapshotterFlags) define(cmd *cobra.Command) {
	f.memory = fetcher.DefaultMemory
	f.swap, f.index, f.pull = "auto", "never", "missing"
	fl := cmd.Flags()
	fl.StringVar(&f.address, "address", "", "`path` of the socket for containerd (default snapshotter.sock in the runtime folder)")
	fl.StringVar(&f.opts.Root, "root", defaultRoot(), "`folder` of the store, and of snapshots")
	fl.BoolVar(&f.opts.Source.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to registries")
	fl.StringVar(&f.opts.Source.HostsDir, "hosts-dir", "/etc/containerd/certs.d", "`folder` of containerd's hosts.toml files")
	fl.StringVar(&f.backend, "backend", "auto", "`backend` of images that are not whole: fuse, hybrid (the kernel's mount, with FUSE for what is not there yet), or auto")
	fl.StringVar(&f.verity, "verity", "try", "`policy` of enforcing fs-verity on images that are whole: require, try or off")
	fl.BoolVar(&f.fill, "fill", true, "fetch in the background what nobody has read yet")
	fl.Var(&f.memory, "fetch-memory", "`size` of what may be in memory of what is being fetched, e.g. 64MiB")
	fl.Var(&f.rate, "limit-rate", "fetch no more than `size` a second, e.g. 10MB, what programs wait for first (default no limit)")
	fl.DurationVar(&f.opts.Source.ReadTimeout, "read-timeout", time.Minute, "`time` after which a read fails that no registry answers; 0 to wait for ever")
	fl.StringVar(&f.metricsAddr, "metrics", "", "serve Prometheus metrics at `address`/metrics, e.g. 127.0.0.1:9100")
	fl.BoolVar(&f.opts.InsecureTOC, "insecure-toc", false, "take layers whose table of contents the manifest does not vouch for")
	fl.BoolVar(&f.remapIDs, "remap-ids", false, "have containerd map IDs of user namespaces when it mounts, not change every file's owner (its proxy plugin needs capabilities = [\"remap-ids\"])")
	fl.StringVar(&f.cri, "cri", "", "pass kubelet's image requests on to containerd's socket at `path`, and fetch with the credentials of its pulls")
	addBudget(cmd, &f.opts.Budget)
}

func (f *snapshotterFlags) run(ctx context.Context, g *global) error {
	if err := f.check(g); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return hint.Wrap(errors.New("snapshotter: it mounts, and needs root"), "run it by systemd or with sudo")
	}
	if f.address == "" {
		f.address = filepath.Join(f.opts.Runtime, "snapshotter.sock")
	}
	f.opts.TryHybrid = tryHybridOnce()
	var options []grpc.ServerOption
	if f.cri != "" {
		to, err := grpc.NewClient("unix://"+f.cri, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return hint.Wrap(fmt.Errorf("--cri %s: %w", f.cri, err), "name containerd's socket, as /run/containerd/containerd.sock")
		}
		defer to.Close()
		keys := &criauth.Keyring{}
		f.opts.Source.Credentials = keys.Credentials
		options = criauth.NewProxy(to, keys).Options()
	}
	k, err := findNodeKeeper(f.opts.Logger)
	if err != nil {
		return err
	}
	limitHeap(int64(f.memory))
	f.opts.SpareMemory = func(bytes int64) { limitHeap(max(int64(f.memory), bytes)) }
	reg := prometheus.NewRegistry()
	f.opts.Metrics = metrics.New(reg)
	l, err := k.listen(f.address)
	if err != nil {
		return err
	}
	defer l.Close()
	if err := k.begin(f.address); err != nil {
		return err
	}
	s, err := snapshotter.New(snapshotter.Options{Mount: f.opts, Keeper: k, RemapIDs: f.remapIDs}, k.sessions())
	if err != nil {
		k.failed()
		return err
	}
	if f.metricsAddr != "" {
		reg.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
		endpoint, err := f.mountFlags.listen(reg, k.resumes())
		if err != nil {
			err = errors.Join(err, s.Close())
			k.failed()
			return err
		}
		defer endpoint.Close()
	}
	err = serveSnapshots(ctx, s, l, k, grpc.NewServer(options...))
	err = errors.Join(err, s.Close())
	k.over()
	return err
}

// serveSnapshots answers containerd until ctx ends.
func serveSnapshots(ctx context.Context, s *snapshotter.Snapshotter, l net.Listener, k *nodeKeeper, server *grpc.Server) error {
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	k.log.Info("serving containerd", "address", l.Addr().String(), "restarts", k.restarts)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		k.log.Warn("tell systemd", "error", err)
	}
	var watchdog <-chan time.Time
	if every, err := daemon.SdWatchdogEnabled(false); err == nil && every > 0 {
		tick := time.NewTicker(every / 3)
		defer tick.Stop()
		watchdog = tick.C
	}
	for {
		select {
		case err := <-served:
			return fmt.Errorf("serve containerd at %s: %w", l.Addr(), err)
		case <-watchdog:
			// A service that cannot look at its snapshots does not say that it is
			// well.
			if _, err := s.Usage(ctx, "watchdog"); err == nil || ctx.Err() != nil || snapshotter.IsNotFound(err) {
				daemon.SdNotify(false, daemon.SdNotifyWatchdog)
			}
		case <-ctx.Done():
			stop := time.AfterFunc(leaveTime, server.Stop)
			defer stop.Stop()
			server.GracefulStop()
			<-served
			return nil
		}
	}
}

// newNodeHolder is the command that keeps the snapshotter's sessions, and
// starts its successors.
func newNodeHolder(g *global) *cobra.Command {
	return &cobra.Command{
		Use:    nodeHolderName + " ADDRESS",
		Hidden: true,
		Args:   exactArgs("ADDRESS"),
		RunE: func(_ *cobra.Command, args []string) error {
			log, err := g.logger()
			if err != nil {
				return err
			}
			return keeper.Hold(log.With("snapshotter", args[0]), func(map[string]*os.File) bool { return false })
		},
	}
}

// The hidden command that tries the hybrid backend for the snapshotter.
const tryHybridName = "try-hybrid"

// newTryHybrid is that command. A trial asks a FUSE mount of its own process:
// killed meanwhile, that one would not end, and neither would the snapshotter.
func newTryHybrid() *cobra.Command {
	return &cobra.Command{
		Use:    tryHybridName + " FOLDER",
		Hidden: true,
		Args:   exactArgs("FOLDER"),
		RunE:   func(_ *cobra.Command, args []string) error { return mount.TryHybrid(args[0]) },
	}
}

// tryTime is how long a trial may take.
const tryTime = 30 * time.Second

// tryHybridOnce starts that command at the first call, and tells each what
// came of it: the store is one.
func tryHybridOnce() func(dir string) error {
	var once sync.Once
	var failed error
	return func(dir string) error {
		once.Do(func() {
			ctx, cancel := context.WithTimeout(context.Background(), tryTime)
			defer cancel()
			cmd := exec.CommandContext(ctx, "/proc/self/exe", tryHybridName, dir)
			cmd.WaitDelay = time.Second
			if out, err := cmd.CombinedOutput(); err != nil {
				failed = fmt.Errorf("%s (%w)", oneLine(strings.TrimPrefix(string(out), "cfs-fuse: ")), err)
			}
		})
		return failed
	}
}

// listenForContainerd makes the socket. One that a process has left behind is
// replaced.
func listenForContainerd(path string) (*net.UnixListener, error) {
	advice := "name another socket with --address"
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, hint.Wrap(fmt.Errorf("socket for containerd: %w", err), advice)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, hint.Wrap(fmt.Errorf("socket for containerd %s: another process serves it", path), "end that one, or "+advice)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, hint.Wrap(fmt.Errorf("socket for containerd: %w", err), advice)
	}
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, hint.Wrap(fmt.Errorf("socket for containerd: %w", err), advice)
	}
	l.SetUnlinkOnClose(false) // a successor's, perhaps
	return l, nil
}
