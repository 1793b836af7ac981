package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/look"
)

type lsFlags struct {
	lookFlags
	long, all, recursive, dir, one, inode bool
}

func newLs(g *global) *cobra.Command {
	var f lsFlags
	cmd := &cobra.Command{
		Use:   "ls [flags] SOURCE[:/PATH] [/PATH...]",
		Short: "List folders of an image",
		Long: `List the folder PATH (the root, if it is left out) of an image, or show the file
PATH, as ls(1) does. Owners are numbers: their names are the image's own matter.` + sourceHelp,
		Example: `  cfs-fuse ls -l registry.example.com/debian:12:/etc
  cfs-fuse ls -lR --json oci:./layout:latest
  cfs-fuse ls /mnt:/usr/bin`,
		Args: atLeastSource,
		RunE: func(cmd *cobra.Command, args []string) error { return f.run(cmd, args) },
	}
	f.define(cmd, g)
	f.defineOutput(cmd, true, true)
	fl := cmd.Flags()
	fl.BoolVarP(&f.long, "long", "l", false, "show modes, owners, sizes, times and targets of links")
	fl.BoolVarP(&f.all, "all", "a", false, "show names that begin with a dot")
	fl.BoolVarP(&f.recursive, "recursive", "R", false, "go into folders")
	fl.BoolVarP(&f.dir, "directory", "d", false, "show folders themselves, not what is in them")
	fl.BoolVarP(&f.one, "one", "1", false, "one name a line (default but on a terminal)")
	fl.BoolVarP(&f.inode, "inode", "i", false, "show inode numbers")
	return cmd
}

// atLeastSource wants a SOURCE.
func atLeastSource(_ *cobra.Command, args []string) error {
	if len(args) == 0 {
		return usageError{fmt.Errorf("SOURCE is missing")}
	}
	return nil
}

func (f *lsFlags) run(cmd *cobra.Command, args []string) error {
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
	l := &lister{lsFlags: f, o: o, w: out, errs: someErrors{w: cmd.ErrOrStderr()}}
	var files, dirs []look.File
	for _, p := range paths {
		at, err := o.tree.Find(p, !f.long && !f.dir || strings.HasSuffix(p, "/"))
		switch {
		case err != nil:
			l.errs.add(err)
		case at.IsDir() && !f.dir:
			dirs = append(dirs, at)
		default:
			at.Path = p // as it was asked for
			files = append(files, at)
		}
	}
	if err := l.list(files, func(c look.File) string { return c.Path }); err != nil {
		return err
	}
	for i, d := range dirs {
		if !f.json && (len(paths) > 1 || f.recursive) {
			if i > 0 || len(files) > 0 {
				fmt.Fprintln(out)
			}
			fmt.Fprintf(out, "%s:\n", f.name(d.Path, nil))
		}
		if err := l.folder(d); err != nil {
			return err
		}
	}
	if f.json {
		if err := printJSON(out, slices.Concat([]fileInfo{}, l.infos)); err != nil {
			return err
		}
	}
	return l.errs.err()
}

// A lister prints lists of files, or keeps them for JSON.
type lister struct {
	*lsFlags
	o     *opened
	w     io.Writer
	infos []fileInfo
	errs  someErrors
}

func (l *lister) folder(dir look.File) error {
	all, err := l.o.tree.Children(dir)
	if err != nil {
		return err
	}
	if !l.all {
		all = slices.DeleteFunc(all, func(c look.File) bool { return strings.HasPrefix(c.Name(), ".") })
	}
	if err := l.list(all, func(c look.File) string { return c.Name() }); err != nil || !l.recursive {
		return err
	}
	for _, c := range all {
		if !c.IsDir() {
			continue
		}
		if !l.json {
			fmt.Fprintf(l.w, "\n%s:\n", l.name(c.Path, nil))
		}
		if err := l.folder(c); err != nil {
			return err
		}
	}
	return nil
}

