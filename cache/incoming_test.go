package cache

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

func TestIncoming(t *testing.T) {
	s, err := Open(filepath.Join(t.TempDir(), "store"), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	large := bytes.Join([][]byte{bytes.Repeat([]byte("data"), 50_000), make([]byte, 300_000), []byte("end"), make([]byte, 70_000)}, nil)
	check := func(want []byte) {
		t.Helper()
		d := image.Digest(sha256.Sum256(want))
		got, err := os.ReadFile(filepath.Join(s.ContentsDir(), d.Path()))
		if err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, want %d: %v", len(got), len(want), err)
		}
		sum, err := verity.Digest(bytes.NewReader(want), verity.SHA256)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(s.Objects(), image.Digest(sum).Path())); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // a second time it is there
		if err := s.PutContent(sha256.Sum256([]byte("small")), []byte("small")); err != nil {
			t.Fatal(err)
		}
		in, err := s.Incoming()
		if err != nil {
			t.Fatal(err)
		}
		for p := large; len(p) > 0; p = p[min(len(p), 70_001):] {
			if _, err := in.Write(p[:min(len(p), 70_001)]); err != nil {
				t.Fatal(err)
			}
		}
		if err := in.Commit(sha256.Sum256(large)); err != nil {
			t.Fatal(err)
		}
		in.Abort()
	}
	check([]byte("small"))
	check(large)
	in, err := s.Incoming()
	if err != nil {
		t.Fatal(err)
	}
	in.Write([]byte("nothing of this stays"))
	in.Abort()
	if names, _ := os.ReadDir(filepath.Join(s.root, "staging")); len(names) > 0 {
		t.Errorf("%v stays behind", names)
	}
	full, err := Open(filepath.Join(t.TempDir(), "full"), Options{Budget: Budget{Size: 100 << 10}})
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	if in, err = full.Incoming(); err != nil {
		t.Fatal(err)
	}
	in.Write(bytes.Repeat([]byte("x"), 8<<20))
	if err := in.Commit(image.Digest{1}); !errors.Is(err, ErrBudget) {
		t.Errorf("beyond the budget: %v", err)
	}
}
