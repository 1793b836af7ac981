package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// helperName is the name by which mount(8) calls this program for
// 'mount -t cfs-fuse' (mount(8), "External helpers").
const helperName = "mount.cfs-fuse"

const mountHelperHelp = `Mount the image SOURCE at the folder DIR. mount(8) calls this for
'mount -t cfs-fuse', and so for lines of /etc/fstab.

OPTIONS, with commas between, are those of mount(8) that say what programs may
do (ro, nosuid, nodev, noexec), and any long flag of 'cfs-fuse mount', without
its dashes and with '=' before a value. In /etc/fstab write \054 for a comma and
\040 for a blank. What is for mount(8) or systemd alone (defaults, auto, user,
nofail, _netdev, x-…) is passed over.

Whoever has a registry as SOURCE wants _netdev, so that the network is up first.`

const mountHelperExample = `  mount -t cfs-fuse registry.example.com/debian:12 /mnt
  mount -t cfs-fuse -o nosuid,swap=never,store-size=20GB oci:/srv/layout:latest /mnt

  # in /etc/fstab
  registry.example.com/app:1  /srv/app  cfs-fuse  _netdev,nofail,verity=require  0 0`

// newMountHelper returns mount.cfs-fuse; its Run is never used, since what it is
// given becomes a command line of 'cfs-fuse mount'.
func newMountHelper() *cobra.Command {
	return &cobra.Command{
		Use:     helperName + " SOURCE DIR [-sfnv] [-o OPTIONS]",
		Short:   "Mount an image by mount(8) or fstab",
		Long:    mountHelperHelp,
		Example: mountHelperExample,
		Run:     func(cmd *cobra.Command, _ []string) { cmd.Help() },
	}
}

// runMountHelper executes a command line of mount.cfs-fuse.
func runMountHelper(ctx context.Context, args []string) int {
	if slices.Contains(args, "--help") || slices.Contains(args, "-h") {
		return runTool(ctx, newMountHelper(), nil)
	}
	line, fake, err := mountHelperLine(args)
	if err != nil {
		advice := hint.Of(err)
		if advice == "" {
			advice = "see '" + helperName + " --help'"
		}
		fmt.Fprintf(os.Stderr, "%s: %s (hint: %s)\n", helperName, oneLine(err.Error()), advice)
		return exitUsage
	}
	if fake {
		return exitOK
	}
	// What goes on in the background runs its own program with these arguments.
	os.Args = append([]string{"cfs-fuse"}, line...)
	return run(ctx, line)
}

// passedOver are options that are not for a filesystem (mount(8),
// "Filesystem-independent mount options"; fstab(5)), and rw, which mount(8)
// says for "defaults": an image cannot be written to, and a mount with an
// upperdir can anyway.
var passedOver = []string{
	"defaults", "rw", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev",
	"suid", "dev", "exec", "async", "atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "lazytime", "nolazytime", "silent", "loud",
}

// mountHelperLine turns what mount(8) says into arguments of cfs-fuse.
func mountHelperLine(args []string) (line []string, fake bool, err error) {
	var names, options []string
	for i := 0; i < len(args); i++ {
		switch a := args[i]; {
		case a == "-o" || a == "-t" || a == "-N":
			if i++; i == len(args) {
				return nil, false, fmt.Errorf("%s without a value", a)
			}
			if a == "-o" {
				options = append(options, strings.Split(args[i], ",")...)
			} else if a == "-N" {
				return nil, false, hint.Wrap(fmt.Errorf("-N %s: another namespace is not supported", args[i]), "use nsenter(1)")
			}
		case strings.HasPrefix(a, "-") && strings.Trim(a, "-sfnvrw") == "" && !strings.HasPrefix(a, "--"):
			fake = fake || strings.Contains(a, "f")
		case strings.HasPrefix(a, "-"):
			return nil, false, fmt.Errorf("unknown flag %s", a)
		default:
			names = append(names, a)
		}
	}
	if len(names) != 2 {
		return nil, false, fmt.Errorf("%d names, want SOURCE and DIR", len(names))
	}
	root := newRoot(&global{})
	mount, _, err := root.Find([]string{"mount"})
	if err != nil {
		return nil, false, err
	}
	line = []string{"mount"}
	for _, o := range options {
		key, value, given := strings.Cut(o, "=")
		if _, ok := mountAttributes[key]; ok && !given {
			line = append(line, "--options="+key)
			continue
		}
		if o == "" || slices.Contains(passedOver, key) || strings.HasPrefix(key, "x-") || strings.HasPrefix(key, "X-") || key == "comment" {
			continue
		}
		flag := mount.Flags().Lookup(key)
		if flag == nil {
			flag = root.PersistentFlags().Lookup(key)
		}
		switch {
		case flag == nil || flag.Hidden || key == "foreground" || key == "options" || key == "help":
			return nil, false, fmt.Errorf("unknown option %q", o)
		case given:
			line = append(line, "--"+key+"="+value)
		case flag.NoOptDefVal == "":
			return nil, false, fmt.Errorf("the option %s has no value", key)
		default:
			line = append(line, "--"+key)
		}
	}
	return append(line, "--", names[0], names[1]), fake, nil
}
