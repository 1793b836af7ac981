package composefs

import (
	"bytes"
	"errors"
	"math/rand"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

// TestLargeDigest holds the parallel digest to package verity's, around each
// size at which the Merkle tree gets another block or level.
func TestLargeDigest(t *testing.T) {
	data := make([]byte, 70<<20)
	rand.New(rand.NewSource(1)).Read(data)
	for _, alg := range []verity.Algorithm{verity.SHA256, verity.SHA512} {
		step := verity.BlockSize / alg.Size() * verity.BlockSize
		for _, size := range []int{verity.BlockSize + 1, step - 1, step, step + 1, 2*step + 5000,
			step * verity.BlockSize / alg.Size(), step*verity.BlockSize/alg.Size() + 1, len(data)} {
			if size > len(data) {
				continue
			}
			want, err := verity.Digest(bytes.NewReader(data[:size]), alg)
			if err != nil {
				t.Fatal(err)
			}
			got, err := largeDigest(bytes.NewReader(data[:size]), int64(size), alg, 3)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%v of %d bytes: %x, %v; want %x", alg, size, got, err, want)
			}
		}
	}
	if _, err := largeDigest(bytes.NewReader(data[:1000]), 1<<20, verity.SHA256, 2); !errors.Is(err, errChanged) {
		t.Errorf("a file that became shorter: %v", err)
	}
}

func BenchmarkLargeDigest(b *testing.B) {
	data := make([]byte, 256<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := largeDigest(bytes.NewReader(data), int64(len(data)), verity.SHA256, 2); err != nil {
			b.Fatal(err)
		}
	}
}
