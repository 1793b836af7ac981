package mount

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
)

// storyName is the file of an image's folder that has the story of the start of
// its last mount that fetched something: a Story as JSON.
const storyName = "start.json"

// What is kept of a start: of reads that waited the first, and after these the
// last; of chunks that were read, the first.
const (
	firstWaits = 4096
	lastWaits  = 1024
	firstUses  = image.MaxAccesses
)

// maxStory bounds the JSON of a story, in bytes.
const maxStory = 16 << 20

// A Story is what is known of the start of a mount. Times are in seconds since
// Began, sizes in bytes.
type Story struct {
	Version    int       `json:"version"` // 1
	Image      string    `json:"image"`   // the manifest's digest
	Source     string    `json:"source"`
	Mountpoint string    `json:"mountpoint"`
	Began      time.Time `json:"began"` // of the command
	Phases     []Phase   `json:"phases"`
	// Mounted is when the mount was there, 0 before.
	Mounted float64 `json:"mounted_seconds"`
	// States is when each state after Lazy was reached, by its name.
	States map[string]float64 `json:"states"`
	// Waits are reads that had to wait for the source, in the order in which
	// they ended, and WaitsLost how many more there were.
	Waits     []ReadWait `json:"waits"`
	WaitsLost int        `json:"waits_lost"`
	// Uses are the first reads of chunks, in their order.
	Uses     []Use `json:"uses"`
	UsesLost int   `json:"uses_lost"`
	// Local are reads that were answered from the store, and LocalSeconds how
	// long that took, all together.
	Local        int64   `json:"local_reads"`
	LocalSeconds float64 `json:"local_seconds"`
	// Bytes of the image, of those what was in the store at the start, what was
	// taken from files of other images since, and what was read so far.
	Bytes       int64 `json:"image_bytes"`
	LocalBefore int64 `json:"local_before_bytes"`
	Shared      int64 `json:"shared_bytes"`
	Needed      int64 `json:"needed_bytes"`
	// Prefetch is how many parts of files an access profile has named.
	Prefetch int `json:"profile_accesses"`
	// Plan is how these are fetched, and why; nil if there are none.
	Plan    *Plan           `json:"plan"`
	Fetched map[string]Work `json:"fetched"` // by class of work
	// Of the link: how long an answer takes, and how many bytes come in a
	// second.
	LatencySeconds float64 `json:"latency_seconds"`
	BytesPerSecond float64 `json:"bytes_per_second"`
}

// A Phase is one step of a start; the next one begins where it ends.
type Phase struct {
	Name   string  `json:"name"`
	At     float64 `json:"at_seconds"`
	Took   float64 `json:"seconds"`
	Detail string  `json:"detail,omitempty"`
}

// A ReadWait is a read of a program that waited for the source. What Seconds
// has besides the parts was spent on decompressing and comparing digests.
type ReadWait struct {
	Content string  `json:"content"` // digest
	Off     int64   `json:"offset"`
	N       int64   `json:"length"`
	At      float64 `json:"at_seconds"`
	Seconds float64 `json:"seconds"`
	Queue   float64 `json:"queue_seconds"`
	Network float64 `json:"network_seconds"`
	Store   float64 `json:"store_seconds"`
	Bytes   int64   `json:"compressed_bytes"`
	Error   string  `json:"error,omitempty"`
}

// Inflate is the time that went into decompressing and digests, in seconds.
func (w ReadWait) Inflate() float64 { return max(0, w.Seconds-w.Queue-w.Network-w.Store) }

// A Use is the first read of a chunk, by its number in the image's index.
type Use struct {
	Chunk int     `json:"chunk"`
	At    float64 `json:"at_seconds"`
}

// A story is a Story that is being written. Its methods may be called from
// several goroutines, and on nil.
type story struct {
	began  time.Time
	report func(what string, done, total int64) // Options.Progress

	local      atomic.Int64 // reads that did not wait
	localNanos atomic.Int64 // and their time
	waits      atomic.Int64 // reads that did

	mu     sync.Mutex
	s      Story
	recent []ReadWait // a ring, once s.Waits is full
	next   int        // in recent
	saved  int        // how much there was to tell when it was saved
}

func newStory(began time.Time, report func(string, int64, int64)) *story {
	t := &story{began: began, report: report}
	t.s = Story{Version: 1, Began: began, States: map[string]float64{}}
	return t
}

func (t *story) now() float64 { return time.Since(t.began).Seconds() }

