// Package progress tells people who wait how far something has come: by a bar
// on a terminal, by a line every ten seconds elsewhere. It starts nothing and
// asks nobody: who knows of progress calls Set.
package progress

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// A Bar shows the progress of one thing after another. It is for one goroutine.
type Bar struct {
	w        io.Writer
	terminal bool
	columns  func() int
	prefix   string
	now      func() time.Time

	label   string
	started time.Time // of label
	samples []sample  // of the last seconds
	shown   time.Time // when something was last written
	drawn   bool      // a bar stands in the terminal's line
}

// A sample is how far it had come when.
type sample struct {
	at   time.Time
	done int64
}

// How often something is shown, and over how long rates are taken.
const (
	redraw = 100 * time.Millisecond
	every  = 10 * time.Second
	window = 5 * time.Second
)

// New makes a Bar that writes to w. columns gives the width of the terminal that
// w is, and is nil if it is none. Lines begin with prefix there.
func New(w io.Writer, prefix string, columns func() int) *Bar {
	return &Bar{w: w, prefix: prefix, terminal: columns != nil, columns: columns, now: time.Now}
}

// A Unit is what is counted.
type Unit int

// The units.
const (
	Bytes Unit = iota
	Items
)

// Set says that of what label names done out of total is done. A total of 0 says
// that it is not known. It may be called as often as one likes.
func (b *Bar) Set(label string, unit Unit, done, total int64) {
	now := b.now()
	if label != b.label {
		b.label, b.started, b.samples = label, now, nil
		switch {
		case b.terminal:
			b.shown = time.Time{}
		case b.shown.IsZero():
			b.shown = now // a short wait is worth no line
		}
	}
	for len(b.samples) > 2 && now.Sub(b.samples[1].at) > window {
		b.samples = b.samples[1:]
	}
	if n := len(b.samples); n == 0 || now.Sub(b.samples[n-1].at) >= redraw {
		b.samples = append(b.samples, sample{now, done})
	}
	interval := every
	if b.terminal {
		interval = redraw
	}
	if now.Sub(b.shown) < interval {
		return
	}
	b.shown = now
	text := b.text(now, unit, done, total)
	if !b.terminal {
		fmt.Fprintf(b.w, "%s%s  %s\n", b.prefix, label, text)
		return
	}
	b.drawn = true
	fmt.Fprint(b.w, "\r"+b.line(label, text, done, total)+"\x1b[K")
}

// Done takes the bar off the terminal.
func (b *Bar) Done() {
	if b.drawn {
		b.drawn = false
		fmt.Fprint(b.w, "\r\x1b[K")
	}
}

// text says in numbers how far it has come, how fast, and how long it will take.
func (b *Bar) text(now time.Time, unit Unit, done, total int64) string {
	if total <= 0 {
		return short(now.Sub(b.started))
	}
	done = min(done, total)
	show := func(n int64) string { return fmt.Sprint(n) }
	if unit == Bytes {
		show = size
	}
	s := fmt.Sprintf("%3d%%  %s of %s", int(float64(done)/float64(total)*100), show(done), show(total))
	first := b.samples[0]
	seconds := now.Sub(first.at).Seconds()
	if rate := float64(done-first.done) / seconds; seconds > 0.5 && rate > 0 {
		if unit == Bytes {
			s += "  " + size(int64(rate)) + "/s"
		}
		s += "  " + short(time.Duration(float64(total-done)/rate*float64(time.Second))) + " left"
	}
	return s
}

// line draws the bar as wide as the terminal allows.
func (b *Bar) line(label, text string, done, total int64) string {
	const most = 40
	columns := b.columns()
	left := columns - 1 - len(label) - len(text) - 4
	if total <= 0 || left < 10 {
		line := []rune(label + "  " + text)
		return string(line[:max(0, min(len(line), columns-1))])
	}
	width := min(most, left)
	full := int(float64(min(done, total)) / float64(total) * float64(width))
	return label + "  " + strings.Repeat("█", full) + strings.Repeat("░", width-full) + "  " + text
}

// short prints a time in the two units that matter.
func short(d time.Duration) string {
	if d >= 10*time.Second {
		d = d.Round(time.Second)
	}
	switch {
	case d < 0:
		return "0s"
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 100*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// size prints bytes in binary units.
func size(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1024, 0
	for f >= 1024 && i < 5 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTPE"[i])
}
