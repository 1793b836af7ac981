package progress

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

// A clock stands still until it is moved.
type clock struct{ t time.Time }

func (c *clock) now() time.Time          { return c.t }
func (c *clock) forward(d time.Duration) { c.t = c.t.Add(d) }

func newBar(columns func() int) (*Bar, *clock, *bytes.Buffer) {
	var out bytes.Buffer
	c := &clock{time.Unix(1e9, 0)}
	b := New(&out, "cfs-fuse: ", columns)
	b.now = c.now
	return b, c, &out
}

func TestLog(t *testing.T) {
	b, c, out := newBar(nil)
	for range 251 { // 25 s, 4 MiB/s
		done := int64(c.t.Sub(time.Unix(1e9, 0)).Seconds() * 4 * (1 << 20))
		b.Set("filling /mnt", Bytes, done, 1<<30)
		c.forward(100 * time.Millisecond)
	}
	b.Done()
	want := "cfs-fuse: filling /mnt    3%  40.0 MiB of 1.0 GiB  4.0 MiB/s  4m06s left\n" +
		"cfs-fuse: filling /mnt    7%  80.0 MiB of 1.0 GiB  4.0 MiB/s  3m56s left\n"
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out, want)
	}
}

func TestTerminal(t *testing.T) {
	b, c, out := newBar(func() int { return 80 })
	b.Set("manifest", Bytes, 0, 0)
	c.forward(time.Second)
	b.Set("manifest", Bytes, 0, 0)
	b.Set("fill", Bytes, 10, 100)
	c.forward(50 * time.Millisecond)
	b.Set("fill", Bytes, 20, 100) // too soon
	c.forward(time.Second)
	b.Set("fill", Bytes, 50, 100)
	c.forward(time.Second)
	b.Set("seal", Items, 7, 7)
	b.Done()
	b.Done()
	want := []string{
		"manifest  0.0s", "manifest  1.0s", "fill  " + strings.Repeat("█", 4) + strings.Repeat("░", 36) + "   10%  10 B of 100 B",
		"fill  " + strings.Repeat("█", 16) + strings.Repeat("░", 17) + "   50%  50 B of 100 B  38 B/s  1.3s left",
		"seal  " + strings.Repeat("█", 40) + "  100%  7 of 7", "",
	}
	got := strings.Split(out.String(), "\r")[1:]
	if len(got) != len(want) {
		t.Fatalf("got %q", got)
	}
	for i := range want {
		if got[i] != want[i]+"\x1b[K" {
			t.Errorf("got  %q\nwant %q", got[i], want[i])
		}
		if n := len([]rune(got[i])); n > 80+3 {
			t.Errorf("%d columns: %q", n, got[i])
		}
	}

	b, c, out = newBar(func() int { return 20 })
	b.Set("a label that is long", Bytes, 5, 100)
	c.forward(time.Second)
	b.Set("s", Bytes, 5, 100)
	for _, line := range strings.Split(strings.ReplaceAll(out.String(), "\x1b[K", ""), "\r") {
		if len([]rune(line)) > 19 {
			t.Errorf("%q is wider than the terminal", line)
		}
	}
}

func TestShort(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-1: "0s", 1500 * time.Millisecond: "1.5s", 59 * time.Second: "59s", 61 * time.Second: "1m01s", 3*time.Hour + 5*time.Minute: "3h05m", 1e5 * time.Hour: "4166d",
	} {
		if got := short(d); got != want {
			t.Errorf("%v is %s, want %s", d, got, want)
		}
	}
}
