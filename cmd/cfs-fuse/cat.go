package main

import (
	"io"

	"github.com/spf13/cobra"
)

func newCat(g *global) *cobra.Command {
	var f lookFlags
	cmd := &cobra.Command{
		Use:   "cat [flags] SOURCE:/PATH [/PATH...]",
		Short: "Print files of an image",
		Long: `Print files of an image on standard output, as cat(1) does. Only the chunks of
these files are fetched, and each is checked before a byte of it is printed.` + sourceHelp,
		Example: "  cfs-fuse cat registry.example.com/debian:12:/etc/os-release",
		Args:    atLeastSource,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			source, paths, err := splitSources(args)
			if err != nil {
				return err
			}
			if len(paths) == 0 {
				return errNoPath(source)
			}
			o, err := f.open(cmd.Context(), source)
			if err != nil {
				return err
			}
			defer o.Close()
			errs := someErrors{w: cmd.ErrOrStderr()}
			for _, p := range paths {
				at, err := o.tree.Find(p, true)
				if err != nil {
					errs.add(err)
					continue
				}
				r, err := o.tree.Open(cmd.Context(), at)
				if err != nil {
					errs.add(err)
					continue
				}
				// Not by WriterTo: reads as large as chunks are.
				if _, err := io.CopyBuffer(struct{ io.Writer }{cmd.OutOrStdout()}, struct{ io.Reader }{r}, make([]byte, 1<<20)); err != nil {
					return err
				}
			}
			return errs.err()
		},
	}
	f.define(cmd, g)
	return cmd
}
