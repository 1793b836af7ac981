package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// layout writes an OCI layout of layers, each given by its items.
func layout(t *testing.T, layers ...[]imagetest.Item) string {
	t.Helper()
	var blobs []*imagetest.Blob
	for i, items := range layers {
		tar := imagetest.Must(imagetest.Tar(items...))
		if i%2 == 0 {
			blobs = append(blobs, imagetest.Must(imagetest.EStargz(tar, imagetest.Options{ChunkSize: 64 << 10})))
		} else {
			blobs = append(blobs, imagetest.Must(imagetest.ContainersZstdChunked(tar, imagetest.Options{})))
		}
	}
	dir := t.TempDir()
	if err := imagetest.Must(imagetest.Image(blobs...)).WriteLayout(dir, "latest"); err != nil {
		t.Fatal(err)
	}
	return "oci:" + dir + ":latest"
}

func twoLayers(t *testing.T) string {
	return layout(t,
		[]imagetest.Item{
			imagetest.Dir("bin"), imagetest.File("bin/sh", "shell", imagetest.Mode(0o755)),
			imagetest.Random("big", 1<<20, 1), imagetest.File("gone", "x"),
			imagetest.File("same1", "the same bytes"), imagetest.Hardlink("bin/link", "bin/sh"),
		},
		[]imagetest.Item{
			imagetest.Whiteout("gone"), imagetest.File("same2", "the same bytes"),
			imagetest.File("etc/conf", "upper", imagetest.Xattr("user.x", "y")), imagetest.Random("big2", 300_000, 2),
		})
}

// files are what twoLayers' tree holds.
func files() map[string]string {
	return map[string]string{
		"bin/sh": "shell", "bin/link": "shell", "same1": "the same bytes", "same2": "the same bytes",
		"etc/conf": "upper", "big": string(imagetest.RandomBytes(1<<20, 1)), "big2": string(imagetest.RandomBytes(300_000, 2)),
	}
}

func checkFiles(t *testing.T, mnt string) {
	t.Helper()
	for path, want := range files() {
		got, err := os.ReadFile(filepath.Join(mnt, path))
		if err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v; want %d", path, len(got), err, len(want))
		}
	}
	if _, err := os.Lstat(filepath.Join(mnt, "gone")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("gone: %v, want ENOENT", err)
	}
}

// eachBackend runs a test with each of the backends.
func eachBackend(t *testing.T, test func(t *testing.T, b Backend)) {
	for _, b := range []Backend{FUSE, Hybrid} {
		t.Run(string(b), func(t *testing.T) { test(t, b) })
	}
}

// start mounts a source until the test ends.
func start(t *testing.T, source string, o Options) (*Mount, string) {
	t.Helper()
	if o.Root == "" {
		o.Root = filepath.Join(t.TempDir(), "root")
	}
	mnt := t.TempDir()
	m, err := Start(t.Context(), source, mnt, o)
	if err != nil {
		t.Fatal(err, "; hint:", hint.Of(err))
	}
	t.Cleanup(func() { end(t, m, mnt) })
	return m, mnt
}

func end(t *testing.T, m *Mount, mnt string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := m.Close(ctx); err != nil {
		t.Error(err)
	}
	for kmount.Unmount(mnt) == nil {
	}
	if _, err := kmount.At(mnt); !errors.Is(err, kmount.ErrNotMounted) {
		t.Errorf("after the end: %v, want ErrNotMounted", err)
	}
}

func waitFor(t *testing.T, m *Mount, s State) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := m.WaitFor(ctx, s); err != nil {
		t.Fatal(err)
	}
}

