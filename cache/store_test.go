package cache

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

func TestLayout(t *testing.T) {
	old := syscall.Umask(0o077) // objects are 0644 all the same
	defer syscall.Umask(old)
	dir := filepath.Join(t.TempDir(), "a", "b")
	x := imageOf(t, cut("a*1"), cut("b*2 c*3"), cut("0*5"))
	s := open(t, dir, Options{})
	c := contentsOf(t, s, x)
	putAll(t, c, x)
	wantWhole(t, s, c, x)
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, fi.Mode().String()+" "+e.Name())
	}
	want := []string{
		"-rw------- README", "-rw------- boot", "-rw------- collect.lock", "drwx------ contents", "drwx------ images",
		"drwx------ leases", "drwx------ objects", "drwx------ pins", "drwx------ quarantine", "drwx------ refs",
		"drwx------ staging", "-rw------- synced", "-rw------- version",
	}
	if !slices.Equal(got, want) {
		t.Errorf("layout:\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	for _, dir := range []string{s.Root(), s.Objects(), s.ContentsDir(), s.Images(), s.Refs()} {
		if st := stat(t, dir); st.Mode != syscall.S_IFDIR|0o700 || !filepath.IsAbs(dir) {
			t.Errorf("%s: mode %o", dir, st.Mode)
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "version")); string(b) != "cfs-fuse store 1\n" {
		t.Errorf("version: %q, %v", b, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	tests := []struct {
		name, files string // name:content, space separated; "_" stands for a newline, "/" ends a folder
		want, hint  string // in the error; "" is success
	}{
		{"empty", "", "", ""},
		{"an empty filesystem", "lost+found/", "", ""},
		{"litter of a crashed open", ".tmp-123:cfs-f", "", ""},
		{"only the marker", "version:cfs-fuse*store*1_", "", ""},
		{"somebody's files", "letter:hello", `holds "letter"`, "empty folder"},
		{"somebody's folder", "objects/", `holds "objects"`, "empty folder"},
		{"newer", "version:cfs-fuse*store*2_", "version 2 is newer", "newer one"},
		{"much newer", "version:cfs-fuse*store*2000000000_", "is newer", "newer one"},
		{"older than all", "version:cfs-fuse*store*0_", "not a layout version", "--root"},
		{"negative", "version:cfs-fuse*store*-1_", "not a layout version", "--root"},
		{"no newline", "version:cfs-fuse*store*1", "not a layout version", "--root"},
		{"another program's", "version:1_", "not a layout version", "--root"},
		{"huge", "version:cfs-fuse*store*99999999999999999999_", "not a layout version", "--root"},
		{"empty marker", "version:", "not a layout version", "--root"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for f := range strings.FieldsSeq(tt.files) {
				name, data, _ := strings.Cut(f, ":")
				data = strings.NewReplacer("_", "\n", "*", " ").Replace(data)
				var err error
				if strings.HasSuffix(name, "/") {
					err = os.Mkdir(filepath.Join(dir, name), 0o755)
				} else {
					err = os.WriteFile(filepath.Join(dir, name), []byte(data), 0o644)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			s, err := Open(dir, Options{})
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				s.Close()
				return
			}
			if err == nil {
				s.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.Contains(hint.Of(err), tt.hint) || !strings.Contains(err.Error(), dir) {
				t.Fatalf("error %q, hint %q", err, hint.Of(err))
			}
		})
	}
	t.Run("a file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if s, err := Open(path, Options{}); !errors.Is(err, syscall.ENOTDIR) {
			t.Fatalf("%v, %v", s, err)
		}
	})
}

func TestLitterIsRemoved(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	dead := filepath.Join(dir, "staging", durable.TempPrefix+"dead")
	if err := os.WriteFile(dead, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.noTmpfile = true
	alive, err := s.temp()
	if err != nil {
		t.Fatal(err)
	}
	other := open(t, dir, Options{})
	if got := staged(t, other); len(got) != 1 || got[0] != alive.name {
		t.Fatalf("left: %q", got)
	}
	s.discard(alive)
	if got := staged(t, other); len(got) != 0 {
		t.Fatalf("left: %q", got)
	}
}

// TestLesserFilesystems fills the store where the filesystem cannot do
// something, by the ways round it.
func TestLesserFilesystems(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(*Store)
	}{
		{"no O_TMPFILE", func(s *Store) { s.noTmpfile, s.chmod = true, true }},
		{"no link of a bare descriptor", func(s *Store) { s.linkEmpty = false }},
		{"no extended attributes", func(s *Store) { s.noXattr.Store(true) }},
		{"chmod", func(s *Store) { s.chmod = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			x := imageOf(t, cut("a*1"), cut("b*5000 c*3"), cut("0*5"), cut("d*1 e*1").lying())
			var all []*Contents
			for range 2 {
				s := open(t, dir, Options{})
				tt.set(s)
				all = append(all, contentsOf(t, s, x))
			}
			for j := range x.Chunks() {
				for _, c := range all {
					if err := c.Put(j, x.data(j)); err != nil && !errors.As(err, new(*DigestError)) {
						t.Fatal(err)
					}
				}
			}
			for _, c := range all {
				if p := c.Progress(); p.FilesLocal != 3 {
					t.Fatalf("%+v", p)
				}
				for i := range x.Contents() {
					if c.Whole(i) {
						wantRead(t, c, x, i)
						if _, err := c.Verity(i); err != nil {
							t.Fatal(err)
						}
					}
				}
				c.s.Close()
			}
			if n := check(t, all[0].s); n != 6 || len(staged(t, all[0].s)) != 0 {
				t.Fatalf("%d names; %q in staging", n, staged(t, all[0].s))
			}
		})
	}
}

// overwrite changes a byte of a file and keeps its size and times.
func overwrite(t *testing.T, path string, off int64) {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("!"), off); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, fi.ModTime(), fi.ModTime()); err != nil {
		t.Fatal(err)
	}
}

