package image

import (
	"bytes"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// From blobs of three formats to the index of one tree.
func TestWhole(t *testing.T) {
	var layers []Layer
	for _, blob := range []*imagetest.Blob{
		imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(
			imagetest.Dir("etc"), imagetest.File("etc/a", "one"), imagetest.File("etc/b", "two"),
			imagetest.Random("large", 100_000, 1), imagetest.Dir("var"), imagetest.File("var/x", "x"),
		)), imagetest.Options{ChunkSize: 30_000, Prioritized: []string{"etc/b"}})),
		imagetest.Must(imagetest.ZstdChunked(imagetest.Must(imagetest.Tar(
			imagetest.File("etc/a", "three"), imagetest.Hardlink("link", "etc/b"), imagetest.Whiteout("var"),
			imagetest.Random("copy", 100_000, 1),
		)), imagetest.Options{MinChunkSize: 1 << 20})),
		imagetest.Must(imagetest.ContainersZstdChunked(imagetest.Must(imagetest.Tar(
			imagetest.File("holes", "x"+string(make([]byte, 50_000))+"y"), imagetest.Symlink("s", "etc/a"),
		)), imagetest.Options{})),
	} {
		x, err := toc.Read(bytes.NewReader(blob.Data), blob.Desc.Size, toc.Options{Annotations: blob.Desc.Annotations})
		if err != nil {
			t.Fatal(err)
		}
		d, err := toc.ParseDigest(blob.Desc.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, Layer{d, blob.Desc.Size, x})
	}
	x, err := Merge(layers)
	if err != nil {
		t.Fatal(err)
	}
	checkTree(t, x, layers)
	checkIndex(t, x, layers)
	const want = "copy=100000@1 etc/?@0 etc/a=5@1 etc/b=3@0 holes=50002@2 large=100000@0 link=>etc/b s->etc/a@2"
	if got := describe(x); got != want {
		t.Errorf("got %s", got)
	}
	idx, err := OpenIndex(indexOf(t, x, layers))
	if err != nil {
		t.Fatal(err)
	}
	// etc/a, etc/b, holes, and once what copy and large have in common: 1, 1, 3 and 4 chunks.
	if idx.Contents() != 4 || idx.Chunks() != 9 || idx.Layers()[0].PrefetchEnd == 0 || !idx.Chunk(8).Zero {
		t.Errorf("%d contents, %d chunks, layers %+v, last %+v", idx.Contents(), idx.Chunks(), idx.Layers(), idx.Chunk(8))
	}
}
