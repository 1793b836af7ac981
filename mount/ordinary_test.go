package mount

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/tarindex"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/image/zstdchunked"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// served is an image in a registry of its own.
func served(t *testing.T, layers ...*imagetest.Blob) (*registrytest.Registry, string) {
	t.Helper()
	r, err := registrytest.New(registrytest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r, add(r, "img", layers...)
}

func add(r *registrytest.Registry, name string, layers ...*imagetest.Blob) string {
	im := imagetest.Must(imagetest.Image(layers...))
	for d, b := range im.Blobs {
		r.Add(d, bytes.NewReader(b), int64(len(b)))
	}
	r.AddManifest(name, "x", im.Desc.MediaType, im.Raw)
	return "docker://" + r.Host() + "/" + name + ":x"
}

func plainLayer(mediaType string, data, tar []byte) *imagetest.Blob {
	return &imagetest.Blob{Data: data, DiffID: digest.FromBytes(tar),
		Desc: ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}}
}

// mixed is an image of layers of all kinds, and what it shows.
func mixed() ([]*imagetest.Blob, map[string][]byte) {
	big, mid := imagetest.RandomBytes(9<<20, 1), bytes.Repeat([]byte("compressible "), 500_000)
	tars := [][]byte{
		imagetest.Must(imagetest.Tar(imagetest.Random("big", 9<<20, 1), imagetest.File("hidden", "of the lowest"), imagetest.File("mid", string(mid)), imagetest.Dir("d"), imagetest.File("d/a", "a"))),
		imagetest.Must(imagetest.Tar(imagetest.File("chunked", "of eStargz"), imagetest.Whiteout("hidden"))),
		imagetest.Must(imagetest.Tar(imagetest.File("z", string(mid[:100_000])), imagetest.Hardlink("zz", "z"))),
		imagetest.Must(imagetest.Tar(imagetest.File("plain", "of a tar"), imagetest.Symlink("s", "plain"))),
	}
	z, err := zstd.NewWriter(nil)
	if err != nil {
		panic(err)
	}
	layers := []*imagetest.Blob{
		imagetest.Must(imagetest.Gzip(tars[0])),
		imagetest.Must(imagetest.EStargz(tars[1], imagetest.Options{})),
		plainLayer(ocispec.MediaTypeImageLayerZstd, z.EncodeAll(tars[2], nil), tars[2]),
		plainLayer(ocispec.MediaTypeImageLayer, tars[3], tars[3]),
	}
	return layers, map[string][]byte{
		"big": big, "mid": mid, "d/a": []byte("a"), "chunked": []byte("of eStargz"), "z": mid[:100_000], "zz": mid[:100_000], "plain": []byte("of a tar"), "s": []byte("of a tar"),
	}
}

func checkTree(t *testing.T, mnt string, want map[string][]byte) {
	t.Helper()
	for path, data := range want {
		got, err := os.ReadFile(filepath.Join(mnt, path))
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, want %d: %v", path, len(got), len(data), err)
		}
	}
	if _, err := os.Lstat(filepath.Join(mnt, "hidden")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("hidden: %v", err)
	}
}

