package cache

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/image"
)

func checked(t testing.TB, s *Store, o CheckOptions) (res *Checked, found []Problem) {
	t.Helper()
	o.Report = func(p Problem) { found = append(found, p) }
	res, err := s.Check(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	if res.Problems != len(found) {
		t.Errorf("%d problems, told of %v", res.Problems, found)
	}
	return res, found
}

// Each kind of damage is found, told of with its path, and put out of the way
// or right; a second check finds nothing, and what was lost comes again.
func TestCheckFinds(t *testing.T) {
	for name, c := range map[string]struct {
		damage func(t *testing.T, s *Store, x img)
		path   string // of the problem, its beginning
		what   string
		read   bool // only --read finds it
		lost   int
		again  int // problems that stay
	}{
		"a bit of a file": {func(t *testing.T, s *Store, x img) {
			rot(t, contentPath(s, x, 0), 9)
		}, "contents/sha256/", "its bytes have digest", true, 1, 0},
		"a file cut short": {func(t *testing.T, s *Store, x img) {
			plain(t, contentPath(s, x, 1))
			if err := os.Truncate(contentPath(s, x, 1), 100); err != nil {
				t.Fatal(err)
			}
		}, "contents/sha256/", "100 bytes, image", false, 1, 0},
		"a file emptied": {func(t *testing.T, s *Store, x img) {
			plain(t, contentPath(s, x, 1))
			if err := os.Truncate(contentPath(s, x, 1), 0); err != nil {
				t.Fatal(err)
			}
		}, "", "not empty", false, 0, 0},
		"an object's name lost": {func(t *testing.T, s *Store, x img) {
			if err := os.Remove(objectPath(s, x, 0)); err != nil {
				t.Fatal(err)
			}
		}, "contents/sha256/", "is missing", false, 0, 0},
		"a content under another's name": {func(t *testing.T, s *Store, x img) {
			if err := os.Remove(contentPath(s, x, 0)); err != nil {
				t.Fatal(err)
			}
			if err := os.Link(contentPath(s, x, 1), contentPath(s, x, 0)); err != nil {
				t.Fatal(err)
			}
		}, "contents/sha256/", "bytes", false, 1, 0},
		"an object under another's name": {func(t *testing.T, s *Store, x img) {
			if err := os.Remove(objectPath(s, x, 0)); err != nil {
				t.Fatal(err)
			}
			if err := os.Link(objectPath(s, x, 1), objectPath(s, x, 0)); err != nil {
				t.Fatal(err)
			}
		}, "", "", false, 0, 0},
		"a setuid bit": {func(t *testing.T, s *Store, x img) {
			if err := unix.Chmod(contentPath(s, x, 0), 0o4755); err != nil {
				t.Fatal(err)
			}
		}, "contents/sha256/", "mode 4755", false, 0, 0},
		"a device": {func(t *testing.T, s *Store, x img) {
			path := filepath.Join(s.Objects(), "00", strings.Repeat("0", 62))
			os.Mkdir(filepath.Dir(path), 0o700)
			if err := unix.Mknod(path, unix.S_IFCHR|0o666, 1<<8|3); err != nil {
				t.Fatal(err)
			}
		}, "objects/00/", "regular file", false, 0, 0},
		"a foreign object that is not what it is called": {func(t *testing.T, s *Store, x img) {
			path := filepath.Join(s.Objects(), "00", strings.Repeat("0", 62))
			os.Mkdir(filepath.Dir(path), 0o700)
			if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, "objects/00/", "fs-verity digest", true, 0, 0},
		"the noted digest": {func(t *testing.T, s *Store, x img) {
			plain(t, contentPath(s, x, 0))
			if err := unix.Setxattr(contentPath(s, x, 0), verityXattr, make([]byte, 32), 0); err != nil {
				t.Fatal(err)
			}
		}, "contents/sha256/", "noted fs-verity digest", false, 0, 0},
		"a chunk of a staged file": {func(t *testing.T, s *Store, x img) {
			rot(t, stagedPath(t, s), 4097)
		}, "staging/", "1 chunks are damaged, the first is 1", true, 0, 0},
		"a staged file cut short": {func(t *testing.T, s *Store, x img) {
			if err := os.Truncate(stagedPath(t, s), 5000); err != nil {
				t.Fatal(err)
			}
		}, "staging/", "the file has 5000", false, 0, 0},
		"a map": {func(t *testing.T, s *Store, x img) {
			rot(t, stagedPath(t, s)+mapSuffix, 3)
		}, "staging/", "not a staging map", false, 0, 0},
		"a stray file": {func(t *testing.T, s *Store, x img) {
			for _, name := range []string{"stray", "objects/stray", "contents/sha256/00/stray", "staging/stray", "leases/stray"} {
				os.Mkdir(filepath.Join(s.Root(), "contents/sha256/00"), 0o700)
				if err := os.WriteFile(filepath.Join(s.Root(), name), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
		}, "", "", false, 0, 5},
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t, t.TempDir(), Options{})
			x := imageOf(t, cut("a*5000"), cut("b*6000"), cut("c*7000 d*100"), cut("e*4096 f*4096 g*4096"))
			install(t, s, x, 0)
			cs := contentsOf(t, s, x)
			i, last := x.find(t, cut("e*4096 f*4096 g*4096"), 2)
			for j := range x.Chunks() {
				if j != last {
					put(t, cs, x, j)
				}
			}
			cs.Close()
			s.Close()
			s = open(t, s.Root(), Options{}) // lets go of the map
			c.damage(t, s, x)
			res, found := checked(t, s, CheckOptions{})
			if c.read {
				if len(found) > 0 && c.what != "" {
					t.Fatalf("found without reading: %v", found)
				}
				res, found = checked(t, s, CheckOptions{Read: true})
				if res.BytesRead == 0 {
					t.Error("nothing was read")
				}
			}
			if len(found) == 0 && c.what != "" || len(res.Lost) != c.lost {
				t.Fatalf("found %v, lost %v", found, res.Lost)
			}
			if c.what != "" && (!strings.HasPrefix(found[0].Path, c.path) || !strings.Contains(found[0].What, c.what) || found[0].Done == "") {
				t.Errorf("found %+v", found[0])
			}
			checked(t, s, CheckOptions{Read: true})
			if _, found := checked(t, s, CheckOptions{Read: true}); len(found) != c.again {
				t.Errorf("found again: %v", found)
			}
			if c.again > 0 {
				return
			}
			check(t, s)
			s.emptyAside() // good files may have come there by a wrong name
			cs = contentsOf(t, s, x)
			putAll(t, cs, x)
			wantRead(t, cs, x, i)
			wantWhole(t, s, cs, x)
			if _, found := checked(t, s, CheckOptions{Read: true}); len(found) != 0 {
				t.Errorf("found when it was whole again: %v", found)
			}
		})
	}
}

func contentPath(s *Store, x img, i int) string {
	return filepath.Join(s.ContentsDir(), x.Content(i).Digest.Path())
}

func objectPath(s *Store, x img, i int) string {
	return filepath.Join(s.Objects(), x.by[x.Content(i).Digest].fsVerity().Path())
}

func stagedPath(t testing.TB, s *Store) string {
	t.Helper()
	for _, name := range staged(t, s) {
		if !strings.HasSuffix(name, mapSuffix) {
			return filepath.Join(s.Root(), "staging", name)
		}
	}
	t.Fatal("nothing is staged")
	return ""
}

// Damaged images are moved aside, unless they are in use; where only the sealed
// image is damaged, only that goes.
func TestCheckImages(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	a, b, c := imageOf(t, cut("a*1")), imageOf(t, cut("b*1")), imageOf(t, cut("c*1"))
	da, db, dc := install(t, s, a, time.Hour), install(t, s, b, time.Hour), install(t, s, c, time.Hour)
	l, err := s.Lease(db)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	res, found := checked(t, s, CheckOptions{Image: func(d image.Digest, dir string) []error {
		if dir != s.ImageDir(d) {
			t.Errorf("folder %s", dir)
		}
		if d == dc {
			return []error{ErrSealed}
		}
		return []error{errors.New("broken")}
	}})
	if res.Images != 3 || len(found) != 3 || len(res.LostImages) != 1 || res.LostImages[0] != da {
		t.Errorf("%+v, %v", res, found)
	}
	if exists(s.ImageDir(da)) || !exists(filepath.Join(s.ImageDir(db), RecordName)) || exists(filepath.Join(s.ImageDir(dc), RecordName)) || !exists(filepath.Join(s.ImageDir(dc), LazyName)) {
		t.Error("a must be gone, b be as it was, c be not sealed")
	}
	if aside, err := os.ReadDir(filepath.Join(s.Root(), asideName)); err != nil || len(aside) != 1 {
		t.Errorf("aside: %v, %v", aside, err)
	}
	res2, err := s.Collect(t.Context(), CollectOptions{Unneeded: true})
	if err != nil || res2.Freed == 0 {
		t.Errorf("%+v, %v", res2, err)
	}
}
