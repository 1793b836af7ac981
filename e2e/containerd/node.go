// Package containerd runs real containerds, Debian's and one built from the Go
// module proxy, with cfs-fuse or another snapshotter, each with folders of its
// own, in a mount namespace and with a /run of its own (Isolate). Its tests pull
// and run real images; the benchmark beside it measures.
package containerd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

const isolatedEnv = "CFS_FUSE_CONTAINERD_ISOLATED"

// Isolate returns once this process is one in mount and PID namespaces of its
// own, with an empty /run. Otherwise it starts itself again there, and never
// returns: it ends as that one does, and whatever that has started ends too.
func Isolate() error {
	if os.Getenv(isolatedEnv) != "" {
		return unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	args := append([]string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private", self}, os.Args[1:]...)
	cmd := exec.Command("unshare", args...)
	cmd.Env = append(os.Environ(), isolatedEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err = cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		return fmt.Errorf("isolate: %w", err)
	}
	os.Exit(0)
	return nil
}

// Build has the commands of the containerd that cfs-fuse is linked with built
// from the Go module proxy, once, and returns their folder below cache.
func Build(ctx context.Context, cache string, progress io.Writer) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Version}}", "github.com/containerd/containerd/v2").Output()
	if err != nil {
		return "", fmt.Errorf("build containerd: which version: %w", err)
	}
	version := strings.TrimSpace(string(out))
	var commands []string
	for _, c := range []string{"containerd", "ctr", "containerd-shim-runc-v2"} {
		commands = append(commands, "github.com/containerd/containerd/v2/cmd/"+c+"@"+version)
	}
	return images.GoInstall(ctx, cache, "containerd-"+version, progress, []string{"-tags", "no_btrfs no_zfs no_devmapper"}, commands...)
}

// Options say what runs on a Node.
type Options struct {
	// Dir is for everything that is written, but for sockets.
	Dir string
	// Bin is the folder of containerd's commands; "" means Debian's.
	Bin string
	// Binary is the cfs-fuse command, Args are more of its arguments.
	Binary string
	Args   []string
	// Snapshotter is "cfs" (also if empty); "overlayfs" or another one of
	// containerd's; or any name, if Address is the socket of a proxy snapshotter.
	Snapshotter, Address string
}

// A Node is a containerd with a snapshotter.
type Node struct {
	o      Options
	socket string
	daemon *exec.Cmd
	snap   *exec.Cmd
}

