package imagetest

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func readTar(t *testing.T, b []byte) map[string]string {
	t.Helper()
	files := map[string]string{}
	r := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		} else if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[h.Name] = string(data)
	}
}

func TestTar(t *testing.T) {
	b, err := Tar(
		Dir("d", Mode(0o700)), Dir("e/"), File("d/f", "content", Owner(1, 2), Xattr("user.a", "x\x00y"), Mtime(time.Unix(5, 6))),
		Symlink("s", "d"), Hardlink("h", "d/f"), Char("c", 1, 3), Block("b", 8, 1), Fifo("p"),
		Whiteout("d/gone"), Whiteout("gone/"), Opaque("d"), Opaque(""), Random("r", 10, 1),
	)
	if err != nil {
		t.Fatal(err)
	}
	files := readTar(t, b)
	for _, name := range []string{"d/", "e/", "d/f", "s", "h", "c", "b", "p", "d/.wh.gone", ".wh.gone", "d/.wh..wh..opq", ".wh..wh..opq", "r"} {
		if _, ok := files[name]; !ok {
			t.Errorf("%q is missing", name)
		}
	}
	if files["d/f"] != "content" || files["r"] != string(RandomBytes(10, 1)) || files["r"] == string(RandomBytes(10, 2)) {
		t.Error("contents differ")
	}
	h, err := tar.NewReader(bytes.NewReader(Must(Tar(File("f", "", Xattr("user.a", "x\x00y"), Mtime(time.Unix(5, 6))))))).Next()
	if err != nil || h.PAXRecords["SCHILY.xattr.user.a"] != "x\x00y" || !h.ModTime.Equal(time.Unix(5, 6)) || h.Mode != 0o644 {
		t.Errorf("header %+v, %v", h, err)
	}
	if _, err := Tar(File("a\x00b", "")); err == nil {
		t.Error("a NUL in a name was written")
	}
}

// The blobs decompress to the tar they were made of, and are the same each time.
func TestBlobs(t *testing.T) {
	tarball := Must(Tar(Dir("d"), File("d/f", "hello"), Random("r", 200_000, 1), File("zeros", strings.Repeat("\x00", 10_000))))
	for name, write := range map[string]func([]byte, Options) (*Blob, error){
		"eStargz": EStargz, "zstd:chunked": ZstdChunked, "containers/storage": ContainersZstdChunked,
		"legacy": func(b []byte, o Options) (*Blob, error) { return LegacyFooter(Must(EStargz(b, o))) },
		"gzip":   func(b []byte, o Options) (*Blob, error) { return Gzip(b) },
	} {
		for _, o := range []Options{{}, {ChunkSize: 1000}} {
			b, err := write(tarball, o)
			if err != nil {
				t.Fatal(err)
			}
			if b.Desc.Digest != digest.FromBytes(b.Data) || b.Desc.Size != int64(len(b.Data)) {
				t.Errorf("%s: descriptor %+v", name, b.Desc)
			}
			if again := Must(write(tarball, o)); again.Desc.Digest != b.Desc.Digest {
				t.Errorf("%s: two blobs from one tar", name)
			}
			var content []byte
			if strings.HasSuffix(b.Desc.MediaType, "gzip") {
				content, err = io.ReadAll(Must(new(estargz.GzipDecompressor).Reader(bytes.NewReader(b.Data))))
			} else {
				content, err = io.ReadAll(Must(zstd.NewReader(bytes.NewReader(b.Data))))
			}
			if err != nil {
				t.Fatal(err)
			}
			if b.DiffID != digest.FromBytes(content) && name != "legacy" {
				t.Errorf("%s: DiffID is %s, the tar's digest %s", name, b.DiffID, digest.FromBytes(content))
			}
			got, want := readTar(t, content), readTar(t, tarball)
			for k, v := range want {
				if got[k] != v {
					t.Errorf("%s: file %q differs", name, k)
				}
			}
		}
	}
	if _, err := LegacyFooter(Must(Gzip(tarball))); err == nil {
		t.Error("a legacy footer on an ordinary layer")
	}
	if _, err := EStargz(tarball, Options{Prioritized: []string{"nothing"}}); err == nil {
		t.Error("a prioritized file that is not there was taken")
	}
}

// stargz-snapshotter's own reader reads the legacy footer we write.
func TestLegacyFooter(t *testing.T) {
	b := Must(LegacyFooter(Must(EStargz(Must(Tar(File("f", "hello"))), Options{}))))
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(b.Data), 0, b.Desc.Size))
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := r.Lookup("f"); !ok || r.TOCDigest().String() != b.Desc.Annotations[estargz.TOCJSONDigestAnnotation] {
		t.Error("the TOC differs")
	}
}

func TestImage(t *testing.T) {
	base := Must(EStargz(Must(Tar(File("a", "1"))), Options{}))
	top := Must(ZstdChunked(Must(Tar(File("b", "2"))), Options{}))
	im := Must(Image(base, top))
	other := Must(ImageFor(ocispec.Platform{OS: "linux", Architecture: "riscv64"}, base))
	index := Must(Index(im, other))

	var m ocispec.Manifest
	if err := json.Unmarshal(im.Raw, &m); err != nil || len(m.Layers) != 2 || m.Layers[1].Annotations[estargz.TOCJSONDigestAnnotation] == "" {
		t.Errorf("manifest %s, %v", im.Raw, err)
	}
	var c ocispec.Image
	if err := json.Unmarshal(im.Config, &c); err != nil || len(c.RootFS.DiffIDs) != 2 || c.RootFS.DiffIDs[0] != base.DiffID {
		t.Errorf("config %s, %v", im.Config, err)
	}
	if len(im.Blobs) != 4 || len(index.Blobs) != 7 {
		t.Errorf("%d and %d blobs", len(im.Blobs), len(index.Blobs))
	}
	for d, b := range index.Blobs {
		if d != digest.FromBytes(b) {
			t.Errorf("blob %s is %s", d, digest.FromBytes(b))
		}
	}

	dir := filepath.Join(t.TempDir(), "layout")
	if err := index.WriteLayout(dir, "tag"); err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := index.WriteArchive(&buf, "tag"); err != nil {
		t.Fatal(err)
	}
	archive := readTar(t, buf.Bytes())
	if len(archive) != 9 {
		t.Errorf("%d files in the archive", len(archive))
	}
	for name, want := range archive {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s differs: %v", name, err)
		}
	}
	var root ocispec.Index
	if err := json.Unmarshal([]byte(archive["index.json"]), &root); err != nil || root.Manifests[0].Digest != index.Desc.Digest ||
		root.Manifests[0].Annotations[ocispec.AnnotationRefName] != "tag" {
		t.Errorf("index.json is %s, %v", archive["index.json"], err)
	}
	if err := im.WriteLayout(filepath.Join(dir, "index.json"), ""); err == nil {
		t.Error("a layout was written into a file")
	}
}

func TestMust(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	Must(Tar(File("a\x00b", "")))
}
