package cache

import (
	"path/filepath"
	"slices"
	"testing"
)

// Every layout that was released is kept as a store in testdata/layouts, made
// by the program of then, and is opened, read, checked, filled and collected
// by this one. Layout 1 was packed before there were leases and budgets, with
// a content of five chunks of which two were missing.
func TestReleasedLayouts(t *testing.T) {
	stores, err := filepath.Glob("testdata/layouts/*.tar.gz")
	if err != nil || len(stores) != version {
		t.Fatalf("%q, %v: want one store for each of %d layouts", stores, err, version)
	}
	half := cut("a*4096 b*4096 0*8192 c*100")
	x := imageOf(t, half, cut("d*5000"), cut("e*4096 f*5000"), cut("0*9000"), cut("g*1"))
	for _, path := range stores {
		for name, c := range map[string]struct{ boot string }{
			"the same boot": {"the machine that made it"},
			"another boot":  {"another"},
		} {
			t.Run(filepath.Base(path)+"/"+name, func(t *testing.T) {
				dir := t.TempDir()
				run(t, "tar", "--xattrs", "--xattrs-include=user.*", "-xpzf", path, "-C", dir)
				s := open(t, dir, Options{BootID: c.boot})
				digests, err := s.ImageDigests()
				if err != nil || len(digests) != 1 {
					t.Fatalf("%v, %v", digests, err)
				}
				sources, err := s.Sources()
				if err != nil || len(sources) != 0 { // refs did not say theirs then
					t.Errorf("%v, %v", sources, err)
				}
				kept, done, err := s.openIndex(digests[0])
				if err != nil {
					t.Fatal(err)
				}
				defer done()
				if kept.Contents() != x.Contents() || kept.Chunks() != x.Chunks() {
					t.Fatalf("%d contents, %d chunks", kept.Contents(), kept.Chunks())
				}
				cs, err := s.Contents(kept)
				if err != nil {
					t.Fatal(err)
				}
				if p := cs.Progress(); p.FilesLocal != 4 || p.BytesLocal != 5000+9096+9000+1+4096+8192 {
					t.Fatalf("%+v", p)
				}
				for i := range x.Contents() {
					if x.Content(i).Digest != half.digest {
						wantRead(t, cs, x, i)
					}
				}
				if _, found := checked(t, s, CheckOptions{Read: true}); len(found) != 0 {
					t.Errorf("check: %v", found)
				}
				if n := putAll(t, cs, x); n != 2 {
					t.Errorf("%d chunks were missing", n)
				}
				wantWhole(t, s, cs, x)
				cs.Close()
				l, err := s.Lease(digests[0])
				if err != nil {
					t.Fatal(err)
				}
				if res := collect(t, s, CollectOptions{Budget: Budget{Size: 1}}); res.Contents != 0 {
					t.Errorf("collected while it was leased: %+v", res)
				}
				l.Close()
				if res := collect(t, s, CollectOptions{Budget: Budget{Size: 1}}); res.Contents != 5 || !slices.Equal(res.Removed, []string{digests[0].String()}) {
					t.Errorf("collected: %+v", res)
				}
			})
		}
	}
}
