package metrics

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestCollectors(t *testing.T) {
	reg := prometheus.NewPedanticRegistry()
	m := New(reg)
	m.Request(Demand, OK, 10)
	m.Request(Demand, OK, 5)
	m.Request(Fill, Failed, 1)
	m.ChunkFailed(ReasonDigest)
	m.Read(Local, time.Millisecond)
	m.State("sealed", []string{"lazy", "sealed"})
	m.Progress(4, 3, 400, 300)
	problems, err := testutil.GatherAndLint(reg)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	const want = `
# HELP cfs_fuse_files_local Distinct file contents of the image that are whole in the store.
# TYPE cfs_fuse_files_local gauge
cfs_fuse_files_local 3
# HELP cfs_fuse_source_bytes_total Bytes received from the image's source, by class of work and result.
# TYPE cfs_fuse_source_bytes_total counter
cfs_fuse_source_bytes_total{class="demand",result="failed"} 0
cfs_fuse_source_bytes_total{class="demand",result="ok"} 15
cfs_fuse_source_bytes_total{class="fill",result="failed"} 1
cfs_fuse_source_bytes_total{class="fill",result="ok"} 0
cfs_fuse_source_bytes_total{class="metadata",result="failed"} 0
cfs_fuse_source_bytes_total{class="metadata",result="ok"} 0
cfs_fuse_source_bytes_total{class="prefetch",result="failed"} 0
cfs_fuse_source_bytes_total{class="prefetch",result="ok"} 0
# HELP cfs_fuse_state 1 for the state that the image is in, 0 for the others.
# TYPE cfs_fuse_state gauge
cfs_fuse_state{state="lazy"} 0
cfs_fuse_state{state="sealed"} 1
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "cfs_fuse_files_local", "cfs_fuse_source_bytes_total", "cfs_fuse_state"); err != nil {
		t.Error(err)
	}
}

// A package under test has no collectors.
func TestNil(t *testing.T) {
	var m *Metrics
	m.Request(Demand, OK, 1)
	m.ChunkFailed(ReasonFetch)
	m.Read(Registry, 0)
	m.State("lazy", nil)
	m.Progress(1, 1, 1, 1)
}