// phase ends the last step of the start, and begins another, "" for none.
func (t *story) phase(name string) {
	if t == nil {
		return
	}
	t.mu.Lock()
	now := t.now()
	if n := len(t.s.Phases); n > 0 && t.s.Phases[n-1].Took == 0 {
		t.s.Phases[n-1].Took = now - t.s.Phases[n-1].At
	}
	if name != "" {
		t.s.Phases = append(t.s.Phases, Phase{Name: name, At: now})
	}
	t.mu.Unlock()
	if t.report != nil && name != "" {
		t.report(name, 0, 0)
	}
}

// command notes what was before the first step: the command that started this
// process.
func (t *story) command(until time.Time) {
	if d := until.Sub(t.began); d > 0 {
		t.s.Phases = append(t.s.Phases, Phase{Name: "command", Took: d.Seconds(), Detail: "from the command line to the process that serves"})
	}
}

// detail says more of the step under way.
func (t *story) detail(format string, args ...any) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.s.Phases); n > 0 {
		t.s.Phases[n-1].Detail = fmt.Sprintf(format, args...)
	}
}

// progress tells how far the step under way has come.
func (t *story) progress(what string, done, total int64) {
	if t != nil && t.report != nil {
		t.report(what, done, total)
	}
}

// mounted ends the start's steps.
func (t *story) mounted() {
	t.phase("")
	if t != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.s.Mounted = t.now()
	}
}

func (t *story) reached(s State) {
	if t == nil || s == Lazy {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.s.States[s.String()]; !ok {
		t.s.States[s.String()] = t.now()
	}
}

func (t *story) shared(bytes int64) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.s.Shared += bytes
}

func (t *story) prefetch(parts int) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.s.Prefetch = parts
}

// waited is the fetcher's FetchOptions.Waited.
func (t *story) waited(x *image.Index) func(fetcher.Waited) {
	if t == nil {
		return nil
	}
	return func(w fetcher.Waited) {
		t.waits.Add(1)
		r := ReadWait{
			Content: x.Content(w.Content).Digest.String(), Off: w.Off, N: w.N, At: w.Since.Sub(t.began).Seconds(), Seconds: w.Total.Seconds(),
			Queue: w.Queue.Seconds(), Network: w.Network.Seconds(), Store: w.Store.Seconds(), Bytes: w.Bytes,
		}
		if w.Err != nil {
			r.Error = oneLine(w.Err.Error())
		}
		t.mu.Lock()
		defer t.mu.Unlock()
		switch {
		case len(t.s.Waits) < firstWaits:
			t.s.Waits = append(t.s.Waits, r)
		case len(t.recent) < lastWaits:
			t.recent = append(t.recent, r)
		default:
			t.recent[t.next] = r
			t.next = (t.next + 1) % lastWaits
			t.s.WaitsLost++
		}
	}
}

// used notes the first read of a chunk.
func (t *story) used(chunk int, size int64) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.s.Needed += size
	if len(t.s.Uses) < firstUses {
		t.s.Uses = append(t.s.Uses, Use{chunk, t.now()})
	} else {
		t.s.UsesLost++
	}
}

// answered notes a read that did not wait.
func (t *story) answered(d time.Duration) {
	if t != nil {
		t.local.Add(1)
		t.localNanos.Add(int64(d))
	}
}

// reads counts the reads of this process: those that did not wait, and those
// that did.
func (t *story) reads() (local, waited int64) {
	if t == nil {
		return 0, 0
	}
	return t.local.Load(), t.waits.Load()
}

// tell returns the story so far.
func (t *story) tell() *Story {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.s
	s.Local += t.local.Load()
	s.LocalSeconds += time.Duration(t.localNanos.Load()).Seconds()
	s.Phases = append([]Phase{}, s.Phases...)
	s.Uses = append([]Use{}, s.Uses...)
	s.Waits = append([]ReadWait{}, s.Waits...)
	s.Waits = append(s.Waits, t.recent[t.next:]...)
	s.Waits = append(s.Waits, t.recent[:t.next]...)
	s.States = map[string]float64{}
	for k, v := range t.s.States {
		s.States[k] = v
	}
	return &s
}

