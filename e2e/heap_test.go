package e2e

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// A ropeBlob is a blob of pieces, most of which are the same bytes many times.
type ropeBlob struct {
	pieces [][]byte
	ends   []int64
}

func (r *ropeBlob) size() int64 {
	if len(r.ends) == 0 {
		return 0
	}
	return r.ends[len(r.ends)-1]
}

func (r *ropeBlob) add(p []byte) (off int64) {
	off = r.size()
	r.pieces, r.ends = append(r.pieces, p), append(r.ends, off+int64(len(p)))
	return off
}

func (r *ropeBlob) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		i := sort.Search(len(r.ends), func(i int) bool { return r.ends[i] > off })
		if i == len(r.ends) {
			return n, io.EOF
		}
		k := copy(p[n:], r.pieces[i][int64(len(r.pieces[i]))-(r.ends[i]-off):])
		n, off = n+k, off+int64(k)
	}
	return n, nil
}

// largeLayer is a layer of files of 64 MiB in chunks of 4 MiB, total bytes of
// them. The blob's digest is a made-up one: nobody reads the whole blob.
func largeLayer(t *testing.T, total int64, pack func([]byte) []byte, toc func(w io.Writer, off int64, toc *estargz.JTOC) (digest.Digest, error)) (*ropeBlob, ocispec.Descriptor) {
	t.Helper()
	const chunk, perFile = 4 << 20, 16
	blob, index := &ropeBlob{}, &estargz.JTOC{Version: 1}
	data := imagetest.RandomBytes(chunk, 1)
	packed, sum := pack(data), digest.FromBytes(data)
	for i := range int(total / (chunk * perFile)) {
		own := append(fmt.Appendf(nil, "%08d", i), data[8:]...) // so that no two files are one content
		h, name := sha256.New(), fmt.Sprintf("file%03d", i)
		for k := range perFile {
			e := &estargz.TOCEntry{Name: name, Type: "chunk", ChunkOffset: int64(k) * chunk, ChunkSize: chunk, ChunkDigest: sum.String()}
			p, q := packed, data
			if k == 0 {
				p, q = pack(own), own
				e.Type, e.Size, e.Mode, e.ChunkDigest = "reg", chunk*perFile, 0o644, digest.FromBytes(own).String()
			}
			h.Write(q)
			e.Offset = blob.add(p)
			index.Entries = append(index.Entries, e)
		}
		index.Entries[len(index.Entries)-perFile].Digest = digest.NewDigest(digest.SHA256, h).String()
	}
	var tail bytes.Buffer
	tocDigest, err := toc(&tail, blob.size(), index)
	if err != nil {
		t.Fatal(err)
	}
	blob.add(tail.Bytes())
	return blob, ocispec.Descriptor{Digest: tocDigest, Size: blob.size(), Annotations: map[string]string{estargz.TOCJSONDigestAnnotation: tocDigest.String()}}
}

// Filling an image of 2 GiB takes no more memory than it was told to.
func TestHeapWhileFilling(t *testing.T) {
	const total, mib = 2 << 30, 1 << 20
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, mediaType string
		flags           []string
		limit           float64
	}{
		{"default", ocispec.MediaTypeImageLayerGzip, nil, 300 * mib},
		{"64MiB", ocispec.MediaTypeImageLayerZstd, []string{"--fetch-memory", "64MiB"}, 128 * mib},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := newBench(t)
			var blob *ropeBlob
			var desc ocispec.Descriptor
			if c.mediaType == ocispec.MediaTypeImageLayerGzip {
				blob, desc = largeLayer(t, total, func(p []byte) []byte {
					var b bytes.Buffer
					w, _ := gzip.NewWriterLevel(&b, gzip.BestSpeed)
					w.Write(p)
					w.Close()
					return b.Bytes()
				}, func(w io.Writer, off int64, toc *estargz.JTOC) (digest.Digest, error) {
					return estargz.NewGzipCompressor().WriteTOCAndFooter(w, off, toc, sha256.New())
				})
			} else {
				annotations := map[string]string{}
				blob, desc = largeLayer(t, total, func(p []byte) []byte {
					var b bytes.Buffer // as a stream: the window is the level's
					encoder.Reset(&b)
					io.Copy(encoder, bytes.NewReader(p))
					encoder.Close()
					return b.Bytes()
				}, func(w io.Writer, off int64, toc *estargz.JTOC) (digest.Digest, error) {
					return (&zstdchunked.Compressor{CompressionLevel: zstd.SpeedFastest, Metadata: annotations}).WriteTOCAndFooter(w, off, toc, sha256.New())
				})
				for k, v := range annotations {
					desc.Annotations[k] = v
				}
			}
			desc.MediaType = c.mediaType
			r, err := registrytest.New(registrytest.Options{})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(r.Close)
			r.Add(desc.Digest, blob, desc.Size)
			config := r.AddBytes(ocispec.MediaTypeImageConfig, []byte("{}"))
			manifest := imagetest.Must(json.Marshal(ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{desc}}))
			r.AddManifest("large", "1", ocispec.MediaTypeImageManifest, manifest)
			addr := freeAddr(t)
			start := time.Now()
			point := b.mount("docker://"+r.Host()+"/large:1", append([]string{"--metrics", addr, "--swap", "never"}, c.flags...)...)
			most, samples := 0.0, 0
			for {
				s := b.status(point)
				if s.State != "lazy" {
					break
				}
				most, samples = max(most, metric(t, addr, "go_memstats_heap_inuse_bytes")), samples+1
				time.Sleep(20 * time.Millisecond)
				if time.Since(start) > commandTime {
					t.Fatalf("not filled: %+v", s)
				}
			}
			took := time.Since(start)
			proc, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.status(point).PID))
			_, peak, _ := strings.Cut(string(proc), "VmHWM:")
			peak, _, _ = strings.Cut(peak, "\n")
			t.Logf("2 GiB in %v; the heap was at most %.0f MiB in %d samples; most resident %s", took.Round(time.Millisecond), most/mib, samples, strings.TrimSpace(peak))
			if most > c.limit || samples < 10 {
				t.Errorf("the heap was %.0f MiB in %d samples, the limit is %.0f", most/mib, samples, c.limit/mib)
			}
			if fi, err := os.Stat(filepath.Join(point, "file000")); err != nil || fi.Size() != 64<<20 {
				t.Error(fi, err)
			}
			b.must("umount", point)
		})
	}
}
