package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newProfile(g *global) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "profile",
		Short: "Access profiles: what a start reads first",
		Long: `An access profile is what programs read first of an image, in order. Each mount
that is served by cfs-fuse records one, and the next start of the same image, or of
another one of its repository, on a machine that does not have its bytes, fetches
them in that order before all else.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(
		newProfileShow(g),
		newProfileExport(g),
		newProfileImport(),
		newProfileMerge(),
		newProfilePush(g),
		newProfilePull(g),
	)
	return cmd
}

func newProfileExport(g *global) *cobra.Command {
	var o mount.Options
	cmd := &cobra.Command{
		Use:   "export [flags] MOUNTPOINT|SOURCE",
		Short: "Print the access profile of an image as JSON",
		Long: `Print the access profile of the image that is mounted at MOUNTPOINT, or that the
store knows as SOURCE ('cfs-fuse mount --help'), as JSON: a list of contents by
digest with the parts that were read, in the order of their first reads. No request
is made.`,
		Example: `  cfs-fuse profile export /mnt > app.json
  cfs-fuse profile export docker://registry.example.com/app:1 > app.json`,
		Args: exactArgs("MOUNTPOINT or SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Runtime = g.runtimeDir
			var err error
			if o.Root, err = filepath.Abs(o.Root); err != nil {
				return err
			}
			raw, err := mount.ExportProfile(cmd.Context(), args[0], o)
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(raw)
			return err
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&o.Root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVar(&o.Source.Platform, "platform", "", "`os/arch` that SOURCE was mounted with")
	return cmd
}

func newProfileImport() *cobra.Command {
	var root string
	cmd := &cobra.Command{
		Use:   "import [flags] [FILE]",
		Short: "Put an exported access profile into the store",
		Long: `Put the access profile in FILE, or on standard input, into the store: for the
image that it names, and for its repository. It replaces what is there.`,
		Example: "  cfs-fuse profile import app.json",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			in := cmd.InOrStdin()
			if len(args) == 1 && args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return err
				}
				defer f.Close()
				in = f
			}
			raw, err := io.ReadAll(io.LimitReader(in, image.MaxProfileSize+1))
			if err != nil {
				return fmt.Errorf("read the profile: %w", err)
			}
			if root, err = filepath.Abs(root); err != nil {
				return err
			}
			p, err := mount.ImportProfile(root, raw)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d accesses of %s (%s)\n", len(p.Accesses), p.Image, p.Repository)
			return err
		},
	}
	cmd.Flags().StringVar(&root, "root", defaultRoot(), "`folder` of the store")
	return cmd
}
