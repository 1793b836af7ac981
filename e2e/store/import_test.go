package store

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Files that are on the machine already are not fetched: from an unpacked tree
// and from the object store of mkcomposefs. The store's objects are one of
// mkcomposefs's in turn.
func TestImport(t *testing.T) {
	b, r := newBench(t), serve(t)
	img := push(t, r, "imported", 0, files("usr", 80, 30, 50_000))
	tree := filepath.Join(b.dir, "tree")
	for _, f := range img.files {
		path := filepath.Join(tree, f.name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, f.data(), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	theirs := filepath.Join(b.dir, "theirs")
	b.must("erofs", "create", "--digest-store", theirs, tree, filepath.Join(b.dir, "theirs.cfs"))
	for name, from := range map[string]string{"a tree": tree, "a store of objects": theirs} {
		t.Run(name, func(t *testing.T) {
			b.root = filepath.Join(b.dir, "root-"+filepath.Base(from))
			var res struct {
				Files, Added, Bytes int64
			}
			if err := json.Unmarshal([]byte(b.must("cache", "import", "--root", b.root, "--json", "--from", from)), &res); err != nil {
				t.Fatal(err)
			}
			if res.Files != 30 || res.Added != 30 || res.Bytes < 30*50_000 {
				t.Errorf("%+v", res)
			}
			before := r.Counts().Bytes
			p := b.mount(img.name)
			b.waitFor("swapped", p)
			if err := readAll(p, img); err != nil {
				t.Error(err)
			}
			if got := r.Counts().Bytes - before; got > 100_000 { // the manifest and the end of the layer, with its TOC
				t.Errorf("%d bytes were fetched", got)
			}
			// The reverse: every object that mkcomposefs wants is there.
			objects := filepath.Join(b.root, "objects")
			n := strings.Count(b.must("erofs", "objects", "--missing", "--basedir", objects, filepath.Join(b.dir, "theirs.cfs")), "\n")
			if n != 0 {
				t.Errorf("%d objects of mkcomposefs's image are missing", n)
			}
			used := sizeOf(objects)
			b.must("erofs", "create", "--digest-store", objects, tree, filepath.Join(b.dir, "ours.cfs"))
			if sizeOf(objects) != used {
				t.Error("mkcomposefs added objects that are there")
			}
			if err := b.unmount(p); err != nil {
				t.Fatal(err)
			}
		})
	}
	// What is not what it is called is left out, and said.
	bad := filepath.Join(theirs, "00", strings.Repeat("0", 62))
	if err := os.MkdirAll(filepath.Dir(bad), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bad, []byte("something else"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := b.run("cache", "import", "--root", b.root, "--from", theirs); err == nil || !strings.Contains(err.Error(), "not its name") {
		t.Errorf("a wrong object: %v", err)
	}
}
