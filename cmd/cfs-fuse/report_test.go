package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// TestReportIsSafe draws a start whose names want to be more than names.
func TestReportIsSafe(t *testing.T) {
	const bad = `</title><script>alert("x")</script><img src=http://example.com/x onerror=alert(1)>`
	e := &mount.Explanation{
		Status: mount.Status{Source: bad, Mountpoint: bad}, Next: bad, Risk: bad, Paths: map[string]string{"c": bad},
		Story: &mount.Story{Image: bad, Began: time.Unix(1e9, 0), Mounted: 0.5, Phases: []mount.Phase{{Name: bad, Took: 0.5, Detail: bad}},
			Waits: []mount.ReadWait{{Content: "c", At: 0.6, Seconds: 1, Network: 0.5, Error: bad}, {Content: "c", At: 0.7, Seconds: 0.1, Queue: 0.1}},
			Uses:  []mount.Use{{Chunk: 0, At: 0.6}}},
	}
	e.Start = e.Story.Times(0)
	page := startReport{Mountpoint: bad, Source: bad, Next: bad, Timeline: drawTimeline(e), Slowest: [][]string{{"1", bad}},
		Map: chunkMap{Cells: []cell{{Class: "read", Heat: heat(0.5), Title: bad}}}}
	var b bytes.Buffer
	if err := reportPage.Execute(&b, page); err != nil {
		t.Fatal(err)
	}
	if s := b.String(); strings.Contains(s, "<script") || strings.Contains(s, "<img") || !strings.Contains(s, "&lt;script&gt;") {
		t.Errorf("the page has a stranger's tags")
	}
	tl := page.Timeline
	if len(tl.Waits) != 2 || tl.Waits[0].Parts[0].Y == tl.Waits[1].Parts[0].Y || len(tl.Ticks) < 3 || tl.Needed == "" {
		t.Errorf("timeline: %+v", tl)
	}
	for at, want := range map[float64]string{-1: "#7f0000", 0: "#7f0000", 1: "#fdd49e", 2: "#fdd49e"} {
		if got := heat(at); got != want {
			t.Errorf("heat of %v is %s, want %s", at, got, want)
		}
	}
}
