package mount

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// TestStory tells the start of a mount over a link with a round trip: its
// steps, the reads that waited, and what is kept of it after the mount is gone.
func TestStory(t *testing.T) {
	const trip = 20 * time.Millisecond
	r := imagetest.Must(registrytest.New(registrytest.Options{Link: registrytest.Link{Latency: trip}}))
	t.Cleanup(r.Close)
	source := serveImage(t, r, "1", imagetest.File("first", "read first"), imagetest.Random("big", 1<<20, 1), imagetest.Random("never", 1<<20, 2))
	var steps []string
	began := time.Now().Add(-time.Second)
	o := Options{
		Root: filepath.Join(t.TempDir(), "root"), Runtime: t.TempDir(), Swap: Never, NoFill: true, Began: began,
		Source:   fetcher.Options{PlainHTTP: true, HostsDir: t.TempDir()},
		Progress: func(what string, _, _ int64) { steps = append(steps, what) },
	}
	m, mnt := start(t, source, o)
	control, err := NewControl(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"first", "big", "first"} {
		if _, err := os.ReadFile(filepath.Join(mnt, name)); err != nil {
			t.Fatal(err)
		}
	}
	e, err := Explain(t.Context(), o.Runtime, mnt, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := e.Story
	for _, want := range []string{"store", "manifest", "tables of contents", "merge", "write the tree", "local files", "backend", "mount"} {
		if !slices.Contains(steps, want) || !slices.ContainsFunc(s.Phases, func(p Phase) bool { return p.Name == want && p.Took > 0 }) {
			t.Errorf("no step %q in %q, %+v", want, steps, s.Phases)
		}
	}
	if s.Phases[0].Name != "command" || s.Phases[0].Took < 1 {
		t.Errorf("the first step is %+v", s.Phases[0])
	}
	sum := 0.0
	for _, p := range s.Phases {
		sum += p.Took
	}
	if math.Abs(sum-s.Mounted) > 0.05*s.Mounted {
		t.Errorf("steps of %v s until it is mounted after %v s: %+v", sum, s.Mounted, s.Phases)
	}
	if len(s.Waits) < 2 || s.Needed != 1<<20+10 || s.Bytes != 2<<20+10 || s.LocalBefore != 0 {
		t.Errorf("%d waits; %d of %d bytes needed, %d there before", len(s.Waits), s.Needed, s.Bytes, s.LocalBefore)
	}
	var first, big int
	for _, w := range s.Waits {
		switch path := e.Paths[w.Content]; path {
		case "/first":
			first++
		case "/big":
			big++
		default:
			t.Errorf("a read of %q waited", path)
		}
		if w.At < s.Mounted-0.001 || w.Seconds <= 0 || w.Queue+w.Network+w.Store > w.Seconds+1e-9 || w.Inflate() < 0 {
			t.Errorf("%+v", w)
		}
	}
	if w := s.Waits[0]; w.Network < trip.Seconds() || first != 1 || big == 0 {
		t.Errorf("%d and %d reads waited, the first is %+v", first, big, w)
	}
	if n := len(s.Uses); n != 17 || s.Uses[0].At < s.Mounted-0.001 {
		t.Errorf("%d chunks used, want 17: %+v", n, s.Uses)
	}
	st := e.Start
	if got := st.Mount + st.Waiting + st.Idle; math.Abs(got-st.Until) > 1e-6 || st.Waiting < trip.Seconds() || st.Reads != len(s.Waits) ||
		math.Abs(st.Queue+st.Network+st.Inflate+st.Store-st.Waiting) > 1e-6 {
		t.Errorf("%+v", st)
	}
	if !strings.Contains(e.Next, "not local yet") || !strings.Contains(e.Risk, "processes that use the mount") {
		t.Errorf("next: %q, risk: %q", e.Next, e.Risk)
	}

	// Who has a file open uses it.
	f, err := os.Open(filepath.Join(mnt, "first"))
	if err != nil {
		t.Fatal(err)
	}
	info, err := kmount.At(mnt)
	if err != nil {
		t.Fatal(err)
	}
	if how := usedBy("/proc/self", info); how != "files" {
		t.Errorf("an open file is %q", how)
	}
	f.Close()
	if how := usedBy("/proc/self", info); how != "" {
		t.Errorf("no open file is %q", how)
	}

	if err := m.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	control.Close()
	kept, err := storyOf(o.Root, e.Status.ManifestDigest)
	if err != nil || len(kept.Waits) != len(s.Waits) || len(kept.Uses) != len(s.Uses) || kept.Mountpoint != mnt {
		t.Errorf("kept: %+v, %v", kept, err)
	}
}

func TestTimes(t *testing.T) {
	s := &Story{Mounted: 1, BytesPerSecond: 1000, LatencySeconds: 0.1, Waits: []ReadWait{
		{At: 1.5, Seconds: 1, Network: 0.5, Queue: 0.25, Bytes: 500}, {At: 2, Seconds: 1, Network: 1, Bytes: 100}, {At: 4, Seconds: 1, Network: 0.5, Store: 0.25, Bytes: 400},
	}}
	got := s.Times(0)
	want := StartTimes{Until: 5, Mount: 1, Waiting: 2.5, Idle: 1.5, Queue: 2.5 / 12, Network: 2.5 * 2 / 3, Inflate: 2.5 / 6, Store: 2.5 / 12, Reads: 3, Compressed: 1000, PrefetchSaves: 2.5}
	near := func(a, b float64) bool { return math.Abs(a-b) < 1e-9 }
	if !near(got.Until, want.Until) || !near(got.Waiting, want.Waiting) || !near(got.Idle, want.Idle) || !near(got.Network, want.Network) ||
		!near(got.Queue, want.Queue) || !near(got.Store, want.Store) || !near(got.Inflate, want.Inflate) || got.Reads != 3 || !near(got.PrefetchSaves, want.PrefetchSaves) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if got := s.Times(2.5); got.Reads != 2 || !near(got.Waiting, 1) || !near(got.Idle, 0.5) {
		t.Errorf("until 2.5: %+v", got)
	}
	if got := s.Times(0.5); got.Mount != 0.5 || got.Waiting != 0 || got.Idle != 0 {
		t.Errorf("until 0.5: %+v", got)
	}
	if got := (&Story{Mounted: 3}).Times(0); got != (StartTimes{Until: 3, Mount: 3}) {
		t.Errorf("without reads: %+v", got)
	}
	if s := s.Slowest(2); len(s) != 2 || s[0].At != 1.5 {
		t.Errorf("slowest: %+v", s)
	}
}

// TestStoryBounds waits for more reads than a story keeps.
func TestStoryBounds(t *testing.T) {
	x := indexOf(t, imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.File("f", "x"))), imagetest.Options{})))
	s := newStory(time.Now(), nil)
	waited := s.waited(x)
	const n = firstWaits + lastWaits + 10
	for i := range n {
		waited(fetcher.Waited{Off: int64(i), Since: time.Now(), Err: errors.New("lost")})
	}
	for range firstUses + 3 {
		s.used(0, 1)
	}
	got := s.tell()
	if len(got.Waits) != firstWaits+lastWaits || got.WaitsLost != 10 || got.Waits[0].Off != 0 || got.Waits[firstWaits-1].Off != firstWaits-1 ||
		got.Waits[firstWaits].Off != firstWaits+10 || got.Waits[len(got.Waits)-1].Off != n-1 || got.Waits[0].Error != "lost" {
		t.Errorf("%d waits and %d more, the last %+v", len(got.Waits), got.WaitsLost, got.Waits[len(got.Waits)-1])
	}
	if len(got.Uses) != firstUses || got.UsesLost != 3 || got.Needed != firstUses+3 {
		t.Errorf("%d uses and %d more, %d bytes", len(got.Uses), got.UsesLost, got.Needed)
	}
	data, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	if len(data) > maxStory {
		t.Errorf("a story of %d bytes", len(data))
	}
	if _, err := parseStory(data); err != nil {
		t.Error(err)
	}
}

func FuzzParseStory(f *testing.F) {
	f.Add([]byte(`{"version":1,"waits":[{"content":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","at_seconds":1,"seconds":2}],"uses":[{"chunk":3,"at_seconds":1}]}`))
	f.Add([]byte(`{"version":1,"waits":[{"content":"x"}]}`))
	f.Add([]byte(`{"version":2}`))
	f.Add([]byte(`{"version":1,"profile_accesses":3,"plan":{"mode":"stream","measured":true,"density":0.5,"prefetch":{"requests":2,"bytes":9,"seconds":1e300}}}`))
	f.Add([]byte(`{"version":1,"mounted_seconds":1e308,"bytes_per_second":-1,"uses":[{"chunk":-1}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseStory(data)
		if err != nil {
			return
		}
		s.Times(0)
		s.Times(1)
		s.Slowest(10)
		for _, u := range s.Uses {
			if u.Chunk < 0 {
				t.Fatal(u)
			}
		}
	})
}
