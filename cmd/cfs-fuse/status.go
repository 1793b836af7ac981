package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newStatus(g *global) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [MOUNTPOINT]",
		Short: "Show what is mounted, and how far it has come",
		Long: `Show the mount at MOUNTPOINT, or every mount: its source, state, what is local,
which backend serves it, what fs-verity enforces, and why it goes no further if
it does not. With --json, sizes are bytes: one object, or a list without MOUNTPOINT.`,
		Example: "  cfs-fuse status\n  cfs-fuse status --json /mnt",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var all []mount.Status
			var err error
			if len(args) == 1 {
				var s mount.Status
				if s, err = mount.Query(cmd.Context(), g.runtimeDir, args[0]); err == nil {
					all = []mount.Status{s}
				}
			} else {
				all, err = mount.List(cmd.Context(), g.runtimeDir)
			}
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if asJSON {
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				if len(args) == 1 {
					return enc.Encode(all[0])
				}
				return enc.Encode(slices.Concat([]mount.Status{}, all))
			}
			for i, s := range all {
				if i > 0 {
					fmt.Fprintln(out)
				}
				if err := printStatus(out, s); err != nil {
					return err
				}
			}
			if len(all) == 0 {
				fmt.Fprintln(out, "nothing is mounted")
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printStatus(out io.Writer, s mount.Status) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(w, "  %s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	fmt.Fprintln(w, s.Mountpoint)
	row("source", "%s", s.Source)
	if s.ManifestDigest != "" {
		row("manifest", "%s", s.ManifestDigest)
	}
	row("state", "%s", s.State)
	reason := ""
	if s.BackendReason != "" {
		reason = ": " + s.BackendReason
	}
	switch {
	case s.Backend == "kernel":
		row("backend", "kernel (EROFS + overlayfs)")
	case s.PID == 0:
		row("backend", "%s, with no process%s", s.Backend, reason)
	default:
		row("backend", "%s (process %d)%s", s.Backend, s.PID, reason)
	}
	switch {
	case s.PID == 0:
	case s.Keeper == "":
		row("session", "ends with its process")
	case s.KeeperPID == 0:
		row("session", "kept by %s, restarted %d times", s.Keeper, s.Restarts)
	default:
		row("session", "kept by its %s (process %d), restarted %d times", s.Keeper, s.KeeperPID, s.Restarts)
	}
	if s.Files > 0 {
		row("local", "%d of %d files, %s of %s", s.FilesLocal, s.Files, size(s.BytesLocal), size(s.Bytes))
	}
	var fetched int64
	var requests int64
	for _, f := range s.Fetched {
		fetched += f.Bytes
		requests += f.Requests
	}
	if requests > 0 {
		row("fetched", "%s in %d requests", size(fetched), requests)
	}
	for _, extra := range [][2]string{{"idmap", s.IDMap}, {"upperdir", s.Upper}, {"context", s.Context}} {
		if extra[1] != "" {
			row(extra[0], "%s", extra[1])
		}
	}
	row("verity", "%s", s.Verity)
	if s.ComposefsDigest != "" {
		row("composefs", "%s", s.ComposefsDigest)
	}
	if s.OldestWaitSeconds > 0 {
		row("oldest wait", "%s", time.Duration(s.OldestWaitSeconds*float64(time.Second)).Round(time.Millisecond))
	}
	if s.StoreNote != "" {
		row("store", "%s", s.StoreNote)
	}
	for _, e := range s.Elsewhere {
		what := "swapped"
		if !e.Swapped {
			what = e.Note
		}
		row("elsewhere", "%s (process %d): %s", cmp.Or(e.Mountpoint, "-"), e.PID, what)
	}
	if s.Note != "" {
		row("note", "%s", s.Note)
	}
	return w.Flush()
}

// size prints bytes for people, in binary units.
func size(n int64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < len(units)-1 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, units[i])
}
