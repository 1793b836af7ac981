package main

import (
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newSwap(g *global) *cobra.Command {
	return &cobra.Command{
		Use:   "swap MOUNTPOINT",
		Short: "Put the kernel's mount in FUSE's place now",
		Long: `Swap the image at MOUNTPOINT, which must be sealed, for the kernel's own mount:
one that was mounted with --swap never, or one whose swap failed before. No call
of a program that uses the mount fails; what is open on FUSE stays there until it
is closed. If the kernel refuses, exit code 4 and the message say why, and FUSE
goes on serving.`,
		Example: "  cfs-fuse wait --for sealed /mnt && cfs-fuse swap /mnt",
		Args:    exactArgs("MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return mount.SwapNow(cmd.Context(), g.runtimeDir, args[0])
		},
	}
}
