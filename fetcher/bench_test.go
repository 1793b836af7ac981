package fetcher

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// words is text that compresses about as programs do.
func words(n int, seed uint64) string {
	var b strings.Builder
	r := rand.New(rand.NewPCG(seed, 0))
	for b.Len() < n {
		fmt.Fprintf(&b, "%s%d ", []string{"open", "read", "chunk", "layer", "digest", "mount"}[r.IntN(6)], r.IntN(5000))
	}
	return b.String()[:n]
}

// BenchmarkFill fills over loopback, where the cores are the limit.
func BenchmarkFill(b *testing.B) {
	items := []imagetest.Item{imagetest.Dir("d")}
	total := 0
	for i := range 600 {
		n := 20_000 + i%10*20_000
		items = append(items, imagetest.File(fmt.Sprintf("d/%05d", i), words(n, uint64(i))))
		total += n
	}
	tar := imagetest.Must(imagetest.Tar(items...))
	for name, layer := range map[string]*imagetest.Blob{
		"gzip": imagetest.Must(imagetest.EStargz(tar, imagetest.Options{})),
		"zstd": imagetest.Must(imagetest.ZstdChunked(tar, imagetest.Options{})),
	} {
		m := build(b, layer)
		r := registryOf(b, registrytest.Options{})
		s := open(b, m.serve(r, "a"), quick())
		for _, streams := range []int{1, 2, 3, 6, 12} {
			b.Run(fmt.Sprint(name, "/streams=", streams), func(b *testing.B) {
				b.SetBytes(int64(total))
				b.ReportAllocs()
				for b.Loop() {
					sink := newSink(m.x)
					sink.discard = true
					f := m.fetch(b, s, sink, FetchOptions{Streams: streams})
					if err := f.Fill(ctx); err != nil {
						b.Fatal(err)
					}
					f.Close()
				}
			})
		}
	}
}
