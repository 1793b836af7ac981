package toc_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// A countingReader counts the reads of a blob and the bytes they asked for.
type countingReader struct {
	r     io.ReaderAt
	reads int
	bytes int64
}

func (c *countingReader) ReadAt(p []byte, off int64) (int, error) {
	c.reads++
	c.bytes += int64(len(p))
	return c.r.ReadAt(p, off)
}

func read(b *imagetest.Blob) (*toc.TOC, error) {
	return toc.Read(bytes.NewReader(b.Data), int64(len(b.Data)), toc.Options{Annotations: b.Desc.Annotations})
}

func decompress(t testing.TB, c toc.Compression, span []byte) []byte {
	t.Helper()
	var r io.Reader
	var err error
	if c == toc.Gzip {
		r, err = gzip.NewReader(bytes.NewReader(span))
	} else {
		var z *zstd.Decoder
		if z, err = zstd.NewReader(bytes.NewReader(span), zstd.WithDecoderConcurrency(1)); err == nil {
			defer z.Close()
		}
		r = z
	}
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// compareWithTar checks a TOC against the tar that its blob decompresses to:
// every header, and every chunk's bytes.
func compareWithTar(t *testing.T, blob []byte, x *toc.TOC, round time.Duration) {
	t.Helper()
	type file struct {
		h    *tar.Header
		data []byte
	}
	var files []file
	tr := tar.NewReader(bytes.NewReader(decompress(t, x.Compression, blob)))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		switch h.Name {
		case ".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json":
		default:
			files = append(files, file{h, data})
		}
	}
	if len(files) != len(x.Entries) {
		t.Fatalf("%d entries, the tar has %d", len(x.Entries), len(files))
	}
	types := map[byte]toc.Type{tar.TypeDir: toc.Dir, tar.TypeReg: toc.Reg, tar.TypeSymlink: toc.Symlink, tar.TypeLink: toc.Hardlink,
		tar.TypeChar: toc.Char, tar.TypeBlock: toc.Block, tar.TypeFifo: toc.Fifo}
	var span struct { // the last one, decompressed
		off  int64
		data []byte
	}
	for i, f := range files {
		e := x.Entries[i]
		mtime := f.h.ModTime.Round(round)
		want := toc.Entry{
			Name: f.h.Name, Type: types[f.h.Typeflag], Mode: uint32(f.h.Mode), UID: uint32(f.h.Uid), GID: uint32(f.h.Gid),
			Size: f.h.Size, MtimeSec: mtime.Unix(), MtimeNsec: uint32(mtime.Nanosecond()), Linkname: f.h.Linkname,
			DevMajor: uint32(f.h.Devmajor), DevMinor: uint32(f.h.Devminor), Digest: e.Digest, Chunks: e.Chunks,
		}
		for _, k := range slices.Sorted(maps.Keys(f.h.PAXRecords)) {
			if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				want.Xattrs = append(want.Xattrs, toc.Xattr{Name: name, Value: []byte(f.h.PAXRecords[k])})
			}
		}
		if got, want := fmt.Sprintf("%+v", e), fmt.Sprintf("%+v", want); got != want {
			t.Errorf("entry\n got %s\nwant %s", got, want)
		}
		var content []byte
		for _, c := range e.Chunks {
			if span.off != c.BlobOffset || span.data == nil {
				span.off, span.data = c.BlobOffset, nil
			}
			if c.Zero {
				content = append(content, make([]byte, c.Size)...)
				continue
			}
			if span.data == nil {
				span.data = decompress(t, x.Compression, blob[c.BlobOffset:c.BlobEnd])
			}
			content = append(content, span.data[c.InnerOffset:][:c.Size]...)
		}
		if !bytes.Equal(content, f.data) {
			t.Errorf("%s: its chunks do not give its content", e.Name)
		}
	}
}

