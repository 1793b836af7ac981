package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// The exit codes, as the root command's help lists them.
const (
	exitOK         = 0
	exitFailed     = 1
	exitUsage      = 2
	exitNotMounted = 3
	exitStuck      = 4
	exitTimeout    = 5
)

const rootHelp = `cfs-fuse mounts container images before they are there.

A mount serves the image's whole tree at once, through FUSE, and fetches only
what is read; the rest arrives behind. When every byte is local and checked,
the mount is swapped for one of the kernel's own (EROFS and overlayfs), and
nothing of cfs-fuse is left running for it.

Exit codes:
  0  done
  1  failed; the message says at what, why, and what to do next
  2  the command line is wrong
  3  there is no such mount
  4  the state that was waited for will not be reached
  5  the time given by --timeout is over`

// global are the flags that every command has.
type global struct {
	runtimeDir string
	logLevel   string
	logFormat  string
}

// usageError is a command line that cannot be right.
type usageError struct{ error }

// extra are commands of other builds than the installed one (docs.go).
var extra []func() *cobra.Command

func newRoot(g *global) *cobra.Command {
	root := &cobra.Command{
		Use:           "cfs-fuse",
		Short:         "Mount container images before they are there",
		Long:          rootHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("unknown command %q", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.PersistentFlags().StringVar(&g.runtimeDir, "runtime-dir", defaultRuntime(), "`folder` of the records of what is mounted")
	root.PersistentFlags().StringVar(&g.logLevel, "log-level", "info", "`level` of what is logged: debug, info, warn or error")
	root.PersistentFlags().StringVar(&g.logFormat, "log-format", "text", "`format` of the log: text or json, one line for each event")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	root.AddCommand(
		newMount(g),
		newSnapshotter(g),
		newNodeHolder(g),
		newTryHybrid(),
		newUmount(g),
		newStatus(g),
		newWait(g),
		newSwap(g),
		newUpgrade(g),
		newHolder(g),
		newVerify(g),
		newConvert(g),
		newRecord(g),
		newProfile(g),
		newIndex(g),
		newCache(g),
		newErofs(),
		newExplain(g),
		newReport(g),
		newTop(g),
		newInspect(g),
		newLs(g),
		newTree(g),
		newCat(g),
		newStat(g),
		newDu(g),
		newFind(g),
		newCp(g),
		newDiff(g),
		newLayers(g),
		newExporter(g),
		newVersion(),
		newDoctor(g),
	)
	for _, more := range extra {
		root.AddCommand(more())
	}
	return root
}

// run executes one command line and returns its exit code. Errors go to
// standard error, one line each, with what to do next.
func run(ctx context.Context, args []string) int {
	var g global
	root := newRoot(&g)
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if _, ok := errors.AsType[errPartial](err); ok {
		return exitFailed // each was said already
	}
	if status, ok := errors.AsType[exitStatus](err); ok {
		return int(status)
	}
	code := exitCode(err)
	advice := hint.Of(err)
	if code == exitUsage && advice == "" {
		advice = fmt.Sprintf("see '%s --help'", cmd.CommandPath())
	}
	line := oneLine(err.Error())
	if advice != "" {
		line += " (hint: " + oneLine(advice) + ")"
	}
	fmt.Fprintln(os.Stderr, "cfs-fuse: "+line)
	return code
}

func exitCode(err error) int {
	var code interface{ ExitCode() int }
	switch _, usage := errors.AsType[usageError](err); {
	case usage, strings.HasPrefix(err.Error(), "unknown command"), strings.HasPrefix(err.Error(), "unknown flag"):
		return exitUsage
	case errors.As(err, &code):
		return code.ExitCode()
	case errors.Is(err, kmount.ErrNotMounted):
		return exitNotMounted
	case errors.Is(err, mount.ErrStuck):
		return exitStuck
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	}
	return exitFailed
}

// oneLine makes a text one line that can be printed anywhere.
func oneLine(s string) string {
	printable := func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return utf8.RuneError // a name in an image must not command the terminal
	}
	return strings.Map(printable, strings.Join(strings.Fields(s), " "))
}

// exactArgs wants as many arguments as names, and says which is missing.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usageError{fmt.Errorf("%s is missing", names[len(args)])}
		case len(args) > len(names):
			return usageError{fmt.Errorf("unexpected argument %q", args[len(names)])}
		}
		return nil
	}
}

// oneOf fails unless value is among allowed.
func oneOf(flag, value string, allowed ...string) error {
	for _, a := range allowed {
		if value == a {
			return nil
		}
	}
	return usageError{fmt.Errorf("--%s %s: want %s", flag, value, strings.Join(allowed, ", "))}
}

func (g *global) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(g.logLevel)); err != nil {
		return nil, usageError{fmt.Errorf("--log-level %s: want debug, info, warn or error", g.logLevel)}
	}
	o := &slog.HandlerOptions{Level: level}
	switch g.logFormat {
	case "text", "":
		return slog.New(slog.NewTextHandler(os.Stderr, o)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(os.Stderr, o)), nil
	}
	return nil, usageError{fmt.Errorf("--log-format %s: want text or json", g.logFormat)}
}

func defaultRuntime() string {
	if os.Geteuid() == 0 {
		return "/run/cfs-fuse"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "cfs-fuse")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("cfs-fuse-%d", os.Geteuid()))
}

func defaultRoot() string {
	if os.Geteuid() == 0 {
		return "/var/lib/cfs-fuse"
	}
	if dir := os.Getenv("XDG_DATA_HOME"); dir != "" {
		return filepath.Join(dir, "cfs-fuse")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return filepath.Join(os.TempDir(), "cfs-fuse-data")
	}
	return filepath.Join(home, ".local/share/cfs-fuse")
}
