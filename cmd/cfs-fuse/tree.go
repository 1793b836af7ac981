package main

import (
	"bufio"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
)

// A treeNode is what 'tree --json' prints.
type treeNode struct {
	fileInfo
	Contents []*treeNode `json:"contents,omitempty"`
}

func newTree(g *global) *cobra.Command {
	var f lookFlags
	var depth int
	var all, dirs, sizes bool
	cmd := &cobra.Command{
		Use:   "tree [flags] SOURCE[:/PATH]",
		Short: "Draw the tree of an image",
		Long:  "Draw the folder PATH (the root, if it is left out) of an image, as tree(1) does." + sourceHelp,
		Example: `  cfs-fuse tree -L 2 registry.example.com/debian:12
  cfs-fuse tree -s oci:./layout:latest:/etc`,
		Args: exactArgs("SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			source, path := splitSource(args[0])
			o, err := f.open(cmd.Context(), source)
			if err != nil {
				return err
			}
			defer o.Close()
			top, err := o.tree.Find(path, true)
			if err != nil {
				return err
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			d := &treeDrawer{f: &f, o: o, w: out, depth: depth, all: all, dirs: dirs, sizes: sizes}
			if f.json {
				n, err := d.node(top, 0)
				if err != nil {
					return err
				}
				return printJSON(out, n)
			}
			fmt.Fprintln(out, f.quoted(top.Path, &top))
			if err := d.draw(top, "", 1); err != nil {
				return err
			}
			fmt.Fprintf(out, "\n%d directories", d.countDirs)
			if !dirs {
				fmt.Fprintf(out, ", %d files", d.countFiles)
			}
			fmt.Fprintln(out)
			return nil
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, true, true)
	fl := cmd.Flags()
	fl.IntVarP(&depth, "level", "L", 0, "draw no more than so many `levels`")
	fl.BoolVarP(&all, "all", "a", false, "draw names that begin with a dot")
	fl.BoolVarP(&dirs, "dirs", "d", false, "draw folders only")
	fl.BoolVarP(&sizes, "size", "s", false, "show sizes")
	return cmd
}

type treeDrawer struct {
	f                     *lookFlags
	o                     *opened
	w                     *bufio.Writer
	depth                 int
	all, dirs, sizes      bool
	countDirs, countFiles int
}

// children returns what is drawn of a folder that lies at a level.
func (d *treeDrawer) children(f look.File, level int) ([]look.File, error) {
	if !f.IsDir() || d.depth > 0 && level > d.depth {
		return nil, nil
	}
	all, err := d.o.tree.Children(f)
	var shown []look.File
	for _, c := range all {
		if (d.all || !strings.HasPrefix(c.Name(), ".")) && (!d.dirs || c.IsDir()) {
			shown = append(shown, c)
		}
	}
	return shown, err
}

func (d *treeDrawer) draw(f look.File, indent string, level int) error {
	all, err := d.children(f, level)
	if err != nil {
		return err
	}
	for i, c := range all {
		branch, below := "├── ", "│   "
		if i == len(all)-1 {
			branch, below = "└── ", "    "
		}
		if c.IsDir() {
			d.countDirs++
		} else {
			d.countFiles++
		}
		size := ""
		if d.sizes {
			size = fmt.Sprintf("[%11s]  ", d.f.size(c.Size))
		}
		shown := d.f.quoted(c.Name(), &all[i])
		if c.IsSymlink() {
			target, err := d.o.tree.Target(c)
			if err != nil {
				return err
			}
			shown += " -> " + d.f.quoted(target, nil)
		}
		fmt.Fprintf(d.w, "%s%s%s%s\n", indent, branch, size, shown)
		if err := d.draw(c, indent+below, level+1); err != nil {
			return err
		}
	}
	return nil
}

func (d *treeDrawer) node(f look.File, level int) (*treeNode, error) {
	i, err := d.o.info(f)
	if err != nil {
		return nil, err
	}
	n := &treeNode{fileInfo: i}
	all, err := d.children(f, level+1)
	for _, c := range all {
		child, err := d.node(c, level+1)
		if err != nil {
			return nil, err
		}
		n.Contents = append(n.Contents, child)
	}
	return n, err
}
