package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"

	"github.com/spf13/cobra"
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
	default:
		return nil
	}
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
	line := tool.Name() + ": " + oneLine(err.Error())
	if advice != "" {
		line += " (hint: " + oneLine(advice) + ")"
	}
	fmt.Fprintln(os.Stderr, line)
	return exitFailed
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
