package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A wrong is an image in which the bytes of two files are exchanged.
type wrong struct {
	contents   map[string][]byte // as the TOC has them
	bad, other string            // the two files
	good       string            // one that is as it should be
}

// wrongDigest writes such an image into an OCI layout, as eStargz: the
// exchanged bytes decompress, and are not what the TOC promises.
func wrongDigest(t *testing.T, layout string) (w wrong) {
	t.Helper()
	rng := rand.NewChaCha8([32]byte{7})
	w.contents = map[string][]byte{}
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for i := range 8 {
		name, text := fmt.Sprintf("file%d", i), make([]byte, 100_000)
		rng.Read(text)
		w.contents[name] = text
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(text))}); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(text); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer.Bytes()), 0, int64(layer.Len())), estargz.WithCompressionLevel(0))
	if err != nil {
		t.Fatal(err)
	}
	blob, err := io.ReadAll(built)
	if err := errors.Join(err, built.Close()); err != nil {
		t.Fatal(err)
	}
	r, err := estargz.Open(io.NewSectionReader(bytes.NewReader(blob), 0, int64(len(blob))))
	if err != nil {
		t.Fatal(err)
	}
	// Without compression most spans have one size; any two of them will do.
	spans := map[int][]string{}
	span := func(name string) []byte {
		e, ok := r.Lookup(name)
		if !ok {
			t.Fatalf("no %s in the TOC", name)
		}
		return blob[e.Offset:e.NextOffset()]
	}
	for _, name := range slices.Sorted(maps.Keys(w.contents)) {
		n := len(span(name))
		spans[n] = append(spans[n], name)
	}
	for _, names := range spans {
		if len(names) >= 3 {
			w.bad, w.other, w.good = names[0], names[1], names[2]
		}
	}
	if w.bad == "" {
		t.Fatalf("no three spans of one size: %v", spans)
	}
	bad, other := span(w.bad), span(w.other)
	kept := bytes.Clone(bad)
	copy(bad, other)
	copy(other, kept)
	desc, err := images.PutBlob(layout, ocispec.MediaTypeImageLayerGzip, bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	desc.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: built.TOCDigest().String()}
	config := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{built.DiffID()}}}
	config.OS, config.Architecture = "linux", "amd64"
	if err := images.WriteImage(layout, "wrong", config, []ocispec.Descriptor{desc}); err != nil {
		t.Fatal(err)
	}
	return w
}

// A chunk with the wrong bytes gives EIO, one line in the log and a metric,
// and nothing of it is kept; what is beside it is served.
func TestWrongDigest(t *testing.T) { eachBackend(t, testWrongDigest) }

func testWrongDigest(t *testing.T, b *bench) {
	layout, dir := filepath.Join(b.dir, "layout"), filepath.Join(b.dir, "registry")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	w := wrongDigest(t, layout)
	own, err := images.StartRegistry(context.Background(), images.RegistryOptions{Storage: filepath.Join(dir, "storage"), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	if err := images.Push(context.Background(), layout, "wrong", own.Addr, "latest"); err != nil {
		t.Fatal(err)
	}
	desc, err := onlyManifest(layout)
	if err != nil {
		t.Fatal(err)
	}
	addr := freeAddr(t)
	point := b.mount("docker://"+own.Addr+"/wrong:latest", "--fill=false", "--metrics", addr)
	if got, err := os.ReadFile(filepath.Join(point, w.good)); err != nil || !bytes.Equal(got, w.contents[w.good]) {
		t.Errorf("good file: %d bytes, %v", len(got), err)
	}
	for range 3 {
		got, err := os.ReadFile(filepath.Join(point, w.bad))
		if !errors.Is(err, unix.EIO) || len(got) != 0 {
			t.Errorf("bad: %d bytes, %v; want EIO", len(got), err)
		}
	}
	s := b.status(point)
	if s.BytesLocal >= s.Bytes || s.State != "lazy" { // what lies beside it may have come with it
		t.Errorf("status after the bad reads: %+v", s)
	}
	if n := metric(t, addr, `cfs_fuse_chunks_failed_total{reason="digest"}`); n < 1 {
		t.Errorf("chunks failed for their digest: %v", n)
	}
	// One line, with image, path, chunk and both digests.
	log, err := os.ReadFile(s.Log)
	if err != nil {
		t.Fatal(err)
	}
	want, got := sha256.Sum256(w.contents[w.bad]), sha256.Sum256(w.contents[w.other])
	var lines []string
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, hex.EncodeToString(want[:])) {
			lines = append(lines, line)
		}
	}
	if len(lines) != 1 {
		t.Errorf("%d lines of the log name the digest, want one:\n%s", len(lines), log)
	}
	for _, word := range []string{desc, w.bad, "chunk=", hex.EncodeToString(got[:])} {
		if len(lines) > 0 && !strings.Contains(lines[0], word) {
			t.Errorf("the log line does not name %q: %s", word, lines[0])
		}
	}
	b.must("umount", point)
	// Neither the bytes that came nor a file of the promised name is kept.
	holds(t, b.root, "good", w.contents[w.good], true)
	holds(t, b.root, "bad", w.contents[w.bad], false)
	holds(t, b.root, "other", w.contents[w.other], false)
}