// inodes maps each path to its inode number as stat(2) gives it.
func inodes(t *testing.T, mnt string) map[string]uint64 {
	t.Helper()
	all := map[string]uint64{}
	err := filepath.WalkDir(mnt, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		fi, err := d.Info()
		if err == nil {
			all[strings.TrimPrefix(path, mnt)] = statIno(fi)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestFourStates(t *testing.T) { eachBackend(t, testFourStates) }

func testFourStates(t *testing.T, backend Backend) {
	source := twoLayers(t)
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Backend: backend, Root: root, Swap: Never, NoFill: true})
	if s := m.Status(); s.State != Lazy || s.Backend != string(backend) || s.FilesLocal != 0 {
		t.Errorf("at first: %+v", s)
	}
	lazy := inodes(t, mnt)
	checkFiles(t, mnt)
	waitFor(t, m, Sealed) // every content was read
	s := m.Status()
	if s.FilesLocal != s.Files || s.BytesLocal != s.Bytes || s.ComposefsDigest == "" {
		t.Errorf("sealed: %+v", s)
	}
	end(t, m, mnt)

	// The same store again: no request is needed, the kernel mounts at once.
	if err := os.RemoveAll(strings.TrimSuffix(strings.TrimPrefix(source, "oci:"), ":latest")); err != nil {
		t.Fatal(err)
	}
	m2, mnt2 := start(t, source, Options{Backend: backend, Root: root})
	if s := m2.Status(); s.State != Swapped || s.Backend != "kernel" {
		t.Errorf("second mount: %+v", s)
	}
	checkFiles(t, mnt2)
	for path, ino := range inodes(t, mnt2) {
		if lazy[path] != ino {
			t.Errorf("%s: inode %d by FUSE, %d by the kernel", path, lazy[path], ino)
		}
	}
}

func TestFillSealSwap(t *testing.T) { eachBackend(t, testFillSealSwap) }

func testFillSealSwap(t *testing.T, backend Backend) {
	m, mnt := start(t, twoLayers(t), Options{Backend: backend})
	waitFor(t, m, Swapped)
	checkFiles(t, mnt)
	info, err := kmount.At(mnt)
	if err != nil || !isSealedMount(info) {
		t.Errorf("At = %+v, %v; want the sealed image", info, err)
	}
	select {
	case <-m.server.Done():
	case <-time.After(10 * time.Second):
		t.Error("FUSE is still served after the swap")
	}
}

// Both images must have each inode at the same place (ARCHITECTURE.md).
func TestSameNIDs(t *testing.T) { eachBackend(t, testSameNIDs) }

func testSameNIDs(t *testing.T, backend Backend) {
	m, _ := start(t, twoLayers(t), Options{Backend: backend, Swap: Never})
	waitFor(t, m, Sealed)
	where := map[string]map[string]uint64{}
	for _, name := range []string{lazyName, sealedName} {
		r, err := erofs.OpenFile(m.image.path(name))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		where[name] = map[string]uint64{}
		if err := r.Walk(func(path string, ino erofs.Inode) error {
			where[name][path] = ino.NID
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	if len(where[lazyName]) < 8 {
		t.Errorf("only %d names", len(where[lazyName]))
	}
	for path, nid := range where[lazyName] {
		if where[sealedName][path] != nid {
			t.Errorf("%s: nid %d lazy, %d sealed", path, nid, where[sealedName][path])
		}
	}
}

func TestPinnedDigest(t *testing.T) { eachBackend(t, testPinnedDigest) }

func testPinnedDigest(t *testing.T, backend Backend) {
	source := twoLayers(t)
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Backend: backend, Root: root, Digest: image.Digest{1}})
	err := m.WaitFor(t.Context(), Sealed)
	if !errors.Is(err, ErrStuck) || !strings.Contains(err.Error(), "--digest wants 0100") {
		t.Errorf("WaitFor = %v, want ErrStuck with both digests", err)
	}
	if s := m.Status(); s.State != Complete || s.Backend != string(backend) {
		t.Errorf("status = %+v", s)
	}
	checkFiles(t, mnt)
	end(t, m, mnt)

	m, mnt = start(t, source, Options{Backend: backend, Root: root, Swap: Never})
	waitFor(t, m, Sealed)
	var right hexDigest
	if err := right.UnmarshalText([]byte(m.Status().ComposefsDigest)); err != nil {
		t.Fatal(err)
	}
	end(t, m, mnt)
	// Now the store knows that it is the wrong one before it is mounted.
	other := t.TempDir()
	if wrong, err := Start(t.Context(), source, other, Options{Backend: backend, Root: root, Digest: image.Digest{1}}); err == nil {
		end(t, wrong, other)
		t.Error("the wrong image was mounted")
	}
	m, _ = start(t, source, Options{Backend: backend, Root: root, Digest: image.Digest(right)})
	if s := m.Status(); s.State != Swapped {
		t.Errorf("with the right digest: %+v", s)
	}
}

// This kernel may or may not have fs-verity; require must hold either way.
func TestVerityRequire(t *testing.T) { eachBackend(t, testVerityRequire) }

func testVerityRequire(t *testing.T, backend Backend) {
	m, mnt := start(t, twoLayers(t), Options{Backend: backend, Verity: Require})
	err := m.WaitFor(t.Context(), Swapped)
	if s := m.Status(); err == nil && s.Verity != "enforced" {
		t.Errorf("swapped with verity %q", s.Verity)
	} else if err != nil && (!errors.Is(err, ErrStuck) || s.Backend != string(backend) || !strings.Contains(s.Note, "--verity require")) {
		t.Errorf("WaitFor = %v; status %+v", err, s)
	}
	checkFiles(t, mnt)
}

// What the store lost is noticed at the next mount, and fetched again.
func TestStateIsRecomputed(t *testing.T) {
	for _, damage := range []struct {
		what string
		do   func(m *Mount) error
	}{
		{"an object is gone", func(m *Mount) error {
			v, err := m.contents.Verity(0)
			if err != nil {
				return err
			}
			return errors.Join(os.Remove(filepath.Join(m.store.Objects(), v.Path())),
				os.Remove(filepath.Join(m.store.ContentsDir(), m.image.index.Content(0).Digest.Path())))
		}},
		{"the sealed image is damaged", func(m *Mount) error {
			f, err := os.OpenFile(m.image.path(sealedName), os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte("damage"), 5000)
			return err
		}},
		{"the record is damaged", func(m *Mount) error {
			return os.WriteFile(m.image.path(recordName), []byte("{"), 0o600)
		}},
		{"the lazy image is gone", func(m *Mount) error { return os.Remove(m.image.path(lazyName)) }},
		{"the index is damaged", func(m *Mount) error {
			return os.WriteFile(m.image.path(chunksName), []byte("noise"), 0o600)
		}},
		{"the manifest is damaged", func(m *Mount) error {
			return os.WriteFile(m.image.path(manifestName), []byte("{}"), 0o600)
		}},
	} {
		t.Run(damage.what, func(t *testing.T) {
			source := twoLayers(t)
			root := filepath.Join(t.TempDir(), "root")
			m, mnt := start(t, source, Options{Root: root, Swap: Never})
			waitFor(t, m, Sealed)
			if err := damage.do(m); err != nil {
				t.Fatal(err)
			}
			end(t, m, mnt)
			m, mnt = start(t, source, Options{Root: root})
			waitFor(t, m, Swapped)
			checkFiles(t, mnt)
		})
	}
}

func TestStartErrors(t *testing.T) {
	good := twoLayers(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	gz := imagetest.Must(imagetest.Gzip([]byte("no tar at all, and longer than nothing")))
	plain := t.TempDir()
	if err := imagetest.Must(imagetest.Image(gz)).WriteLayout(plain, "x"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ name, source, mnt, want, hint string }{
		{"no mount point", good, "/nonexistent/dir", "/nonexistent/dir", "mkdir -p"},
		{"a file", good, file, "not a folder", "mkdir -p"},
		{"no source", "oci:/nonexistent", "", "/nonexistent", ""},
		{"ordinary layer", "oci:" + plain + ":x", "", "layer 0 (" + gz.Desc.Digest.String() + ", " + gz.Desc.MediaType, "layers are tars"},
		{"composefs without objects", "composefs:" + file, "", "no folder of objects", "--objects"},
	} {
		t.Run(c.name, func(t *testing.T) {
			mnt := c.mnt
			if mnt == "" {
				mnt = t.TempDir()
			}
			root := filepath.Join(t.TempDir(), "root")
			m, err := Start(t.Context(), c.source, mnt, Options{Root: root})
			if err == nil {
				end(t, m, mnt)
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), c.want) || !strings.Contains(hint.Of(err), c.hint) {
				t.Errorf("error %q, hint %q; want %q, %q", err, hint.Of(err), c.want, c.hint)
			}
			if _, err := kmount.At(mnt); !errors.Is(err, kmount.ErrNotMounted) {
				t.Errorf("mounted all the same: %v", err)
			}
			if left, _ := filepath.Glob(filepath.Join(root, "images", "*")); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

func TestMountTwice(t *testing.T) { eachBackend(t, testMountTwice) }

func testMountTwice(t *testing.T, backend Backend) {
	source := twoLayers(t)
	_, mnt := start(t, source, Options{Backend: backend, Swap: Never, NoFill: true})
	if m, err := Start(t.Context(), source, mnt, Options{Backend: backend, Root: t.TempDir()}); err == nil {
		m.Close(t.Context())
		t.Error("mounted over itself")
	} else if !strings.Contains(hint.Of(err), "cfs-fuse umount") {
		t.Errorf("error %v, hint %q", err, hint.Of(err))
	}
}

// The same words in another folder, or the same folder with another image, are
// not the image that the store remembers.
func TestLocalSourcesAreAsked(t *testing.T) {
	root := filepath.Join(t.TempDir(), "root")
	a := layout(t, []imagetest.Item{imagetest.File("f", "one")})
	b := layout(t, []imagetest.Item{imagetest.File("f", "two")})
	dir := func(source string) string { return strings.TrimSuffix(strings.TrimPrefix(source, "oci:"), ":latest") }
	for _, c := range []struct{ dir, want string }{{dir(a), "one"}, {dir(b), "two"}} {
		t.Chdir(c.dir)
		m, mnt := start(t, "oci:.:latest", Options{Root: root, Swap: Never})
		if got, err := os.ReadFile(filepath.Join(mnt, "f")); err != nil || string(got) != c.want {
			t.Errorf("in %s: %q, %v; want %q", c.dir, got, err, c.want)
		}
		end(t, m, mnt)
	}
	again := imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.File("f", "three"))), imagetest.Options{}))
	if err := imagetest.Must(imagetest.Image(again)).WriteLayout(dir(b), "latest"); err != nil {
		t.Fatal(err)
	}
	_, mnt := start(t, b, Options{Root: root, Swap: Never})
	if got, err := os.ReadFile(filepath.Join(mnt, "f")); err != nil || string(got) != "three" {
		t.Errorf("rebuilt: %q, %v; want three", got, err)
	}
}

// An image that was taken on trust once is not trusted for ever.
func TestInsecureIsRemembered(t *testing.T) {
	blob := imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.File("f", "x"))), imagetest.Options{}))
	blob.Desc.Annotations = nil
	dir := t.TempDir()
	if err := imagetest.Must(imagetest.Image(blob)).WriteLayout(dir, "latest"); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(t.TempDir(), "root")
	source := "oci:" + dir + ":latest"
	refused := func() {
		t.Helper()
		mnt := t.TempDir()
		m, err := Start(t.Context(), source, mnt, Options{Root: root})
		if err == nil {
			end(t, m, mnt)
			t.Error("mounted without --insecure-toc")
		} else if !strings.Contains(hint.Of(err), "--insecure-toc") {
			t.Errorf("error %v, hint %q", err, hint.Of(err))
		}
	}
	refused()
	m, mnt := start(t, source, Options{Root: root, InsecureTOC: true})
	waitFor(t, m, Swapped)
	end(t, m, mnt)
	refused()
}