// forget empties the store of an image but for its folder.
func forget(t *testing.T, root string) {
	t.Helper()
	for _, dir := range []string{"objects", "contents/sha256", "staging"} {
		names, err := os.ReadDir(filepath.Join(root, dir))
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range names {
			if err := os.RemoveAll(filepath.Join(root, dir, n.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// Layers that are ordinary tars are read once, at the cost of a pull, and the
// image goes through its states as others do. What is evicted later is read by
// the index.
func TestOrdinaryLayers(t *testing.T) {
	layers, want := mixed()
	r, source := served(t, layers...)
	pull := int64(0)
	for _, l := range layers {
		pull += l.Desc.Size
	}
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Root: root})
	checkTree(t, mnt, want)
	waitFor(t, m, Sealed)
	if got := m.Status().Fetched["fill"].Bytes; got < layers[0].Desc.Size || got > pull {
		t.Errorf("%d bytes were read, a pull is %d", got, pull)
	}
	checkTree(t, mnt, want)
	end(t, m, mnt)

	forget(t, root)
	for _, noFill := range []bool{true, false} {
		m, mnt = start(t, source, Options{Root: root, NoFill: noFill, Swap: Never})
		f, err := os.Open(filepath.Join(mnt, "big"))
		if err != nil {
			t.Fatal(err)
		}
		part := make([]byte, 4096)
		if _, err := f.ReadAt(part, 5<<20); err != nil || !bytes.Equal(part, want["big"][5<<20:][:4096]) {
			t.Errorf("4 KiB of big: %v", err)
		}
		f.Close()
		if got := m.Status().BytesLocal; noFill && got > 2*tarindex.MaxSpan {
			t.Errorf("%d bytes are local after a read of 4 KiB", got)
		}
		checkTree(t, mnt, want)
		if !noFill {
			waitFor(t, m, Sealed)
		}
		end(t, m, mnt)
	}

	// Another image of the same layer finds its index in the store.
	before := r.Counts()
	m, mnt = start(t, add(r, "other", layers[0]), Options{Root: root, NoFill: true})
	if got, err := os.ReadFile(filepath.Join(mnt, "hidden")); err != nil || string(got) != "of the lowest" {
		t.Errorf("hidden: %q, %v", got, err)
	}
	waitOther := m.Status().Fetched["fill"].Bytes
	if after := r.Counts(); waitOther > 0 {
		t.Errorf("the layer was read again: %d bytes, %+v after %+v", waitOther, after, before)
	}
}

// A layer whose bytes are wrong leaves nothing mounted.
func TestWrongOrdinaryLayer(t *testing.T) {
	tar := imagetest.Must(imagetest.Tar(imagetest.File("a", "b")))
	gz := imagetest.Must(imagetest.Gzip(tar))
	gz.DiffID = digest.FromString("another tar")
	_, source := served(t, gz)
	mnt := t.TempDir()
	m, err := Start(t.Context(), source, mnt, Options{Root: filepath.Join(t.TempDir(), "root")})
	if err == nil {
		end(t, m, mnt)
		t.Fatal("no error")
	}
	if !strings.Contains(err.Error(), "DiffID") || !strings.Contains(err.Error(), gz.Desc.Digest.String()) {
		t.Error(err)
	}
}

// An index that another has made is believed as far as the DiffID proves it: one
// that lies gives errors, or wrong files, and the image is never sealed.
func TestForeignIndex(t *testing.T) {
	layers, want := mixed()
	_, source := served(t, layers...)
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Root: root})
	waitFor(t, m, Sealed)
	dir := m.image.dir
	end(t, m, mnt)
	d := image.Digest(sha256.Sum256(layers[0].Data))
	own := filepath.Join(dir, indexName(d, ownIndex))
	good, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	reseal := func(b []byte) []byte {
		sum := sha256.Sum256(b[:len(b)-sha256.Size])
		copy(b[len(b)-sha256.Size:], sum[:])
		return b
	}
	points := int(binary.LittleEndian.Uint32(good[96:]))
	windows := int(binary.LittleEndian.Uint32(good[112:]))
	digests := 128 + points*40 + windows
	for name, c := range map[string]struct {
		index  []byte
		sealed bool
	}{
		"true":              {good, true},
		"another DiffID":    {reseal(append(bytes.Clone(good[:56]), append(make([]byte, 32), good[88:]...)...)), true}, // it is passed over
		"a wrong digest":    {reseal(append(bytes.Clone(good[:digests+3]), append([]byte{good[digests+3] ^ 1}, good[digests+4:]...)...)), false},
		"a wrong offset":    {reseal(append(bytes.Clone(good[:128+40]), append([]byte{good[128+40] ^ 1}, good[128+41:]...)...)), false},
		"a wrong state":     {reseal(append(bytes.Clone(good[:128+40+32]), append([]byte{good[128+40+32] ^ 5}, good[128+40+33:]...)...)), false},
		"a false file name": {lyingIndex(t), false},
	} {
		t.Run(name, func(t *testing.T) {
			forget(t, root)
			// The image's folder is made anew by the index.
			os.Remove(own)
			elsewhere := filepath.Join(root, "images", strings.Repeat("0", 64))
			if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(elsewhere, 0o700)); err != nil {
				t.Fatal(err)
			}
			defer os.RemoveAll(elsewhere)
			if err := os.WriteFile(filepath.Join(elsewhere, indexName(d, foreignIndex)), c.index, 0o600); err != nil {
				t.Fatal(err)
			}
			m, mnt := start(t, source, Options{Root: root, Swap: Never, Index: Auto})
			err := m.WaitFor(t.Context(), Sealed)
			if (err == nil) != c.sealed {
				t.Errorf("sealed: %v", err)
			}
			if c.sealed {
				checkTree(t, mnt, want)
			} else if got := m.Status(); got.State >= Sealed || got.Note == "" {
				t.Errorf("%s, %q", got.State, got.Note)
			}
		})
	}
}

