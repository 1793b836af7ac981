package e2e

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// An image of two halves: 'near', which readers read all the time, and 'far',
// of which most stays in the registry.
type halves struct {
	reference string // a folder with the near half
	far       []string
	contents  map[string][]byte // of the far half
	bytes     int64             // of both
}

const (
	nearFiles, nearSize = 320, 48 << 10
	farFiles, farSize   = 3000, 8 << 10
	folders             = 10
)

// pushHalves builds the image as eStargz and pushes it to a registry.
func pushHalves(t *testing.T, dir, addr string) halves {
	t.Helper()
	h := halves{reference: filepath.Join(dir, "reference"), contents: map[string][]byte{}}
	rng := rand.NewChaCha8([32]byte{6})
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	put := func(name string, size int) []byte {
		text := make([]byte, size)
		rng.Read(text)
		header := tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(size), ModTime: time.Unix(1_700_000_000, 0)}
		if err := tw.WriteHeader(&header); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(text); err != nil {
			t.Fatal(err)
		}
		h.bytes += int64(size)
		return text
	}
	if err := os.Mkdir(h.reference, 0o755); err != nil {
		t.Fatal(err)
	}
	// The far half has a folder of its own, of which the reference knows
	// nothing; readers look at the near half's folders.
	for i := range folders {
		name := fmt.Sprintf("near/d%02d", i)
		for _, d := range []string{"near", name}[min(i, 1):] {
			header := tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755, ModTime: time.Unix(1_700_000_000, 0)}
			if err := tw.WriteHeader(&header); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.MkdirAll(filepath.Join(h.reference, fmt.Sprintf("d%02d", i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for i := range nearFiles {
		name := fmt.Sprintf("d%02d/f%03d", i%folders, i)
		text := put("near/"+name, nearSize)
		path := filepath.Join(h.reference, name)
		if err := os.WriteFile(path, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i := range farFiles {
		name := fmt.Sprintf("far/f%04d", i)
		h.contents[name] = put(name, farSize)
		h.far = append(h.far, name)
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	err := filepath.Walk(h.reference, func(path string, _ os.FileInfo, err error) error {
		return errors.Join(err, os.Chtimes(path, time.Unix(1_700_000_000, 0), time.Unix(1_700_000_000, 0)))
	})
	if err != nil {
		t.Fatal(err)
	}
	built, err := estargz.Build(io.NewSectionReader(bytes.NewReader(layer.Bytes()), 0, int64(layer.Len())), estargz.WithCompressionLevel(0))
	if err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(dir, "halves")
	desc, err := images.PutBlob(layout, ocispec.MediaTypeImageLayerGzip, built)
	if err := errors.Join(err, built.Close()); err != nil {
		t.Fatal(err)
	}
	desc.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: built.TOCDigest().String()}
	config := ocispec.Image{RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{built.DiffID()}}}
	config.OS, config.Architecture = "linux", "amd64"
	if err := images.WriteImage(layout, "halves", config, []ocispec.Descriptor{desc}); err != nil {
		t.Fatal(err)
	}
	if err := images.Push(context.Background(), layout, "halves", addr, "latest"); err != nil {
		t.Fatal(err)
	}
	return h
}

// restartCyclesEnv makes TestKilledUnderReaders a long one.
const restartCyclesEnv = "CFS_FUSE_E2E_RESTARTS"

// A server that is killed under eight readers, over and over, with half of the
// data in the registry, is a pause and no error: for what is read by path,
// through open descriptors and mappings, and for what is being fetched.
func TestKilledUnderReaders(t *testing.T) {
	cycles := map[string]int{fuseBackend: 20, hybridBackend: 10}
	if text := os.Getenv(restartCyclesEnv); text != "" {
		n, err := strconv.Atoi(text)
		if err != nil {
			t.Fatal(err)
		}
		cycles = map[string]int{fuseBackend: n, hybridBackend: n}
	}
	for _, backend := range []string{fuseBackend, hybridBackend} {
		t.Run(backend, func(t *testing.T) { testKilledUnderReaders(t, backend, cycles[backend]) })
	}
}

func testKilledUnderReaders(t *testing.T, backend string, cycles int) {
	b := newBench(t)
	b.backend = backend
	dir := filepath.Join(b.dir, "registry")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	own, err := images.StartRegistry(context.Background(), images.RegistryOptions{Storage: filepath.Join(dir, "storage"), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	h := pushHalves(t, b.dir, own.Addr)
	k := newLink(t, own.Addr, speed{delay: 5 * time.Millisecond})
	point := b.mount("docker://"+k.addr+"/halves:latest", "--fill=false")
	b.isServed(point)

	t.Setenv(coldEnv, "1")
	var workers []*running
	for _, kind := range []string{loadWorker, loadWorker, loadWorker, loadWorker, holdWorker, holdWorker, holdWorker, holdWorker} {
		workers = append(workers, startWorker(t, kind, filepath.Join(point, "near"), h.reference))
	}
	for _, w := range workers {
		if err := w.ready(); err != nil {
			t.Fatal(err)
		}
	}
	far := slices.Clone(h.far)
	rand.Shuffle(len(far), func(i, j int) { far[i], far[j] = far[j], far[i] })
	fetched := make(chan error, 1)
	readFar := func(name string) error {
		got, err := os.ReadFile(filepath.Join(point, name))
		if err == nil && !bytes.Equal(got, h.contents[name]) {
			err = fmt.Errorf("%s: other bytes", name)
		}
		return err
	}
	// A file that was opened while it was not whole is read through FUSE for as
	// long as it is open, with either backend.
	probe, err := os.Open(filepath.Join(point, far[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer probe.Close()
	var pauses []time.Duration
	for i := range cycles {
		s := b.status(point)
		if s.Restarts != i {
			t.Errorf("status says %d restarts after %d", s.Restarts, i)
		}
		time.Sleep(rand.N(100 * time.Millisecond))
		if err := forgetNames(point); err != nil {
			t.Fatal(err)
		}
		go func() { fetched <- readFar(far[(i+1)%farFiles]) }()
		time.Sleep(rand.N(8 * time.Millisecond)) // it is on its way
		start := time.Now()
		if err := unix.Kill(s.PID, unix.SIGKILL); err != nil {
			t.Fatalf("cycle %d: kill %d: %v", i, s.PID, err)
		}
		for !ended(s.PID) {
			time.Sleep(100 * time.Microsecond)
		}
		// Only a successor can answer this.
		unix.Fadvise(int(probe.Fd()), 0, 0, unix.FADV_DONTNEED)
		_, err := probe.ReadAt(make([]byte, farSize), 0)
		pauses = append(pauses, time.Since(start))
		if err := errors.Join(err, <-fetched); err != nil {
			t.Errorf("cycle %d: %v", i, err)
		}
		if t.Failed() {
			break
		}
	}
	ops := 0
	for _, w := range workers {
		r, err := w.stop()
		if err != nil {
			t.Fatal(err)
		}
		ops += r.Ops
		if r.Wrong > 0 {
			t.Errorf("%s worker: %d of %d operations failed or were wrong: %q", w.kind, r.Wrong, r.Ops, r.Errors)
		}
	}
	s := b.status(point)
	slices.Sort(pauses)
	t.Logf("%d kills, %d operations, %d of %d MiB local at the end; pause: median %v, p99 %v, longest %v",
		len(pauses), ops, s.BytesLocal>>20, h.bytes>>20, pauses[len(pauses)/2], pauses[len(pauses)*99/100], pauses[len(pauses)-1])
	if s.State != "lazy" {
		t.Errorf("state %s at the end: nothing was remote any more", s.State)
	}
	probe.Close()
	b.must("umount", point)
	noProcess(t, point)
}

// forgetNames has the kernel forget the names of a mount that nobody uses, by
// reconfiguring it to what it is.
func forgetNames(point string) error {
	ctx, err := unix.Fspick(unix.AT_FDCWD, point, unix.FSPICK_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(ctx)
	return errors.Join(unix.FsconfigSetFlag(ctx, "ro"), unix.FsconfigReconfigure(ctx))
}

// Kills at any point of a mount's life, the swap among them, leave one mount
// in the end, and that the kernel's.
func TestKilledOnTheWay(t *testing.T) {
	const rounds = 8
	for i := range rounds {
		b := newBench(t)
		b.backend = []string{fuseBackend, hybridBackend}[i%2]
		point := b.mount("oci:" + set.Layout(images.EStargz) + ":" + images.Small)
		s := b.status(point)
		time.Sleep(time.Duration(i/2) * 80 * time.Millisecond)
		unix.Kill(s.PID, unix.SIGKILL) // unless it has left
		b.waitFor("swapped", point)
		isKernel(t, point)
		sameTree(t, set.Reference(images.Small), point, treediff.Options{})
		if t.Failed() {
			t.Fatalf("killed in state %s, %v after it", s.State, time.Duration(i/2)*80*time.Millisecond)
		}
	}
}

// A server whose holder dies starts another, which does the same.
func TestHolderKilled(t *testing.T) {
	b := newBench(t)
	b.backend = fuseBackend
	point := b.mount("oci:"+set.Layout(images.EStargz)+":"+images.Small, "--swap", "never")
	before := b.status(point)
	if err := unix.Kill(before.KeeperPID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "another holder", func() bool { return b.status(point).KeeperPID != before.KeeperPID })
	time.Sleep(200 * time.Millisecond) // it has been given everything
	if err := unix.Kill(before.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, "a successor", func() bool { s := b.status(point); return s.PID != 0 && s.PID != before.PID })
	sameTree(t, set.Reference(images.Small), point, treediff.Options{})
	if s := b.status(point); s.Restarts != 1 || s.Keeper != "holder" {
		t.Errorf("status: %+v", s)
	}
	b.must("umount", point)
	noProcess(t, point)
}

// 'upgrade' has another program go on under load, holder included; a program
// that cannot changes nothing.
func TestUpgrade(t *testing.T) {
	b := newBench(t)
	b.backend = fuseBackend
	point := b.mount("oci:"+set.Layout(images.EStargz)+":"+images.Small, "--swap", "never")
	next := filepath.Join(runDir, "cfs-fuse-next")
	text, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(next, text, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv(coldEnv, "1")
	var workers []*running
	for _, kind := range []string{loadWorker, holdWorker} {
		w := startWorker(t, kind, point, set.Reference(images.Small))
		workers = append(workers, w)
		if err := w.ready(); err != nil {
			t.Fatal(err)
		}
	}
	before := b.status(point)
	b.refused(1, []string{"/bin/false", strconv.Itoa(before.PID) + " goes on"}, "upgrade", "--program", "/bin/false", point)
	if s := b.status(point); s.PID != before.PID || s.Restarts != 0 {
		t.Errorf("after an upgrade to nothing: %+v", s)
	}
	for i, program := range []string{next, binary, next, binary} {
		b.must("upgrade", "--program", program)
		s := b.status(point)
		if s.PID == before.PID || s.Restarts != i+1 {
			t.Errorf("upgrade %d: before %+v, after %+v", i, before, s)
		}
		for what, pid := range map[string]int{"server": s.PID, "holder": s.KeeperPID} {
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); exe != program {
				t.Errorf("upgrade %d: the %s runs %s (%v), want %s", i, what, exe, err, program)
			}
		}
		before = s
	}
	for _, w := range workers {
		r, err := w.stop()
		if err != nil {
			t.Fatal(err)
		}
		if r.Wrong > 0 {
			t.Errorf("%s worker: %d of %d operations failed or were wrong: %q", w.kind, r.Wrong, r.Ops, r.Errors)
		}
	}
	b.must("umount", point)
	noProcess(t, point)
}