// Story returns what is known of the start of the mount, nil for a composefs:
// source.
func (m *Mount) Story() *Story {
	if m.image == nil || m.story == nil {
		return nil
	}
	s := m.story.tell()
	s.Image, s.Source, s.Mountpoint = m.image.digest.String(), m.source, m.mountpoint
	if s.Fetched == nil {
		s.Fetched = map[string]Work{}
	}
	for class, w := range m.Status().Fetched {
		before := s.Fetched[class] // by a process before this one
		s.Fetched[class] = Work{Requests: before.Requests + w.Requests, Bytes: before.Bytes + w.Bytes}
	}
	if m.fetch != nil {
		s.plan(m.fetch.Plan())
		latency, rate := m.fetch.Link()
		s.LatencySeconds, s.BytesPerSecond = latency.Seconds(), rate
	}
	return s
}

// startStory begins to tell the story of this mount, with the time of the
// command if that is known.
func (m *Mount) startStory() {
	began := m.opts.Began
	if began.IsZero() || began.After(m.started) {
		began = m.started
	}
	m.story = newStory(began, m.opts.Progress)
	m.story.command(m.started)
}

// beginStory notes what is local before anything is fetched.
func (m *Mount) beginStory() {
	if m.story == nil {
		return
	}
	p := m.contents.Progress()
	m.story.mu.Lock()
	defer m.story.mu.Unlock()
	m.story.s.Bytes, m.story.s.LocalBefore = p.Bytes, p.BytesLocal
}

// resumeStory goes on with what the process before has saved.
func (m *Mount) resumeStory() {
	s, err := readStory(m.image.path(storyName))
	if err != nil || s.Mountpoint != m.mountpoint || m.story == nil {
		return
	}
	t := m.story
	t.mu.Lock()
	defer t.mu.Unlock()
	t.began = s.Began
	t.s = *s
	if t.s.States == nil {
		t.s.States = map[string]float64{}
	}
	t.saved = t.size()
}

func (t *story) size() int {
	return len(t.s.Phases) + len(t.s.Waits) + len(t.recent) + t.s.WaitsLost + len(t.s.Uses) + len(t.s.States)
}

// saveStory keeps the story with the image, if there is more of it than was
// saved, and a mount that fetches tells it.
func (m *Mount) saveStory() error {
	if m.image == nil || m.story == nil || m.fetch == nil {
		return nil
	}
	m.story.mu.Lock()
	size := m.story.size()
	saved := m.story.saved
	m.story.mu.Unlock()
	if m.fetch.Plan().Measured {
		size++
	}
	if size <= saved {
		return nil
	}
	data, err := json.Marshal(m.Story())
	if err == nil {
		err = durable.WriteFile(m.image.path(storyName), append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("the story of the start: %w", err)
	}
	m.story.mu.Lock()
	m.story.saved = size
	m.story.mu.Unlock()
	return nil
}

// readStory reads a story, of which nothing is believed that would mislead its
// readers.
func readStory(path string) (*Story, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxStory {
		return nil, fmt.Errorf("%s: %d bytes, the limit is %d", path, fi.Size(), maxStory)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	s, err := parseStory(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func parseStory(data []byte) (*Story, error) {
	var s Story
	if err := json.Unmarshal(data, &s); err != nil {
		return nil, err
	}
	switch {
	case s.Version != 1:
		return nil, fmt.Errorf("version %d, want 1", s.Version)
	case len(s.Waits) > firstWaits+lastWaits || len(s.Uses) > firstUses:
		return nil, errors.New("more reads than a story has")
	}
	if err := s.Plan.check(); err != nil {
		return nil, err
	}
	for _, w := range s.Waits {
		if _, err := toc.ParseDigest(w.Content); err != nil || w.At < 0 || w.Seconds < 0 {
			return nil, fmt.Errorf("a read of content %.80q at %v s for %v s", w.Content, w.At, w.Seconds)
		}
	}
	for _, u := range s.Uses {
		if u.Chunk < 0 || u.At < 0 {
			return nil, fmt.Errorf("a read of chunk %d at %v s", u.Chunk, u.At)
		}
	}
	return &s, nil
}

// story answers with the story so far.
func (c *Control) story(w http.ResponseWriter, _ *http.Request) {
	s := c.mount.Story()
	if s == nil {
		http.Error(w, "this mount fetches nothing", http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(s)
}

// storyOf returns the story that the store has of an image.
func storyOf(root, manifestDigest string) (*Story, error) {
	d, err := toc.ParseDigest(manifestDigest)
	if err != nil {
		return nil, err
	}
	return readStory(filepath.Join(root, "images", fmt.Sprintf("%x", d[:]), storyName))
}
