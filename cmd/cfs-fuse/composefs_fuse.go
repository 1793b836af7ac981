package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

const composefsFuseHelp = `Serve the composefs image IMAGE at the folder MOUNTPOINT through FUSE, from a
process in the background that ends with the mount. It is
'cfs-fuse mount composefs:IMAGE --objects DIR MOUNTPOINT' with the command line
of the composefs project's tool; 'cfs-fuse -o …' is the same.

The options of -o, with a backslash before a comma that belongs to one:
  source=IMAGE          the image; mandatory
  basedir=DIR[:DIR...]  the folders of objects; mandatory
  nodev, nosuid, allow_other
                        as those of 'cfs-fuse mount --options'
  noacl, ro, default_permissions
                        taken, and change nothing`

// newComposefsFuse returns composefs-fuse.
func newComposefsFuse() *cobra.Command {
	var options []string
	var f mountFlags
	var ignored bool
	cmd := &cobra.Command{
		Use:     "composefs-fuse [-f] -o OPTIONS MOUNTPOINT",
		Short:   "Mount a composefs image through FUSE",
		Long:    composefsFuseHelp,
		Example: "  composefs-fuse -o source=image.cfs,basedir=/srv/objects /mnt\n  umount /mnt",
		Args:    exactArgs("MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			image, objects, words, err := parseFuseOptions(strings.Join(options, ","))
			if err != nil {
				return usage(err)
			}
			g := global{runtimeDir: defaultRuntime(), logLevel: "info"}
			f.opts.Objects, f.options = objects, words
			f.backend, f.swap, f.verity = "fuse", "never", "off"
			return f.run(cmd.Context(), &g, "composefs:"+image, args[0])
		},
	}
	f.define(&cobra.Command{})
	fl := cmd.Flags()
	fl.StringArrayVarP(&options, "options", "o", nil, "`options`, with commas between")
	fl.BoolVarP(&f.foreground, "foreground", "f", false, "stay in the foreground")
	fl.BoolVarP(&ignored, "single", "s", false, "ignored")
	return cmd
}

// parseFuseOptions reads the argument of composefs-fuse's -o; words are those
// that mount's --options takes.
func parseFuseOptions(s string) (image string, objects, words []string, err error) {
	for _, option := range splitOptions(s) {
		key, value, _ := strings.Cut(option, "=")
		value = unescapeOption(value)
		switch key {
		case "source":
			image = value
		case "basedir":
			objects = strings.FieldsFunc(value, func(c rune) bool { return c == ':' })
		case "nodev", "nosuid", "allow_other":
			words = append(words, key)
		case "noacl", "ro", "default_permissions":
		default:
			return "", nil, nil, fmt.Errorf("unknown option %q", option)
		}
	}
	switch {
	case image == "":
		return "", nil, nil, hint.Wrap(errors.New("no image"), "add -o source=IMAGE")
	case len(objects) == 0:
		return "", nil, nil, hint.Wrap(errors.New("no folder of objects"), "add -o basedir=DIR")
	}
	return image, objects, words, nil
}
