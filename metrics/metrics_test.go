package metrics

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestCollectors(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m := New(reg)
	m.Request(Demand, FromRegistry, OK, 10)
	m.Request(Demand, FromRegistry, OK, 5)
	m.Request(Fill, FromMirror, Failed, 1)
	m.SourceError(ErrorStall, "registry.example.com")
	m.ChunkFailed(ReasonDigest)
	m.Read(Local, time.Millisecond)
	m.Milestone(Sealed, time.Second, "sha256:"+strings.Repeat("0", 64))
	m.NotFetched(PassedUnread, 7)
	expires := time.Unix(1234567890, 0)
	m.Watch(func() Observation {
		return Observation{State: "lazy", Backend: "fuse", Verity: VerityNone, Files: 4, FilesLocal: 3, Waiting: 2, OldestWait: time.Second,
			Credentials: map[string]time.Time{"registry.example.com": expires}}
	})
	stop := m.Watch(func() Observation {
		return Observation{State: "sealed", Backend: "fuse", Files: 100, Waiting: 1, AtRisk: true,
			Store: StoreLevel{"/store", 5, 6, 7}, OldestWait: 3 * time.Second,
			Credentials: map[string]time.Time{"registry.example.com": expires.Add(time.Hour)}}
	})
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	check := func(want ...string) {
		t.Helper()
		for _, line := range want {
			name := line[:strings.IndexAny(line+"{", "{ ")]
			got, err := gathered(reg, name)
			if err != nil || !strings.Contains(got, "\n"+line+"\n") {
				t.Errorf("no %q (%v) in:\n%s", line, err, got)
			}
		}
	}
	check(`cfs_fuse_source_bytes_total{class="demand",result="ok",source="registry"} 15`,
		`cfs_fuse_source_bytes_total{class="fill",result="failed",source="mirror"} 1`,
		`cfs_fuse_source_bytes_total{class="metadata",result="ok",source="file"} 0`,
		`cfs_fuse_source_errors_total{host="registry.example.com",kind="stall"} 1`,
		`cfs_fuse_mounts{backend="fuse",state="lazy"} 1`, `cfs_fuse_mounts{backend="fuse",state="sealed"} 1`, `cfs_fuse_mounts{backend="kernel",state="swapped"} 0`,
		`cfs_fuse_files 104`, `cfs_fuse_files_local 3`, `cfs_fuse_reads_waiting 3`, `cfs_fuse_oldest_wait_seconds 3`, `cfs_fuse_mounts_at_risk 1`,
		`cfs_fuse_store_bytes{root="/store"} 5`, `cfs_fuse_store_budget_bytes{root="/store"} 6`, `cfs_fuse_store_free_bytes{root="/store"} 7`,
		`cfs_fuse_credentials_expire_timestamp_seconds{host="registry.example.com"} 1.23456789e+09`,
		`cfs_fuse_not_fetched_bytes_total{reason="unread"} 7`)
	stop()
	check(`cfs_fuse_files 4`, `cfs_fuse_oldest_wait_seconds 1`, `cfs_fuse_mounts_at_risk 0`)
}

// Every family is in the table, with the type that it says there.
func TestFamilies(t *testing.T) {
	reg := prometheus.NewRegistry()
	m := New(reg)
	m.Watch(func() Observation {
		return Observation{Store: StoreLevel{Root: "/"}, Credentials: map[string]time.Time{"h": time.Now()}}
	})
	m.FUSERequest("read")
	m.SourceError(ErrorStall, "h")
	all, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]Kind{}
	for _, f := range Families() {
		kinds[f.Name] = f.Kind
	}
	for _, f := range all {
		if k := kinds[f.GetName()]; string(k) != strings.ToLower(f.GetType().String()) {
			t.Errorf("%s is a %s, the table says %q", f.GetName(), f.GetType(), k)
		}
		delete(kinds, f.GetName())
	}
	for name := range kinds {
		t.Errorf("%s is in the table only", name)
	}
}

func TestDocs(t *testing.T) {
	have, err := os.ReadFile("../docs/metrics.md")
	if err != nil || string(have) != Markdown() {
		t.Errorf("docs/metrics.md is not what the code says (%v): run 'make docs'", err)
	}
}

// A package under test has no collectors.
// A store's path may be no text.
func TestOddLabels(t *testing.T) {
	m := New(prometheus.NewRegistry())
	defer m.Watch(func() Observation { return Observation{Store: StoreLevel{Root: "/a\xff"}} })()
	if _, data, err := m.Snapshot(); err != nil || !bytes.Contains(data, []byte("/a\ufffd")) {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}

func TestNil(t *testing.T) {
	var m *Metrics
	m.Request(Demand, FromFile, OK, 1)
	m.SourceError(ErrorStall, "h")
	m.NotFetched(PassedReused, 1)
	m.ChunkFailed(ReasonFetch)
	m.Read(Registry, 0)
	m.RequestFailed()
	m.FUSERequest("read")
	m.Started(OK)
	m.Resumed()
	m.Milestone(Mounted, 0, "")
	m.Evicted(1, 1)
	m.Watch(nil)()
	if err := m.Spool("/nonexistent/x"); err != nil {
		t.Error(err)
	}
	if _, _, err := m.Snapshot(); err != nil {
		t.Error(err)
	}
	if err := m.Retire(); err != nil {
		t.Error(err)
	}
}
