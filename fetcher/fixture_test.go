package fetcher

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// TestMain keeps the tests from docker's config.json and hosts.toml of the
// machine they run on.
func TestMain(m *testing.M) {
	dir, err := os.MkdirTemp("", "fetcher")
	if err != nil {
		panic(err)
	}
	os.Setenv("DOCKER_CONFIG", dir)
	code := m.Run()
	os.RemoveAll(dir)
	os.Exit(code)
}

// leakFree fails the test if it ends with more goroutines than it began with.
// It must come before what the test starts and its cleanups stop.
func leakFree(t testing.TB) {
	before := runtime.NumGoroutine()
	t.Cleanup(func() { noMore(t, before) })
}

// noMore fails the test if there are more goroutines than before, after a moment.
func noMore(t testing.TB, before int) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Second)
	for runtime.NumGoroutine() > before {
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Errorf("%d goroutines, %d at the beginning:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// quick are options for tests of failures.
func quick() Options {
	return Options{PlainHTTP: true, HostsDir: "/nonexistent", StallTimeout: 200 * time.Millisecond, ReadTimeout: 2 * time.Second}
}

func registryOf(t testing.TB, o registrytest.Options) *registrytest.Registry {
	t.Helper()
	r, err := registrytest.New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

func open(t testing.TB, source string, o Options) Source {
	t.Helper()
	s, err := OpenSource(source, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// memSink keeps chunks in memory, in a form that shows who got what.
type memSink struct {
	x       *image.Index
	mu      sync.Mutex
	data    map[int][]byte
	puts    map[int]int
	fail    error // of every Put
	discard bool  // keep no data
	local   []atomic.Bool
	bytes   atomic.Int64
}

func newSink(x *image.Index) *memSink {
	return &memSink{x: x, data: map[int][]byte{}, puts: map[int]int{}, local: make([]atomic.Bool, x.Chunks())}
}

func (s *memSink) Missing(chunk int) bool { return !s.local[chunk].Load() }

func (s *memSink) Put(chunk int, data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	c := s.x.Chunk(chunk)
	if c.Zero != (data == nil) || !c.Zero && (int64(len(data)) != c.Size || !s.discard && sha256.Sum256(data) != c.Digest) {
		return fmt.Errorf("sink: chunk %d put with wrong data", chunk)
	}
	s.puts[chunk]++
	if !s.discard {
		s.data[chunk] = bytes.Clone(data)
	}
	s.bytes.Add(c.Size)
	s.local[chunk].Store(true)
	return nil
}

// content assembles a content from its chunks.
func (s *memSink) content(t testing.TB, i int) []byte {
	t.Helper()
	c := s.x.Content(i)
	out := make([]byte, c.Size)
	for k := range c.Chunks {
		j := s.x.ContentChunk(i, k)
		if s.Missing(j) {
			t.Fatalf("chunk %d of content %d is missing", j, i)
		}
		s.mu.Lock()
		copy(out[s.x.Chunk(j).FileOffset:], s.data[j])
		s.mu.Unlock()
	}
	return out
}

// check compares all that is stored with the digests of the contents.
func (s *memSink) check(t testing.TB) {
	t.Helper()
	for i := range s.x.Contents() {
		if got := image.Digest(sha256.Sum256(s.content(t, i))); got != s.x.Content(i).Digest {
			t.Fatalf("content %d is %s, want %s", i, got, s.x.Content(i).Digest)
		}
	}
	for j, n := range s.puts {
		if n != 1 {
			t.Errorf("chunk %d was put %d times", j, n)
		}
	}
}

// An img is an image in all its forms.
type img struct {
	oci *imagetest.OCI
	x   *image.Index
}

// build makes an image and its index.
func build(t testing.TB, layers ...*imagetest.Blob) *img {
	t.Helper()
	oci, err := imagetest.Image(layers...)
	if err != nil {
		t.Fatal(err)
	}
	var ls []image.Layer
	for i, l := range layers {
		tc, err := toc.Read(bytes.NewReader(l.Data), l.Desc.Size, toc.Options{Annotations: l.Desc.Annotations})
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		d, err := toc.ParseDigest(l.Desc.Digest.String())
		if err != nil {
			t.Fatal(err)
		}
		ls = append(ls, image.Layer{Digest: d, Size: l.Desc.Size, TOC: tc})
	}
	return &img{oci, indexOf(t, ls)}
}

func indexOf(t testing.TB, ls []image.Layer) *image.Index {
	t.Helper()
	tree, err := image.Merge(ls)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := image.WriteIndex(&b, tree, ls); err != nil {
		t.Fatal(err)
	}
	x, err := image.OpenIndex(b.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// serve puts the image into a registry as NAME:1.
func (m *img) serve(r *registrytest.Registry, name string) string {
	for d, b := range m.oci.Blobs {
		r.Add(d, bytes.NewReader(b), int64(len(b)))
	}
	r.AddManifest(name, "1", ocispec.MediaTypeImageManifest, m.oci.Raw)
	return "docker://" + r.Host() + "/" + name + ":1"
}

// fetch makes a fetcher of the image from a source.
func (m *img) fetch(t testing.TB, s Source, sink Sink, o FetchOptions) *Fetcher {
	t.Helper()
	var blobs []Blob
	for _, d := range m.oci.Layers {
		blobs = append(blobs, s.Blob(d))
	}
	f := New(m.x, blobs, sink, o)
	t.Cleanup(f.Close)
	return f
}

// small is an image of all formats, with chunks of every kind: shared spans,
// holes, several chunks to a file, prioritized files.
var small = sync.OnceValue(func() []*imagetest.Blob {
	text := strings.Repeat("the quick brown fox jumps over the lazy dog. ", 3000)
	tar := func(seed uint64) []byte {
		items := []imagetest.Item{imagetest.Dir("d"), imagetest.File(fmt.Sprint("d/first", seed), fmt.Sprint("prioritized ", seed))}
		for i := range 40 {
			items = append(items, imagetest.File(fmt.Sprint("d/small", seed, "-", i), fmt.Sprint("file ", i, " of ", seed, text[:i*37])))
		}
		items = append(items,
			imagetest.Random(fmt.Sprint("d/random", seed), 300_000, seed),
			imagetest.File(fmt.Sprint("d/text", seed), text+fmt.Sprint(seed)),
			imagetest.File(fmt.Sprint("d/hole", seed), "begin"+strings.Repeat("\x00", 700_000)+"end"+fmt.Sprint(seed)),
			imagetest.File("d/same", "in every layer"),
		)
		return imagetest.Must(imagetest.Tar(items...))
	}
	return []*imagetest.Blob{
		imagetest.Must(imagetest.EStargz(tar(1), imagetest.Options{ChunkSize: 50_000, Prioritized: []string{"d/first1", "d/small1-3"}})),
		imagetest.Must(imagetest.EStargz(tar(2), imagetest.Options{ChunkSize: 60_000, MinChunkSize: 20_000})),
		imagetest.Must(imagetest.ZstdChunked(tar(3), imagetest.Options{ChunkSize: 50_000, Prioritized: []string{"d/first3"}})),
		imagetest.Must(imagetest.ContainersZstdChunked(tar(4), imagetest.Options{})),
	}
})

// spread is one eStargz layer of n random files of size bytes.
func spread(n, size int) *imagetest.Blob {
	items := []imagetest.Item{imagetest.Dir("d")}
	for i := range n {
		items = append(items, imagetest.Random(fmt.Sprintf("d/%05d", i), size, uint64(i)))
	}
	return imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(items...)), imagetest.Options{Level: 1}))
}

func layoutOf(t testing.TB, m *img) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	if err := m.oci.WriteLayout(dir, "1"); err != nil {
		t.Fatal(err)
	}
	return dir
}

var ctx = context.Background()

func readAll(b Blob, off, n int64) ([]byte, error) {
	r, err := b.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// A memBlob is a blob in memory.
type memBlob []byte

func (b memBlob) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(b[off : off+n])), nil
}
