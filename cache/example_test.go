package cache

import (
	"encoding/hex"
	"os"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// TestWorkedExample holds the example in docs/store.md to what the store does.
func TestWorkedExample(t *testing.T) {
	doc, err := os.ReadFile("../docs/store.md")
	if err != nil {
		t.Fatal(err)
	}
	ct := cut("a*4096 b*4096 0*8192 c*100")
	x := imageOf(t, ct)
	s := open(t, t.TempDir(), Options{})
	c := contentsOf(t, s, x)
	put(t, c, x, x.ContentChunk(0, 0), x.ContentChunk(0, 2))
	b, err := os.ReadFile(s.stagingDir.f.Name() + "/" + stagingName(ct.digest) + mapSuffix)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{ct.digest.Path(), ct.fsVerity().Path(), stagingName(ct.digest)}
	layout := layoutOf(image.Content{Digest: ct.digest, Size: int64(len(ct.data)), Chunks: len(ct.chunks)},
		func(k int) image.Chunk { return image.Chunk{Chunk: ct.chunks[k]} })
	want = append(want, hex.EncodeToString(layout[:]))
	for _, ch := range ct.chunks {
		if !ch.Zero {
			want = append(want, hex.EncodeToString(ch.Digest[:]))
		}
	}
	copy(b[80:], "\x1f\x0e\x5d\x4c\x3b\x2a\x49\x18\x87\x76\x65\x54\x43\x32\x21\x10") // the example's boot id
	dump := hex.Dump(b)
	for line := range strings.Lines(dump) {
		want = append(want, strings.Join(strings.Fields(line)[:min(17, len(strings.Fields(line))-1)], " "))
	}
	for _, w := range want {
		if !strings.Contains(strings.Join(strings.Fields(string(doc)), " "), w) {
			t.Errorf("docs/store.md lacks %s", w)
		}
	}
	putAll(t, c, x)
	wantWhole(t, s, c, x)
	if t.Failed() {
		t.Logf("the map:\n%s", dump)
	}
}