// sample holds one of everything that a tar can say and a TOC can keep.
func sample() []byte {
	return imagetest.Must(imagetest.Tar(
		imagetest.Dir("./", imagetest.Mode(0o700)),
		imagetest.Dir("etc", imagetest.Owner(1, 2), imagetest.Xattr("user.a", "1"), imagetest.Xattr("user.B", "x\x00y")),
		imagetest.File("etc/hello", "hello\n", imagetest.Mode(0o6755), imagetest.Owner(4294967294, 3)),
		imagetest.File("etc/hello again", "hello\n"),
		imagetest.File("empty", ""),
		imagetest.Random("large", 300_000, 1, imagetest.Mtime(time.Unix(1700000000, 987654321))),
		imagetest.File("holes", strings.Repeat("\x00", 5000)+"x"+strings.Repeat("\x00", 3000)+strings.Repeat("y", 70_000)),
		imagetest.File("old", "x", imagetest.Mtime(time.Unix(-86400, 0))),
		imagetest.File("é\n\"\\\x01", "odd name"),
		imagetest.Symlink("symlink", strings.Repeat("x", 4095)),
		imagetest.Hardlink("hardlink", "etc/hello"),
		imagetest.Char("null", 1, 3), imagetest.Block("sda", 8, 1<<20-1), imagetest.Fifo("fifo"),
		imagetest.Whiteout("etc/gone"), imagetest.Opaque("etc"),
	))
}

func TestRead(t *testing.T) {
	type writer = func([]byte, imagetest.Options) (*imagetest.Blob, error)
	legacy := func(tar []byte, o imagetest.Options) (*imagetest.Blob, error) {
		b, err := imagetest.EStargz(tar, o)
		if err != nil {
			return nil, err
		}
		return imagetest.LegacyFooter(b)
	}
	noAnnotations := func(w writer, keep string) writer {
		return func(tar []byte, o imagetest.Options) (*imagetest.Blob, error) {
			b, err := w(tar, o)
			if err == nil {
				maps.DeleteFunc(b.Desc.Annotations, func(k, _ string) bool { return !strings.HasSuffix(k, keep) })
			}
			return b, err
		}
	}
	for _, c := range []struct {
		name   string
		write  writer
		o      imagetest.Options
		format toc.Format
		round  time.Duration
	}{
		{"eStargz", imagetest.EStargz, imagetest.Options{}, toc.EStargz, time.Second},
		{"eStargz, many chunks", imagetest.EStargz, imagetest.Options{ChunkSize: 7777}, toc.EStargz, time.Second},
		{"eStargz, chunks end with the file", imagetest.EStargz, imagetest.Options{ChunkSize: 100_000}, toc.EStargz, time.Second},
		{"eStargz, several workers", imagetest.EStargz, imagetest.Options{Workers: 4}, toc.EStargz, time.Second},
		{"eStargz, innerOffset", imagetest.EStargz, imagetest.Options{MinChunkSize: 1 << 20}, toc.EStargz, time.Second},
		{"eStargz, innerOffset and chunks", imagetest.EStargz, imagetest.Options{MinChunkSize: 50_000, ChunkSize: 1000}, toc.EStargz, time.Second},
		{"eStargz, prioritized", imagetest.EStargz, imagetest.Options{Prioritized: []string{"large", "empty"}}, toc.EStargz, time.Second},
		{"eStargz, prioritized and innerOffset", imagetest.EStargz, imagetest.Options{Prioritized: []string{"large"}, MinChunkSize: 1 << 20}, toc.EStargz, time.Second},
		{"stargz, legacy footer", legacy, imagetest.Options{}, toc.EStargz, time.Second},
		{"zstd:chunked", imagetest.ZstdChunked, imagetest.Options{}, toc.ZstdChunked, time.Second},
		{"zstd:chunked, many chunks", imagetest.ZstdChunked, imagetest.Options{ChunkSize: 7777, Prioritized: []string{"etc/hello"}}, toc.ZstdChunked, time.Second},
		{"zstd:chunked, innerOffset", imagetest.ZstdChunked, imagetest.Options{MinChunkSize: 1 << 20}, toc.ZstdChunked, time.Second},
		{"zstd:chunked by its footer", noAnnotations(imagetest.ZstdChunked, "toc.digest"), imagetest.Options{}, toc.ZstdChunked, time.Second},
		{"zstd:chunked by its footer and checksum", noAnnotations(imagetest.ZstdChunked, "manifest-checksum"), imagetest.Options{}, toc.ZstdChunked, time.Second},
		{"containers/storage", imagetest.ContainersZstdChunked, imagetest.Options{}, toc.ZstdChunked, 1},
		{"containers/storage, many chunks", imagetest.ContainersZstdChunked, imagetest.Options{ChunkSize: 1000}, toc.ZstdChunked, 1},
		{"containers/storage by its footer", noAnnotations(imagetest.ContainersZstdChunked, "manifest-checksum"), imagetest.Options{}, toc.ZstdChunked, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			b, err := c.write(sample(), c.o)
			if err != nil {
				t.Fatal(err)
			}
			x, err := read(b)
			if err != nil {
				t.Fatal(err)
			}
			if x.Format != c.format {
				t.Errorf("format %s, want %s", x.Format, c.format)
			}
			if d := b.Desc.Annotations["containerd.io/snapshot/stargz/toc.digest"]; d != "" && d != x.Digest.String() {
				t.Errorf("digest %s, the annotation is %s", x.Digest, d)
			}
			compareWithTar(t, b.Data, x, c.round)
			checkTOC(t, x, b.Desc.Size)
			if want := len(c.o.Prioritized) > 0; want != (x.PrefetchEnd > 0) {
				t.Errorf("PrefetchEnd is %d", x.PrefetchEnd)
			}
			for i, name := range c.o.Prioritized {
				// An eStargz writer puts the prioritized files, and what they need, first.
				k := slices.IndexFunc(x.Entries, func(e toc.Entry) bool { return e.Name == name })
				for _, ch := range x.Entries[k].Chunks {
					if ch.BlobOffset >= x.PrefetchEnd {
						t.Errorf("prioritized file %d is at %d, PrefetchEnd is %d", i, ch.BlobOffset, x.PrefetchEnd)
					}
				}
			}
		})
	}
}

