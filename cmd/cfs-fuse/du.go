package main

import (
	"bufio"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
)

// A duSum is what 'du --json' prints of a path.
type duSum struct {
	Path  string `json:"path"`
	Bytes int64  `json:"bytes"`
	Local int64  `json:"bytes_local"` // of them, in the store
	Files int64  `json:"files"`       // regular files, each inode once

	depth int
	dir   bool
}

func newDu(g *global) *cobra.Command {
	var f lookFlags
	var all, summarize, local bool
	depth := -1
	cmd := &cobra.Command{
		Use:   "du [flags] SOURCE[:/PATH] [/PATH...]",
		Short: "Sum up the sizes of an image's files",
		Long: `Sum up the sizes of the files in each folder, as 'du --apparent-size' does: a
file with several names counts once. Sizes are those of the files, not of the
compressed layers.` + sourceHelp,
		Example: "  cfs-fuse du -d 1 registry.example.com/debian:12:/usr",
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
			if summarize {
				depth = 0
			}
			o, err := f.open(cmd.Context(), source)
			if err != nil {
				return err
			}
			defer o.Close()
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			errs := someErrors{w: cmd.ErrOrStderr()}
			seen := map[uint64]bool{}
			found := []duSum{}
			for _, p := range paths {
				at, err := o.tree.Find(p, false)
				if err == nil {
					var sums []duSum
					sums, err = o.sumUp(at, seen)
					found = append(found, slices.DeleteFunc(sums, func(u duSum) bool {
						return depth >= 0 && u.depth > depth || !u.dir && !all && u.depth > 0
					})...)
				}
				if err != nil {
					errs.add(err)
				}
			}
			if f.json {
				if err := printJSON(out, found); err != nil {
					return err
				}
				return errs.err()
			}
			for _, u := range found {
				if local {
					fmt.Fprintf(out, "%s\t%s\t%s\n", f.size(u.Bytes), f.size(u.Local), f.name(u.Path, nil))
				} else {
					fmt.Fprintf(out, "%s\t%s\n", f.size(u.Bytes), f.name(u.Path, nil))
				}
			}
			return errs.err()
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, true, false)
	fl := cmd.Flags()
	fl.BoolVarP(&all, "all", "a", false, "show files too")
	fl.BoolVarP(&summarize, "summarize", "s", false, "show the sum only")
	fl.IntVarP(&depth, "max-depth", "d", -1, "show no more than so many `levels` of folders")
	fl.BoolVar(&local, "local", false, "show in a second column what of it is in the store")
	return cmd
}

// sumUp returns the sums of a file and all below it, folders after what is in
// them, as du prints them.
func (o *opened) sumUp(f look.File, seen map[uint64]bool) ([]duSum, error) {
	var done, open []duSum
	shut := func(depth int) {
		for len(open) > 0 && open[len(open)-1].depth >= depth {
			u := open[len(open)-1]
			open = open[:len(open)-1]
			if len(open) > 0 {
				up := &open[len(open)-1]
				up.Bytes, up.Local, up.Files = up.Bytes+u.Bytes, up.Local+u.Local, up.Files+u.Files
			}
			done = append(done, u)
		}
	}
	err := o.tree.Walk(f, func(f look.File, depth int) error {
		shut(depth)
		u := duSum{Path: f.Path, depth: depth, dir: f.IsDir()}
		if f.IsRegular() && (f.Nlink < 2 || !seen[f.NID]) {
			seen[f.NID] = f.Nlink > 1
			object, err := o.tree.Object(f)
			if err != nil {
				return err
			}
			u.Bytes, u.Files = f.Size, 1
			u.Local, _, _ = o.Local(object)
		}
		open = append(open, u)
		return nil
	})
	shut(0)
	return done, err
}
