package verity

import (
	"bytes"
	"errors"
	"io"
	"math/rand"
	"testing"
)

// TestParallel holds the parallel digest to the sequential one, around each
// size at which the Merkle tree gets another block or level.
func TestParallel(t *testing.T) {
	data := make([]byte, 65<<20)
	rand.New(rand.NewSource(1)).Read(data)
	for _, alg := range []Algorithm{SHA256, SHA512} {
		step := BlockSize / alg.Size() * BlockSize
		for _, size := range []int{BlockSize + 1, step - 1, step, step + 1, 2*step + 5000,
			step * BlockSize / alg.Size(), step*BlockSize/alg.Size() + 1, len(data)} {
			if size > len(data) {
				continue
			}
			want, err := Digest(bytes.NewReader(data[:size]), alg)
			if err != nil {
				t.Fatal(err)
			}
			got, err := parallelDigest(bytes.NewReader(data[:size]), int64(size), alg, 3)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%v of %d bytes: %x, %v; want %x", alg, size, got, err, want)
			}
			if size > 2*step && size < minParallel {
				continue
			}
			// More than size is there: it does not count.
			got, err = DigestAt(bytes.NewReader(data), int64(size), alg, 2)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("DigestAt: %v of %d bytes: %x, %v; want %x", alg, size, got, err, want)
			}
		}
	}
	for _, size := range []int64{0, 1, BlockSize} {
		want, _ := Digest(bytes.NewReader(data[:size]), SHA256)
		if got, err := DigestAt(bytes.NewReader(data), size, SHA256, 2); err != nil || !bytes.Equal(got, want) {
			t.Errorf("DigestAt of %d bytes: %x, %v; want %x", size, got, err, want)
		}
	}
	for _, size := range []int64{1 << 20, minParallel} {
		if _, err := DigestAt(bytes.NewReader(data[:1000]), size, SHA256, 2); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("a file that is shorter than %d: %v", size, err)
		}
	}
}

func BenchmarkParallel(b *testing.B) {
	data := make([]byte, 256<<20)
	b.SetBytes(int64(len(data)))
	for b.Loop() {
		if _, err := parallelDigest(bytes.NewReader(data), int64(len(data)), SHA256, 2); err != nil {
			b.Fatal(err)
		}
	}
}
