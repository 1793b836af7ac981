package main

import (
	"bytes"
	"cmp"
	"context"
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

//go:embed report.html
var reportHTML string

var reportPage = template.Must(template.New("report").Parse(reportHTML))

func newReport(g *global) *cobra.Command {
	var output string
	var until time.Duration
	cmd := &cobra.Command{
		Use:   "report [flags] MOUNTPOINT -o FILE",
		Short: "Draw the start of a mount as a page of HTML",
		Long: `Write a page of HTML about the start of the mount at MOUNTPOINT: what waited on
what, a map of the image's chunks by state and by time of first use, the reads that
waited longest, and what a prefetch would have saved. The page is one file with its
pictures in it, asks no network for anything, and has the numbers of 'explain --json'.`,
		Example: "  cfs-fuse report /mnt -o start.html",
		Args:    exactArgs("MOUNTPOINT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := mount.Explain(cmd.Context(), g.runtimeDir, args[0], until.Seconds())
			if err != nil {
				return err
			}
			if e.Story == nil {
				return hint.Wrap(fmt.Errorf("%s: nothing is known of its start", args[0]), "an image that was sealed before fetches nothing; 'cfs-fuse explain' says how it is mounted")
			}
			if !cmd.Flags().Changed("log-level") {
				g.logLevel = "warn"
			}
			log, err := g.logger()
			if err != nil {
				return err
			}
			img, err := mount.OpenImage(cmd.Context(), e.Status.Mountpoint, mount.Options{Runtime: g.runtimeDir, Logger: log, InsecureTOC: true})
			if err != nil {
				return err
			}
			defer img.Close()
			page, err := makeReport(cmd.Context(), e, img)
			if err != nil {
				return err
			}
			var b bytes.Buffer
			if err := reportPage.Execute(&b, page); err != nil {
				return fmt.Errorf("draw the report: %w", err)
			}
			if output == "-" {
				_, err = io.Copy(cmd.OutOrStdout(), &b)
				return err
			}
			if fi, err := os.Stat(output); err == nil && !fi.Mode().IsRegular() {
				return fmt.Errorf("%s: not a regular file", output)
			}
			if output, err = filepath.Abs(output); err != nil {
				return err
			}
			return durable.WriteFile(output, b.Bytes(), 0o644)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "start.html", "the `file` to write; - for standard output")
	cmd.Flags().DurationVar(&until, "until", 0, "the start ends so long after the command (default the last read that waited)")
	return cmd
}

// What report.html shows. Numbers with a Key are those of explain --json under
// that name, in Value.
type startReport struct {
	Mountpoint, Source, Image, Began, Backend, State, Next, Risk string

	Tiles, Bytes []figure
	Timeline     timeline
	Map          chunkMap
	Slowest      [][]string

	Saves                                                                          string
	SavesShown, WaitingShown, IdleShown, Latency, Rate, Compressed, Link, Prefetch string
}

type figure struct{ Key, Value, Shown, Label string }

type box struct {
	X, Y, W, H, Class, Title string
	Parts                    []box
}

type tick struct{ X, Text, Anchor string }

type timeline struct {
	Height        string
	Ticks         []tick
	Phases, Waits []box
	Needed        string
	More          int
}

type cell struct{ X, Y, W, Class, Heat, Title string }

type chunkMap struct {
	Height, Last                  string
	PerCell, Absent, Unread, Read int
	Cells                         []cell
}

// number writes a number as encoding/json does, so that both can be compared.
func number(v float64) string { return strconv.FormatFloat(v, 'g', -1, 64) }

func coordinate(v float64) string { return strconv.FormatFloat(v, 'f', 2, 64) }

func seconds(v float64) string { return fmt.Sprintf("%.3f s", v) }

func makeReport(ctx context.Context, e *mount.Explanation, img *mount.Image) (*startReport, error) {
	s, st := e.Story, e.Start
	r := &startReport{
		Mountpoint: e.Status.Mountpoint, Source: e.Status.Source, Image: s.Image, Began: s.Began.Format(time.RFC1123), Backend: e.Status.Backend,
		State: e.Status.State.String(), Next: e.Next, Risk: e.Risk, Saves: number(st.PrefetchSaves), SavesShown: seconds(st.PrefetchSaves),
		WaitingShown: seconds(st.Waiting), IdleShown: seconds(st.Idle), Latency: fmt.Sprintf("%.1f ms", s.LatencySeconds*1000), Rate: size(int64(s.BytesPerSecond)),
		Compressed: size(st.Compressed), Prefetch: strconv.Itoa(s.Prefetch), Link: "no time that is known",
	}
	if s.BytesPerSecond > 0 {
		r.Link = seconds(s.LatencySeconds + float64(st.Compressed)/s.BytesPerSecond)
	}
	second := func(key string, v float64, label string) {
		r.Tiles = append(r.Tiles, figure{key, number(v), seconds(v), label})
	}
	second("until_seconds", st.Until, "the start")
	second("mount_seconds", st.Mount, "until the mount was there")
	second("waiting_seconds", st.Waiting, "reads waited")
	second("idle_seconds", st.Idle, "no read waited")
	second("network_seconds", st.Network, "waited for the network")
	second("inflate_seconds", st.Inflate, "for decompressing, digests")
	r.Tiles = append(r.Tiles, figure{"reads_waited", strconv.Itoa(st.Reads), strconv.Itoa(st.Reads), "reads that waited"})
	sized := func(key string, n int64, label string) {
		r.Bytes = append(r.Bytes, figure{key, strconv.FormatInt(n, 10), size(n), label})
	}
	sized("image_bytes", s.Bytes, "in the image's files")
	sized("needed_bytes", s.Needed, "of them read so far")
	sized("local_before_bytes", s.LocalBefore, "were in the store at the start")
	sized("shared_bytes", s.Shared, "were taken from files of other images")
	for _, class := range []string{"metadata", "demand", "prefetch", "fill"} {
		sized(class+"_bytes", s.Fetched[class].Bytes, fmt.Sprintf("fetched, compressed, in %d requests: %s", s.Fetched[class].Requests, class))
	}
	for _, w := range s.Slowest(20) {
		path := e.Path(w.Content)
		if w.Error != "" {
			path += " (failed: " + w.Error + ")"
		}
		row := []string{}
		for _, v := range []float64{w.At, w.Seconds, w.Network, w.Inflate(), w.Store, w.Queue} {
			row = append(row, fmt.Sprintf("%.3f", v))
		}
		r.Slowest = append(r.Slowest, append(row, strconv.FormatInt(w.Off, 10), strconv.FormatInt(w.N, 10), path))
	}
	r.Timeline = drawTimeline(e)
	var err error
	r.Map, err = drawMap(ctx, e, img)
	return r, err
}

// Of the timeline, in units of its picture, which is 1000 wide: reads that waited
// at the same time lie in lanes of their own.
const (
	laneHeight  = 14
	maxLanes    = 40
	topLane     = 40
	curveHeight = 160
)

func drawTimeline(e *mount.Explanation) timeline {
	s, until := e.Story, max(e.Start.Until, 1e-3)
	x := func(at float64) float64 { return min(1000, at/until*1000) }
	var t timeline
	step := math.Pow(10, math.Floor(math.Log10(until)))
	for until/step < 5 {
		step /= 2
	}
	for at := 0.0; at <= until; at += step {
		anchor := "middle"
		switch {
		case at == 0:
			anchor = "start"
		case x(at) > 970:
			anchor = "end"
		}
		t.Ticks = append(t.Ticks, tick{coordinate(x(at)), strconv.FormatFloat(at, 'g', 4, 64) + " s", anchor})
	}
	for _, p := range s.Phases {
		t.Phases = append(t.Phases, box{X: coordinate(x(p.At)), Y: "18", W: coordinate(max(0.5, x(p.At+p.Took)-x(p.At)-0.3)), H: "14",
			Title: fmt.Sprintf("%s, %.3f s: %s", p.Name, p.Took, p.Detail)})
	}
	waits := slices.Clone(s.Waits)
	slices.SortStableFunc(waits, func(a, b mount.ReadWait) int { return cmp.Compare(a.At, b.At) })
	var lanes []float64 // until when each is taken
	for _, w := range waits {
		if w.At >= until {
			continue
		}
		lane := slices.IndexFunc(lanes, func(end float64) bool { return end <= w.At })
		if lane < 0 {
			if len(lanes) == maxLanes {
				t.More++
				continue
			}
			lane = len(lanes)
			lanes = append(lanes, 0)
		}
		lanes[lane] = w.At + w.Seconds
		b := box{Title: fmt.Sprintf("%s at %d, %d bytes: %.3f s, at %.3f s", e.Path(w.Content), w.Off, w.N, w.Seconds, w.At)}
		at := w.At
		for _, part := range []struct {
			class string
			took  float64
		}{{"queue", w.Queue}, {"network", w.Network}, {"inflate", w.Inflate()}, {"store", w.Store}} {
			if part.took > 0 {
				b.Parts = append(b.Parts, box{Class: part.class, X: coordinate(x(at)), Y: strconv.Itoa(topLane + lane*laneHeight),
					W: coordinate(max(0.1, x(at+part.took)-x(at))), H: strconv.Itoa(laneHeight - 2)})
			}
			at += part.took
		}
		t.Waits = append(t.Waits, b)
	}
	curve := topLane + len(lanes)*laneHeight + 10
	height := curve + curveHeight
	t.Height = strconv.Itoa(height)
	var points []string
	for i, u := range s.Uses {
		if u.At <= until {
			y := float64(height-4) - float64(i+1)/float64(len(s.Uses))*(curveHeight-8)
			points = append(points, coordinate(x(u.At))+","+coordinate(y))
		}
	}
	t.Needed = strings.Join(points, " ")
	return t
}

// Of the maps: so many cells at most, in rows of so many.
const (
	maxCells   = 4000
	cellsInRow = 100
)

func drawMap(ctx context.Context, e *mount.Explanation, img *mount.Image) (chunkMap, error) {
	used := map[int]float64{}
	last := 0.0
	for _, u := range e.Story.Uses {
		if _, ok := used[u.Chunk]; !ok {
			used[u.Chunk] = u.At
			last = max(last, u.At)
		}
	}
	type group struct {
		mount.ChunkState
		chunks, local, read int
		first               float64
		from                int
	}
	var all []group
	m := chunkMap{PerCell: 1, Last: seconds(last)}
	var states []mount.ChunkState
	if err := img.Chunks(ctx, func(_ int, c mount.ChunkState) { states = append(states, c) }); err != nil {
		return m, err
	}
	m.PerCell = max(1, (len(states)+maxCells-1)/maxCells)
	for j, c := range states {
		if c.Zero {
			break // holes, which are the last, are never fetched
		}
		if j%m.PerCell == 0 {
			all = append(all, group{ChunkState: c, first: math.Inf(1), from: j})
		}
		g := &all[len(all)-1]
		g.chunks++
		at, read := used[j]
		switch {
		case read:
			m.Read++
			g.read++
			g.first = min(g.first, at)
		case c.Local:
			m.Unread++
		default:
			m.Absent++
		}
		if c.Local {
			g.local++
		}
	}
	const width = 1000.0 / cellsInRow
	for i, g := range all {
		c := cell{X: coordinate(float64(i%cellsInRow) * width), Y: coordinate(float64(i/cellsInRow) * width), W: coordinate(width - 1), Class: "absent", Heat: "#eef1f5"}
		switch {
		case g.read > 0:
			c.Class, c.Heat = "read", heat((g.first-e.Story.Mounted)/max(1e-9, last-e.Story.Mounted))
		case 2*g.local >= g.chunks:
			c.Class = "local"
		}
		c.Title = fmt.Sprintf("layer %d, chunks %d to %d: %d local, %d read; %s", g.Layer, g.from, g.from+g.chunks-1, g.local, g.read, e.Path(g.Content))
		if g.read > 0 {
			c.Title += fmt.Sprintf(", first after %.3f s", g.first)
		}
		m.Cells = append(m.Cells, c)
	}
	m.Height = coordinate(float64((len(all)+cellsInRow-1)/cellsInRow) * width)
	return m, nil
}

// heat is a colour between dark red (0) and a light orange (1).
func heat(at float64) string {
	stops := [][3]float64{{0x7f, 0, 0}, {0xd7, 0x30, 0x1f}, {0xfc, 0x8d, 0x59}, {0xfd, 0xd4, 0x9e}}
	at = min(1, max(0, at)) * float64(len(stops)-1)
	i := min(int(at), len(stops)-2)
	part := at - float64(i)
	mix := func(k int) int { return int(stops[i][k] + (stops[i+1][k]-stops[i][k])*part) }
	return fmt.Sprintf("#%02x%02x%02x", mix(0), mix(1), mix(2))
}
