package verity

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
)

func TestPieces(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for _, size := range []int{0, 1, 4095, 4096, 4097, 128 * 4096, 129*4096 + 5, 64*4096 - 1, 2_000_000} {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		for _, alg := range []Algorithm{SHA256, SHA512} {
			want, err := Digest(bytes.NewReader(data), alg)
			if err != nil {
				t.Fatal(err)
			}
			p := NewPieces(int64(size), alg)
			var offs []int
			const piece = 5 * BlockSize
			for off := 0; off < size; off += piece {
				offs = append(offs, off)
			}
			rng.Shuffle(len(offs), func(i, j int) { offs[i], offs[j] = offs[j], offs[i] })
			if len(offs) > 0 {
				if _, err := p.Sum(); err == nil {
					t.Error("Sum of an unfinished file: no error")
				}
			}
			var work sync.WaitGroup
			for w := range 3 {
				work.Go(func() {
					for i := w; i < len(offs)*4/3; i += 3 { // some twice
						off := offs[i%len(offs)]
						if _, err := p.WriteAt(data[off:min(size, off+piece)], int64(off)); err != nil {
							t.Error(err)
						}
					}
				})
			}
			work.Wait()
			for _, off := range offs {
				p.WriteAt(data[off:min(size, off+piece)], int64(off))
			}
			got, err := p.Sum()
			if err != nil || !bytes.Equal(got, want) || p.Missing() != -1 {
				t.Errorf("%d bytes, %v: %x, %v; want %x", size, alg, got, err, want)
			}
		}
	}
}

func TestPiecesRefuse(t *testing.T) {
	p := NewPieces(10_000, SHA256)
	for _, c := range []struct {
		off int64
		n   int
	}{{1, 4096}, {0, 100}, {-4096, 4096}, {8192, 1809}, {12288, 0}} {
		if _, err := p.WriteAt(make([]byte, c.n), c.off); !errors.Is(err, ErrUnaligned) {
			t.Errorf("%d bytes at %d: %v, want ErrUnaligned", c.n, c.off, err)
		}
	}
	if _, err := p.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Error(err)
	}
	if off := p.Missing(); off != 4096 {
		t.Errorf("Missing = %d, want 4096", off)
	}
}
