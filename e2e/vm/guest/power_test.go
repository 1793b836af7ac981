package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

// marker is the line at which the host cuts the power of a machine that runs
// TestPowerBefore.
const marker = "now cut the power"

// fixturePath keeps what TestPowerBefore made for TestPowerAfter, which runs
// in the next machine on the same disk.
const fixturePath = disk + "/fixture.json"

type savedFixture struct {
	Dir, Root, Layout string
	Want              map[string]string
	Record            record
}

// TestPowerBefore seals an image and waits for the power to be cut. Nothing
// here syncs what cfs-fuse has written.
func TestPowerBefore(t *testing.T) {
	f := seal(t)
	want := map[string]string{}
	for name, content := range f.want {
		want[name] = fmt.Sprintf("%x", content)
	}
	data, err := json.Marshal(savedFixture{f.dir, f.root, f.layout, want, f.record})
	check(t, err)
	file, err := os.Create(fixturePath)
	check(t, err)
	_, err = file.Write(data)
	check(t, err)
	check(t, file.Sync())
	fmt.Println(marker)
	select {}
}

// TestPowerAfter finds the image sealed, with all its objects, enforced, and
// mountable without its source.
func TestPowerAfter(t *testing.T) {
	data, err := os.ReadFile(fixturePath)
	check(t, err)
	var saved savedFixture
	check(t, json.Unmarshal(data, &saved))
	f := &fixture{dir: saved.Dir, root: saved.Root, layout: saved.Layout, want: map[string]string{}, record: saved.Record}
	for name, content := range saved.Want {
		var b []byte
		_, err := fmt.Sscanf(content, "%x", &b)
		if content != "" {
			check(t, err)
		}
		f.want[name] = string(b)
	}
	check(t, os.RemoveAll(f.layout))
	now, err := os.ReadFile(filepath.Join(filepath.Dir(f.image(t)), "sealed.json"))
	check(t, err)
	var rec record
	check(t, json.Unmarshal(now, &rec))
	if rec != f.record {
		t.Errorf("sealed.json: %+v, before the power was cut %+v", rec, f.record)
	}
	mnt := point(t)
	f.mount(t, mnt, "--verity", "require", "--swap", "require", "--digest", f.record.Composefs)
	if s := statusOf(t, mnt); s.Backend != "kernel" || s.Verity != "enforced" {
		t.Errorf("status: %+v, want the kernel's mount at once", s)
	}
	f.same(t, mnt)
}