// Processes that share an image seal it once, and all swap.
func TestSealTogether(t *testing.T) { eachBackend(t, testSealTogether) }

func testSealTogether(t *testing.T, backend Backend) {
	source := twoLayers(t)
	root := filepath.Join(t.TempDir(), "root")
	var all []*Mount
	for range 4 {
		m, _ := start(t, source, Options{Backend: backend, Root: root})
		all = append(all, m)
	}
	for _, m := range all {
		waitFor(t, m, Swapped)
	}
}

// A mount point is one image's: also after the swap, also through a link.
func TestSwappedIsTaken(t *testing.T) { eachBackend(t, testSwappedIsTaken) }

func testSwappedIsTaken(t *testing.T, backend Backend) {
	source := twoLayers(t)
	m, mnt := start(t, source, Options{Backend: backend})
	waitFor(t, m, Swapped)
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(mnt, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{mnt, link} {
		if second, err := Start(t.Context(), source, path, Options{Backend: backend, Root: t.TempDir()}); err == nil {
			end(t, second, path)
			t.Errorf("%s: mounted over itself", path)
		}
	}
}

// Names that others took out of the folder of objects come back.
func TestMissingObjectName(t *testing.T) {
	source := twoLayers(t)
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Root: root})
	waitFor(t, m, Swapped)
	v, err := m.contents.Verity(0)
	if err != nil {
		t.Fatal(err)
	}
	object := filepath.Join(m.store.Objects(), v.Path())
	end(t, m, mnt)
	if err := os.Remove(object); err != nil {
		t.Fatal(err)
	}
	_, mnt = start(t, source, Options{Root: root})
	checkFiles(t, mnt)
	if _, err := os.Stat(object); err != nil {
		t.Error(err)
	}
}

