package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const topHelp = `Show all mounted images, and look again each second: their state, how much is
local, how many reads wait now and for how long the oldest has, how many bytes a
second come from the source and into the store, and how many of the reads found
their bytes in the store (of reads that reached cfs-fuse: with the hybrid backend
those of whole files are the kernel's own).

Keys: up and down choose a mount, of which the lower part tells more; s sorts by
another column, q ends. Into a pipe, or with --once, one table is printed.`

func newTop(g *global) *cobra.Command {
	var interval time.Duration
	var once, asJSON bool
	cmd := &cobra.Command{
		Use:     "top [flags]",
		Short:   "Watch all mounted images",
		Long:    topHelp,
		Example: "  cfs-fuse top\n  cfs-fuse top --once | grep lazy",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if interval < 100*time.Millisecond {
				return usageError{fmt.Errorf("--interval %v: want at least 100ms", interval)}
			}
			b := &board{}
			ctx := cmd.Context()
			all, err := mount.List(ctx, g.runtimeDir)
			if err != nil {
				return err
			}
			b.update(all, time.Now())
			out := cmd.OutOrStdout()
			if once || asJSON || !isTerminal(out) || !isTerminal(os.Stdin) {
				// A rate needs two looks.
				select {
				case <-ctx.Done():
					return ctx.Err()
				case <-time.After(interval):
				}
				if all, err = mount.List(ctx, g.runtimeDir); err != nil {
					return err
				}
				b.update(all, time.Now())
				if asJSON {
					return printJSON(out, b.rows)
				}
				_, err = io.WriteString(out, b.table(1<<10, -1, false))
				return err
			}
			m := topModel{ctx: ctx, runtimeDir: g.runtimeDir, interval: interval, board: b, width: 80, height: 24}
			last, err := tea.NewProgram(m, tea.WithContext(ctx)).Run()
			if err == nil {
				err = last.(topModel).err
			}
			if ctx.Err() != nil {
				return nil // Ctrl-C is as good as q
			}
			return err
		},
	}
	fl := cmd.Flags()
	fl.DurationVarP(&interval, "interval", "d", time.Second, "time between two looks")
	fl.BoolVar(&once, "once", false, "print one table and end")
	fl.BoolVar(&asJSON, "json", false, "print one table as JSON and end")
	return cmd
}

// A topRow is what is shown of one mount.
type topRow struct {
	Mountpoint string  `json:"mountpoint"`
	Source     string  `json:"source"`
	State      string  `json:"state"`
	Backend    string  `json:"backend"`
	Local      float64 `json:"local_percent"` // of the image's bytes
	Waiting    int     `json:"reads_waiting"`
	Oldest     float64 `json:"oldest_wait_seconds"`
	// Fetch and Store are bytes a second: compressed ones from the source, and
	// the files' into the store.
	Fetch float64 `json:"fetch_bytes_per_second"`
	Store float64 `json:"store_bytes_per_second"`
	// Hits is the part of the reads that found their bytes in the store, -1 if
	// there was none.
	Hits float64 `json:"hit_percent"`

	status mount.Status
}

// A board remembers what it has last seen, for rates.
type board struct {
	rows []topRow
	at   time.Time
	sort int // a column of topColumns
}

// topColumns are the columns, and what they are sorted by.
var topColumns = []struct {
	title string
	less  func(a, b topRow) int
}{
	{"MOUNTPOINT", func(a, b topRow) int { return cmp.Compare(a.Mountpoint, b.Mountpoint) }},
	{"STATE", func(a, b topRow) int { return cmp.Compare(a.status.State, b.status.State) }},
	{"LOCAL", func(a, b topRow) int { return cmp.Compare(a.Local, b.Local) }},
	{"WAITING", func(a, b topRow) int { return cmp.Compare(b.Waiting, a.Waiting) }},
	{"OLDEST", func(a, b topRow) int { return cmp.Compare(b.Oldest, a.Oldest) }},
	{"FETCH/S", func(a, b topRow) int { return cmp.Compare(b.Fetch, a.Fetch) }},
	{"STORE/S", func(a, b topRow) int { return cmp.Compare(b.Store, a.Store) }},
	{"HITS", func(a, b topRow) int { return cmp.Compare(a.Hits, b.Hits) }},
}

