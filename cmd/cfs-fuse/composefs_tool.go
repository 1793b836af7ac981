package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// newTool returns the command of the composefs project that a program called
// arg0 stands in for, nil if there is none of this name.
func newTool(arg0 string) *cobra.Command {
	var tool *cobra.Command
	switch filepath.Base(arg0) {
	case "mkcomposefs":
		tool = newCreate("mkcomposefs")
	case "composefs-info":
		tool = newComposefsInfo()
	case "composefs-dump":
		tool = newComposefsDump()
	case "mount.composefs":
		tool = newComposefsMount()
	case "composefs-fuse":
		tool = newComposefsFuse()
	default:
		return nil
	}
	return asTool(tool)
}

// asTool makes a command behave as the composefs project's tools do.
func asTool(tool *cobra.Command) *cobra.Command {
	abbreviate(tool.Flags())
	tool.SilenceErrors, tool.SilenceUsage = true, true
	tool.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	return tool
}

// runTool executes the command line of a tool. Its exit code is 1 for every
// error, a wrong command line included, as it is with the tools of this name.
func runTool(ctx context.Context, tool *cobra.Command, args []string) int {
	tool.SetArgs(args)
	err := tool.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	advice := hint.Of(err)
	if advice == "" && exitCode(err) == exitUsage {
		advice = fmt.Sprintf("see '%s --help'", tool.Name())
	}
	line := tool.Name() + ": " + oneLine(capitalErrno(err))
	if advice != "" {
		line += " (hint: " + oneLine(advice) + ")"
	}
	fmt.Fprintln(os.Stderr, line)
	return exitFailed
}

// abbreviate lets flags be called by any beginning of their name that no other
// flag has, as getopt_long(3) does for the tools of these names.
func abbreviate(flags *pflag.FlagSet) {
	names := []string{"help"} // cobra adds it later
	flags.VisitAll(func(f *pflag.Flag) { names = append(names, f.Name) })
	flags.SetNormalizeFunc(func(_ *pflag.FlagSet, name string) pflag.NormalizedName {
		full := ""
		for _, n := range names {
			switch {
			case n == name:
				return pflag.NormalizedName(n)
			case !strings.HasPrefix(n, name):
			case full != "":
				return pflag.NormalizedName(name)
			default:
				full = n
			}
		}
		if full == "" {
			full = name
		}
		return pflag.NormalizedName(full)
	})
}

// capitalErrno returns the text of err with the kernel's reason in it as
// strerror(3) has it, "Permission denied": scripts look for these words in what
// the tools of these names print.
func capitalErrno(err error) string {
	text := err.Error()
	errno, ok := errors.AsType[unix.Errno](err)
	if !ok {
		return text
	}
	reason := errno.Error()
	k := strings.LastIndex(text, reason)
	if k < 0 || reason == "" {
		return text
	}
	return text[:k] + strings.ToUpper(reason[:1]) + text[k+1:]
}

// usage makes err one of the command line, and keeps its advice.
func usage(err error) error { return hint.Wrap(usageError{err}, hint.Of(err)) }

// atOnce is for a command that leaves nothing behind when it is killed: it
// gives back the signals that would end its context.
func atOnce(run func(cmd *cobra.Command, args []string) error) func(cmd *cobra.Command, args []string) error {
	return func(cmd *cobra.Command, args []string) error {
		signal.Reset(os.Interrupt, unix.SIGTERM)
		return run(cmd, args)
	}
}