// An outage is waited out; wrong bytes are not.
func TestFillIsTriedAgain(t *testing.T) { eachBackend(t, testFillIsTriedAgain) }

func testFillIsTriedAgain(t *testing.T, backend Backend) {
	source := twoLayers(t)
	blobs := filepath.Join(strings.TrimSuffix(strings.TrimPrefix(source, "oci:"), ":latest"), "blobs")
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Backend: backend, Root: root, NoFill: true})
	end(t, m, mnt)
	raw, err := os.ReadFile(m.image.path(manifestName))
	if err != nil {
		t.Fatal(err)
	}
	manifest := filepath.Join(blobs, "sha256", hexDigest(m.image.digest).String())
	if err := os.Rename(blobs, blobs+"-away"); err != nil {
		t.Fatal(err)
	}
	// The manifest is there, the layers are not.
	if err := errors.Join(os.MkdirAll(filepath.Dir(manifest), 0o755), os.WriteFile(manifest, raw, 0o644)); err != nil {
		t.Fatal(err)
	}
	m, _ = start(t, source, Options{Backend: backend, Root: root})
	for m.Status().Note == "" {
		time.Sleep(10 * time.Millisecond)
	}
	if s := m.Status(); s.State != Lazy || !strings.Contains(s.Note, "trying again") {
		t.Errorf("without layers: %+v", s)
	}
	if err := errors.Join(os.RemoveAll(blobs), os.Rename(blobs+"-away", blobs)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, m, Swapped)
}