func (l *lister) list(files []look.File, name func(look.File) string) error {
	if l.json {
		for _, c := range files {
			i, err := l.o.info(c)
			if err != nil {
				return err
			}
			l.infos = append(l.infos, i)
		}
		return nil
	}
	if l.long {
		return l.longList(files, name)
	}
	var names []string
	width := 0
	for i := range files {
		n := name(files[i])
		prefix := ""
		if l.inode {
			prefix = fmt.Sprintf("%d ", files[i].NID)
		}
		shown := prefix + l.name(n, nil)
		width = max(width, utf8.RuneCountInString(shown)+2)
		names = append(names, prefix+l.name(n, &files[i])+strings.Repeat("\x00", utf8.RuneCountInString(shown)))
	}
	if !l.terminal || l.one {
		for _, n := range names {
			fmt.Fprintln(l.w, strings.TrimRight(n, "\x00"))
		}
		return nil
	}
	// Down the columns, as many as fit.
	columns := max(1, terminalWidth()/max(1, width))
	rows := (len(names) + columns - 1) / columns
	for r := range rows {
		for i := r; i < len(names); i += rows {
			n := strings.TrimRight(names[i], "\x00")
			if i+rows < len(names) {
				n += strings.Repeat(" ", width-(len(names[i])-len(n)))
			}
			fmt.Fprint(l.w, n)
		}
		fmt.Fprintln(l.w)
	}
	return nil
}

// terminalWidth is that of standard output, in columns.
func terminalWidth() int {
	ws, err := unix.IoctlGetWinsize(int(os.Stdout.Fd()), unix.TIOCGWINSZ)
	if err != nil || ws.Col == 0 {
		return 80
	}
	return int(ws.Col)
}

const timeFormat = "2006-01-02 15:04"

func (l *lister) longList(files []look.File, name func(look.File) string) error {
	var rows [][]string
	acls := false
	for i, c := range files {
		mode := modeString(c)
		acl, err := l.hasACL(c)
		if err != nil {
			return err
		}
		if acl {
			acls, mode = true, mode+"+"
		}
		size := l.size(c.Size)
		if isDevice(c) {
			size = fmt.Sprintf("%d, %d", unix.Major(uint64(c.Rdev)), unix.Minor(uint64(c.Rdev)))
		}
		shown := l.name(name(c), &files[i])
		if c.IsSymlink() {
			target, err := l.o.tree.Target(c)
			if err != nil {
				return err
			}
			shown += " -> " + l.name(target, nil)
		}
		row := []string{mode, strconv.Itoa(int(c.Nlink)), strconv.Itoa(int(c.UID)), strconv.Itoa(int(c.GID)), size, mtime(c).Format(timeFormat), shown}
		if l.inode {
			row = slices.Insert(row, 1, strconv.FormatUint(c.NID, 10))
		}
		rows = append(rows, row)
	}
	for _, row := range rows {
		if mode := &row[0]; acls && !strings.HasSuffix(*mode, "+") {
			*mode += " "
		}
		if l.inode {
			row[0], row[1] = row[1], row[0]
		}
	}
	writeColumns(l.w, rows)
	return nil
}

// hasACL reports whether a file has more permissions than its mode says, which
// ls marks with a plus.
func (l *lister) hasACL(c look.File) (bool, error) {
	xattrs, err := l.o.tree.Xattrs(c)
	return slices.ContainsFunc(xattrs, func(x erofs.Xattr) bool { return strings.HasPrefix(x.Name, "system.posix_acl_") }), err
}

// writeColumns prints rows with their cells aligned to the right, but for the
// last one, which may hold anything.
func writeColumns(w io.Writer, rows [][]string) {
	var widths []int
	for _, row := range rows {
		for i, cell := range row {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], len(cell))
		}
	}
	for _, row := range rows {
		last := len(row) - 1
		for i, cell := range row[:last] {
			fmt.Fprintf(w, "%*s ", widths[i], cell)
		}
		fmt.Fprintln(w, row[last])
	}
}
