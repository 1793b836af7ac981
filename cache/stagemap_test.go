package cache

import (
	"bytes"
	"errors"
	"math/bits"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image"
)

func someMap(chunks int, bitmap ...byte) *stageMap {
	return &stageMap{
		content: image.Digest{1, 2, 3}, layout: layoutID{4, 5, 6}, boot: bootID{7, 8, 9},
		size: 1 << 33, chunks: chunks, bits: bitmap,
	}
}

func TestStageMap(t *testing.T) {
	for _, tt := range []struct {
		m    *stageMap
		have []int
		left int
	}{
		{someMap(1, 0), nil, 1},
		{someMap(1, 1), nil, 1}, // the last chunk is never believed
		{someMap(2, 3), []int{0}, 1},
		{someMap(3, 4), []int{2}, 2},
		{someMap(8, 0xfe), []int{1, 2, 3, 4, 5, 6, 7}, 1},
		{someMap(8, 0xff), []int{0, 1, 2, 3, 4, 5, 6}, 1},
		{someMap(17, 0x01, 0x80, 0x01), []int{0, 15, 16}, 14},
	} {
		b := tt.m.marshal()
		if int64(len(b)) != mapSize(tt.m.chunks) {
			t.Errorf("%d chunks: %d bytes", tt.m.chunks, len(b))
		}
		m, err := parseMap(b)
		if err != nil {
			t.Errorf("%d chunks: %v", tt.m.chunks, err)
			continue
		}
		if m.content != tt.m.content || m.layout != tt.m.layout || m.boot != tt.m.boot || m.size != tt.m.size || m.chunks != tt.m.chunks {
			t.Errorf("%+v comes back as %+v", tt.m, m)
		}
		have, left := m.believed()
		if left != tt.left {
			t.Errorf("%v: %d left, want %d", tt.m.bits, left, tt.left)
		}
		for k := range tt.m.chunks {
			want := false
			for _, h := range tt.have {
				want = want || h == k
			}
			if have.has(k) != want {
				t.Errorf("%v: chunk %d: %v", tt.m.bits, k, have.has(k))
			}
		}
	}
}

func TestBadStageMaps(t *testing.T) {
	for name, change := range map[string]func(b []byte) []byte{
		"magic":          func(b []byte) []byte { b[0]++; return b },
		"later format":   func(b []byte) []byte { b[13]++; return b },
		"no chunks":      func(b []byte) []byte { b[104] = 0; return b[:mapHeaderSize] },
		"more chunks":    func(b []byte) []byte { b[104] = 200; return b },
		"2^32-1 chunks":  func(b []byte) []byte { copy(b[104:], "\xff\xff\xff\xff"); return b },
		"no bytes":       func(b []byte) []byte { clear(b[96:104]); return b },
		"2^64-1 bytes":   func(b []byte) []byte { copy(b[96:], "\xff\xff\xff\xff\xff\xff\xff\xff"); return b },
		"too few bytes":  func(b []byte) []byte { clear(b[96:104]); b[96] = 9; return b },
		"reserved":       func(b []byte) []byte { b[108] = 1; return b },
		"bits past end":  func(b []byte) []byte { b[len(b)-1] |= 4; return b },
		"short":          func(b []byte) []byte { return b[:len(b)-1] },
		"long":           func(b []byte) []byte { return append(b, 0) },
		"half a header":  func(b []byte) []byte { return b[:50] },
		"nothing at all": func([]byte) []byte { return nil },
	} {
		if m, err := parseMap(change(someMap(10, 0xff, 0x02).marshal())); !errors.Is(err, errBadMap) {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
	}
}

func FuzzStagingMap(f *testing.F) {
	f.Add(someMap(1, 0).marshal())
	f.Add(someMap(10, 0xff, 0x02).marshal())
	f.Add(someMap(64, 1, 2, 3, 4, 5, 6, 7, 8).marshal())
	f.Add([]byte(mapMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseMap(bytes.Clone(b))
		if err != nil {
			return
		}
		if !bytes.Equal(m.marshal(), b) {
			t.Fatalf("%x is read as %+v", b, m)
		}
		have, left := m.believed()
		marked := 0
		for i := range have {
			marked += bits.OnesCount64(have[i].Load())
		}
		if left < 1 || marked+left != m.chunks {
			t.Fatalf("%d chunks: %d marked, %d left", m.chunks, marked, left)
		}
	})
}

// TestLayoutOf holds the worked example of docs/store.md.
func TestLayoutOf(t *testing.T) {
	a, b := cut("a*4096 b*4096 0*8192 c*100"), cut("a*4096 b*4096 0*8192 c*100")
	id := func(c content) layoutID {
		return layoutOf(image.Content{Digest: c.digest, Size: int64(len(c.data)), Chunks: len(c.chunks)},
			func(k int) image.Chunk { return image.Chunk{Chunk: c.chunks[k]} })
	}
	want := id(a)
	for name, change := range map[string]func(){
		"content": func() { b.digest[0]++ },
		"chunk":   func() { b.chunks[1].Digest[0]++ },
		"zero":    func() { b.chunks[1].Zero = true },
		"offset":  func() { b.chunks[1].FileOffset++ },
		"size":    func() { b.chunks[1].Size++ },
		"fewer":   func() { b.chunks = b.chunks[:3] },
	} {
		b = cut("a*4096 b*4096 0*8192 c*100")
		if id(b) != want {
			t.Fatal("not the same layout")
		}
		change()
		if id(b) == want {
			t.Errorf("%s changes, the layout's id does not", name)
		}
	}
	// What only the blob knows of a chunk does not count.
	b = cut("a*4096 b*4096 0*8192 c*100")
	b.chunks[0].BlobOffset, b.chunks[0].BlobEnd, b.chunks[0].InnerOffset = 5, 6, 7
	if id(b) != want {
		t.Error("the place in the blob changes the layout's id")
	}
}
