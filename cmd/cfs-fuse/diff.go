package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
)

// A diffReport is what 'diff --json' prints.
type diffReport struct {
	Changes []look.Change `json:"changes"`
	diffSums
}

// diffSums sum a comparison up.
type diffSums struct {
	Added   int `json:"added"`
	Removed int `json:"removed"`
	Changed int `json:"changed"`
	// Bytes of regular files, by path: those that were added and removed, and
	// of changed ones both sizes.
	BytesAdded   int64 `json:"bytes_added"`
	BytesRemoved int64 `json:"bytes_removed"`
	BytesBefore  int64 `json:"bytes_changed_before"`
	BytesAfter   int64 `json:"bytes_changed_after"`
	// New are contents of the second image that the first has nowhere.
	New      int   `json:"new_contents"`
	BytesNew int64 `json:"bytes_new_contents"`
}

func newDiff(g *global) *cobra.Command {
	var f lookFlags
	var times bool
	var sums bool
	cmd := &cobra.Command{
		Use:   "diff [flags] SOURCE1[:/PATH] SOURCE2[:/PATH]",
		Short: "Compare two images",
		Long: `Compare the trees of two images, or of folders in them, and print a line for each
path that is not the same in both:

  A  /usr/bin/new      added, with its size
  D  /usr/bin/old      removed
  M  /etc/passwd       changed, with what: type, content, mode, owner, target,
                       device, xattrs, links (and mtime with --times)

Contents are compared by their digests: nothing but tables of contents is fetched.` + sourceHelp,
		Example: `  cfs-fuse diff registry.example.com/app:1 registry.example.com/app:2
  cfs-fuse diff --sum registry.example.com/app:1:/usr /mnt:/usr`,
		Args: exactArgs("SOURCE1", "SOURCE2"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			var o [2]*opened
			var at [2]look.File
			for i, a := range args {
				source, path := splitSource(a)
				var err error
				if o[i], err = f.open(cmd.Context(), source); err != nil {
					return err
				}
				defer o[i].Close()
				if at[i], err = o[i].tree.Find(path, true); err != nil {
					return err
				}
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			r := diffReport{Changes: []look.Change{}}
			err := look.Diff(o[0].tree, o[1].tree, at[0], at[1], times, func(c look.Change) error {
				r.add(c)
				switch {
				case sums:
				case f.json:
					r.Changes = append(r.Changes, c)
				default:
					f.printChange(out, c)
				}
				return cmd.Context().Err()
			})
			if err == nil {
				err = r.newContents(cmd.Context(), o, at)
			}
			if err != nil {
				return err
			}
			if f.json {
				return printJSON(out, r)
			}
			f.printSums(out, r.diffSums)
			return nil
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, true, true)
	cmd.Flags().BoolVar(&times, "times", false, "other modification times are a change too")
	cmd.Flags().BoolVar(&sums, "sum", false, "print the sums only")
	return cmd
}

func (s *diffSums) add(c look.Change) {
	switch c.Kind {
	case look.Added:
		s.Added++
		s.BytesAdded += c.After
	case look.Removed:
		s.Removed++
		s.BytesRemoved += c.Before
	default:
		s.Changed++
		s.BytesBefore += c.Before
		s.BytesAfter += c.After
	}
}

// newContents sums up what a machine that has the first image would fetch for
// the second, file by file.
func (s *diffSums) newContents(ctx context.Context, o [2]*opened, at [2]look.File) error {
	have := map[string]bool{}
	for i := range o {
		err := o[i].tree.Walk(at[i], func(c look.File, _ int) error {
			object, err := o[i].tree.Object(c)
			if i == 1 && object != "" && !have[object] {
				s.New++
				s.BytesNew += c.Size
			}
			have[object] = true
			if err == nil {
				err = ctx.Err()
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (f *lookFlags) printChange(w io.Writer, c look.Change) {
	letter, color, size := "M", "33", ""
	switch {
	case c.Kind == look.Added:
		letter, color, size = "A", "32", "+"+f.size(c.After)
	case c.Kind == look.Removed:
		letter, color, size = "D", "31", "-"+f.size(c.Before)
	case c.Before != c.After:
		size = f.size(c.Before) + " -> " + f.size(c.After)
	}
	if f.colored() {
		letter = "\x1b[" + color + "m" + letter + "\x1b[0m"
	}
	fmt.Fprintf(w, "%s  %s", letter, f.quoted(c.Path, nil))
	if len(c.What) > 0 {
		fmt.Fprintf(w, "  %s", strings.Join(c.What, ","))
	}
	if size != "" && size != "+0" && size != "-0" {
		fmt.Fprintf(w, "  (%s)", size)
	}
	fmt.Fprintln(w)
}

func (f *lookFlags) printSums(w io.Writer, s diffSums) {
	fmt.Fprintf(w, "%d added (+%s), %d removed (-%s), %d changed (%s -> %s)\n",
		s.Added, f.size(s.BytesAdded), s.Removed, f.size(s.BytesRemoved), s.Changed, f.size(s.BytesBefore), f.size(s.BytesAfter))
	fmt.Fprintf(w, "%d contents (%s) of the second are nowhere in the first\n", s.New, f.size(s.BytesNew))
}