// Start starts both, and returns when they answer.
func Start(ctx context.Context, o Options) (*Node, error) {
	if o.Snapshotter == "" {
		o.Snapshotter = "cfs"
	}
	n := &Node{o: o, socket: "/run/containerd/containerd.sock"}
	if err := os.MkdirAll(o.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := n.StartSnapshotter(); err != nil {
		return nil, err
	}
	if err := n.StartDaemon(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// Root is the folder of cfs-fuse's store, Runtime that of its mounts.
func (n *Node) Root() string    { return filepath.Join(n.o.Dir, "store") }
func (n *Node) Runtime() string { return "/run/cfs-fuse" }

// StartSnapshotter starts cfs-fuse, if that is the snapshotter.
func (n *Node) StartSnapshotter() error {
	if n.o.Snapshotter != "cfs" || n.o.Address != "" {
		return nil
	}
	var err error
	args := append([]string{"--runtime-dir", n.Runtime(), "snapshotter", "--root", n.Root()}, n.o.Args...)
	n.snap, err = n.start("snapshotter.log", n.o.Binary, args...)
	if err != nil {
		return err
	}
	return n.await(n.snap, "cfs-fuse", filepath.Join(n.Runtime(), "snapshotter.sock"))
}

// StartDaemon starts containerd.
func (n *Node) StartDaemon(ctx context.Context) error {
	address, version := n.o.Address, 3
	if address == "" {
		address = filepath.Join(n.Runtime(), "snapshotter.sock")
	}
	command := filepath.Join(n.o.Bin, "containerd")
	if n.o.Bin == "" {
		command, version = "/usr/bin/containerd", 2
	}
	config := fmt.Sprintf("version = %d\nroot = %q\nstate = \"/run/containerd\"\n", version, filepath.Join(n.o.Dir, "containerd"))
	config += fmt.Sprintf("[grpc]\n  address = %q\n", n.socket)
	if n.o.Snapshotter != "overlayfs" {
		config += fmt.Sprintf("[proxy_plugins.%s]\n  type = \"snapshot\"\n  address = %q\n", n.o.Snapshotter, address)
		if n.o.Bin != "" {
			config += fmt.Sprintf("  [proxy_plugins.%s.exports]\n    enable_remote_snapshot_annotations = \"true\"\n", n.o.Snapshotter)
		}
	}
	if n.o.Bin == "" {
		config += fmt.Sprintf("[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = %q\n  disable_snapshot_annotations = false\n", n.o.Snapshotter)
	} else {
		config += fmt.Sprintf("[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = %q\n  disable_snapshot_annotations = false\n", n.o.Snapshotter)
		config += fmt.Sprintf("[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"linux\"\n  snapshotter = %q\n", n.o.Snapshotter)
	}
	path := filepath.Join(n.o.Dir, "config.toml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		return err
	}
	var err error
	if n.daemon, err = n.start("containerd.log", command, "-c", path); err != nil {
		return err
	}
	if err := n.await(n.daemon, "containerd", n.socket); err != nil {
		return err
	}
	_, err = n.Ctr(ctx, "version")
	return err
}

// start starts a program whose output goes to the end of a log.
func (n *Node) start(log, command string, args ...string) (*exec.Cmd, error) {
	out, err := os.OpenFile(filepath.Join(n.o.Dir, log), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	cmd := exec.Command(command, args...)
	cmd.Env = n.env()
	cmd.Stdout, cmd.Stderr = out, out
	return cmd, cmd.Start()
}

func (n *Node) env() []string {
	env := append(os.Environ(), "CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1")
	if n.o.Bin != "" {
		env = append(env, "PATH="+n.o.Bin+":"+os.Getenv("PATH")) // of two the last counts
	}
	return env
}

const startTime = time.Minute

func (n *Node) await(cmd *exec.Cmd, what, socket string) error {
	for end := time.Now().Add(startTime); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("unix", socket)
		if err == nil {
			c.Close()
			return nil
		}
		if time.Now().After(end) || unix.Kill(cmd.Process.Pid, 0) != nil {
			return fmt.Errorf("%s does not answer: %w\n%s", what, err, n.Log(what))
		}
	}
}

// Log returns the end of what containerd or cfs-fuse has said.
func (n *Node) Log(what string) string {
	name := "containerd.log"
	if what != "containerd" {
		name = "snapshotter.log"
	}
	text, _ := os.ReadFile(filepath.Join(n.o.Dir, name))
	return string(text[max(0, len(text)-6000):])
}

// Command is ctr with the node's containerd, not started.
func (n *Node) Command(ctx context.Context, args ...string) *exec.Cmd {
	command := filepath.Join(n.o.Bin, "ctr")
	if n.o.Bin == "" {
		command = "/usr/bin/ctr"
	}
	cmd := exec.CommandContext(ctx, command, append([]string{"--address", n.socket}, args...)...)
	cmd.Env = n.env()
	cmd.WaitDelay = time.Second
	return cmd
}

// Ctr runs ctr and returns its standard output.
func (n *Node) Ctr(ctx context.Context, args ...string) (string, error) {
	cmd := n.Command(ctx, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("ctr %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(errs.String()+" "+lastLine(out.String())))
	}
	return out.String(), nil
}

func lastLine(s string) string {
	s = strings.TrimSpace(s)
	return s[strings.LastIndex(s, "\n")+1:]
}

// Pull pulls an image of a registry without TLS. Debian's ctr downloads every
// layer, whatever the snapshotter says; there containerd's client is used, as
// other programs do.
func (n *Node) Pull(ctx context.Context, ref string) error {
	if n.o.Bin != "" {
		_, err := n.Ctr(ctx, "image", "pull", "--plain-http", "--snapshotter", n.o.Snapshotter, ref)
		return err
	}
	c, err := client.New(n.socket)
	if err != nil {
		return err
	}
	defer c.Close()
	plain := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchAllHosts))
	_, err = c.Pull(namespaces.WithNamespace(ctx, "default"), ref, client.WithPullUnpack, client.WithPullSnapshotter(n.o.Snapshotter),
		client.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(ref)),
		client.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: plain})))
	return err
}

// Run runs a command in a new container and returns what it printed.
func (n *Node) Run(ctx context.Context, ref, id string, argv ...string) (string, error) {
	return n.Ctr(ctx, append([]string{"run", "--rm", "--snapshotter", n.o.Snapshotter, "--", ref, id}, argv...)...)
}

// Servers lists the processes of cfs-fuse that serve, and with holders those that
// would start another one.
func (n *Node) Servers(holders bool) (pids []int) {
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, path := range lines {
		text, _ := os.ReadFile(path)
		args := strings.Split(string(text), "\x00")
		for _, a := range args[min(1, len(args)):] {
			if args[0] == n.o.Binary && (a == "snapshotter" || holders && a == "hold-snapshotter") {
				pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}

// Kill kills the process that serves, as kill -9 does.
func (n *Node) Kill() {
	for _, pid := range n.Servers(false) {
		unix.Kill(pid, unix.SIGKILL)
	}
}

// StopDaemon ends containerd; containers go on.
func (n *Node) StopDaemon() {
	if n.daemon != nil {
		n.daemon.Process.Signal(unix.SIGTERM)
		n.daemon.Wait()
		n.daemon = nil
	}
}

// StopSnapshotter kills cfs-fuse and what would start another one: all at once,
// as when the machine stops.
func (n *Node) StopSnapshotter() {
	for pids := n.Servers(true); len(pids) > 0; pids = n.Servers(true) {
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGSTOP)
		}
		for _, pid := range pids {
			unix.Kill(pid, unix.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if n.snap != nil {
		n.snap.Wait()
		n.snap = nil
	}
}

// Close ends everything.
func (n *Node) Close() error {
	n.StopDaemon()
	n.StopSnapshotter()
	return nil
}
