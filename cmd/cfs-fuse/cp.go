package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/look"
)

func errNoPath(source string) error {
	return hint.Wrap(usageError{fmt.Errorf("%s: no path in the image", source)}, "write "+source+":/PATH")
}

func newCp(g *global) *cobra.Command {
	var f lookFlags
	var o look.CopyOptions
	cmd := &cobra.Command{
		Use:   "cp [flags] SOURCE:/PATH [/PATH...] LOCAL",
		Short: "Copy files out of an image",
		Long: `Copy files out of an image, as 'cp -a' does: modes, times, extended attributes,
symbolic and hard links are kept, and as root owners and devices. If LOCAL is a
folder the copies go into it, else the copy gets that name. Without -r a
symbolic link is followed, inside the image; with -r it is copied.

What is there already is replaced, and folders are filled. Nothing is written
outside of the copy: no link in the image or below LOCAL is followed.` + sourceHelp,
		Example: `  cfs-fuse cp registry.example.com/debian:12:/etc/os-release .
  cfs-fuse cp -r oci:./layout:latest:/usr/share/doc /tmp/doc`,
		Args: exactOrMore(2, "SOURCE:/PATH", "LOCAL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			local := args[len(args)-1]
			source, paths, err := splitSources(args[:len(args)-1])
			if err != nil {
				return err
			}
			if len(paths) == 0 {
				return errNoPath(source)
			}
			into := false
			if fi, err := os.Stat(local); err == nil && fi.IsDir() {
				into = true
			} else if strings.HasSuffix(local, "/") || len(paths) > 1 {
				return hint.Wrap(fmt.Errorf("copy to %s: it is no folder", local), "mkdir -p "+local)
			}
			img, err := f.open(cmd.Context(), source)
			if err != nil {
				return err
			}
			defer img.Close()
			errs := someErrors{w: cmd.ErrOrStderr()}
			o.Fetch, o.File = img.Fetch, img.File
			o.Warn = func(path string, err error) { errs.add(fmt.Errorf("%s: %w", path, err)) }
			var sum look.Copied
			for _, p := range paths {
				at, err := img.tree.Find(p, !o.Recursive)
				if err != nil {
					errs.add(err)
					continue
				}
				if at.IsDir() && !o.Recursive {
					errs.add(fmt.Errorf("%s is a folder (hint: add -r)", at.Path))
					continue
				}
				dir, name := filepath.Dir(filepath.Clean(local)), filepath.Base(filepath.Clean(local))
				if into {
					dir, name = local, filepath.Base(filepath.Clean(p))
				}
				done, err := copyTo(cmd, img, at, dir, name, o)
				sum.Files, sum.Bytes = sum.Files+done.Files, sum.Bytes+done.Bytes
				if err != nil {
					return err
				}
			}
			if f.json {
				if err := printJSON(cmd.OutOrStdout(), sum); err != nil {
					return err
				}
			}
			return errs.err()
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, false, false)
	cmd.Flags().BoolVarP(&o.Recursive, "recursive", "r", false, "copy folders, with everything in them")
	return cmd
}

// copyTo copies a file of an image to dir/name. Of the root of an image, whose
// name is a slash, what is in it is copied into dir.
func copyTo(cmd *cobra.Command, img *opened, at look.File, dir, name string, o look.CopyOptions) (look.Copied, error) {
	if name != "/" {
		return img.tree.Copy(cmd.Context(), at, dir, name, o)
	}
	return img.tree.CopyInto(cmd.Context(), at, dir, o)
}

// exactOrMore wants at least n arguments, and says which is missing.
func exactOrMore(n int, names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < n {
			return usageError{errors.New(names[len(args)] + " is missing")}
		}
		return nil
	}
}
