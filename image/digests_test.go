package image

import (
	"bytes"
	"errors"
	"testing"
)

// A DigestTable says what the Index of the same bytes says.
func TestDigestTable(t *testing.T) {
	tree, layers := chunkyTree(t)
	b := indexOf(t, tree, layers)
	x, err := OpenIndex(b)
	if err != nil || x.Contents() == 0 {
		t.Fatal(x, err)
	}
	checkTable(t, b, x)
}

// checkTable compares a DigestTable of b with the Index of b.
func checkTable(t testing.TB, b []byte, x *Index) {
	t.Helper()
	d, err := OpenDigests(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		t.Fatal(err)
	}
	if d.Contents() != x.Contents() {
		t.Fatalf("%d contents, want %d", d.Contents(), x.Contents())
	}
	n := 0
	for p := range 256 {
		all, err := d.Prefix(byte(p))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if c != x.Content(n) || int(c.Digest[0]) != p {
				t.Errorf("content %d below %02x: %+v, want %+v", n, p, c, x.Content(n))
			}
			if got, err := d.Content(n); err != nil || got != c {
				t.Errorf("Content(%d) = %+v, %v", n, got, err)
			}
			n++
		}
	}
	if n != x.Contents() {
		t.Errorf("prefixes have %d contents, want %d", n, x.Contents())
	}
	j := 0
	if err := d.EachChunk(func(p Place) bool {
		c := x.Chunk(j)
		if p != (Place{c.Content, c.FileOffset, c.Size, c.Digest}) {
			t.Errorf("chunk %d is %+v, want %+v", j, p, c)
		}
		j++
		return true
	}); err != nil {
		t.Fatal(err)
	}
	for ; j < x.Chunks(); j++ {
		if !x.Chunk(j).Zero {
			t.Errorf("chunk %d was left out", j)
		}
	}
}

// Bytes that are cut or changed are no table.
func TestDigestTableDamaged(t *testing.T) {
	tree, layers := chunkyTree(t)
	b := indexOf(t, tree, layers)
	for i := range b {
		bad := bytes.Clone(b)
		bad[i] ^= 1
		if _, err := OpenDigests(bytes.NewReader(bad), int64(len(bad))); !errors.Is(err, ErrIndex) {
			t.Fatalf("byte %d changed: %v", i, err)
		}
		if _, err := OpenDigests(bytes.NewReader(b[:i]), int64(i)); !errors.Is(err, ErrIndex) {
			t.Fatalf("cut at %d: %v", i, err)
		}
	}
}

// walkTable calls everything of a table of bytes that nobody vouches for.
func walkTable(t testing.TB, b []byte) {
	t.Helper()
	d, err := OpenDigests(bytes.NewReader(b), int64(len(b)))
	if err != nil {
		return
	}
	for p := range 256 {
		if _, err := d.Prefix(byte(p)); err != nil {
			return
		}
	}
	d.EachChunk(func(p Place) bool {
		if _, err := d.Content(p.Content); err != nil {
			t.Fatal(err)
		}
		return true
	})
}
