package mount

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/internal/finding"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// What is found out is what mounts find, and nothing of the trials is left.
func TestExamine(t *testing.T) {
	root, run := filepath.Join(t.TempDir(), "root"), filepath.Join(t.TempDir(), "run")
	all := Examine(t.Context(), root, run)
	states := map[string]finding.State{}
	for _, f := range all {
		t.Logf("%+v", f)
		states[f.Name] = f.State
		if f.Group == "" || f.Name == "" || f.Detail == "" || strings.Contains(f.Detail, "\n") ||
			(f.State == finding.OK) != (f.Cost == "") || (f.State == finding.OK) != (f.Advice == "") {
			t.Errorf("not a whole finding: %+v", f)
		}
	}
	want := map[string]bool{"fuse": true, "sockets": true}
	if os.Geteuid() == 0 {
		dir := t.TempDir()
		want["hybrid backend"] = tryHybrid(dir) == nil
		want["swap"] = true
	}
	for name, ok := range want {
		if (states[name] == finding.OK) != ok {
			t.Errorf("%s is %q, want ok: %v", name, states[name], ok)
		}
	}
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), ".try-") {
			t.Errorf("left behind: %s", path)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(run + "/*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	mounts, err := kmount.Mounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, root) {
			t.Errorf("left behind: %+v", m)
		}
	}
	// Where no store can be, one finding says so.
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if all := Examine(t.Context(), file, run); len(all) != 1 || all[0].State != finding.Missing {
		t.Errorf("a store that is a file: %+v", all)
	}
}