// The file was written by containers/storage v1.59.1, pkg/chunked/compressor.
func TestReadContainersStorage(t *testing.T) {
	blob, annotations := containersStorage(t)
	x, err := toc.Read(bytes.NewReader(blob), int64(len(blob)), toc.Options{Annotations: annotations})
	if err != nil {
		t.Fatal(err)
	}
	compareWithTar(t, blob, x, 1)
	checkTOC(t, x, int64(len(blob)))
	var zero, many bool
	for _, e := range x.Entries {
		many = many || len(e.Chunks) > 2
		zero = zero || slices.ContainsFunc(e.Chunks, func(c toc.Chunk) bool { return c.Zero })
	}
	if !zero || !many {
		t.Errorf("the sample has lost its holes (%v) or its files of many chunks (%v)", zero, many)
	}
}

func containersStorage(t testing.TB) (blob []byte, annotations map[string]string) {
	t.Helper()
	blob, err := os.ReadFile("testdata/containers-storage-1.59.1.blob")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("testdata/containers-storage-1.59.1.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, &annotations); err != nil {
		t.Fatal(err)
	}
	return blob, annotations
}

// checkTOC checks what Read promises of every TOC.
func checkTOC(t testing.TB, x *toc.TOC, size int64) {
	t.Helper()
	type span struct{ off, end int64 }
	spans := map[span]bool{}
	for _, e := range x.Entries {
		if e.Type < toc.Dir || e.Type > toc.Fifo || e.Mode&^0o7777 != 0 || e.MtimeNsec > 999_999_999 || e.Size < 0 {
			t.Fatalf("entry %+v", e)
		}
		if !slices.IsSortedFunc(e.Xattrs, func(a, b toc.Xattr) int {
			if a.Name == b.Name {
				return 1
			}
			return strings.Compare(a.Name, b.Name)
		}) {
			t.Fatalf("extended attributes out of order: %+v", e.Xattrs)
		}
		if e.Digest.IsZero() != (e.Size == 0) {
			t.Fatalf("entry %+v", e)
		}
		covered := int64(0)
		for _, c := range e.Chunks {
			if c.FileOffset != covered || c.Size <= 0 {
				t.Fatalf("entry %q: chunk %+v, covered to %d", e.Name, c, covered)
			}
			covered += c.Size
			if c.Zero {
				if c.BlobOffset != 0 || c.BlobEnd != 0 || c.InnerOffset != 0 {
					t.Fatalf("entry %q: hole %+v", e.Name, c)
				}
				continue
			}
			if c.BlobOffset < 0 || c.BlobEnd <= c.BlobOffset || c.BlobEnd > size || c.InnerOffset < 0 || c.Size > toc.MaxChunk || c.Digest.IsZero() {
				t.Fatalf("entry %q: chunk %+v of a blob of %d bytes", e.Name, c, size)
			}
			spans[span{c.BlobOffset, c.BlobEnd}] = true
		}
		if covered != e.Size {
			t.Fatalf("entry %q: %d bytes of %d covered", e.Name, covered, e.Size)
		}
	}
	ordered := slices.SortedFunc(maps.Keys(spans), func(a, b span) int { return int(a.off - b.off) })
	for i := 1; i < len(ordered); i++ {
		if ordered[i-1].end > ordered[i].off {
			t.Fatalf("spans %v and %v overlap", ordered[i-1], ordered[i])
		}
	}
	if x.PrefetchEnd < 0 || x.PrefetchEnd > size {
		t.Fatalf("PrefetchEnd is %d of %d", x.PrefetchEnd, size)
	}
}