// onlyManifest returns the digest of the one manifest of a layout.
func onlyManifest(layout string) (string, error) {
	text, err := os.ReadFile(filepath.Join(layout, "index.json"))
	if err != nil {
		return "", err
	}
	var index ocispec.Index
	if err := json.Unmarshal(text, &index); err != nil || len(index.Manifests) != 1 {
		return "", fmt.Errorf("%s: %w", text, err)
	}
	return index.Manifests[0].Digest.String(), nil
}

// holds checks whether any file below root begins with the content, wherever
// its name comes from.
func holds(t *testing.T, root, what string, content []byte, want bool) {
	t.Helper()
	found := ""
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if bytes.Contains(text, content[:4096]) {
			found = path
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if (found != "") != want {
		t.Errorf("store holds %s: %q, want it to: %t", what, found, want)
	}
}

// metric scrapes one sample.
func metric(t *testing.T, addr, sample string) float64 {
	t.Helper()
	for line := range strings.Lines(scrape(t, addr)) {
		if rest, ok := strings.CutPrefix(line, sample+" "); ok {
			var v float64
			if _, err := fmt.Sscan(rest, &v); err != nil {
				t.Fatalf("%q: %v", line, err)
			}
			return v
		}
	}
	t.Errorf("no sample %s", sample)
	return 0
}

func scrape(t *testing.T, addr string) string {
	t.Helper()
	resp, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("metrics: %s, %v", resp.Status, err)
	}
	return string(text)
}

