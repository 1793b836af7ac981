package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/sandbox"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const recordHelp = `Run COMMAND in the tree of the image SOURCE, and record what it reads first: the
access profile that 'cfs-fuse mount' and 'cfs-fuse convert' start with. Without
COMMAND, what the image's config says is run, with its environment, user and folder.

The tree is writable, in memory; /proc, /sys, /dev, /tmp and /run are there, and the
network is this machine's. Mounts and processes of the command are in namespaces of its
own, and end with it. It is no container: what needs to be kept away from the machine
should not be run so.

The image is mounted by FUSE for this, whatever the store has of it, so that no read
goes unseen. Its layers must be eStargz or zstd:chunked. The profile takes the place of the
one that the store has for the image, and with --output is written to a file too.

The exit status is that of COMMAND; 126 and 127 if it cannot be run or is not there.`

const recordExample = `  cfs-fuse record docker://registry.example.com/app:1 -- app --version

  # a server, for twenty seconds
  cfs-fuse record --timeout 20s --output app.json docker://registry.example.com/app:1`

type recordFlags struct {
	opts    mount.Options
	output  string
	env     []string
	user    string
	workdir string
	timeout time.Duration
}

func newRecord(g *global) *cobra.Command {
	var f recordFlags
	cmd := &cobra.Command{
		Use:     "record [flags] SOURCE [-- COMMAND [ARGUMENT...]]",
		Short:   "Run a program in an image and record what it reads first",
		Long:    recordHelp,
		Example: recordExample,
		Args: func(cmd *cobra.Command, args []string) error {
			before := len(args)
			if dash := cmd.ArgsLenAtDash(); dash >= 0 {
				before = dash
			}
			if before > 1 {
				return hint.Wrap(usageError{fmt.Errorf("unexpected argument %q", args[1])}, "write -- before the command")
			}
			return exactArgs("SOURCE")(cmd, args[:before])
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, g, args[0], args[1:])
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.opts.Root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVarP(&f.output, "output", "o", "", "write the profile to `FILE` too")
	fl.StringArrayVarP(&f.env, "env", "e", nil, "set `NAME=VALUE` in the command's environment (may be repeated)")
	fl.StringVarP(&f.user, "user", "u", "", "run as `USER[:GROUP]` of the image (default its config's)")
	fl.StringVarP(&f.workdir, "workdir", "w", "", "run in this `folder` of the image (default its config's)")
	fl.DurationVar(&f.timeout, "timeout", 0, "end the command with SIGTERM after this `time`, and that is no failure; 0: never")
	fl.StringVar(&f.opts.Source.Platform, "platform", "", "`os/arch` to take of a multi-platform image (default this machine's)")
	fl.BoolVar(&f.opts.InsecureTOC, "insecure-toc", false, "take layers whose table of contents the manifest does not vouch for")
	addRegistryFlags(cmd, &f.opts.Source)
	return cmd
}

// exitStatus is that of a program which was run for the user, and has said
// itself what there is to say.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// ExitCode is what this process ends with.
func (e exitStatus) ExitCode() int { return int(e) }

func (f *recordFlags) run(cmd *cobra.Command, g *global, source string, args []string) error {
	if os.Geteuid() != 0 {
		return hint.Wrap(errors.New("record: only root can make the namespaces for it"), "use sudo")
	}
	if f.timeout < 0 {
		return usageError{fmt.Errorf("--timeout %v: negative", f.timeout)}
	}
	for _, e := range f.env {
		if !strings.Contains(e, "=") {
			return usageError{fmt.Errorf("--env %s: want NAME=VALUE", e)}
		}
	}
	// From here on this process has its mounts for itself, and they end with it.
	if err := ownMounts(); err != nil {
		return err
	}
	var err error
	if f.opts.Logger, err = g.logger(); err != nil {
		return err
	}
	if f.opts.Root, err = filepath.Abs(f.opts.Root); err != nil {
		return err
	}
	return f.record(cmd.Context(), cmd.ErrOrStderr(), source, args)
}

// ownMountsEnv marks a process that has a mount namespace of its own.
const ownMountsEnv = "CFS_FUSE_OWN_MOUNTS"

// ownMounts starts this program again, as this process, in a mount namespace of
// its own. In what is started so, it does nothing.
func ownMounts() error {
	if os.Getenv(ownMountsEnv) == fmt.Sprint(os.Getpid()) {
		os.Unsetenv(ownMountsEnv)
		return nil
	}
	runtime.LockOSThread() // of the new program, this thread is the first
	defer runtime.UnlockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNS)
	if err == nil {
		err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	}
	if err == nil {
		err = unix.Exec("/proc/self/exe", os.Args, append(os.Environ(), fmt.Sprintf("%s=%d", ownMountsEnv, os.Getpid())))
	}
	return hint.Wrap(fmt.Errorf("make a mount namespace: %w", err), "record needs CAP_SYS_ADMIN")
}

