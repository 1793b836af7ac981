package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newWait(g *global) *cobra.Command {
	var state string
	var timeout time.Duration
	var quiet bool
	cmd := &cobra.Command{
		Use:   "wait --for STATE MOUNTPOINT",
		Short: "Wait until a mount has reached a state",
		Long: `Wait until the mount at MOUNTPOINT has reached a state:

  complete  every byte is local and checked
  sealed    the image for the kernel is written, its digest is known
  swapped   the kernel serves it, and no process of cfs-fuse is left for it
            (but for files that were opened before and are open still)

Exit code 4 says that the state will never be reached, and the message why.`,
		Example: "  cfs-fuse wait --for swapped --timeout 5m /mnt",
		Args:    exactArgs("MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oneOf("for", state, "complete", "sealed", "swapped"); err != nil {
				return err
			}
			var want mount.State
			if err := want.UnmarshalText([]byte(state)); err != nil {
				return err
			}
			ctx := cmd.Context()
			if timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, timeout)
				defer cancel()
			}
			return awaitState(ctx, g.runtimeDir, args[0], want, quiet)
		},
	}
	cmd.Flags().StringVar(&state, "for", "", "the `state` to wait for: complete, sealed or swapped")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up after this long, e.g. 90s (default never)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	cmd.MarkFlagRequired("for")
	return cmd
}
