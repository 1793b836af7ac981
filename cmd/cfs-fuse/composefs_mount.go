package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const composefsMountHelp = `Have the kernel mount the composefs image IMAGE at the folder MOUNTPOINT: EROFS for
the metadata, overlayfs for the objects. No process stays behind. mount(8) calls
this for 'mount -t composefs'.

The options of -o, with a backslash before a comma that belongs to one:
  basedir=DIR[:DIR...]  the folders of objects; mandatory
  digest=HEX            the fs-verity digest (SHA-256, or SHA-512 of 128 digits)
                        that the image must have, with fs-verity enabled on it;
                        implies verity
  verity                every file has a digest, and the kernel enforces it
  tryverity             the same, if the kernel and the filesystem can
  idmap=FILE            map user and group IDs by this user namespace, as
                        /proc/PID/ns/user
  upperdir=DIR,workdir=DIR  overlayfs's folders for a mount that can be written to
  ro, rw                read-only, or as upperdir allows`

// newComposefsMount returns mount.composefs.
func newComposefsMount() *cobra.Command {
	var options []string
	var fstype string
	var fake, ignored bool
	cmd := &cobra.Command{
		Use:     "mount.composefs [-t composefs] -o OPTIONS IMAGE MOUNTPOINT",
		Short:   "Mount a composefs image by the kernel",
		Long:    composefsMountHelp,
		Example: "  mount.composefs -o basedir=/srv/objects image.cfs /mnt\n  mount -t composefs -o basedir=/srv/objects,verity image.cfs /mnt",
		Args:    exactArgs("IMAGE", "MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if fstype != "composefs" {
				return usageError{fmt.Errorf("-t %s: want composefs", fstype)}
			}
			o, err := parseMountOptions(strings.Join(options, ","))
			if err != nil {
				return usage(err)
			}
			if fake {
				return nil
			}
			return mount.Composefs(args[0], args[1], o)
		},
	}
	fl := cmd.Flags()
	fl.StringArrayVarP(&options, "options", "o", nil, "`options`, with commas between")
	fl.StringVarP(&fstype, "types", "t", "composefs", "`type` of the filesystem")
	// What mount(8) may pass to a helper (mount(8), "External helpers").
	fl.BoolVarP(&fake, "fake", "f", false, "check the command line and do nothing")
	fl.BoolVarP(&ignored, "no-mtab", "n", false, "ignored")
	fl.BoolVarP(&ignored, "verbose", "v", false, "ignored")
	fl.BoolVarP(&ignored, "sloppy", "s", false, "ignored")
	return cmd
}

// parseMountOptions reads the argument of -o.
func parseMountOptions(s string) (o mount.ComposefsOptions, err error) {
	verity := false
	for _, option := range splitOptions(s) {
		key, value, given := strings.Cut(option, "=")
		value = unescapeOption(value)
		switch key {
		case "basedir", "digest", "idmap", "upperdir", "workdir":
			if !given || value == "" {
				return o, fmt.Errorf("the option %s has no value", key)
			}
		default:
			if given {
				return o, fmt.Errorf("unknown option %q", option)
			}
		}
		switch key {
		case "basedir":
			o.Basedirs = strings.FieldsFunc(value, func(c rune) bool { return c == ':' })
		case "digest":
			if o.Digest, err = hex.DecodeString(value); err != nil || len(o.Digest) != 32 && len(o.Digest) != 64 {
				return o, fmt.Errorf("digest=%.80s: want 64 hexadecimal digits, or 128 of SHA-512", value)
			}
		case "idmap":
			o.IDMap = value
		case "upperdir":
			o.Upper = value
		case "workdir":
			o.Work = value
		case "verity":
			verity = true
		case "tryverity":
			o.Verity = mount.Try
		case "ro":
			o.ReadOnly = true
		case "rw":
			o.ReadOnly = false
		default:
			return o, fmt.Errorf("unknown option %q", option)
		}
	}
	if verity {
		o.Verity = mount.Require
	}
	switch {
	case len(o.Basedirs) == 0:
		return o, hint.Wrap(errors.New("no folder of objects"), "add -o basedir=DIR")
	case (o.Upper == "") != (o.Work == ""):
		return o, errors.New("of upperdir and workdir only one is given")
	}
	return o, nil
}

// splitOptions splits at the commas that have no backslash before them, and
// leaves out what is empty.
func splitOptions(s string) []string {
	var all []string
	start := 0
	for i := 0; i <= len(s); i++ {
		switch {
		case i == len(s) || s[i] == ',':
			if i > start {
				all = append(all, s[start:min(i, len(s))])
			}
			start = i + 1
		case s[i] == '\\':
			i = min(i+1, len(s)-1)
		}
	}
	return all
}

// unescapeOption takes away the backslash before any byte.
func unescapeOption(s string) string {
	var b []byte
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b = append(b, s[i])
	}
	return string(b)
}