func TestComposefsSource(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha", "b": strings.Repeat("b", 10_000)})
	m, mnt := start(t, "composefs:"+imagePath, Options{Objects: []string{t.TempDir(), objects}})
	for name, want := range map[string]string{"a": "alpha", "b": strings.Repeat("b", 10_000)} {
		if got, err := os.ReadFile(filepath.Join(mnt, name)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	if s := m.Status(); s.State != Complete || s.Backend != "fuse" {
		t.Errorf("status = %+v", s)
	}
	if err := m.WaitFor(t.Context(), Swapped); !errors.Is(err, ErrStuck) {
		t.Errorf("WaitFor = %v, want ErrStuck", err)
	}
}

// With --verity require an object that is not what the image says is not
// given out, also if it changes while it is mounted.
func TestComposefsSourceIsChecked(t *testing.T) {
	imagePath, objects := composefsImage(t, map[string]string{"a": "alpha", "b": strings.Repeat("b", 10_000)})
	m, mnt := start(t, "composefs:"+imagePath, Options{Objects: []string{objects}, Verity: Require})
	if got, err := os.ReadFile(filepath.Join(mnt, "a")); err != nil || string(got) != "alpha" {
		t.Errorf("a = %q, %v", got, err)
	}
	if s := m.Status(); !strings.Contains(s.Verity, "checked") {
		t.Errorf("verity: %s", s.Verity)
	}
	for name := range m.objects.digests {
		f, err := os.OpenFile(filepath.Join(objects, name), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("X"), 2); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	dropPages(t, filepath.Join(mnt, "a"))
	for _, name := range []string{"a", "b"} {
		if got, err := os.ReadFile(filepath.Join(mnt, name)); !errors.Is(err, unix.EIO) {
			t.Errorf("%s, changed: %q, %v; want EIO", name, got, err)
		}
	}
	end(t, m, mnt)

	// A file without a digest cannot be vouched for.
	plain := filepath.Join(t.TempDir(), "plain.erofs")
	root := &erofs.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Children: []*erofs.Node{
		{Name: "f", Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 5, Target: "aa/f"},
	}}
	if err := erofs.WriteFile(plain, root, imageFormat); err != nil {
		t.Fatal(err)
	}
	if m, err := Start(t.Context(), "composefs:"+plain, mnt, Options{Objects: []string{objects}, Verity: Require}); err == nil {
		end(t, m, mnt)
		t.Error("an image without digests was mounted")
	} else if !strings.Contains(err.Error(), "no fs-verity digest") {
		t.Error(err)
	}
}

// What an image has beside objects: long symbolic links, inline files read at
// any place, xattrs of all kinds, and an object from the second folder.
func TestComposefsSourceShowsAll(t *testing.T) {
	inline := strings.Repeat("0123456789abcdef", 250)
	target := strings.Repeat("long/", 800) + "end"
	root := &erofs.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Children: []*erofs.Node{
		{Name: "inline", Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: uint64(len(inline)), Content: []byte(inline), Xattrs: []erofs.Xattr{
			{Name: "user.a", Value: []byte("1")}, {Name: "trusted.b", Value: nil}, {Name: "security.c", Value: []byte{0, 1}},
			{Name: "trusted.overlay.nested", Value: []byte("kept")},
		}},
		{Name: "link", Mode: unix.S_IFLNK | 0o777, Nlink: 1, Size: uint64(len(target)), Target: target},
		{Name: "object", Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: 6, Target: "name-of-any-kind"},
	}}
	imagePath := filepath.Join(t.TempDir(), "x.erofs")
	if err := erofs.WriteFile(imagePath, root, imageFormat); err != nil {
		t.Fatal(err)
	}
	first, second := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(second, "name-of-any-kind"), []byte("second"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, mnt := start(t, "composefs:"+imagePath, Options{Objects: []string{first, second}})
	f, err := os.Open(filepath.Join(mnt, "inline"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range [][2]int{{0, 4000}, {1, 3}, {2047, 2}, {3990, 10}} {
		got := make([]byte, at[1])
		if _, err := f.ReadAt(got, int64(at[0])); err != nil || string(got) != inline[at[0]:at[0]+at[1]] {
			t.Errorf("inline at %v: %q, %v", at, got, err)
		}
	}
	for name, want := range map[string]string{"user.a": "1", "trusted.b": "", "security.c": "\x00\x01", "trusted.overlay.nested": "kept"} {
		buf := make([]byte, 100)
		n, err := unix.Lgetxattr(filepath.Join(mnt, "inline"), name, buf)
		if err != nil || string(buf[:max(n, 0)]) != want {
			t.Errorf("%s = %q, %v; want %q", name, buf[:max(n, 0)], err, want)
		}
	}
	if got, err := os.Readlink(filepath.Join(mnt, "link")); err != nil || got != target {
		t.Errorf("link: %d bytes, %v; want %d", len(got), err, len(target))
	}
	if got, err := os.ReadFile(filepath.Join(mnt, "object")); err != nil || string(got) != "second" {
		t.Errorf("object = %q, %v", got, err)
	}
}

// Once everything is local the kernel reads further ahead through FUSE.
func TestReadsFurther(t *testing.T) {
	m, mnt := start(t, twoLayers(t), Options{Backend: FUSE, Swap: Never, NoFill: true})
	ahead := func() string {
		t.Helper()
		info, err := kmount.At(mnt)
		if err != nil {
			t.Fatal(err)
		}
		kb, err := os.ReadFile("/sys/class/bdi/" + info.Dev + "/read_ahead_kb")
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(kb))
	}
	if got := ahead(); got != "128" {
		t.Errorf("while lazy: %s KiB, want the kernel's 128", got)
	}
	checkFiles(t, mnt)
	waitFor(t, m, Sealed)
	if got := ahead(); got != readahead {
		t.Errorf("everything local: %s KiB, want %s", got, readahead)
	}
}

// The record and the socket are what the other commands see.
func TestControl(t *testing.T) { eachBackend(t, testControl) }

func testControl(t *testing.T, backend Backend) {
	run := filepath.Join(t.TempDir(), "run")
	m, mnt := start(t, twoLayers(t), Options{Backend: backend, Runtime: run})
	c, err := NewControl(m)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m.WaitFor(ctx, Swapped)
	if all, err := List(ctx, run); err != nil || len(all) != 1 || all[0].State != Swapped || all[0].PID != os.Getpid() {
		t.Errorf("List = %+v, %v", all, err)
	}
	<-m.server.Done()
	c.Close()
	s, err := Query(ctx, run, mnt)
	if err != nil || s.State != Swapped || s.PID != 0 || s.Files == 0 {
		t.Errorf("after the process has left: %+v, %v", s, err)
	}
	if err := Await(ctx, run, mnt, Sealed); err != nil {
		t.Error(err)
	}
	held, err := os.Open(mnt)
	if err != nil {
		t.Fatal(err)
	}
	if err := Unmount(ctx, run, mnt); !errors.Is(err, unix.EBUSY) {
		t.Errorf("unmount of what is in use: %v, want EBUSY", err)
	}
	go func() {
		time.Sleep(busyTime / 10)
		held.Close()
	}()
	if err := Unmount(ctx, run, mnt); err != nil {
		t.Errorf("unmount of what was in use for an instant: %v", err)
	}
	if left, _ := os.ReadDir(run); len(left) > 0 {
		t.Errorf("left in the runtime folder: %v", fmt.Sprint(left))
	}
}

// A process that ends late leaves alone what is its successor's.
func TestSuccessor(t *testing.T) { eachBackend(t, testSuccessor) }

func testSuccessor(t *testing.T, backend Backend) {
	run := filepath.Join(t.TempDir(), "run")
	m, mnt := start(t, twoLayers(t), Options{Backend: backend, Runtime: run, Swap: Never, NoFill: true})
	c, err := NewControl(m)
	if err != nil {
		t.Fatal(err)
	}
	files := FilesOf(run, mnt)
	if err := files.save(Status{Mountpoint: mnt, Source: "successor", PID: 1}); err != nil {
		t.Fatal(err)
	}
	c.Close()
	if s, err := files.load(); err != nil || s.Source != "successor" {
		t.Errorf("record = %+v, %v; want the successor's", s, err)
	}
	if _, err := os.Stat(files.Socket); err != nil {
		t.Error(err)
	}
}