func TestStagedAfterReboot(t *testing.T) {
	ct := cut("a*5000 b*5000 0*5000 0*5000 e*5000 f*5000")
	x := imageOf(t, ct)
	for _, boot := range []string{"one", "two"} {
		dir := t.TempDir()
		s := open(t, dir, Options{BootID: "one"})
		c := contentsOf(t, s, x)
		for k := range 5 {
			put(t, c, x, x.ContentChunk(0, k))
		}
		s.Close()
		staging := filepath.Join(dir, "staging", stagingName(ct.digest))
		overwrite(t, staging, 5001)  // in b
		overwrite(t, staging, 15001) // in the second zero chunk

		s = open(t, dir, Options{BootID: boot})
		other := open(t, dir, Options{BootID: boot})
		c = contentsOf(t, s, x)
		for k, gone := range []bool{false, true, false, true, false, true} {
			want := gone && boot == "two" || k == 5 // within a boot everything is believed
			if got := c.Missing(x.ContentChunk(0, k)); got != want {
				t.Errorf("boot %s: chunk %d missing: %v", boot, k, got)
			}
		}
		c2 := contentsOf(t, other, x)
		if p, p2 := c.Progress(), c2.Progress(); p != p2 {
			t.Errorf("boot %s: another process sees %+v, not %+v", boot, p2, p)
		}
		if boot == "two" {
			if n := putAll(t, c, x); n != 3 {
				t.Errorf("%d chunks were missing", n)
			}
			wantWhole(t, s, c, x)
			check(t, s)
		}
		s.Close()
		other.Close()
	}
}