// manyFiles is a tar of n small files.
func manyFiles(n int) []byte {
	items := make([]imagetest.Item, 0, n)
	for i := range n {
		items = append(items, imagetest.File(fmt.Sprintf("usr/lib/go/src/package%d/file%d.go", i/40, i), fmt.Sprintf("package p%d", i)))
	}
	return imagetest.Must(imagetest.Tar(items...))
}

// A registry is asked once where it can be, at most twice, and for no byte
// twice.
func TestReadRequests(t *testing.T) {
	large := imagetest.Must(imagetest.Tar(imagetest.Random("large", 3<<20, 1)))
	var dirs []string
	for i := range 2000 {
		dirs = append(dirs, fmt.Sprintf("type:dir name:directory%030d", i))
	}
	long := entriesJSON(strings.Join(dirs, "\n"))
	for _, c := range []struct {
		name    string
		blob    *imagetest.Blob
		reads   int
		atMost  int64 // bytes; 0: the whole blob
		entries int
	}{
		{"small", imagetest.Must(imagetest.EStargz(sample(), imagetest.Options{})), 1, 0, 16},
		{"large file", imagetest.Must(imagetest.EStargz(large, imagetest.Options{Level: 1})), 1, 100_000, 1},
		{"TOC before the tail", &imagetest.Blob{Data: estargzOf(long)}, 2, 0, 2000},
		{"TOC before the tail, zstd", &imagetest.Blob{Data: zstdStored(long)}, 2, 0, 2000},
		{"position known", imagetest.Must(imagetest.ContainersZstdChunked(large, imagetest.Options{})), 1, 10_000, 1},
		{"position known, stargz", imagetest.Must(imagetest.ZstdChunked(large, imagetest.Options{})), 1, 1000, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, size := &countingReader{r: bytes.NewReader(c.blob.Data)}, int64(len(c.blob.Data))
			x, err := toc.Read(r, size, toc.Options{Annotations: c.blob.Desc.Annotations, InsecureTOC: true})
			if err != nil {
				t.Fatal(err)
			}
			if c.atMost == 0 {
				c.atMost = size
			}
			if r.reads != c.reads || r.bytes > c.atMost {
				t.Errorf("%d reads of %d bytes, want %d reads of at most %d", r.reads, r.bytes, c.reads, c.atMost)
			}
			if len(x.Entries) != c.entries {
				t.Errorf("%d entries", len(x.Entries))
			}
		})
	}
}

type failingReader struct{ err error }

func (f failingReader) ReadAt([]byte, int64) (int, error) { return 0, f.err }

func TestReadFails(t *testing.T) {
	lost := errors.New("registry lost")
	if _, err := toc.Read(failingReader{lost}, 1000, toc.Options{}); !errors.Is(err, lost) {
		t.Errorf("got %v", err)
	}
	b := imagetest.Must(imagetest.EStargz(sample(), imagetest.Options{}))
	if _, err := toc.Read(bytes.NewReader(b.Data), b.Desc.Size+1, toc.Options{Annotations: b.Desc.Annotations}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("blob shorter than its descriptor says: got %v", err)
	}
}

func TestNoTOC(t *testing.T) {
	gz := imagetest.Must(imagetest.Gzip(sample())).Data
	es := imagetest.Must(imagetest.EStargz(sample(), imagetest.Options{})).Data
	for name, data := range map[string][]byte{
		"gzip": gz, "tar": sample(), "empty": nil, "one byte": {1}, "46 bytes": es[len(es)-46:], "cut": es[:len(es)-1],
		"zeros": make([]byte, 200_000), "magic alone": []byte("GNUlInUx"), "no frame": append(make([]byte, 64), "GNUlInUx"...),
	} {
		for _, insecure := range []bool{false, true} {
			_, err := toc.Read(bytes.NewReader(data), int64(len(data)), toc.Options{InsecureTOC: insecure})
			if !errors.Is(err, toc.ErrNoTOC) {
				t.Errorf("%s: got %v", name, err)
			}
		}
	}
}

