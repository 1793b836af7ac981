package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/composefs"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

const infoHelp = `Show what composefs images hold. COMMAND is one of
  ls               every entry: a slash after folders, "-> " and the target after
                   symbolic links, "@ " and its object after files that have one
  objects          the objects that the images refer to, sorted, each once
  missing-objects  those of them that are not in the folder --basedir
  dump             the images as composefs-dump(5) text
  measure-file     the fs-verity digest of any files: the kernel's where
                   fs-verity is enabled on them, else computed`

// infoFlags are what the commands that read images have in common.
type infoFlags struct {
	basedir string
	filter  []string

	contentPaths bool
}

func (f *infoFlags) addFilter(cmd *cobra.Command) {
	cmd.Flags().StringArrayVar(&f.filter, "filter", nil, "show only the entry `NAME` of the root and what is in it (may be repeated)")
}

func (f *infoFlags) addBasedir(cmd *cobra.Command, what string) {
	cmd.Flags().StringVar(&f.basedir, "basedir", "", what)
}

func newComposefsInfo() *cobra.Command {
	var f infoFlags
	cmd := &cobra.Command{
		Use:     "composefs-info [flags] COMMAND FILE...",
		Short:   "Show what composefs images hold",
		Long:    infoHelp,
		Example: "  composefs-info ls image.cfs\n  composefs-info --basedir=/srv/objects missing-objects image.cfs\n  composefs-info --filter=usr --filter=etc dump image.cfs",
		RunE: atOnce(func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("COMMAND is missing")}
			}
			w := cmd.OutOrStdout()
			var run func(images []string) error
			switch args[0] {
			case "ls":
				run = func(images []string) error { return f.list(w, images) }
			case "dump":
				run = func(images []string) error { return f.dump(w, images) }
			case "objects":
				run = func(images []string) error { return f.objects(w, images, false) }
			case "missing-objects":
				run = func(images []string) error { return f.objects(w, images, true) }
			case "measure-file":
				run = func(files []string) error { return measureFiles(w, verity.SHA256, files) }
			default:
				return usageError{fmt.Errorf("unknown command %q", args[0])}
			}
			if len(args) == 1 {
				return usageError{errors.New("FILE is missing")}
			}
			return run(args[1:])
		}),
	}
	f.addFilter(cmd)
	f.addBasedir(cmd, "the `folder` of objects for missing-objects")
	return cmd
}

// each opens the images one after the other.
func (f *infoFlags) each(images []string, fn func(r *erofs.Reader) error) error {
	for _, name := range f.filter {
		if strings.Contains(name, "/") {
			return usageError{fmt.Errorf("--filter %s: want the name of an entry of the root", name)}
		}
	}
	for _, path := range images {
		r, err := erofs.OpenFile(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		err = fn(r)
		r.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil
}

func (f *infoFlags) list(w io.Writer, images []string) error {
	return f.each(images, func(r *erofs.Reader) error { return composefs.List(w, r, f.filter) })
}

func (f *infoFlags) dump(w io.Writer, images []string) error {
	return f.each(images, func(r *erofs.Reader) error {
		if f.contentPaths {
			if err := composefs.CheckContentPaths(r); err != nil {
				return err
			}
		}
		return composefs.Dump(w, r, f.filter)
	})
}

// objects prints the objects of all images, or those that are not in basedir.
func (f *infoFlags) objects(w io.Writer, images []string, missing bool) error {
	if missing && f.basedir == "" {
		return usage(hint.Wrap(errors.New("no folder of objects to look in"), "add --basedir=DIR"))
	}
	set := composefs.Objects{}
	err := f.each(images, func(r *erofs.Reader) error { return set.Add(r, f.filter) })
	if err != nil {
		return err
	}
	all := set.Sorted()
	if missing {
		if all, err = set.Missing(f.basedir); err != nil {
			return err
		}
	}
	out := bufio.NewWriterSize(w, 64<<10)
	for _, object := range all {
		fmt.Fprintln(out, object)
	}
	return out.Flush()
}

func measureFiles(w io.Writer, alg verity.Algorithm, files []string) error {
	for _, path := range files {
		digest, err := composefs.Measure(path, alg)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(w, "%x\n", digest); err != nil {
			return err
		}
	}
	return nil
}

// newComposefsDump returns composefs-dump, which the composefs project's tests
// use to see that an image survives being read and written.
func newComposefsDump() *cobra.Command {
	return &cobra.Command{
		Use:     "composefs-dump SOURCE IMAGE",
		Short:   "Read a composefs image and write it again",
		Long:    "Read the composefs image SOURCE into a tree and write IMAGE from it, in the same\nformat version. The two are equal, byte for byte, if SOURCE was well made.",
		Example: "  composefs-dump image.cfs again.cfs && cmp image.cfs again.cfs",
		Args:    exactArgs("SOURCE", "IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r, err := erofs.OpenFile(args[0])
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			root, err := erofs.Load(r)
			version := r.Header().Version
			r.Close()
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			return composefs.WriteImage(args[1], root, erofs.Options{MinVersion: version,
				Tee: whileWanted{cmd.Context(), io.Discard}})
		},
	}
}