func TestObjectsAfterReboot(t *testing.T) {
	names := []string{"durable", "durable damaged", "late", "late damaged", "content only", "content only damaged"}
	var cts []content
	for i := range names {
		cts = append(cts, cut(strings.Repeat("a*5000 ", 1+i)))
	}
	x := imageOf(t, cts...)
	dir := t.TempDir()
	s := open(t, dir, Options{BootID: "one"})
	c := contentsOf(t, s, x)
	fill := func(n int) {
		for k := range cts[n].chunks {
			_, j := x.find(t, cts[n], k)
			put(t, c, x, j)
		}
	}
	fill(0)
	fill(1)
	time.Sleep(20 * time.Millisecond) // more than the file clock's tick
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	for n := 2; n < len(names); n++ {
		fill(n)
	}
	s.Close()
	for n, name := range names {
		path := filepath.Join(s.ContentsDir(), cts[n].digest.Path())
		if strings.Contains(name, "damaged") {
			overwrite(t, path, 4999)
		}
		if strings.HasPrefix(name, "content only") {
			if err := os.Remove(filepath.Join(s.Objects(), cts[n].fsVerity().Path())); err != nil {
				t.Fatal(err)
			}
		}
	}
	unmapped := filepath.Join(dir, "staging", stagingName(cts[0].digest))
	foreign := filepath.Join(s.Objects(), cts[0].fsVerity().Path()+"x")
	for _, path := range []string{unmapped, foreign} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}

	for _, boot := range []string{"one", "two", "two"} {
		s = open(t, dir, Options{BootID: boot})
		c = contentsOf(t, s, x)
		for n, name := range names {
			i, _ := x.find(t, cts[n], 0)
			// What is older than the Sync is not read, so its damage is not
			// found: only that shows that it was not read.
			want := boot == "one" || name != "late damaged" && name != "content only damaged"
			if c.Whole(i) != want {
				t.Errorf("boot %s: %s: whole %v", boot, name, c.Whole(i))
			}
			_, err := os.Lstat(filepath.Join(s.Objects(), cts[n].fsVerity().Path()))
			if want = want && n < 4; (err == nil) != want {
				t.Errorf("boot %s: object of %s: %v", boot, name, err)
			}
		}
		_, err := os.Lstat(unmapped)
		if (err == nil) != (boot == "one") {
			t.Errorf("boot %s: staging file without a map: %v", boot, err)
		}
		if _, err := os.Lstat(foreign); err != nil {
			t.Errorf("boot %s: a file with another name: %v", boot, err)
		}
		s.Close()
	}
	os.Remove(filepath.Join(dir, syncedName)) // nothing is known to be durable
	s = open(t, dir, Options{BootID: "three"})
	c = contentsOf(t, s, x)
	if i, _ := x.find(t, cts[1], 0); c.Whole(i) {
		t.Error("without a stamp the old damage is not found")
	}
}

// TestClockSetBack opens a store whose stamp is in the future.
func TestClockSetBack(t *testing.T) {
	dir := t.TempDir()
	ct := cut("a*100")
	x := imageOf(t, ct)
	s := open(t, dir, Options{BootID: "one"})
	s.Close()
	future := stamp(time.Now().Add(time.Hour))
	if err := os.WriteFile(filepath.Join(dir, syncedName), future.marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, Options{BootID: "one"})
	c := contentsOf(t, s, x)
	time.Sleep(20 * time.Millisecond)
	putAll(t, c, x)
	s.Close()
	overwrite(t, filepath.Join(s.ContentsDir(), ct.digest.Path()), 0)
	s = open(t, dir, Options{BootID: "two"})
	if contentsOf(t, s, x).Whole(0) {
		t.Fatal("a damaged file passes for durable")
	}
}

func TestStamp(t *testing.T) {
	for _, tt := range []struct {
		in   string
		zero bool
	}{
		{"1700000000.000000001\n", false},
		{"1700000000.000000001", false},
		{"", true},
		{"1700000000", true},
		{"1700000000.1\n", true},
		{"x.000000001\n", true},
		{"1.00000000x\n", true},
	} {
		got := time.Time(parseStamp([]byte(tt.in)))
		if got.IsZero() != tt.zero {
			t.Errorf("parseStamp(%q) = %v", tt.in, got)
		}
		if !tt.zero && !bytes.Equal(stamp(got).marshal(), []byte(strings.TrimSuffix(tt.in, "\n")+"\n")) {
			t.Errorf("%q comes back as %q", tt.in, stamp(got).marshal())
		}
	}
}