// Everything the manifest promises of the TOC must hold.
func TestPromises(t *testing.T) {
	const (
		tocDigest   = "containerd.io/snapshot/stargz/toc.digest"
		stargz      = "io.containers.zstd-chunked.manifest-"
		containers  = "io.github.containers.zstd-chunked.manifest-"
		otherDigest = "sha256:0000000000000000000000000000000000000000000000000000000000000001"
	)
	blobs := map[string]*imagetest.Blob{
		"e": imagetest.Must(imagetest.EStargz(sample(), imagetest.Options{})),
		"z": imagetest.Must(imagetest.ZstdChunked(sample(), imagetest.Options{})),
		"c": imagetest.Must(imagetest.ContainersZstdChunked(sample(), imagetest.Options{})),
	}
	digestError := func(err error) bool { _, ok := errors.AsType[*toc.DigestError](err); return ok }
	noDigest := func(err error) bool { return errors.Is(err, toc.ErrNoTOCDigest) }
	none := func(err error) bool { return err == nil }
	says := func(s string) func(error) bool {
		return func(err error) bool { return err != nil && strings.Contains(err.Error(), s) }
	}
	for _, c := range []struct {
		name     string
		blob     string
		change   string // "key=value" sets, "key" removes
		insecure bool
		want     func(error) bool
	}{
		{"no digest", "e", tocDigest, false, noDigest},
		{"no digest, insecure", "e", tocDigest, true, none},
		{"another digest", "e", tocDigest + "=" + otherDigest, false, digestError},
		{"another digest, insecure", "e", tocDigest + "=" + otherDigest, true, digestError},
		{"not a digest", "e", tocDigest + "=md5:abc", true, says("sha256:")},
		{"a second digest that is wrong", "e", containers + "checksum=" + otherDigest, false, digestError},
		{"both of stargz's", "z", "", false, none},
		{"stargz's without the compressed one", "z", stargz + "checksum", false, none},
		{"stargz's without the JSON's", "z", tocDigest, false, none},
		{"stargz's with another compressed one", "z", stargz + "checksum=" + otherDigest, false, digestError},
		{"stargz's with another JSON's", "z", tocDigest + "=" + otherDigest, false, digestError},
		{"both dialects, two answers", "z", containers + "checksum=" + otherDigest, false, says("another digest")},
		{"both dialects, two positions", "z", containers + "position=8:1:1:1", false, says("another position")},
		{"containers/storage's", "c", "", false, none},
		{"containers/storage's, no digest", "c", containers + "checksum", false, noDigest},
		{"containers/storage's, no digest, insecure", "c", containers + "checksum", true, none},
		{"containers/storage's, another", "c", containers + "checksum=" + otherDigest, false, digestError},
		{"position of three numbers", "c", containers + "position=1:2:3", false, says("four numbers")},
		{"position with a sign", "c", containers + "position=-1:2:3:1", false, says("invalid syntax")},
		{"position with a huge number", "c", containers + "position=99999999999999999999:2:3:1", false, says("out of range")},
		{"position in the first frame header", "c", containers + "position=7:2:3:1", false, says("no TOC can be")},
		{"position that overflows", "c", containers + "position=18446744073709551615:2:3:1", false, says("no TOC can be")},
		{"position after the end", "c", containers + "position=999999999:2:3:1", false, says("not within")},
		{"TOC of another type", "c", containers + "position=100:2:3:2", false, says("type 2")},
		{"TOC too large", "c", containers + "position=100:999999999999:3:1", false, says("limit")},
		{"TOC too large uncompressed", "c", containers + "position=100:3:999999999999:1", false, says("limit")},
		{"empty TOC", "c", containers + "position=100:0:0:1", false, says("no TOC can be")},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := blobs[c.blob]
			a := maps.Clone(b.Desc.Annotations)
			if key, value, ok := strings.Cut(c.change, "="); ok {
				a[key] = value
			} else {
				delete(a, key)
			}
			_, err := toc.Read(bytes.NewReader(b.Data), b.Desc.Size, toc.Options{Annotations: a, InsecureTOC: c.insecure})
			if !c.want(err) {
				t.Errorf("got %v", err)
			}
		})
	}
}

// 15,000 small files, as in the Go toolchain.
func BenchmarkRead(b *testing.B) {
	tar := manyFiles(15_000)
	for name, write := range map[string]func([]byte, imagetest.Options) (*imagetest.Blob, error){
		"eStargz": imagetest.EStargz, "zstd": imagetest.ZstdChunked, "containers": imagetest.ContainersZstdChunked,
	} {
		blob := imagetest.Must(write(tar, imagetest.Options{Level: 1}))
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if _, err := read(blob); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
