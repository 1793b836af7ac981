package cache

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

// install gives an image a folder in the store, last used age ago.
func install(t testing.TB, s *Store, x img, age time.Duration) image.Digest {
	t.Helper()
	d := image.Digest(sha256.Sum256(x.raw))
	dir := s.ImageDir(d)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{ChunksName, LazyName, SealedName, RecordName} {
		if err := os.WriteFile(filepath.Join(dir, name), x.raw, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	used := time.Now().Add(-age)
	if err := os.WriteFile(s.leasePath(d), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(s.leasePath(d), used, used); err != nil {
		t.Fatal(err)
	}
	return d
}

// filled installs an image and fills it.
func filled(t testing.TB, s *Store, x img, age time.Duration) image.Digest {
	t.Helper()
	d := install(t, s, x, age)
	c := contentsOf(t, s, x)
	putAll(t, c, x)
	c.Close()
	return d
}

func collect(t testing.TB, s *Store, o CollectOptions) *Collected {
	t.Helper()
	res, err := s.Collect(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	check(t, s)
	return res
}

// localOf returns how many of the image's contents are whole on disk.
func localOf(t testing.TB, s *Store, x img) (n int) {
	t.Helper()
	for i := range x.Contents() {
		if exists(filepath.Join(s.ContentsDir(), x.Content(i).Digest.Path())) {
			n++
		}
	}
	return n
}

// many returns n contents of 10,000 bytes that no other letter has.
func many(letter string, n int) (all []content) {
	for i := range n {
		all = append(all, cut(fmt.Sprintf("%s*%d", letter, 10_000+i)))
	}
	return all
}

// Least recently used images give up their data first, what several images
// need stays until the last of them goes, and in the end the folders go.
func TestEvictionOrder(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	shared := many("s", 10)
	a := imageOf(t, slices.Concat(many("a", 10), shared)...)
	b := imageOf(t, slices.Concat(many("b", 10), shared)...)
	c := imageOf(t, many("c", 10)...)
	da, db, dc := filled(t, s, a, 3*time.Hour), filled(t, s, b, 2*time.Hour), filled(t, s, c, time.Hour)

	if res := collect(t, s, CollectOptions{Unneeded: true}); res.Freed != 0 || res.Contents != 0 {
		t.Fatalf("without a budget: %+v", res)
	}
	u, err := s.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(u.Images) != 3 || u.Images[0].Digest != da.String() || u.Images[2].Digest != dc.String() || u.Contents != 40 {
		t.Fatalf("%+v", u)
	}
	if i := u.Images[0]; i.Exclusive != 10*12288 || i.Local != 20 || i.Files != 20 || i.BytesLocal != i.Bytes || !i.Sealed || i.InUse {
		t.Errorf("image a: %+v", i)
	}

	// One byte too many: a's own data go, not what b needs too.
	res := collect(t, s, CollectOptions{Budget: Budget{Size: u.Total - 1}})
	if !slices.Equal(res.Evicted, []string{da.String()}) || len(res.Removed) != 0 || res.Contents != 10 || res.Over != 0 {
		t.Fatalf("first: %+v", res)
	}
	if localOf(t, s, a) != 10 || localOf(t, s, b) != 20 || localOf(t, s, c) != 10 {
		t.Fatalf("local: %d %d %d", localOf(t, s, a), localOf(t, s, b), localOf(t, s, c))
	}
	if exists(filepath.Join(s.ImageDir(da), RecordName)) || !exists(filepath.Join(s.ImageDir(da), LazyName)) || !exists(filepath.Join(s.ImageDir(db), RecordName)) {
		t.Error("an evicted image must be Lazy, another Sealed")
	}
	after, err := s.Usage(t.Context())
	if err != nil || after.Total != u.Total-res.Freed {
		t.Errorf("total %d, want %d less %d; %v", after.Total, u.Total, res.Freed, err)
	}

	// What c has and the folders take: b's data go, with what a needed too.
	res = collect(t, s, CollectOptions{Budget: Budget{Size: 10*12288 + after.ImageBytes}})
	if !slices.Equal(res.Evicted, []string{da.String(), db.String()}) || len(res.Removed) != 0 || res.Over != 0 {
		t.Fatalf("second: %+v", res)
	}
	if localOf(t, s, a)+localOf(t, s, b) != 0 || localOf(t, s, c) != 10 || len(list(t, s)) != 20 {
		t.Errorf("left: %q", list(t, s))
	}

	// Nearly nothing: c's data go, and then folders, the oldest first.
	res = collect(t, s, CollectOptions{Budget: Budget{Size: u.Images[2].Metadata / 2}})
	if !slices.Equal(res.Evicted, []string{dc.String()}) || !slices.Equal(res.Removed, []string{da.String(), db.String()}) || res.Over != 0 {
		t.Fatalf("third: %+v", res)
	}
	if exists(s.ImageDir(da)) || exists(s.ImageDir(db)) || exists(s.leasePath(da)) || !exists(s.ImageDir(dc)) || len(list(t, s)) != 0 {
		t.Error("a and b must be gone, and c be there")
	}
}

// What is leased, pinned or open anywhere is not touched, and a store that is
// over its budget for it says by how much.
func TestEvictionSparesUsed(t *testing.T) {
	for _, how := range []string{"lease", "pin", "mapped"} {
		t.Run(how, func(t *testing.T) {
			s := open(t, t.TempDir(), Options{})
			x, y := imageOf(t, many("x", 10)...), imageOf(t, many("y", 10)...)
			dx, dy := filled(t, s, x, 2*time.Hour), filled(t, s, y, time.Hour)
			end := func() {}
			switch how {
			case "lease":
				l, err := s.Lease(dx)
				if err != nil {
					t.Fatal(err)
				}
				end = func() { l.Close() }
			case "pin":
				if err := s.Pin(dx); err != nil {
					t.Fatal(err)
				}
				end = func() {
					if err := s.Unpin(dx); err != nil {
						t.Fatal(err)
					}
				}
			case "mapped": // as the kernel keeps a mount's image open
				f, err := os.Open(filepath.Join(s.ImageDir(dx), SealedName))
				if err != nil {
					t.Fatal(err)
				}
				b, err := unix.Mmap(int(f.Fd()), 0, 1, unix.PROT_READ, unix.MAP_SHARED)
				f.Close()
				if err != nil {
					t.Fatal(err)
				}
				end = func() { unix.Munmap(b) }
			}
			res := collect(t, s, CollectOptions{Budget: Budget{Size: 1}})
			if localOf(t, s, x) != 10 || localOf(t, s, y) != 0 || !slices.Equal(res.Removed, []string{dy.String()}) || res.Over < 10*12288 {
				t.Fatalf("%+v; local %d %d", res, localOf(t, s, x), localOf(t, s, y))
			}
			_, err := s.Collect(t.Context(), CollectOptions{Remove: []image.Digest{dx}})
			if !errors.Is(err, ErrInUse) && !errors.Is(err, ErrPinned) {
				t.Errorf("removed: %v", err)
			}
			end()
			res = collect(t, s, CollectOptions{Remove: []image.Digest{dx}})
			if localOf(t, s, x) != 0 || !slices.Equal(res.Removed, []string{dx.String()}) || exists(s.pinPath(dx)) {
				t.Fatalf("after the end: %+v", res)
			}
		})
	}
}

// Removing an image by name takes what only it needs, and leaves what is there
// for nobody.
func TestRemove(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	shared := many("s", 5)
	x, y := imageOf(t, slices.Concat(many("x", 5), shared)...), imageOf(t, slices.Concat(many("y", 5), shared)...)
	dx, dy := filled(t, s, x, 0), filled(t, s, y, time.Hour)
	stray := imageOf(t, many("z", 5)...)
	putAll(t, contentsOf(t, s, stray), stray)
	half := imageOf(t, cut("h*5000 i*5000"), cut("j*5000 k*5000"))
	dh := install(t, s, half, 0)
	c := contentsOf(t, s, half)
	put(t, c, half, 0)
	ref := filepath.Join(s.Refs(), "aa")
	if err := os.WriteFile(ref, []byte(dx.String()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ref+RefSourceSuffix, []byte("docker://x\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if src, err := s.Sources(); err != nil || !slices.Equal(src[dx], []string{"docker://x"}) {
		t.Errorf("sources: %v, %v", src, err)
	}
	if res := collect(t, s, CollectOptions{Remove: []image.Digest{dx}, DryRun: true}); len(res.Removed) != 1 || localOf(t, s, x) != 10 {
		t.Fatalf("dry run: %+v", res)
	}
	collect(t, s, CollectOptions{Remove: []image.Digest{dx}})
	if localOf(t, s, x) != 5 || localOf(t, s, y) != 10 || localOf(t, s, stray) != 5 || exists(ref) || exists(ref+RefSourceSuffix) {
		t.Errorf("local %d %d %d", localOf(t, s, x), localOf(t, s, y), localOf(t, s, stray))
	}
	if _, err := s.Collect(t.Context(), CollectOptions{Remove: []image.Digest{dx}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("again: %v", err)
	}
	if n := len(staged(t, s)); n != 2 {
		t.Fatalf("%d staged", n)
	}
	c.Close()
	s.stages.closeAll() // lets go of the map
	s.stages.closed = false
	collect(t, s, CollectOptions{Remove: []image.Digest{dh, dy}})
	if n := len(staged(t, s)); n != 0 || localOf(t, s, y) != 0 {
		t.Errorf("%d staged, %d local", n, localOf(t, s, y))
	}
	res := collect(t, s, CollectOptions{Unneeded: true})
	if localOf(t, s, stray) != 0 || len(list(t, s)) != 0 || res.Freed == 0 {
		t.Errorf("left: %q", list(t, s))
	}
}

// Objects that other programs put into the folder stay; those that a crash
// left without a content's name go, and objects whose digest is not noted are
// found by their inode.
func TestCollectNameless(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	x := imageOf(t, many("x", 3)...)
	putAll(t, contentsOf(t, s, x), x)
	object := func(i int) string {
		return filepath.Join(s.Objects(), x.by[x.Content(i).Digest].fsVerity().Path())
	}
	os.Remove(filepath.Join(s.ContentsDir(), x.Content(0).Digest.Path())) // the crash: too young to be one
	if err := unix.Removexattr(object(1), verityXattr); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(s.Objects(), "00", strings.Repeat("1", 62))
	os.Mkdir(filepath.Dir(foreign), 0o700)
	if err := os.WriteFile(foreign, []byte("theirs"), 0o644); err != nil {
		t.Fatal(err)
	}
	res, err := s.Collect(t.Context(), CollectOptions{Unneeded: true})
	if err != nil {
		t.Fatal(err)
	}
	if !exists(foreign) || !exists(object(0)) || exists(object(1)) || exists(object(2)) || res.Contents != 2 {
		t.Errorf("%+v; %q", res, list(t, s))
	}
}

// Put keeps to the budget by itself, and says so when it cannot.
func TestBudget(t *testing.T) {
	dir := t.TempDir()
	const size = 40 << 20
	s := open(t, dir, Options{Budget: Budget{Size: size}})
	big := func(letter string) img {
		var all []content
		for i := range 20 {
			all = append(all, cut(fmt.Sprintf("%s*%d", letter, 1<<20+i)), cut(fmt.Sprintf("%s*%d %s*70000", letter, 1000+i, letter)))
		}
		return imageOf(t, all...)
	}
	for i, letter := range []string{"a", "b", "c", "d"} {
		x := big(letter)
		d := install(t, s, x, 0)
		l, err := s.Lease(d)
		if err != nil {
			t.Fatal(err)
		}
		c := contentsOf(t, s, x)
		putAll(t, c, x)
		wantWhole(t, s, c, x)
		u, err := s.Usage(t.Context())
		if err != nil || u.Total > size+2*noteEvery {
			t.Fatalf("image %d: %d bytes, %v", i, u.Total, err)
		}
		if got := s.meter.total.Load() + s.meter.pending.Load(); got < u.Total-2<<20 || got > u.Total+2<<20 {
			t.Errorf("image %d: %d bytes are taken to be there, there are %d", i, got, u.Total)
		}
		c.Close()
		l.Close()
	}
	// Two at once are too many.
	x, y := big("e"), big("f")
	for _, x := range []img{x, y} {
		l, err := s.Lease(install(t, s, x, 0))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
	}
	cx, cy := contentsOf(t, s, x), contentsOf(t, s, y)
	putAll(t, cx, x)
	refused := 0
	for j := range y.Chunks() {
		err := cy.Put(j, y.data(j))
		if cy.Missing(j) != (err != nil) {
			t.Fatalf("chunk %d: %v, missing %v", j, err, cy.Missing(j))
		}
		if err != nil {
			refused++
			if !errors.Is(err, ErrBudget) || !errors.Is(err, unix.ENOSPC) {
				t.Fatal(err)
			}
		}
	}
	if refused == 0 || cy.Progress().FilesLocal == 0 {
		t.Errorf("%d chunks refused, %+v", refused, cy.Progress())
	}
	wantWhole(t, s, cx, x)
}

// rewrite gives an image its folder again, as package mount does.
func rewrite(s *Store, d image.Digest, x img) error {
	tmp, err := os.MkdirTemp(s.Images(), ".tmp-*")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tmp, ChunksName), x.raw, 0o600); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.ImageDir(d)); err != nil {
		return os.RemoveAll(tmp) // it is there
	}
	return nil
}

// Four processes' worth of stores fill, evict and fill again at once; none is
// ever told of a content that is not there, and none loses one it uses.
func TestCollectWhileFilling(t *testing.T) {
	dir := t.TempDir()
	shared := many("s", 30)
	var images []img
	for _, l := range []string{"a", "b", "c", "d"} {
		images = append(images, imageOf(t, slices.Concat(many(l, 30), shared)...))
	}
	first := open(t, dir, Options{})
	var digests []image.Digest
	for _, x := range images {
		digests = append(digests, install(t, first, x, 0))
	}
	var wg sync.WaitGroup
	stop := time.Now().Add(2 * time.Second)
	for n := range 4 {
		wg.Go(func() {
			for round := 0; time.Now().Before(stop) && !t.Failed(); round++ {
				s, err := Open(dir, Options{Budget: Budget{Size: 1 << 20}})
				if err != nil {
					t.Error(err)
					return
				}
				x, d := images[(n+round)%4], digests[(n+round)%4]
				l, err := s.Lease(d)
				if err != nil {
					t.Error(err)
					return
				}
				if err := rewrite(s, d, x); err != nil {
					t.Error(err)
				}
				c, err := s.Contents(x.Index)
				if err != nil {
					t.Error(err)
					return
				}
				for j := range x.Chunks() {
					if c.Missing(j) {
						if err := c.Put(j, x.data(j)); err != nil && !errors.Is(err, ErrBudget) {
							t.Error(err)
						}
					}
				}
				for i := range x.Contents() {
					if !c.Whole(i) {
						continue
					}
					p := make([]byte, x.Content(i).Size)
					if got, err := c.ReadAt(i, p, 0); err != nil || got != len(p) {
						t.Errorf("content %d: %d bytes, %v", i, got, err)
					}
					if _, err := c.Verity(i); err != nil {
						t.Errorf("content %d: %v", i, err)
					}
				}
				l.Close()
				s.Close()
				if _, err := first.Collect(t.Context(), CollectOptions{Budget: Budget{Size: 300 << 10}}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	check(t, first)
}

// A filesystem that others want to use too is left that much room.
func TestBudgetFree(t *testing.T) {
	mnt := newFilesystem(t, "tmpfs", 32)
	const free = 20 << 20
	s := open(t, filepath.Join(mnt, "store"), Options{Budget: Budget{Free: free}})
	big := func(letter string) (all []content) {
		for i := range 60 {
			all = append(all, cut(fmt.Sprintf("%s*%d", letter, 100_000+i)))
		}
		return all
	}
	for _, letter := range []string{"a", "b", "c"} { // any two are too many
		x := imageOf(t, big(letter)...)
		l, err := s.Lease(install(t, s, x, 0))
		if err != nil {
			t.Fatal(err)
		}
		c := contentsOf(t, s, x)
		putAll(t, c, x)
		wantWhole(t, s, c, x)
		c.Close()
		l.Close()
		if got := s.meter.free(); got < free-noteEvery {
			t.Errorf("after %s: %d bytes are free, want %d", letter, got, free)
		}
	}
	if u, err := s.Usage(t.Context()); err != nil || len(u.Images) != 3 || u.ContentBytes > 12<<20 {
		t.Errorf("%+v, %v", u, err)
	}
	if err := os.WriteFile(filepath.Join(mnt, "others"), make([]byte, 15<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	x := imageOf(t, big("d")...)
	l, err := s.Lease(install(t, s, x, 0))
	if err != nil {
		t.Fatal(err)
	}
	c := contentsOf(t, s, x)
	err = nil
	for j := 0; j < x.Chunks() && err == nil; j++ {
		err = c.Put(j, x.data(j))
	}
	if !errors.Is(err, ErrBudget) {
		t.Errorf("others have the room: %v", err)
	}
	if err := s.Room(); !errors.Is(err, ErrBudget) {
		t.Errorf("room: %v", err)
	}
	if err := os.Remove(filepath.Join(mnt, "others")); err != nil {
		t.Fatal(err)
	}
	time.Sleep(fullPause)
	for range 20 { // looking took some time, so it is looked for again later
		if err = s.Room(); err == nil {
			break
		}
		time.Sleep(fullPause / 4)
	}
	if err != nil {
		t.Errorf("there is room again: %v", err)
	}
	putAll(t, c, x)
	wantWhole(t, s, c, x)
	c.Close()
	l.Close()
	s.Close()
}
