package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

const erofsHelp = `Write, show and check composefs images: EROFS images of metadata, with the files'
content in a folder of objects.

The same is to be had under the names of the composefs project's tools: called
mkcomposefs, composefs-info or mount.composefs (links that 'make install' makes),
this program takes their options.`

// newErofs returns the command 'erofs' with its own commands.
func newErofs() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "erofs",
		Short: "Write, show and check composefs images",
		Long:  erofsHelp,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newCreate("create"), newErofsDump(), newErofsLs(), newErofsObjects(), newErofsFsck(), newErofsDigest())
	return cmd
}

// someArgs wants at least one argument.
func someArgs(name string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 0 {
			return usageError{fmt.Errorf("%s is missing", name)}
		}
		return nil
	}
}

func newErofsDump() *cobra.Command {
	var f infoFlags
	cmd := &cobra.Command{
		Use:     "dump [flags] IMAGE...",
		Short:   "Print images as composefs-dump(5) text",
		Long:    "Print composefs images as composefs-dump(5) text, a line for each entry, from which\n'cfs-fuse erofs create --from-file' makes the same image again.",
		Example: "  cfs-fuse erofs dump image.cfs\n  cfs-fuse erofs dump --filter usr image.cfs",
		Args:    someArgs("IMAGE"),
		RunE:    atOnce(func(cmd *cobra.Command, args []string) error { return f.dump(cmd.OutOrStdout(), args) }),
	}
	f.addFilter(cmd)
	cmd.Flags().BoolVar(&f.contentPaths, "content-paths", false, "fail unless each file's PAYLOAD is the path of its DIGEST, as the dump of a folder with a store of objects has it")
	return cmd
}

func newErofsLs() *cobra.Command {
	var f infoFlags
	cmd := &cobra.Command{
		Use:     "ls [flags] IMAGE...",
		Short:   "List the entries of images",
		Long:    "List the entries of composefs images: a slash after folders, \"-> \" and the target\nafter symbolic links, \"@ \" and the object after files that have one.",
		Example: "  cfs-fuse erofs ls image.cfs\n  cfs-fuse erofs ls --filter etc image.cfs",
		Args:    someArgs("IMAGE"),
		RunE:    atOnce(func(cmd *cobra.Command, args []string) error { return f.list(cmd.OutOrStdout(), args) }),
	}
	f.addFilter(cmd)
	return cmd
}

func newErofsObjects() *cobra.Command {
	var f infoFlags
	var missing bool
	cmd := &cobra.Command{
		Use:     "objects [flags] IMAGE...",
		Short:   "List the objects that images refer to",
		Long:    "List the objects that composefs images refer to, sorted, each once; with --missing\nonly those that are not in the folder --basedir.",
		Example: "  cfs-fuse erofs objects image.cfs\n  cfs-fuse erofs objects --missing --basedir /srv/objects *.cfs",
		Args:    someArgs("IMAGE"),
		RunE: atOnce(func(cmd *cobra.Command, args []string) error {
			return f.objects(cmd.OutOrStdout(), args, missing)
		}),
	}
	f.addFilter(cmd)
	f.addBasedir(cmd, "the `folder` of objects")
	cmd.Flags().BoolVar(&missing, "missing", false, "only those that are not in --basedir")
	return cmd
}

func newErofsFsck() *cobra.Command {
	return &cobra.Command{
		Use:   "fsck IMAGE...",
		Short: "Check images and name what is wrong with them",
		Long: `Check all metadata of EROFS images against the format: every inode, name, xattr and
block address. Each violation is a line with its offset in the image. Nothing is
repaired. The exit code is 1 if there was a violation.`,
		Example: "  cfs-fuse erofs fsck image.cfs",
		Args:    someArgs("IMAGE"),
		RunE: atOnce(func(cmd *cobra.Command, args []string) error {
			bad := 0
			for _, path := range args {
				n, err := fsck(cmd.OutOrStdout(), path)
				if err != nil {
					return err
				}
				if n > 0 {
					bad++
				}
			}
			if bad > 0 {
				return fmt.Errorf("check: %d of %d images are damaged", bad, len(args))
			}
			return nil
		}),
	}
}

// fsck prints what is wrong with an image and returns how much it is. An error
// says that the image could not be checked.
func fsck(w io.Writer, path string) (violations int, err error) {
	out := bufio.NewWriterSize(w, 64<<10)
	var unsupported error
	tell := func(fault error) bool {
		if errors.Is(fault, errors.ErrUnsupported) {
			unsupported = fmt.Errorf("%s: %w", path, fault)
			return false
		}
		violations++
		_, err = fmt.Fprintf(out, "%s: %s\n", path, oneLine(fault.Error()))
		return err == nil
	}
	r, openErr := erofs.OpenFile(path)
	if _, corrupt := errors.AsType[*erofs.CorruptError](openErr); openErr != nil && !corrupt {
		return 0, fmt.Errorf("%s: %w", path, openErr)
	}
	if openErr != nil {
		tell(openErr)
	} else {
		defer r.Close()
		r.Faults(tell)
	}
	if unsupported != nil {
		return violations, errors.Join(unsupported, out.Flush())
	}
	if violations == 0 {
		fmt.Fprintf(out, "%s: no violations, %d inodes\n", path, r.Header().Inodes)
	}
	return violations, errors.Join(err, out.Flush())
}

func newErofsDigest() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:     "digest [flags] FILE...",
		Short:   "Print the fs-verity digests of files",
		Long:    "Print the fs-verity digest of any files, a line for each: the kernel's where fs-verity\nis enabled on the file, else computed.",
		Example: "  cfs-fuse erofs digest image.cfs",
		Args:    someArgs("FILE"),
		RunE: atOnce(func(cmd *cobra.Command, args []string) error {
			if err := oneOf("algorithm", name, "sha256", "sha512"); err != nil {
				return err
			}
			alg := verity.SHA256
			if name == "sha512" {
				alg = verity.SHA512
			}
			return measureFiles(cmd.OutOrStdout(), alg, args)
		}),
	}
	cmd.Flags().StringVar(&name, "algorithm", "sha256", "hash `algorithm`: sha256 or sha512")
	return cmd
}
