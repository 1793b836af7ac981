package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newSwap(g *global) *cobra.Command {
	var namespaces string
	cmd := &cobra.Command{
		Use:   "swap [flags] MOUNTPOINT",
		Short: "Put the kernel's mount in FUSE's place now",
		Long: `Swap the image at MOUNTPOINT, which must be sealed, for the kernel's own mount:
one that was mounted with --swap never, or one whose swap failed before. No call
of a program that uses the mount fails; what is open on FUSE stays there until it
is closed. If the kernel refuses, exit code 4 and the message say why, and FUSE
goes on serving.

Mount namespaces that see MOUNTPOINT by propagation are swapped with it. Those
that have bound the mount itself are swapped if a process of theirs is listed;
this works also later, while FUSE's process is still there. What cannot be swapped
(the root of a namespace, an overlayfs that has the mount as a lower) keeps
working, and 'cfs-fuse status' lists it.`,
		Example: "  cfs-fuse wait --for sealed /mnt && cfs-fuse swap /mnt\n  cfs-fuse swap --swap-namespaces $(pidof -s app) /mnt",
		Args:    exactArgs("MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			pids, err := mount.ParsePIDs(namespaces)
			if err != nil {
				return usageError{fmt.Errorf("--swap-namespaces: %w", err)}
			}
			return mount.SwapNow(cmd.Context(), g.runtimeDir, args[0], pids...)
		},
	}
	addSwapNamespaces(cmd, &namespaces)
	return cmd
}

func addSwapNamespaces(cmd *cobra.Command, pids *string) {
	cmd.Flags().StringVar(pids, "swap-namespaces", "", "swap also in the mount namespaces of the processes `PID,...`, wherever they have the mount")
}
