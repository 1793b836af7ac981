// Command cfs-fuse mounts container images: lazily through FUSE at first, by
// the kernel once every byte is local and checked. 'cfs-fuse --help' has the
// commands and exit codes.
package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/keeper"
	"github.com/cfs-fuse/cfs-fuse/internal/sandbox"
)

func main() {
	sandbox.Init()
	end := []os.Signal{os.Interrupt, unix.SIGTERM}
	if !signal.Ignored(unix.SIGHUP) { // nohup(1)
		end = append(end, unix.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), end...)
	code := call(ctx, os.Args[0], os.Args[1:])
	stop()
	os.Exit(code)
}

// call runs the program under the name it was called by.
func call(ctx context.Context, name string, args []string) int {
	if keeper.Started() && len(args) > 0 && args[0] == holderName {
		return run(ctx, args) // of a composefs-fuse, whose name it has
	}
	if filepath.Base(name) == helperName {
		return runMountHelper(ctx, args)
	}
	if tool := newTool(name); tool != nil {
		return runTool(ctx, tool, args)
	}
	if len(args) > 0 && strings.HasPrefix(args[0], "-o") { // cfs-fuse -o source=IMAGE,basedir=DIR MOUNTPOINT
		return runTool(ctx, asTool(newComposefsFuse()), args)
	}
	return run(ctx, args)
}