func TestBootID(t *testing.T) {
	kernel, err := readBootID("")
	if err != nil || kernel == (bootID{}) {
		t.Fatal(kernel, err)
	}
	a, _ := readBootID("a")
	b, _ := readBootID("b")
	if a == b || a == kernel {
		t.Fatal("boot ids do not differ")
	}
}

// TestTakeOver has one image leave a staging file that another image, which
// cuts the content otherwise, takes over.
func TestTakeOver(t *testing.T) {
	dir := t.TempDir()
	one, two := cut("a*5000 a*5000 b*1"), cut("a*10000 b*1")
	x, y := imageOf(t, one), imageOf(t, two)
	s := open(t, dir, Options{})
	put(t, contentsOf(t, s, x), x, x.ContentChunk(0, 0))
	s.Close()
	s = open(t, dir, Options{})
	cy, cx := contentsOf(t, s, y), contentsOf(t, s, x)
	if cy.Progress().BytesLocal != 0 || cx.Progress().BytesLocal != 5000 {
		t.Fatal("layouts are mixed up")
	}
	put(t, cy, y, y.ContentChunk(0, 0))
	s.Close()
	s = open(t, dir, Options{})
	cy, cx = contentsOf(t, s, y), contentsOf(t, s, x)
	if cy.Progress().BytesLocal != 10000 || cx.Progress().BytesLocal != 0 {
		t.Fatalf("layouts are mixed up: %+v, %+v", cy.Progress(), cx.Progress())
	}
	putAll(t, cx, x)
	wantWhole(t, s, cx, x)
	s.Close()
	s = open(t, dir, Options{})
	cy = contentsOf(t, s, y)
	wantWhole(t, s, cy, y)
	if n := staged(t, s); len(n) != 0 {
		t.Fatalf("left in staging: %q", n)
	}
}

// TestUnusableStaging puts things in the way of a staging file.
func TestUnusableStaging(t *testing.T) {
	ct := cut("a*5000 b*5000")
	x := imageOf(t, ct)
	for _, tt := range []struct {
		name string
		do   func(data, mapPath string) error
	}{
		{"empty map", func(_, m string) error { return os.Truncate(m, 0) }},
		{"short map", func(_, m string) error { return os.Truncate(m, 100) }},
		{"long map", func(_, m string) error { return os.Truncate(m, 1000) }},
		{"every chunk marked", func(_, m string) error {
			b, err := os.ReadFile(m)
			b[len(b)-1] = 3
			return errors.Join(err, os.WriteFile(m, b, 0o600))
		}},
		{"no data", func(d, _ string) error { return os.Remove(d) }},
		{"short data", func(d, _ string) error { return os.Truncate(d, 9999) }},
		{"long data", func(d, _ string) error { return os.Truncate(d, 10001) }},
		{"no map", func(_, m string) error { return os.Remove(m) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, Options{})
			put(t, contentsOf(t, s, x), x, x.ContentChunk(0, 0))
			s.Close()
			path := filepath.Join(dir, "staging", stagingName(ct.digest))
			if err := tt.do(path, path+mapSuffix); err != nil {
				t.Fatal(err)
			}
			s = open(t, dir, Options{})
			c := contentsOf(t, s, x)
			if !c.Missing(x.ContentChunk(0, 1)) {
				t.Fatal("the last chunk is not missing")
			}
			putAll(t, c, x)
			wantWhole(t, s, c, x)
			if n := staged(t, s); len(n) != 0 {
				t.Fatalf("left in staging: %q", n)
			}
		})
	}
}
