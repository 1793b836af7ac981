package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newUpgrade(g *global) *cobra.Command {
	var program string
	cmd := &cobra.Command{
		Use:   "upgrade [MOUNTPOINT...]",
		Short: "Have this program go on with mounts that an older one serves",
		Long: `Replace the processes that serve the mounts at MOUNTPOINT, or every mount, by
ones of this program, or of the one given by --program. The new process is made
ready beside the old one, which then leaves: programs see a pause of some
milliseconds. If the new one cannot go on, the old one does, and the command
fails. Counters of the metrics start at zero.`,
		Example: "  /usr/local/bin/cfs-fuse upgrade\n  cfs-fuse upgrade --program ./cfs-fuse-next /mnt",
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := os.Executable()
			if program != "" {
				path, err = filepath.Abs(program)
			}
			if err != nil {
				return fmt.Errorf("the new program: %w", err)
			}
			if len(args) == 0 {
				all, err := mount.List(cmd.Context(), g.runtimeDir)
				if err != nil {
					return err
				}
				for _, s := range all {
					args = append(args, s.Mountpoint)
				}
			}
			var errs []error
			for _, point := range args {
				errs = append(errs, mount.Replace(cmd.Context(), g.runtimeDir, point, path))
			}
			return errors.Join(errs...)
		},
	}
	cmd.Flags().StringVar(&program, "program", "", "`path` of the program that shall serve (default this one)")
	return cmd
}
