package main

import (
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newUmount(g *global) *cobra.Command {
	return &cobra.Command{
		Use:     "umount MOUNTPOINT",
		Aliases: []string{"unmount"},
		Short:   "Unmount an image",
		Long: `Unmount the image at MOUNTPOINT, whatever state it is in, and wait until the
process that serves it has left. What was fetched stays in the store. While a
program uses the mount, nothing is changed and the command fails.`,
		Example: "  cfs-fuse umount /mnt",
		Args:    exactArgs("MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return mount.Unmount(cmd.Context(), g.runtimeDir, args[0])
		},
	}
}