func (f *recordFlags) record(ctx context.Context, say io.Writer, source string, args []string) (err error) {
	temp, err := os.MkdirTemp("", "cfs-fuse-record-*")
	if err != nil {
		return fmt.Errorf("make a folder to mount at: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	tree, work := filepath.Join(temp, "image"), filepath.Join(temp, "work")
	for _, dir := range []string{tree, work} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	command, err := f.command(ctx, source, args)
	if err != nil {
		return err
	}
	command.Root, command.Temp = tree, work
	o := f.opts
	o.Backend, o.Swap, o.NoFill, o.AllowOther, o.Record = mount.FUSE, mount.Never, true, true, true
	m, err := mount.Start(ctx, source, tree, o)
	if err != nil {
		return err
	}
	status, timedOut, err := f.runIn(ctx, command)
	p := m.Profile()
	end, cancel := context.WithTimeout(context.Background(), stopTime)
	defer cancel()
	if closeErr := m.Close(end); err == nil {
		err = closeErr
	}
	if err != nil {
		return fmt.Errorf("record %s: %w", source, err)
	}
	if err := f.write(say, p); err != nil {
		return err
	}
	if status != 0 && !timedOut {
		return exitStatus(status)
	}
	return nil
}

// runIn runs the command, and reports whether --timeout ended it.
func (f *recordFlags) runIn(ctx context.Context, c sandbox.Command) (status int, timedOut bool, err error) {
	if f.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, f.timeout)
		defer cancel()
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
	defer signal.Stop(signals)
	status, err = sandbox.Run(ctx, c, signals)
	return status, errors.Is(ctx.Err(), context.DeadlineExceeded), err
}

// command makes what is run of the arguments and the image's config.
func (f *recordFlags) command(ctx context.Context, source string, args []string) (sandbox.Command, error) {
	var c sandbox.Command
	src, err := fetcher.OpenSource(source, f.opts.Source)
	if err != nil {
		return c, err
	}
	defer src.Close()
	m, err := src.Resolve(ctx)
	if err != nil {
		return c, err
	}
	var config ocispec.Image
	if !m.LocalLayer {
		raw, err := fetcher.ReadConfig(ctx, src, m)
		if err == nil {
			err = json.Unmarshal(raw, &config)
		}
		if err != nil {
			return c, fmt.Errorf("read the config of %s: %w", source, err)
		}
	}
	if len(args) == 0 {
		args = append(append(args, config.Config.Entrypoint...), config.Config.Cmd...)
	}
	if len(args) == 0 {
		return c, usageError{hint.Wrap(fmt.Errorf("%s has no command in its config, and none is given", source), "write -- COMMAND after SOURCE")}
	}
	c = sandbox.Command{Args: args, Env: append(append(c.Env, config.Config.Env...), f.env...), Dir: config.Config.WorkingDir, User: config.Config.User}
	if f.workdir != "" {
		c.Dir = filepath.Join("/", f.workdir)
	}
	if f.user != "" {
		c.User = f.user
	}
	return c, nil
}

// write says what was recorded, and writes it to --output.
func (f *recordFlags) write(say io.Writer, p *image.Profile) error {
	sum, contents := int64(0), map[image.Digest]bool{}
	for _, a := range p.Accesses {
		sum += a.N
		contents[a.Content] = true
	}
	fmt.Fprintf(say, "recorded %d accesses: %s of %d files\n", len(p.Accesses), size(sum), len(contents))
	if f.output == "" {
		return nil
	}
	raw, err := p.Encode()
	if err == nil {
		err = durable.WriteFile(f.output, raw, 0o644)
	}
	if err != nil {
		return hint.Wrap(fmt.Errorf("write the access profile: %w", err), "the store has it: 'cfs-fuse profile export'")
	}
	return nil
}