// lyingIndex is a true index of another tar that claims to be of the mixed
// image's lowest layer.
func lyingIndex(t *testing.T) []byte {
	layers, _ := mixed()
	tar := imagetest.Must(imagetest.Tar(imagetest.Random("big", 9<<20, 1), imagetest.File("false", "of the lowest"), imagetest.Dir("d"), imagetest.File("d/a", "a")))
	gz := imagetest.Must(imagetest.Gzip(tar))
	x, err := tarindex.Build(t.Context(), bytes.NewReader(gz.Data), tarindex.Layer{Blob: sha256.Sum256(gz.Data), Size: gz.Desc.Size}, nil)
	if err != nil {
		t.Fatal(err)
	}
	b := bytes.Clone(x.Bytes())
	sum := sha256.Sum256(layers[0].Data)
	copy(b[16:], sum[:])
	binary.LittleEndian.PutUint64(b[48:], uint64(layers[0].Desc.Size))
	diffID, err := toc.ParseDigest(layers[0].DiffID.String())
	if err != nil {
		t.Fatal(err)
	}
	copy(b[56:], diffID[:])
	sum = sha256.Sum256(b[:len(b)-32])
	copy(b[len(b)-32:], sum[:])
	return b
}

// verify proves ordinary layers, and zstd:chunked ones as Podman writes them,
// from the stored files, without their blobs.
func TestVerifyFromFiles(t *testing.T) {
	layers, _ := mixed()
	tar := imagetest.Must(imagetest.Tar(imagetest.File("split", "by tar-split"), imagetest.Random("more", 200_000, 5)))
	var blob bytes.Buffer
	res, err := zstdchunked.Write(t.Context(), &blob, bytes.NewReader(tar), 1)
	if err != nil {
		t.Fatal(err)
	}
	chunked := plainLayer(ocispec.MediaTypeImageLayerZstd, blob.Bytes(), tar)
	chunked.Desc.Annotations = res.Annotations
	layers = append(layers, chunked)
	r, source := served(t, layers...)
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Root: root})
	waitFor(t, m, Sealed)
	end(t, m, mnt)
	before := r.Counts().Bytes
	top, err := Verify(t.Context(), source, VerifyOptions{Options: Options{Root: root}})
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Counts().Bytes - before; got > 2<<20 {
		t.Errorf("%d bytes were fetched", got)
	}
	// Layer 0 has a file that another hides, and that was stored all the same;
	// eStargz has nothing to put a tar together from.
	wants(t, top, "DiffID", Proven, Unproven, Proven, Proven, Proven)
	wants(t, top, "table of contents", Proven, Proven, Proven, Proven, Proven)
}