// Nothing can be changed, on FUSE, a hybrid or the kernel's mount: EROFS, whatever
// is tried, and also where another error would do.
func TestReadOnly(t *testing.T) {
	b := newBench(t)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Small
	fuse, hybrid := b.mount(source, "--swap", "never", "--backend", fuseBackend), b.mount(source, "--swap", "never")
	b.waitFor("sealed", fuse)
	b.waitFor("sealed", hybrid)
	kernel := b.mount(source)
	isKernel(t, kernel)
	for backend, point := range map[string]string{"fuse": fuse, "hybrid": hybrid, "kernel": kernel} {
		file, dir, missing := filepath.Join(point, "d00/f01"), filepath.Join(point, "d01"), filepath.Join(point, "d00/none")
		for what, try := range map[string]func() error{
			"open for writing": func() error { _, err := os.OpenFile(file, os.O_WRONLY, 0); return err },
			"open for both":    func() error { _, err := os.OpenFile(file, os.O_RDWR, 0); return err },
			"append":           func() error { _, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0); return err },
			"open truncating":  func() error { _, err := os.OpenFile(file, os.O_WRONLY|os.O_TRUNC, 0); return err },
			"truncate":         func() error { return unix.Truncate(file, 1) },
			"create":           func() error { _, err := os.Create(missing); return err },
			"mkdir":            func() error { return unix.Mkdir(missing, 0o755) },
			"mknod":            func() error { return unix.Mknod(missing, unix.S_IFIFO, 0) },
			"symlink":          func() error { return unix.Symlink("x", missing) },
			"link":             func() error { return unix.Link(file, missing) },
			"rename":           func() error { return unix.Rename(file, missing) },
			"unlink":           func() error { return unix.Unlink(file) },
			"rmdir":            func() error { return unix.Rmdir(dir) },
			"chmod":            func() error { return unix.Chmod(file, 0o600) },
			"chown":            func() error { return unix.Chown(file, 1, 1) },
			"utimes":           func() error { return unix.Utimes(file, []unix.Timeval{{}, {}}) },
			"setxattr":         func() error { return unix.Setxattr(file, "user.x", []byte("1"), 0) },
			"removexattr":      func() error { return unix.Removexattr(filepath.Join(point, "d00/f02"), "user.name") },
		} {
			if err := try(); !errors.Is(err, unix.EROFS) {
				t.Errorf("%s: %s: %v, want EROFS", backend, what, err)
			}
		}
	}
}

// --verity require swaps only to a mount that enforces fs-verity; where the
// kernel or the filesystem has none, the first backend stays and says why.
func TestVerityRequired(t *testing.T) {
	b := newBench(t)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Small
	if hasVerity(t, b.dir) {
		point := b.mount(source, "--verity", "require")
		b.waitFor("swapped", point)
		isKernel(t, point)
		if s := b.status(point); s.Verity != "enforced" {
			t.Errorf("verity: %s, want it enforced: fs-verity works here", s.Verity)
		}
		return
	}
	point := b.mount(source, "--verity", "require")
	b.waitFor("sealed", point)
	b.refused(4, []string{"--verity require", "fs-verity"}, "wait", "--for", "swapped", "--timeout", "30s", point)
	b.isServed(point)
	if s := b.status(point); s.State != "sealed" || s.Backend != b.backend || !strings.Contains(s.Note, "verity") || s.Verity == "enforced" || s.PID == 0 {
		t.Errorf("status: %+v", s)
	}
	if _, err := os.ReadFile(filepath.Join(point, "d00/f01")); err != nil {
		t.Error(err)
	}
	b.must("umount", point)
	noProcess(t, point)

	// Sealed already, the same is true from the start, and without the flag
	// the kernel takes over and says what it does not do.
	b.mountAt(source, point, "--verity", "require")
	b.isServed(point)
	b.refused(4, []string{"--verity require"}, "wait", "--for", "swapped", "--timeout", "30s", point)
	b.must("umount", point)
	b.mountAt(source, point)
	isKernel(t, point)
	if s := b.status(point); !strings.HasPrefix(s.Verity, "not enforced (kernel: ") {
		t.Errorf("verity: %q, want it to say that the kernel enforces nothing", s.Verity)
	}
}

// hasVerity tries fs-verity on a file in dir.
func hasVerity(t *testing.T, dir string) bool {
	t.Helper()
	path := filepath.Join(dir, "verity-probe")
	if err := os.WriteFile(path, []byte("probe"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = verity.Enable(f)
	t.Logf("fs-verity here: %v", err)
	return err == nil
}

// A registry that is not there makes mount fail soon, naming it, and leaves
// nothing behind.
func TestRegistryAbsent(t *testing.T) {
	b := newBench(t)
	addr, point := freeAddr(t), b.point()
	start := time.Now()
	b.refused(1, []string{addr}, "mount", "--plain-http", "--root", b.root, "docker://"+addr+"/none:latest", point)
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("took %v", took)
	}
	if all := mountOn(t, point); len(all) > 0 {
		t.Errorf("mounted: %+v", all)
	}
	noProcess(t, point)
}
