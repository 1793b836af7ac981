package erofs

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

// goldenCase is a line of testdata/composefs/INDEX: a dump and what the C
// mkcomposefs makes of it.
type goldenCase struct {
	name     string
	min, max uint32
	reject   bool
	size     int
	digest   string
}

func goldens(t testing.TB) []goldenCase {
	f, err := os.Open("testdata/composefs/INDEX")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var cases []goldenCase
	for in := bufio.NewScanner(f); in.Scan(); {
		var c goldenCase
		if _, err := fmt.Sscanf(in.Text(), "%s min=%d max=%d size=%d fsverity=%s", &c.name, &c.min, &c.max, &c.size, &c.digest); err != nil {
			if _, err := fmt.Sscanf(in.Text(), "%s min=%d max=%d reject", &c.name, &c.min, &c.max); err != nil {
				t.Fatalf("INDEX: %q: %v", in.Text(), err)
			}
			c.reject = true
		}
		cases = append(cases, c)
	}
	if len(cases) < 60 {
		t.Fatalf("only %d cases in INDEX", len(cases))
	}
	return cases
}

func (c *goldenCase) dump(t testing.TB) []byte {
	f, err := os.Open(filepath.Join("testdata/composefs", c.name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if _, err := b.ReadFrom(z); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// image writes the image of a tree into memory.
func image(t testing.TB, root *Node, o Options) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Write(&b, root, o); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestGolden holds the dump parser and the writer to the C tool's images, by
// size and fs-verity digest.
func TestGolden(t *testing.T) {
	for _, c := range goldens(t) {
		root, err := ParseDump(bytes.NewReader(c.dump(t)))
		h := verity.New(verity.SHA256)
		var b bytes.Buffer
		if err == nil {
			err = Write(&b, root, Options{MinVersion: c.min, MaxVersion: c.max, Tee: h})
		}
		if c.reject {
			if err == nil {
				t.Errorf("%s: accepted, the C tool rejects it", c.name)
			} else {
				t.Logf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		if got := hex.EncodeToString(h.Sum()); b.Len() != c.size || got != c.digest {
			t.Errorf("%s (versions %d to %d): %d bytes, digest %s; want %d, %s", c.name, c.min, c.max, b.Len(), got, c.size, c.digest)
		}
	}
}
