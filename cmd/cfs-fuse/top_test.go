package main

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/creack/pty"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// looks are two looks at the same mounts, two seconds apart.
func looks(now time.Time) *board {
	b := &board{}
	lazy := mount.Status{Mountpoint: "/mnt/a", Source: "docker://h/app:1", State: mount.Lazy, Backend: "hybrid", PID: 7, Bytes: 1000, BytesLocal: 100,
		Fetched: map[string]mount.Work{"fill": {Bytes: 1 << 20}}}
	done := mount.Status{Mountpoint: "/mnt/b", Source: "oci:/x", State: mount.Swapped, Backend: "kernel"}
	b.update([]mount.Status{lazy, done}, now)
	lazy.BytesLocal, lazy.Fetched = 500, map[string]mount.Work{"fill": {Bytes: 5 << 20}}
	lazy.ReadsWaiting, lazy.OldestWaitSeconds, lazy.ReadsLocal, lazy.ReadsWaited = 3, 1.25, 3, 1
	b.update([]mount.Status{lazy, done}, now.Add(2*time.Second))
	return b
}

func TestBoard(t *testing.T) {
	b := looks(time.Unix(1e9, 0))
	want := "" +
		"STATE           LOCAL  WAITING  OLDEST  FETCH/S  STORE/S  HITS  MOUNTPOINT\n" +
		"lazy/hybrid       50%        3    1.2s     2.0M      200   75%  /mnt/a\n" +
		"swapped/kernel   100%        0       -        -        -     -  /mnt/b\n"
	if got := b.table(200, -1, false); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
	b.sort = 2 // by what is local
	b.rows[0].Local = 101
	b.order()
	if b.rows[0].Mountpoint != "/mnt/b" {
		t.Errorf("sorted by LOCAL: %+v", b.rows)
	}
	// A mount that another process serves by now counts from nothing.
	s := b.rows[1].status
	s.PID, s.BytesLocal = 8, 900
	b.update([]mount.Status{s}, b.at.Add(time.Second))
	if r := b.rows[0]; r.Fetch != 0 || r.Store != 0 || len(b.rows) != 1 {
		t.Errorf("%+v", b.rows)
	}
	if got := (&board{}).table(80, -1, false); !strings.Contains(got, "nothing is mounted") {
		t.Errorf("an empty board: %q", got)
	}
}

func TestTopModel(t *testing.T) {
	var m tea.Model = topModel{ctx: t.Context(), board: looks(time.Unix(1e9, 0)), width: 90, height: 30}
	press := func(key string) {
		code := map[string]rune{"down": tea.KeyDown, "up": tea.KeyUp}[key]
		if code == 0 {
			code = rune(key[0])
		}
		m, _ = m.Update(tea.KeyPressMsg(tea.Key{Code: code}))
	}
	m, _ = m.Update(tea.WindowSizeMsg{Width: 80, Height: 20})
	for _, c := range []struct{ key, row, source string }{{"up", "/mnt/a", "app:1"}, {"down", "/mnt/b", "oci:/x"}, {"down", "/mnt/b", "oci:/x"}, {"up", "/mnt/a", "app:1"}} {
		press(c.key)
		v := m.View().Content
		if !strings.Contains(v, c.source) || !strings.Contains(v, "2 mounts, 3 reads waiting") || !strings.Contains(v, c.row+"\x1b[0m") {
			t.Errorf("after %s:\n%s", c.key, v)
		}
		for _, line := range strings.Split(v, "\n") {
			line = strings.NewReplacer("\x1b[1m", "", "\x1b[7m", "", "\x1b[0m", "").Replace(line)
			if len([]rune(line)) > 80 {
				t.Errorf("%d columns: %q", len([]rune(line)), line)
			}
		}
	}
	press("s")
	if v := m.View().Content; !strings.Contains(v, "STATE▾") {
		t.Errorf("after s:\n%s", v)
	}
	if _, cmd := m.Update(tea.KeyPressMsg(tea.Key{Code: 'q'})); cmd == nil {
		t.Error("q does not quit")
	}
}

// TestTopOnTerminal runs top on a terminal of its own.
func TestTopOnTerminal(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe, "--runtime-dir", t.TempDir(), "top", "--interval", "100ms")
	cmd.Env = append(os.Environ(), programEnv+"=1", "TERM=xterm-256color")
	tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 80})
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	kill := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer kill.Stop()
	var screen bytes.Buffer
	buf := make([]byte, 4096)
	for !strings.Contains(screen.String(), "nothing is mounted") {
		n, err := tty.Read(buf)
		screen.Write(buf[:n])
		if err != nil {
			t.Fatalf("%v after %q", err, screen.String())
		}
	}
	if _, err := tty.WriteString("q"); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		var n int
		n, err = tty.Read(buf) // EIO once it has ended
		screen.Write(buf[:n])
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("top ended with %v", err)
	}
	// xterm's ctlseqs: the other screen is entered, and left.
	if s := screen.String(); !strings.Contains(s, "\x1b[?1049h") || !strings.Contains(s, "\x1b[?1049l") {
		t.Errorf("%q", s)
	}
}
