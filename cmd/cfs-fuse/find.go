package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
)

type findFlags struct {
	lookFlags
	name, iname, path     string
	types, size, perm     string
	uid, gid              int
	maxDepth, minDepth    int
	empty, absent, print0 bool
	long                  bool
}

func newFind(g *global) *cobra.Command {
	var f findFlags
	cmd := &cobra.Command{
		Use:   "find [flags] SOURCE[:/PATH] [-name GLOB] [-type f] [-size +1M] …",
		Short: "Find files in an image",
		Long: `Print the paths below PATH (the root, if it is left out) that meet all
conditions, as find(1) does. Conditions may be written with one dash or two.` + sourceHelp,
		Example: `  cfs-fuse find registry.example.com/debian:12:/usr -type f -perm /6000
  cfs-fuse find /mnt -size +10M -absent`,
		DisableFlagParsing: true, // as -name is no -n -a -m -e
		RunE: func(cmd *cobra.Command, args []string) error {
			cmd.DisableFlagParsing = false
			if err := cmd.ParseFlags(f.dashes(cmd, args)); err != nil {
				return usageError{err}
			}
			if help, err := cmd.Flags().GetBool("help"); err == nil && help {
				return cmd.Help()
			}
			args = cmd.Flags().Args()
			if err := exactArgs("SOURCE")(cmd, args); err != nil {
				return err
			}
			return f.run(cmd, args[0])
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, true, true)
	fl := cmd.Flags()
	fl.StringVar(&f.name, "name", "", "the last component is like `GLOB`")
	fl.StringVar(&f.iname, "iname", "", "the same, whatever the case")
	fl.StringVar(&f.path, "path", "", "the whole path is like `GLOB`, in which * stands for slashes too")
	fl.StringVar(&f.types, "type", "", "the type is one of `LETTERS`: f, d, l, b, c, p, s")
	fl.StringVar(&f.size, "size", "", "a file of more (+`N`) or less (-N) bytes, or N of them; with a unit: +10M")
	fl.StringVar(&f.perm, "perm", "", "the mode is `MODE` in octal, has all (-MODE) or any (/MODE) of its bits")
	fl.IntVar(&f.uid, "uid", -1, "the owner is `N`")
	fl.IntVar(&f.gid, "gid", -1, "the group is `N`")
	fl.IntVar(&f.maxDepth, "maxdepth", -1, "at most `N` levels below PATH")
	fl.IntVar(&f.minDepth, "mindepth", 0, "at least `N` levels below PATH")
	fl.BoolVar(&f.empty, "empty", false, "a file of no bytes, or a folder with nothing in it")
	fl.BoolVar(&f.absent, "absent", false, "a file of which bytes are missing in the store")
	fl.BoolVar(&f.print0, "print0", false, "end each path with a zero byte, not a newline")
	fl.BoolVar(&f.long, "ls", false, "print as 'ls -l' does")
	return cmd
}

// dashes gives long flags that were written with one dash the second one.
func (f *findFlags) dashes(cmd *cobra.Command, args []string) []string {
	args = slices.Clone(args)
	for i, a := range args {
		name, _, _ := strings.Cut(strings.TrimPrefix(a, "-"), "=")
		if strings.HasPrefix(a, "-") && !strings.HasPrefix(a, "--") && len(name) > 1 && cmd.Flags().Lookup(name) != nil {
			args[i] = "-" + a
		}
	}
	return args
}

// A condition holds of a file, or not.
type condition func(f look.File) (bool, error)

func (f *findFlags) run(cmd *cobra.Command, arg string) error {
	if err := f.check(cmd); err != nil {
		return err
	}
	source, at := splitSource(arg)
	o, err := f.open(cmd.Context(), source)
	if err != nil {
		return err
	}
	defer o.Close()
	conditions, err := f.conditions(o)
	if err != nil {
		return usageError{err}
	}
	top, err := o.tree.Find(at, strings.HasSuffix(at, "/"))
	if err != nil {
		return err
	}
	out := bufio.NewWriter(cmd.OutOrStdout())
	defer out.Flush()
	l := &lister{lsFlags: &lsFlags{lookFlags: f.lookFlags, long: true}, o: o, w: out}
	var long []look.File
	err = o.tree.Walk(top, func(c look.File, depth int) error {
		if err := cmd.Context().Err(); err != nil {
			return err
		}
		if f.maxDepth >= 0 && depth > f.maxDepth {
			return fs.SkipDir
		}
		if depth < f.minDepth {
			return nil
		}
		for _, holds := range conditions {
			if ok, err := holds(c); err != nil || !ok {
				return err
			}
		}
		switch {
		case f.json:
			i, err := o.info(c)
			l.infos = append(l.infos, i)
			return err
		case f.long:
			long = append(long, c)
		case f.print0:
			fmt.Fprintf(out, "%s\x00", c.Path)
		default:
			fmt.Fprintln(out, f.lookFlags.name(c.Path, &c))
		}
		return nil
	})
	if err == nil && f.json {
		err = printJSON(out, slices.Concat([]fileInfo{}, l.infos))
	}
	if err == nil && f.long {
		err = l.longList(long, func(c look.File) string { return c.Path })
	}
	return err
}

func (f *findFlags) conditions(o *opened) (all []condition, err error) {
	add := func(c func(look.File) bool) {
		all = append(all, func(f look.File) (bool, error) { return c(f), nil })
	}
	for _, g := range []string{f.name, f.iname, f.path} {
		if _, err := path.Match(g, ""); err != nil {
			return nil, fmt.Errorf("%q: %w", g, err)
		}
	}
	if f.name != "" {
		add(func(c look.File) bool { ok, _ := path.Match(f.name, c.Name()); return ok })
	}
	if f.iname != "" {
		add(func(c look.File) bool {
			ok, _ := path.Match(strings.ToLower(f.iname), strings.ToLower(c.Name()))
			return ok
		})
	}
	if f.path != "" {
		// path.Match has no star that stands for slashes, so no slash is one.
		flat := strings.NewReplacer("/", "\x01")
		add(func(c look.File) bool { ok, _ := path.Match(flat.Replace(f.path), flat.Replace(c.Path)); return ok })
	}
	if f.types != "" {
		letters := strings.ReplaceAll(strings.ReplaceAll(f.types, ",", ""), "f", "-")
		if strings.Trim(letters, "-dlbcps") != "" {
			return nil, fmt.Errorf("-type %s: want letters of f, d, l, b, c, p, s", f.types)
		}
		add(func(c look.File) bool { return strings.IndexByte(letters, fileTypes[c.Mode&unix.S_IFMT].letter) >= 0 })
	}
	if f.size != "" {
		var n bytesFlag
		if err := n.Set(strings.TrimLeft(f.size, "+-")); err != nil {
			return nil, fmt.Errorf("-size: %w", err)
		}
		sign := f.size[0]
		add(func(c look.File) bool {
			return c.IsRegular() && (sign == '+' && c.Size > int64(n) || sign == '-' && c.Size < int64(n) || c.Size == int64(n) && sign != '+' && sign != '-')
		})
	}
	if f.perm != "" {
		n, err := strconv.ParseUint(strings.TrimLeft(f.perm, "-/"), 8, 12)
		if err != nil {
			return nil, fmt.Errorf("-perm %s: want up to four octal digits", f.perm)
		}
		bits, sign := uint32(n), f.perm[0]
		add(func(c look.File) bool {
			has := c.Mode & 0o7777
			return sign == '-' && has&bits == bits || sign == '/' && (has&bits != 0 || bits == 0) || has == bits
		})
	}
	if f.uid >= 0 {
		add(func(c look.File) bool { return int64(c.UID) == int64(f.uid) })
	}
	if f.gid >= 0 {
		add(func(c look.File) bool { return int64(c.GID) == int64(f.gid) })
	}
	if f.empty {
		all = append(all, func(c look.File) (bool, error) {
			if !c.IsDir() {
				return c.IsRegular() && c.Size == 0, nil
			}
			in, err := o.tree.Children(c)
			return len(in) == 0, err
		})
	}
	if f.absent {
		all = append(all, func(c look.File) (bool, error) {
			object, err := o.tree.Object(c)
			n, _, ok := o.Local(object)
			return ok && n < c.Size, err
		})
	}
	if f.minDepth < 0 {
		err = errors.New("-mindepth: negative")
	}
	return all, err
}
