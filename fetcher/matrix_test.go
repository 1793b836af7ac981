package fetcher

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// seedsEnv is how many seeds of each cell TestFaultMatrix tries.
const seedsEnv = "CFS_FUSE_FAULT_SEEDS"

// The ways in which a cell's faults come, one a seed in turn.
const (
	atFirst   = iota // the first answers are wrong
	badMirror        // all answers of the first of two hosts are wrong
	forGood          // all answers of all hosts are wrong
	atTimes          // of each two answers about one is wrong, for a while
	modes
)

// matrixFaults are the answers of item 2 of the issue, and what tokens and
// redirects can do besides. harmless ones lose nothing however often they come.
var matrixFaults = []struct {
	name     string
	fault    registrytest.Fault
	harmless bool // to ranges
}{
	{"cut", registrytest.Fault{Kind: registrytest.Cut}, false},
	{"short", registrytest.Fault{Kind: registrytest.Short}, false},
	{"stall", registrytest.Fault{Kind: registrytest.Stall}, false},
	{"trickle", registrytest.Fault{Kind: registrytest.Trickle}, false},
	{"silence", registrytest.Fault{Kind: registrytest.Silence}, false},
	{"hangup", registrytest.Fault{Kind: registrytest.Hangup}, false},
	{"whole", registrytest.Fault{Kind: registrytest.Whole}, true},
	{"partial", registrytest.Fault{Kind: registrytest.Partial}, true},
	{"wrong range", registrytest.Fault{Kind: registrytest.WrongRange}, false},
	{"no range", registrytest.Fault{Kind: registrytest.NoRange}, false},
	{"corrupt", registrytest.Fault{Kind: registrytest.Corrupt}, false},
	{"206 for all", registrytest.Fault{Kind: registrytest.Status, Status: 206}, false},
	{"401", registrytest.Fault{Kind: registrytest.Status, Status: 401}, false},
	{"403", registrytest.Fault{Kind: registrytest.Status, Status: 403}, false},
	{"416", registrytest.Fault{Kind: registrytest.Status, Status: 416}, false},
	{"429", registrytest.Fault{Kind: registrytest.Status, Status: 429, RetryAfter: "1"}, false},
	{"500", registrytest.Fault{Kind: registrytest.Status, Status: 500}, false},
	{"503", registrytest.Fault{Kind: registrytest.Status, Status: 503, RetryAfter: "3600"}, false},
}

// final are the faults that are an answer to somebody at a prompt.
var final = map[string]bool{"401": true, "403": true, "416": true}

// TestFaultMatrix does each fault to each kind of request: every read gives
// the right bytes or, where no host gives any, an error within ReadTimeout.
func TestFaultMatrix(t *testing.T) {
	seeds := uint64(3)
	if s := os.Getenv(seedsEnv); s != "" {
		n, err := strconv.ParseUint(s, 10, 16)
		if err != nil {
			t.Fatalf("%s: %v", seedsEnv, err)
		}
		seeds = n
	}
	m, users := build(t, small()...), newLogins(t)
	var cells []func()
	var idle atomic.Int64
	for _, kind := range []string{"manifest", "blob", "token", "object"} {
		for _, f := range matrixFaults {
			for seed := range seeds {
				cells = append(cells, func() {
					c := &cell{m: m, idle: &idle, users: users, kind: kind, name: f.name, fault: f.fault, seed: seed, mode: int(seed % modes)}
					c.harmless = f.harmless || c.noRange() && kind != "blob" && kind != "object"
					c.rnd = rand.New(rand.NewPCG(seed, uint64(len(kind)+len(f.name)<<8)))
					t.Run(fmt.Sprintf("%s/%s/%d", kind, f.name, seed), c.run)
				})
			}
		}
	}
	begin, before := time.Now(), runtime.NumGoroutine()
	var all errgroup.Group
	all.SetLimit(18)
	for _, run := range cells {
		all.Go(func() error {
			run()
			return nil
		})
	}
	all.Wait()
	noMore(t, before)
	if n := idle.Load(); n > int64(len(cells)/10) {
		t.Errorf("in %d of %d cells no request met the fault", n, len(cells))
	}
	t.Logf("%d cells in %v", len(cells), time.Since(begin).Round(time.Second))
}

