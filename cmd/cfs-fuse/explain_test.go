package main

import (
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// TestPrintPlan has explain say how a profile was used, and by which numbers.
func TestPrintPlan(t *testing.T) {
	measured := &mount.Plan{
		Mode: "stream", Measured: true, Needed: 30 << 20, Size: 40 << 20, Density: 0.75, Left: 29 << 20, LatencySeconds: 0.0204, BytesPerSecond: 12.4e6,
		Prefetch: mount.PlanCost{Requests: 635, Bytes: 31 << 20, Seconds: 2.9}, Stream: mount.PlanCost{Requests: 21, Bytes: 36 << 20, Seconds: 2.04},
	}
	prefetch := *measured
	prefetch.Mode = "prefetch"
	for _, c := range []struct {
		story mount.Story
		want  []string
	}{
		{mount.Story{}, []string{"no access profile was known"}},
		{mount.Story{Prefetch: 2}, []string{"did not keep it"}},
		{mount.Story{Prefetch: 2, Plan: &mount.Plan{}}, []string{"not decided", "--fill=false"}},
		{mount.Story{Prefetch: 2, Plan: &mount.Plan{Mode: "prefetch", Needed: 1 << 20, Size: 4 << 20, Density: 0.25}}, []string{"1.0 MiB of 4.0 MiB", "density of 0.250", "decision prefetch: all of it was local, or"}},
		{mount.Story{Prefetch: 2, Plan: measured}, []string{"30.0 MiB of 40.0 MiB", "density of 0.750", "29.0 MiB of that", "20.4 ms, 12.4 MB/s",
			"prefetch 2.900 s: 31.0 MiB in 635 requests", "stream 2.040 s: 36.0 MiB in 21 requests", "decision stream: long ranges, with"}},
		{mount.Story{Prefetch: 2, Plan: &prefetch}, []string{"decision prefetch: long ranges would not"}},
	} {
		var b strings.Builder
		printPlan(&b, &c.story)
		for _, want := range append(c.want, "\nMODE\n") {
			if !strings.Contains(b.String(), want) {
				t.Errorf("no %q in\n%s", want, b.String())
			}
		}
	}
}
