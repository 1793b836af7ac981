package main

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const explainHelp = `Explain the mount at MOUNTPOINT: which backend serves it and why, where the time
of its start went, how what an access profile names was fetched and by what
arithmetic, which bytes were needed, fetched and shared, what keeps it from the
next state, and who would suffer if the process that serves it died.

The start is the time from the command to the end of the last read that waited,
or to --until. It is accounted for in whole: the steps until the mount was there;
then the time in which at least one read waited for the source, by what the reads
waited for; then the time in which none did, so programs ran with what was there.

The story of a start is kept with the image: of a mount that the kernel serves by
now, and of one whose process has died, it is the last one that fetched something.
With the hybrid backend reads of files that were whole reach nobody but the
kernel, and are not in it.`

func newExplain(g *global) *cobra.Command {
	var until time.Duration
	var slowest int
	var timeline, asJSON bool
	cmd := &cobra.Command{
		Use:     "explain [flags] MOUNTPOINT",
		Short:   "Explain why a mount is as it is, and where its start's time went",
		Long:    explainHelp,
		Example: "  cfs-fuse explain /mnt\n  cfs-fuse explain --json --until 2.5s /mnt",
		Args:    exactArgs("MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if until < 0 || slowest < 0 {
				return usageError{fmt.Errorf("--until and --slowest: want no negative numbers")}
			}
			e, err := mount.Explain(cmd.Context(), g.runtimeDir, args[0], until.Seconds())
			if err != nil {
				return err
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			if asJSON {
				return printJSON(out, e)
			}
			if timeline && e.Story != nil {
				slowest = len(e.Story.Waits)
			}
			printExplanation(out, e, slowest, timeline)
			return nil
		},
	}
	fl := cmd.Flags()
	fl.DurationVar(&until, "until", 0, "the start ends so long after the command, e.g. when the program answered (default the last read that waited)")
	fl.IntVar(&slowest, "slowest", 10, "list the `N` reads that waited longest")
	fl.BoolVar(&timeline, "timeline", false, "list all reads that waited, in their order")
	fl.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printExplanation(w io.Writer, e *mount.Explanation, slowest int, timeline bool) {
	s := e.Status
	row := func(name, text string) {
		if text != "" {
			fmt.Fprintf(w, "%-9s %s\n", name, text)
		}
	}
	row("mount", fmt.Sprintf("%s, of %s", s.Mountpoint, s.Source))
	backend := s.Backend
	switch {
	case backend == "kernel":
		backend = "the kernel's EROFS and overlayfs: every byte was local, and the image sealed"
	case s.BackendReason != "":
		backend += ", because: " + s.BackendReason
	}
	row("backend", backend)
	row("state", s.State.String())
	row("next", oneLine(e.Next))
	row("verity", s.Verity)
	row("at risk", e.Risk)
	for i, u := range e.Users {
		if i == 5 {
			fmt.Fprintf(w, "%-9s and %d more processes\n", "", len(e.Users)-i)
			break
		}
		name := ""
		if i == 0 {
			name = "used by"
		}
		fmt.Fprintf(w, "%-9s %d %s (%s)\n", name, u.PID, look.Quote(short(u.Command, 60)), u.How)
	}
	if e.Story == nil {
		fmt.Fprintln(w, "\nNothing was fetched for this image since its stories are kept.")
		return
	}
	printStart(w, e)
	printPlan(w, e.Story)
	printBytes(w, e)
	printWaits(w, e, slowest, timeline)
}

func printStart(w io.Writer, e *mount.Explanation) {
	st := e.Start
	fmt.Fprintf(w, "\nSTART of %s, %.3f s\n", e.Story.Began.Local().Format("2006-01-02 15:04:05"), st.Until)
	rows := [][]string{{"AT", "TOOK", "WHAT"}}
	add := func(at, took float64, what string) {
		rows = append(rows, []string{fmt.Sprintf("%.3f", at), fmt.Sprintf("%.3f", took), what})
	}
	for _, p := range e.Story.Phases {
		what := p.Name
		if p.Detail != "" {
			what += ": " + oneLine(p.Detail)
		}
		add(p.At, p.Took, what)
	}
	if e.Story.Mounted > 0 {
		add(e.Story.Mounted, st.Waiting, fmt.Sprintf("%d reads waited: %.3f for the network, %.3f for decompressing and digests, %.3f for the store, %.3f in the queue",
			st.Reads, st.Network, st.Inflate, st.Store, st.Queue))
		add(e.Story.Mounted, st.Idle, fmt.Sprintf("no read waited: programs ran (%d reads were answered from the store in %.3f s so far)", e.Story.Local, e.Story.LocalSeconds))
	}
	writeColumns(w, rows)
	for _, name := range []string{"complete", "sealed", "swapped"} {
		if at, ok := e.Story.States[name]; ok {
			fmt.Fprintf(w, "%s after %.3f s\n", name, at)
		}
	}
	if st.Reads > 0 {
		fmt.Fprintf(w, "An access profile of all this would have saved some %.3f s of the waiting ('cfs-fuse profile'); this start had one of %d parts.\n",
			st.PrefetchSaves, e.Story.Prefetch)
	}
}

// printPlan says how what the access profile names was fetched, and why so.
func printPlan(w io.Writer, s *mount.Story) {
	fmt.Fprintln(w, "\nMODE")
	p := s.Plan
	switch {
	case s.Prefetch == 0:
		fmt.Fprintln(w, "no access profile was known: what programs read comes first, then what is near, then the rest in order")
		return
	case p == nil:
		fmt.Fprintln(w, "not known: the story is of a version that did not keep it")
		return
	case p.Mode == "":
		fmt.Fprintln(w, "not decided: nothing is fetched ahead yet, or ever (mount --fill=false)")
		return
	}
	rows := [][]string{{"needed", fmt.Sprintf("%s of %s of compressed layers, by the access profile: a density of %.3f", size(p.Needed), size(p.Size), p.Density)}}
	if !p.Measured {
		rows = append(rows, []string{"decision", p.Mode + ": all of it was local, or asked for before the link had been measured"})
		writeColumns(w, rows)
		return
	}
	cost := func(c mount.PlanCost) string {
		return fmt.Sprintf("%.3f s: %s in %d requests", c.Seconds, size(c.Bytes), c.Requests)
	}
	why := "long ranges would not have what is needed a tenth sooner"
	if p.Mode == "stream" {
		why = "long ranges, with all that lies in them, have what is needed a tenth sooner, or more"
	}
	writeColumns(w, append(rows,
		[]string{"left", size(p.Left) + " of that were neither local nor under way when it was decided"},
		[]string{"link", fmt.Sprintf("%.1f ms, %.1f MB/s", 1000*p.LatencySeconds, p.BytesPerSecond/1e6)},
		[]string{"prefetch", cost(p.Prefetch)},
		[]string{"stream", cost(p.Stream)},
		[]string{"decision", p.Mode + ": " + why}))
}

func printBytes(w io.Writer, e *mount.Explanation) {
	s := e.Story
	fmt.Fprintln(w, "\nBYTES")
	rows := [][]string{
		{size(s.Bytes), "in the image's files"},
		{size(s.Needed), "of them read so far"},
		{size(s.LocalBefore), "were in the store at the start"},
		{size(s.Shared), "were taken from files of other images"},
	}
	var classes []string
	for class := range s.Fetched {
		classes = append(classes, class)
	}
	slices.Sort(classes)
	for _, class := range classes {
		if f := s.Fetched[class]; f.Requests > 0 {
			rows = append(rows, []string{size(f.Bytes), fmt.Sprintf("fetched, compressed, in %d requests: %s", f.Requests, class)})
		}
	}
	writeColumns(w, rows)
}

func printWaits(w io.Writer, e *mount.Explanation, n int, timeline bool) {
	all := e.Story.Slowest(n)
	title := "SLOWEST READS"
	if timeline {
		all, title = e.Story.Waits, "READS THAT WAITED"
	}
	if len(all) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%s\n", title)
	rows := [][]string{{"AT", "TOOK", "NETWORK", "INFLATE", "STORE", "QUEUE", "OFFSET", "LENGTH", "PATH"}}
	sec := func(v float64) string { return fmt.Sprintf("%.3f", v) }
	for _, r := range all {
		path := look.Quote(e.Path(r.Content))
		if r.Error != "" {
			path += "  failed: " + oneLine(r.Error)
		}
		rows = append(rows, []string{sec(r.At), sec(r.Seconds), sec(r.Network), sec(r.Inflate()), sec(r.Store), sec(r.Queue),
			fmt.Sprint(r.Off), fmt.Sprint(r.N), path})
	}
	writeColumns(w, rows)
	if lost := e.Story.WaitsLost; lost > 0 {
		fmt.Fprintf(w, "and %d more reads, of which nothing is kept\n", lost)
	}
}