// A cell is one fault done to one kind of request in one way.
type cell struct {
	m        *img
	idle     *atomic.Int64
	users    *logins
	kind     string
	name     string
	fault    registrytest.Fault
	harmless bool
	seed     uint64
	mode     int

	mu  sync.Mutex
	rnd *rand.Rand
}

// do decides whether a request gets the fault. first counts such requests.
func (c *cell) do(q registrytest.Request, bad bool, first *atomic.Int64) registrytest.Fault {
	if q.Kind != c.kind || !bad {
		return registrytest.Fault{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	n := first.Add(1)
	switch c.mode {
	case atFirst:
		limit := int64(1 + c.seed/modes%3)
		if c.once() {
			limit = 1
		}
		if n > limit {
			return registrytest.Fault{}
		}
	case atTimes:
		if n > 12 || c.once() && n > 1 || c.rnd.IntN(2) == 0 {
			return registrytest.Fault{}
		}
	}
	f := c.fault
	if f.At = c.rnd.Int64N(1 + min(max(q.N, 600), 60_000)); f.Kind == registrytest.Partial {
		f.At += minPart // less is as good as nothing
	}
	return f
}

// once reports whether the fault may come once and no more: corruption that
// comes twice is to be reported, a host that wants to be left alone for an hour
// is asked twice within ReadTimeout, and one that trickles thrice.
func (c *cell) once() bool {
	return c.fault.Kind == registrytest.Corrupt || c.fault.RetryAfter == "3600" || c.fault.Kind == registrytest.Trickle
}

func (c *cell) run(t *testing.T) {
	o := quick()
	o.PlainHTTP = false
	o.StallTimeout, o.ReadTimeout = time.Second, 20*time.Second
	if c.fault.Kind == registrytest.Trickle {
		o.ReadTimeout = 8 * time.Second
	}
	if c.fails() && c.kind != "manifest" {
		o.ReadTimeout = 2 * time.Second
	}
	ro := registrytest.Options{
		TLS: c.seed%3 == 1, HTTP2: c.seed%3 == 1, Redirect: c.kind == "object",
		Auth: registrytest.Auth{User: "u", Password: "p", TTL: time.Hour, Silent: c.seed%2 == 0},
	}
	var first atomic.Int64
	var hosting string
	var servers []*registrytest.Registry
	ca := filepath.Join(t.TempDir(), "ca.crt")
	for i := range 2 {
		so := ro
		so.Fault = func(q registrytest.Request) registrytest.Fault {
			return c.do(q, i == 0 || c.mode == forGood, &first)
		}
		r := registryOf(t, so)
		c.m.serve(r, "a")
		c.users.add(t, r.Host())
		servers = append(servers, r)
		if err := os.WriteFile(ca, r.CA(), 0o644); ro.TLS && err != nil { // all have the same
			t.Fatal(err)
		}
		if c.mode == atFirst || c.mode == atTimes {
			break // one host must do
		}
	}
	// The last is the registry, the one before a mirror.
	for i, r := range servers {
		at, trust := "http://"+r.Host(), ""
		if ro.TLS {
			at, trust = "https://"+r.Host(), fmt.Sprintf("ca = %q\n", ca)
		}
		if i == len(servers)-1 {
			hosting = fmt.Sprintf("server = %q\n%s%s", at, trust, hosting)
		} else {
			hosting += fmt.Sprintf("[host.%q]\n%s", at, trust)
		}
	}
	o.HostsDir = hosts(t, map[string]string{"registry.invalid": hosting})
	s, err := OpenSource("registry.invalid/a:1", o)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c.resolve(t, s, o)
	c.read(t, s, o)
	if first.Load() == 0 { // a host may be left alone for being slow, on a busy machine
		c.idle.Add(1)
	}
}

// noRange reports whether the fault is nothing where no range is asked for.
func (c *cell) noRange() bool {
	return c.fault.Kind == registrytest.WrongRange || c.fault.Kind == registrytest.NoRange
}

// fails reports whether nothing can be had.
func (c *cell) fails() bool { return c.mode == forGood && !c.harmless }

func (c *cell) resolve(t *testing.T, s Source, o Options) {
	begin := time.Now()
	manifest, err := s.Resolve(ctx)
	took := time.Since(begin)
	ranges := c.kind == "blob" || c.kind == "object"
	for try := 0; err != nil && (ranges || !c.fails()) && try < 5; try++ {
		// Resolve gives up soon, and a busy machine may stall like a registry.
		manifest, err = s.Resolve(ctx)
	}
	switch {
	case ranges || c.harmless || !c.fails() && !final[c.name] && c.mode != atTimes:
		if err != nil {
			t.Errorf("resolve: %v", err)
		}
	case err == nil && c.fails() && c.kind == "manifest" && c.name != "trickle":
		t.Error("resolved, though no host gives a manifest")
	}
	if err == nil && string(manifest.Raw) != string(c.m.oci.Raw) {
		t.Error("a wrong manifest")
	}
	if took > o.ReadTimeout+slack {
		t.Errorf("resolve took %v", took)
	}
}

// read has three readers and Fill at once.
func (c *cell) read(t *testing.T, s Source, o Options) {
	var blobs []Blob
	for _, d := range c.m.oci.Layers {
		blobs = append(blobs, s.Blob(d))
	}
	sink := newSink(c.m.x)
	f := New(c.m.x, blobs, sink, FetchOptions{})
	defer f.Close()
	must := !(c.fails() && c.kind != "manifest")
	var all sync.WaitGroup
	for w := range uint64(3) {
		all.Go(func() {
			rnd := rand.New(rand.NewPCG(c.seed, w))
			for range 4 {
				i := rnd.IntN(c.m.x.Contents())
				off := rnd.Int64N(c.m.x.Content(i).Size)
				begin := time.Now()
				err := f.Need(ctx, i, off, 1+rnd.Int64N(100_000))
				took := time.Since(begin)
				switch {
				case err != nil && must:
					t.Errorf("read: %v", err)
				case err == nil && !sink.has(i, off):
					t.Error("a read without its chunk")
				case took > o.ReadTimeout+time.Second+slack:
					t.Errorf("a read took %v", took)
				}
				if err != nil {
					return
				}
			}
		})
	}
	fctx, cancel := context.WithTimeout(ctx, 10*o.ReadTimeout)
	defer cancel()
	err := f.Fill(fctx)
	if err != nil && must || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("fill: %v", err)
	}
	all.Wait()
	if err == nil {
		sink.mu.Lock()
		clear(sink.puts) // two jobs may have had a chunk in hand
		sink.mu.Unlock()
		sink.check(t)
	}
}

// logins is docker's config.json for many hosts.
type logins struct {
	mu    sync.Mutex
	dir   string
	auths map[string]map[string]string
}

func newLogins(t *testing.T) *logins {
	l := &logins{dir: t.TempDir(), auths: map[string]map[string]string{}}
	t.Setenv("DOCKER_CONFIG", l.dir)
	return l
}

func (l *logins) add(t *testing.T, host string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.auths[host] = map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte("u:p"))}
	raw, err := json.Marshal(map[string]any{"auths": l.auths})
	if err == nil {
		err = os.WriteFile(filepath.Join(l.dir, "new"), raw, 0o600)
	}
	if err == nil {
		err = os.Rename(filepath.Join(l.dir, "new"), filepath.Join(l.dir, "config.json"))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// slack is what a busy machine may take longer.
const slack = 4 * time.Second
