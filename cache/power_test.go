package cache

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A machine whose power is cut, over and over, runs this test: it finds the
// store as the last cut left it, and fills it until the next. What it prints
// tells whoever cuts what is certain (e2e/power does).
var (
	powerDir     = flag.String("power.dir", "", "`folder` of the store to fill until the power is cut")
	powerCertain = flag.Int("power.certain", 0, "how many contents were reported synced before")
)

func powerImage(t testing.TB) img {
	var contents []content
	for i := range 200 {
		contents = append(contents,
			cut(fmt.Sprintf("a*%d", 1+i*97)),
			cut(fmt.Sprintf("b*%d c*70000 0*5000 d*%d e*1", 1+i, 50000+i)))
	}
	return imageOf(t, contents...)
}

// TestPower checks what is in the store, and goes on filling it. Without a
// folder it does so once, in one of its own, with a boot id that changes in
// place of a power cut.
func TestPower(t *testing.T) {
	x := powerImage(t)
	if *powerDir == "" {
		dir := t.TempDir()
		s := open(t, dir, Options{BootID: "one"})
		n := powerFill(t, s, x, 50)
		s.Close()
		s = open(t, dir, Options{BootID: "two"})
		powerCheck(t, s, x, n)
		return
	}
	dir := *powerDir
	for {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		s := open(t, dir, Options{})
		powerCheck(t, s, x, *powerCertain)
		if t.Failed() {
			return
		}
		fmt.Println("checked")
		powerFill(t, s, x, x.Contents())
		s.Close()
		*powerCertain = 0
		fmt.Println("synced 0") // before the first file goes
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
}

// powerFill fills the contents up to n in order, with chunks of later ones in
// between, and prints how many are certain after each Sync.
func powerFill(t *testing.T, s *Store, x img, n int) int {
	c := contentsOf(t, s, x)
	defer c.Close()
	for i := range n {
		ct := x.Content(i)
		for _, k := range rand.Perm(ct.Chunks) {
			put(t, c, x, x.ContentChunk(i, k))
		}
		if later := i + 1 + rand.IntN(20); later < x.Contents() {
			put(t, c, x, x.ContentChunk(later, 0))
		}
		if i%10 == 9 || i == n-1 {
			if err := s.Sync(); err != nil {
				t.Fatal(err)
			}
			fmt.Printf("synced %d\n", i+1)
		}
	}
	return n
}

// powerCheck looks whether the first certain contents are there, and whether
// everything that is there is right.
func powerCheck(t *testing.T, s *Store, x img, certain int) {
	t.Helper()
	if _, found := checked(t, s, CheckOptions{Read: true}); len(found) > 0 {
		t.Errorf("check: %v", found)
	}
	check(t, s)
	c := contentsOf(t, s, x)
	defer c.Close()
	for i := range x.Contents() {
		if c.Whole(i) {
			wantRead(t, c, x, i)
		} else if i < certain {
			t.Errorf("content %d was synced and is not whole", i)
		}
	}
	for j := range x.Chunks() {
		ch := x.Chunk(j)
		if c.Missing(j) || c.Whole(ch.Content) {
			continue
		}
		want := x.by[x.Content(ch.Content).Digest].data[ch.FileOffset:][:ch.Size]
		got := make([]byte, ch.Size)
		if n, err := c.ReadAt(ch.Content, got, ch.FileOffset); err != nil || string(got[:n]) != string(want) {
			t.Errorf("chunk %d: %d bytes, %v", j, n, err)
		}
	}
	for _, n := range staged(t, s) {
		if strings.HasPrefix(n, ".") {
			t.Errorf("litter: %s", filepath.Join("staging", n))
		}
	}
}
