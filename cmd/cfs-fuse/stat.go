package main

import (
	"bufio"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
)

func newStat(g *global) *cobra.Command {
	var f lookFlags
	var follow bool
	cmd := &cobra.Command{
		Use:   "stat [flags] SOURCE[:/PATH] [/PATH...]",
		Short: "Show what an image says of files",
		Long: `Show what an image says of files, as stat(1) does, and besides the digest of
a file's content, how much of it is in the store, and its extended attributes.` + sourceHelp,
		Example: "  cfs-fuse stat registry.example.com/debian:12:/usr/bin/passwd",
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
				paths = []string{"/"}
			}
			o, err := f.open(cmd.Context(), source)
			if err != nil {
				return err
			}
			defer o.Close()
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			errs := someErrors{w: cmd.ErrOrStderr()}
			var infos []fileInfo
			for _, p := range paths {
				at, err := o.tree.Find(p, follow)
				var i fileInfo
				if err == nil {
					i, err = o.info(at)
				}
				if err != nil {
					errs.add(err)
					continue
				}
				infos = append(infos, i)
				if !f.json {
					if err := f.printStat(out, o, at, i); err != nil {
						return err
					}
				}
			}
			if f.json {
				if err := printJSON(out, slices.Concat([]fileInfo{}, infos)); err != nil {
					return err
				}
			}
			return errs.err()
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, false, false)
	cmd.Flags().BoolVarP(&follow, "dereference", "L", false, "follow symbolic links")
	return cmd
}

func (f *lookFlags) printStat(w io.Writer, o *opened, at look.File, i fileInfo) error {
	shown := f.name(at.Path, nil)
	if at.IsSymlink() {
		shown += " -> " + f.name(i.Target, nil)
	}
	kind := i.Type
	if at.IsRegular() && at.Size == 0 {
		kind = "regular empty file"
	}
	fmt.Fprintf(w, "  File: %s\n", shown)
	fmt.Fprintf(w, "  Size: %-15d Blocks: %-10d IO Block: 4096   %s\n", at.Size, (at.Size+4095)/4096*8, kind)
	fmt.Fprintf(w, " Inode: %-15d Links: %d", at.NID, at.Nlink)
	if isDevice(at) {
		fmt.Fprintf(w, "     Device type: %d,%d", unix.Major(uint64(at.Rdev)), unix.Minor(uint64(at.Rdev)))
	}
	fmt.Fprintf(w, "\nAccess: (%s/%s)  Uid: (%5d)   Gid: (%5d)\n", i.Mode, modeString(at), at.UID, at.GID)
	fmt.Fprintf(w, "Modify: %s\n", mtime(at).Format("2006-01-02 15:04:05.000000000 -0700"))
	if i.Digest != "" {
		fmt.Fprintf(w, "Digest: %s\n", i.Digest)
		fmt.Fprintf(w, " Local: %d of %d bytes\n", *i.Local, at.Size)
	}
	xattrs, err := o.tree.Xattrs(at)
	for _, x := range xattrs {
		fmt.Fprintf(w, " Xattr: %s=%s\n", f.name(x.Name, nil), look.Quote(string(x.Value)))
	}
	return err
}