func fetchedBytes(s mount.Status) (n int64) {
	for _, w := range s.Fetched {
		n += w.Bytes
	}
	return n
}

// update takes over what was seen at a time.
func (b *board) update(all []mount.Status, now time.Time) {
	before := map[string]topRow{}
	for _, r := range b.rows {
		before[r.Mountpoint] = r
	}
	seconds := now.Sub(b.at).Seconds()
	b.rows = []topRow{}
	for _, s := range all {
		r := topRow{Mountpoint: s.Mountpoint, Source: s.Source, State: s.State.String(), Backend: s.Backend, Local: 100,
			Waiting: s.ReadsWaiting, Oldest: s.OldestWaitSeconds, Hits: -1, status: s}
		if s.Bytes > 0 && s.State < mount.Complete {
			r.Local = float64(s.BytesLocal) / float64(s.Bytes) * 100
		}
		if reads := s.ReadsLocal + s.ReadsWaited; reads > 0 {
			r.Hits = float64(s.ReadsLocal) / float64(reads) * 100
		}
		// Another process, or another image, counts from nothing.
		if old, ok := before[s.Mountpoint]; ok && seconds > 0 && old.status.PID == s.PID && s.PID != 0 {
			r.Fetch = max(0, float64(fetchedBytes(s)-fetchedBytes(old.status))/seconds)
			r.Store = max(0, float64(s.BytesLocal-old.status.BytesLocal)/seconds)
		}
		b.rows = append(b.rows, r)
	}
	b.at = now
	b.order()
}

func (b *board) order() {
	slices.SortStableFunc(b.rows, func(x, y topRow) int {
		return cmp.Or(topColumns[b.sort].less(x, y), topColumns[0].less(x, y))
	})
}

// table draws all rows in so many columns, the chosen one inverted.
func (b *board) table(width, chosen int, terminal bool) string {
	rows := [][]string{{}}
	for i, c := range topColumns {
		title := c.title
		if terminal && i == b.sort {
			title += "▾"
		}
		rows[0] = append(rows[0], title)
	}
	for _, r := range b.rows {
		oldest, hits := "-", "-"
		if r.Waiting > 0 {
			oldest = fmt.Sprintf("%.1fs", r.Oldest)
		}
		if r.Hits >= 0 {
			hits = fmt.Sprintf("%.0f%%", r.Hits)
		}
		rate := func(v float64) string {
			if v < 1 {
				return "-"
			}
			return shortSize(int64(v))
		}
		rows = append(rows, []string{look.Quote(r.Mountpoint), r.State + "/" + r.Backend, fmt.Sprintf("%.0f%%", r.Local), fmt.Sprint(r.Waiting), oldest,
			rate(r.Fetch), rate(r.Store), hits})
	}
	widths := make([]int, len(topColumns))
	for _, row := range rows {
		for i, cell := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(cell))
		}
	}
	// The mount point, which comes last, gives way.
	rest := 0
	for _, w := range widths[1:] {
		rest += w + 2
	}
	room := max(10, width-rest)
	var s strings.Builder
	for i, row := range rows {
		var line strings.Builder
		for k, cell := range row[1:] {
			pad := strings.Repeat(" ", widths[k+1]-utf8.RuneCountInString(cell))
			if k == 0 {
				line.WriteString(cell + pad + "  ")
			} else {
				line.WriteString(pad + cell + "  ")
			}
		}
		line.WriteString(fit(row[0], room))
		text := line.String()
		switch {
		case terminal && i == 0:
			text = "\x1b[1m" + text + "\x1b[0m"
		case terminal && i-1 == chosen:
			text = "\x1b[7m" + text + "\x1b[0m"
		}
		s.WriteString(text + "\n")
	}
	if len(b.rows) == 0 {
		s.WriteString("nothing is mounted\n")
	}
	return s.String()
}

