package mount

import (
	"fmt"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
)

// A Plan is how what an access profile names is fetched, and why: by the
// arithmetic of fetcher.Plan. Bytes are compressed, as they are fetched.
type Plan struct {
	// Mode is "prefetch": these parts of files in their order, and else as little
	// as possible; "stream": long ranges with all that lies in them, in the order
	// in which something of them is needed; or "": filling has not begun.
	Mode string `json:"mode"`
	// Measured says that what follows Density has led to Mode. Otherwise all was
	// local, or asked for before the link had been measured.
	Measured bool `json:"measured"`
	// Needed are the bytes that the profile names, local or not, Size those of the
	// layers, and Density is the quotient.
	Needed  int64   `json:"needed_bytes"`
	Size    int64   `json:"layer_bytes"`
	Density float64 `json:"density"`
	// Left is what was neither local nor under way when Mode was chosen.
	Left int64 `json:"left_bytes"`
	// Of the link, as measured by then.
	LatencySeconds float64 `json:"latency_seconds"`
	BytesPerSecond float64 `json:"bytes_per_second"`
	// What either mode would cost, until Left is there.
	Prefetch PlanCost `json:"prefetch"`
	Stream   PlanCost `json:"stream"`
}

// A PlanCost estimates what a mode costs.
type PlanCost struct {
	Requests int     `json:"requests"`
	Bytes    int64   `json:"bytes"` // with those that nobody is known to need
	Seconds  float64 `json:"seconds"`
}

// plan notes what the fetcher has decided. The first decision stays, also if
// another process goes on with the mount.
func (s *Story) plan(p fetcher.Plan) {
	if s.Prefetch == 0 || s.Plan != nil && s.Plan.Measured {
		return
	}
	cost := func(e fetcher.Estimate) PlanCost { return PlanCost{e.Requests, e.Bytes, e.Time.Seconds()} }
	s.Plan = &Plan{
		Mode: string(p.Mode), Measured: p.Measured, Needed: p.Needed, Size: p.Size, Density: p.Density(), Left: p.Left,
		LatencySeconds: p.Latency.Seconds(), BytesPerSecond: p.BytesPerSecond, Prefetch: cost(p.Prefetch), Stream: cost(p.Stream),
	}
}

// check reports what no plan has.
func (p *Plan) check() error {
	switch {
	case p == nil:
		return nil
	case p.Mode != "" && p.Mode != string(fetcher.ModePrefetch) && p.Mode != string(fetcher.ModeStream):
		return fmt.Errorf("a plan of mode %.80q", p.Mode)
	case p.Needed < 0 || p.Size < 0 || p.Left < 0 || p.Density < 0 || p.LatencySeconds < 0 || p.BytesPerSecond < 0:
		return fmt.Errorf("a plan for %d of %d bytes, over a link of %v s and %v bytes a second", p.Needed, p.Size, p.LatencySeconds, p.BytesPerSecond)
	}
	for _, c := range []PlanCost{p.Prefetch, p.Stream} {
		if c.Requests < 0 || c.Bytes < 0 || c.Seconds < 0 {
			return fmt.Errorf("a plan of %d requests for %d bytes in %v s", c.Requests, c.Bytes, c.Seconds)
		}
	}
	return nil
}
