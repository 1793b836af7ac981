package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/internal/finding"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const doctorHelp = `Find out what this machine can do for cfs-fuse, by doing it: FUSE, the kernel's
own mounts, fs-verity, the filesystem of the store, containerd's set-up. With
SOURCE, as 'cfs-fuse mount' takes it, also what its registry and mirrors do with
the requests of a mount, which reads some MiB.

Each line is ok, degraded (it works, at a cost) or missing (something will not
work), and says what that costs and what to do. Nothing that was tried is left,
but for the store's empty folder if there was none.
The exit code is 1 if anything is missing.`

func newDoctor(g *global) *cobra.Command {
	var f mountFlags
	var asJSON bool
	var root, containerd, snapshotter string
	cmd := &cobra.Command{
		Use:     "doctor [SOURCE]",
		Short:   "Find out what works here, what does not, and what to do",
		Long:    doctorHelp,
		Example: "  cfs-fuse doctor\n  cfs-fuse doctor registry.example.com/app:1\n  cfs-fuse doctor --json | jq '.[] | select(.state != \"ok\")'",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			root, err := filepath.Abs(root)
			if err != nil {
				return err
			}
			runtimeDir, err := filepath.Abs(g.runtimeDir)
			if err != nil {
				return err
			}
			var s fetcher.Source
			if len(args) == 1 {
				if s, err = fetcher.OpenSource(args[0], f.opts.Source); err != nil {
					return err
				}
				defer s.Close()
			}
			all := mount.Examine(cmd.Context(), root, runtimeDir)
			all = append(all, examineContainerd(cmd.Context(), containerd, snapshotter)...)
			if s != nil {
				all = append(all, fetcher.Examine(cmd.Context(), s)...)
			}
			out := cmd.OutOrStdout()
			if asJSON {
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				err = enc.Encode(all)
			} else {
				err = printFindings(out, all)
			}
			missing := 0
			for _, one := range all {
				if one.State == finding.Missing {
					missing++
				}
			}
			if err == nil && missing > 0 {
				err = hint.Wrap(fmt.Errorf("doctor: %d of %d things are missing", missing, len(all)), "the lines 'do' above say what to do")
			}
			return errors.Join(err, cmd.Context().Err())
		},
	}
	fl := cmd.Flags()
	fl.BoolVar(&asJSON, "json", false, "print JSON: a list of objects with group, name, state, detail, cost and advice")
	fl.StringVar(&root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVar(&containerd, "containerd", "/run/containerd/containerd.sock", "`socket` of containerd")
	fl.StringVar(&snapshotter, "snapshotter", "/run/cfs-fuse/snapshotter.sock", "`socket` of 'cfs-fuse snapshotter'")
	fl.StringVar(&f.opts.Source.Platform, "platform", "", "`os/arch` to take of a multi-platform image (default this machine's)")
	fl.BoolVar(&f.opts.Source.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to registries")
	fl.StringVar(&f.opts.Source.HostsDir, "hosts-dir", "/etc/containerd/certs.d", "`folder` of containerd's hosts.toml files")
	return cmd
}

// printFindings prints a line for each finding, and two more for those that
// are not ok.
func printFindings(out io.Writer, all []finding.Finding) error {
	colour := map[finding.State]string{finding.OK: "\x1b[32m", finding.Degraded: "\x1b[33m", finding.Missing: "\x1b[31m"}
	width := 0
	for _, f := range all {
		width = max(width, len(f.Name))
	}
	var b strings.Builder
	group := ""
	for _, f := range all {
		if f.Group != group {
			group = f.Group
			fmt.Fprintf(&b, "%s\n", group)
		}
		state := fmt.Sprintf("%-8s", f.State)
		if isTerminal(out) {
			state = colour[f.State] + state + "\x1b[0m"
		}
		fmt.Fprintf(&b, "  %s  %-*s  %s\n", state, width, f.Name, f.Detail)
		indent := strings.Repeat(" ", width+14)
		if f.Cost != "" {
			fmt.Fprintf(&b, "%scost: %s\n", indent, f.Cost)
		}
		if f.Advice != "" {
			fmt.Fprintf(&b, "%sdo:   %s\n", indent, f.Advice)
		}
	}
	_, err := io.WriteString(out, b.String())
	return err
}