// fit keeps the end of a text that is too long.
func fit(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return "…" + string(r[len(r)-n+1:])
	}
	return s
}

// details tells more of a mount.
func (r *topRow) details(width int) string {
	s := r.status
	var b strings.Builder
	line := func(name, text string) {
		if text != "" {
			text = strings.Join(strings.Fields(text), " ")
			if n := width - 13; utf8.RuneCountInString(text) > n && n > 1 {
				text = string([]rune(text)[:n-1]) + "…"
			}
			fmt.Fprintf(&b, "%-11s  %s\n", name, text)
		}
	}
	line("source", s.Source)
	line("local", fmt.Sprintf("%d of %d files, %s of %s", s.FilesLocal, s.Files, size(s.BytesLocal), size(s.Bytes)))
	line("fetched", size(fetchedBytes(s)))
	line("reads", fmt.Sprintf("%d found their bytes, %d waited", s.ReadsLocal, s.ReadsWaited))
	line("verity", s.Verity)
	line("store", s.StoreNote)
	line("note", s.Note)
	return b.String()
}

// topModel is the program on a terminal.
type topModel struct {
	ctx           context.Context
	runtimeDir    string
	interval      time.Duration
	board         *board
	width, height int
	chosen        string // the mount point
	err           error
}

// seen is what mount.List gave.
type seen struct {
	all []mount.Status
	at  time.Time
	err error
}

func (m topModel) Init() tea.Cmd { return m.again() }

// again looks after the interval.
func (m topModel) again() tea.Cmd {
	return tea.Tick(m.interval, func(time.Time) tea.Msg {
		all, err := mount.List(m.ctx, m.runtimeDir)
		return seen{all, time.Now(), err}
	})
}

func (m topModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		m.width, m.height = msg.Width, msg.Height
	case seen:
		if m.err = msg.err; m.err != nil {
			return m, tea.Quit
		}
		m.board.update(msg.all, msg.at)
		return m, m.again()
	case tea.KeyPressMsg:
		switch msg.String() {
		case "q", "ctrl+c", "esc":
			return m, tea.Quit
		case "s":
			m.board.sort = (m.board.sort + 1) % len(topColumns)
			m.board.order()
		case "down", "j":
			m.choose(1)
		case "up", "k":
			m.choose(-1)
		}
	}
	return m, nil
}

// at returns which row is chosen.
func (m topModel) at() int {
	return max(0, slices.IndexFunc(m.board.rows, func(r topRow) bool { return r.Mountpoint == m.chosen }))
}

func (m *topModel) choose(by int) {
	if n := len(m.board.rows); n > 0 {
		m.chosen = m.board.rows[min(n-1, max(0, m.at()+by))].Mountpoint
	}
}

func (m topModel) View() tea.View {
	at := m.at()
	var waiting int
	var rate float64
	for _, r := range m.board.rows {
		waiting += r.Waiting
		rate += r.Fetch
	}
	head := fmt.Sprintf("cfs-fuse top  %s  %d mounts, %d reads waiting, %s/s fetched   (up/down, s sort, q quit)",
		m.board.at.Format("15:04:05"), len(m.board.rows), waiting, shortSize(int64(rate)))
	details := ""
	if len(m.board.rows) > 0 {
		details = m.board.rows[at].details(m.width)
	}
	lines := strings.Split(strings.TrimSuffix(m.board.table(m.width, at, true), "\n"), "\n")
	// The chosen row stays in sight.
	if room := max(2, m.height-4-strings.Count(details, "\n")); len(lines) > room {
		first := 1 + max(0, at+2-room)
		lines = append(lines[:1:1], lines[first:min(len(lines), first+room-1)]...)
	}
	v := tea.NewView(cut(head, m.width) + "\n\n" + strings.Join(lines, "\n") + "\n\n" + details)
	v.AltScreen = true
	return v
}

func cut(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n])
	}
	return s
}
