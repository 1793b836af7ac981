package guest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
)

// This kernel takes no detached mount as a lower of overlayfs, so that the
// hybrid backend gives it EROFS and FUSE in a mount namespace that goes away
// again. It is what 'auto' takes here: files come through FUSE at first, and
// from the disk when they are whole, with nothing left mounted that was needed to
// make it so.
func TestHybrid(t *testing.T) {
	f := seal(t)
	f.root += "2"
	mnt := point(t)
	f.mount(t, mnt, "--fill=false", "--swap", "never")
	var s struct {
		Backend  string           `json:"backend"`
		Reason   string           `json:"backend_reason"`
		Requests map[string]int64 `json:"fuse_requests"`
	}
	ask := func() {
		t.Helper()
		check(t, json.Unmarshal([]byte(must(t, "cfs-fuse", "status", "--json", mnt)), &s))
	}
	ask()
	if s.Backend != "hybrid" {
		t.Fatalf("backend %s: %s", s.Backend, s.Reason)
	}
	before := s.Requests["read"]
	if got, err := os.ReadFile(filepath.Join(mnt, "bin/first")); err != nil || string(got) != f.want["bin/first"] {
		t.Errorf("bin/first: %d bytes, %v", len(got), err)
	}
	if ask(); s.Requests["read"] <= before {
		t.Errorf("%v: nothing was read through FUSE", s.Requests)
	}
	f.same(t, mnt)
	must(t, "cfs-fuse", "wait", "--for", "sealed", "--timeout", "60s", mnt)
	dropCaches(t)
	ask()
	before = s.Requests["read"]
	f.same(t, mnt)
	if ask(); s.Requests["read"] != before {
		t.Errorf("%d reads through FUSE when everything was whole, %d before", s.Requests["read"], before)
	}
	must(t, "cfs-fuse", "swap", mnt)
	f.same(t, mnt)
}
