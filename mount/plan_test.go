package mount

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// TestPlan starts an image with nothing known of it, with a profile, and with a
// profile and no filling; what was decided is in the story, also when the mount
// is gone.
func TestPlan(t *testing.T) {
	const files, each = 40, 200_000
	r := imagetest.Must(registrytest.New(registrytest.Options{Link: registrytest.Link{Latency: 5 * time.Millisecond, BytesPerSecond: 25e6}}))
	t.Cleanup(r.Close)
	profile := &image.Profile{Repository: "docker://host/app"}
	var items []imagetest.Item
	for i := range files {
		items = append(items, imagetest.Random(fmt.Sprint("f", i), each, uint64(i)))
		content := digestOf(string(imagetest.RandomBytes(each, uint64(i*7%files))))
		if i < files/2 {
			profile.Accesses = append(profile.Accesses, image.Access{Content: content, Off: 0, N: each})
		}
	}
	source := serveImage(t, r, "1", items...)
	options := func() Options {
		return Options{Root: filepath.Join(t.TempDir(), "root"), Runtime: t.TempDir(), Swap: Never, Source: fetcher.Options{PlainHTTP: true, HostsDir: t.TempDir()}}
	}

	m, _ := start(t, source, options())
	if s := m.Story(); s.Plan != nil || s.Prefetch != 0 {
		t.Errorf("with nothing known: %+v for %d parts", s.Plan, s.Prefetch)
	}

	o := options()
	o.Profile = func(context.Context, image.Digest, bool) (*image.Profile, error) { return profile, nil }
	m, mnt := start(t, source, o)
	waitFor(t, m, Sealed)
	s := m.Story()
	p := s.Plan
	if p == nil || s.Prefetch != files/2 {
		t.Fatalf("no plan for %d parts", s.Prefetch)
	}
	t.Logf("%+v", *p)
	if p.Mode == "" || p.Density < 0.45 || p.Density > 0.55 || p.Needed < files/2*each || p.Size < files*each {
		t.Errorf("%+v", p)
	}
	if p.Measured != (p.Left > 0) || p.Measured != (p.BytesPerSecond > 0 && p.LatencySeconds > 0 && p.Prefetch.Seconds > 0 && p.Stream.Bytes >= p.Left) {
		t.Errorf("%+v", p)
	}
	end(t, m, mnt)
	if kept, err := storyOf(o.Root, s.Image); err != nil || kept.Plan == nil || *kept.Plan != *p {
		t.Errorf("kept: %+v, %v", kept, err)
	}

	o = options()
	o.NoFill = true
	o.Profile = func(context.Context, image.Digest, bool) (*image.Profile, error) { return profile, nil }
	m, _ = start(t, source, o)
	if p := m.Story().Plan; p == nil || *p != (Plan{}) {
		t.Errorf("without filling: %+v", p)
	}
}

// The first decision stays, and what no plan has is not believed.
func TestPlanKept(t *testing.T) {
	s := &Story{Prefetch: 3}
	s.plan(fetcher.Plan{Mode: fetcher.ModePrefetch, Needed: 5, Size: 10})
	s.plan(fetcher.Plan{Mode: fetcher.ModeStream, Measured: true, Needed: 5, Size: 10, Left: 4, Stream: fetcher.Estimate{Requests: 2, Bytes: 8, Time: time.Second}})
	s.plan(fetcher.Plan{Mode: fetcher.ModePrefetch, Measured: true})
	want := Plan{Mode: "stream", Measured: true, Needed: 5, Size: 10, Density: 0.5, Left: 4, Stream: PlanCost{2, 8, 1}}
	if s.Plan == nil || *s.Plan != want {
		t.Errorf("%+v", s.Plan)
	}
	for plan, good := range map[string]bool{
		`null`: true, `{"mode":"stream","needed_bytes":3}`: true, `{"mode":"magic"}`: false, `{"needed_bytes":-1}`: false,
		`{"density":-0.1}`: false, `{"stream":{"seconds":-1}}`: false, `{"prefetch":{"requests":-1}}`: false,
	} {
		data := []byte(`{"version":1,"plan":` + plan + `}`)
		if !json.Valid(data) {
			t.Fatal(plan)
		}
		if _, err := parseStory(data); (err == nil) != good {
			t.Errorf("%s: %v", plan, err)
		}
	}
}
