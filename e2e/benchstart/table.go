package main

import (
	"fmt"
	"slices"
	"time"
)

// A result is what was measured at one speed, by part.
type result struct {
	speed   speed
	limit   time.Duration // what the link alone takes for the lazy image
	samples map[string][]sample
}

// Parts of a sample.
func answered(s sample) time.Duration { return s.answer }
func whole(s sample) time.Duration    { return s.local }
func read(s sample) time.Duration     { return s.tar }

// times returns what a part took in each run, in order of size.
func (r *result) times(part string, of func(sample) time.Duration) []time.Duration {
	var all []time.Duration
	for _, s := range r.samples[part] {
		all = append(all, of(s))
	}
	slices.Sort(all)
	return all
}

func (r *result) median(part string, of func(sample) time.Duration) time.Duration {
	all := r.times(part, of)
	if len(all) == 0 {
		return 0
	}
	return all[len(all)/2]
}

// cell is a median with its range.
func (r *result) cell(part string, of func(sample) time.Duration) string {
	all := r.times(part, of)
	if len(all) == 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f s (%.2f-%.2f)", all[len(all)/2].Seconds(), all[0].Seconds(), all[len(all)-1].Seconds())
}

// ratio is the ratio of a part to (a), and whether it is at most most; 0: no
// such condition at this speed.
func (r *result) ratio(part string, of func(sample) time.Duration, most float64) string {
	base, t := r.median("pull", of), r.median(part, of)
	if base == 0 || t == 0 {
		return "-"
	}
	return verdict(float64(t)/float64(base), most)
}

func verdict(ratio, most float64) string {
	if most == 0 {
		return fmt.Sprintf("%.2f", ratio)
	}
	met := "met"
	if ratio > most {
		met = "NOT MET"
	}
	return fmt.Sprintf("%.2f (at most %.2f: %s)", ratio, most, met)
}

// Conditions of issue 4: how large the ratios to (a) may be.
const (
	readMost  = 1.05
	localMost = 1.0
	limitMost = 1.05 // of what the link alone takes, at 100 Mbit/s
)

// answerMost returns what (b) and (c) may take until the first answer.
func answerMost(speed string) (lazy, profile float64) {
	switch speed {
	case fastest:
		return 1.0, 0.8
	case "100mbit":
		return 0.35, 0.15
	}
	return 0, 0
}

func (r *result) print() {
	lazy, profile := answerMost(r.speed.name)
	fmt.Printf("\n%s, round trip %v", r.speed.name, r.speed.link.Latency)
	if r.limit > 0 {
		fmt.Printf("; the link alone needs %.2f s", r.limit.Seconds())
	}
	fmt.Printf("; load %s\n\n", loadavg())
	fmt.Printf("| | (a) full pull | (b) lazy | (b):(a) | (c) with profile | (c):(a) |\n|---|---|---|---|---|---|\n")
	for _, row := range []struct {
		what          string
		of            func(sample) time.Duration
		lazy, profile float64
	}{
		{"first answer", answered, lazy, profile},
		{"every byte local", whole, localMost, localMost},
	} {
		fmt.Printf("| %s | %s | %s | %s | %s | %s |\n", row.what, r.cell("pull", row.of),
			r.cell("lazy", row.of), r.ratio("lazy", row.of, row.lazy), r.cell("profile", row.of), r.ratio("profile", row.of, row.profile))
	}
	fmt.Printf("| whole image by tar | %s | %s | %s | | |\n", r.cell("pull", read), r.cell("tar", read), r.ratio("tar", read, readMost))
	cpu := func(s sample) time.Duration { return s.cpu }
	fmt.Printf("| processor until all is local | %s | %s | | %s | |\n", r.cell("pull", cpu), r.cell("lazy", cpu), r.cell("profile", cpu))
	if r.speed.name == "100mbit" {
		for _, part := range []string{"lazy", "profile"} {
			if t := r.median(part, whole); t > 0 {
				fmt.Printf("every byte local (%s) against the link alone: %s\n", part, verdict(float64(t)/float64(r.limit), limitMost))
			}
		}
	}
	for _, part := range []string{"lazy", "profile"} {
		if n := len(r.samples[part]); n > 0 {
			s := r.samples[part][n-1]
			fmt.Printf("last run (%s): mounted after %.2f s, %.1f MB before the answer, sealed after %.2f s, %d modules\n",
				part, s.mounted.Seconds(), float64(s.bytes)/1e6, s.sealed.Seconds(), s.modules)
		}
	}
}
