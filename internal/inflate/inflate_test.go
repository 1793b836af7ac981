package inflate

import (
	"bytes"
	"compress/flate"
	stdgzip "compress/gzip"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/klauspost/compress/gzip"
)

// text is n bytes that compress like program text and data do.
func text(n int, seed uint64) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	words := make([][]byte, 2000)
	for i := range words {
		w := make([]byte, 2+r.IntN(12))
		for j := range w {
			w[j] = byte('a' + r.IntN(26))
		}
		words[i] = w
	}
	b := make([]byte, 0, n+100)
	for len(b) < n {
		switch r.IntN(40) {
		case 0:
			b = append(b, make([]byte, r.IntN(600))...)
		case 1:
			for range r.IntN(300) {
				b = append(b, byte(r.Uint32()))
			}
		case 2:
			if len(b) > 1000 {
				at := r.IntN(len(b) - 900)
				b = append(b, b[at:at+r.IntN(900)]...)
			}
		default:
			b = append(b, words[r.IntN(1+r.IntN(len(words)))]...)
			b = append(b, ' ')
		}
	}
	return b[:n]
}

func pack(t testing.TB, level int, data []byte) []byte {
	var b bytes.Buffer
	w, err := stdgzip.NewWriterLevel(&b, level)
	if err == nil {
		_, err = w.Write(data)
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack reads all of z by Next, and checks the cuts.
func unpack(t testing.TB, blob []byte, span int64, wrap func(io.Reader) io.Reader) ([]byte, []*Checkpoint, error) {
	var points []*Checkpoint
	z := NewReader(wrap(bytes.NewReader(blob)), Options{Span: span, Checkpoint: func(c *Checkpoint) { points = append(points, c) }})
	var out []byte
	var cuts []int64
	for {
		p, cut, err := z.Next()
		if cut {
			cuts = append(cuts, int64(len(out)))
		}
		out = append(out, p...)
		if err != nil {
			if err == io.EOF {
				err = nil
			}
			if err == nil && span > 0 {
				for i, c := range cuts {
					if points[i].Out != c {
						t.Fatalf("cut %d at %d, its checkpoint at %d", i, c, points[i].Out)
					}
				}
			}
			return out, points, err
		}
	}
}

func plainly(r io.Reader) io.Reader { return r }

// checkPoints reads each span from its checkpoint, given no more than its
// bytes.
func checkPoints(t testing.TB, blob, want []byte, points []*Checkpoint, span int64) {
	t.Helper()
	z := NewReader(strings.NewReader(""), Options{})
	for i, c := range points {
		in, out := int64(len(blob)), int64(len(want))
		if i+1 < len(points) {
			in, out = points[i+1].In, points[i+1].Out
		}
		if out-c.Out > max(span, minSpan) {
			t.Fatalf("checkpoint %d: %d bytes to the next", i, out-c.Out)
		}
		if err := z.ResetAt(iotest.HalfReader(bytes.NewReader(blob[c.In:in])), c, out-c.Out); err != nil {
			t.Fatalf("checkpoint %d, %+v: %v", i, c, err)
		}
		got, err := io.ReadAll(z)
		if err != nil || !bytes.Equal(got, want[c.Out:out]) {
			t.Fatalf("checkpoint %d of state %d at %d, bit %d: %d bytes, want %d: %v", i, c.State, c.In, c.Bits, len(got), out-c.Out, err)
		}
	}
}

func TestKinds(t *testing.T) {
	data := text(500_000, 1)
	zeros := make([]byte, 3<<20) // blocks of megabytes of output each
	random := make([]byte, 500_000)
	for i := range random {
		random[i] = byte(rand.Uint32())
	}
	cases := map[string]struct{ blob, want []byte }{
		"nothing":      {pack(t, 6, nil), nil},
		"one byte":     {pack(t, 6, []byte("x")), []byte("x")},
		"stored":       {pack(t, flate.NoCompression, data), data},
		"fast":         {pack(t, flate.BestSpeed, data), data},
		"default":      {pack(t, 6, data), data},
		"best":         {pack(t, 9, data), data},
		"Huffman only": {pack(t, flate.HuffmanOnly, data), data},
		"zeros":        {pack(t, 6, zeros), zeros},
		"random":       {pack(t, 6, random), random},
		"members":      {slicesOf(pack(t, 6, data[:300_000]), pack(t, 1, nil), pack(t, 0, data[300_000:400_000]), pack(t, 9, data[400_000:])), data},
		"garbage":      {slicesOf(pack(t, 6, data), []byte("trailing garbage")), data},
		"padding":      {slicesOf(pack(t, 6, data), make([]byte, 5000)), data},
		"a byte more":  {slicesOf(pack(t, 6, data), []byte{0x1f}), data},
		"fields":       {withFields(t, data), data},
		"fixed":        {fixedBlock(t), []byte("aaaaaaaaaa")},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			for _, span := range []int64{minSpan, 200_000} {
				for _, wrap := range []func(io.Reader) io.Reader{plainly, iotest.HalfReader} {
					got, points, err := unpack(t, c.blob, span, wrap)
					if err != nil || !bytes.Equal(got, c.want) {
						t.Fatalf("span %d: %d bytes, want %d: %v", span, len(got), len(c.want), err)
					}
					checkPoints(t, c.blob, c.want, points, span)
				}
			}
			for cut := 1; cut < len(c.blob) && !strings.Contains("garbage padding a byte more members", name); cut += 1 + len(c.blob)/8 {
				if _, _, err := unpack(t, c.blob[:cut], minSpan, plainly); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Fatalf("cut at %d of %d: %v", cut, len(c.blob), err)
				}
			}
		})
	}
}

func slicesOf(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func withFields(t *testing.T, data []byte) []byte {
	var b bytes.Buffer
	w := stdgzip.NewWriter(&b)
	w.Name, w.Comment, w.Extra = "layer.tar", "a comment", bytes.Repeat([]byte("SG"), 400)
	w.Write(data)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// fixedBlock is a member with a block of fixed codes, whose distance codes
// compress/flate uses for short inputs only.
func fixedBlock(t *testing.T) []byte {
	b := pack(t, 9, []byte("aaaaaaaaaa"))
	if b[10]>>1&3 != 1 {
		t.Fatalf("block of type %d", b[10]>>1&3)
	}
	return b
}

// The files were made of testdata/plain by other tools (testdata/README).
func TestOtherTools(t *testing.T) {
	want, err := os.ReadFile("testdata/plain")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("testdata/*.gz")
	if err != nil || len(files) < 6 {
		t.Fatalf("%d files: %v", len(files), err)
	}
	for _, file := range files {
		blob, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		got, points, err := unpack(t, blob, minSpan, plainly)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: %d bytes, want %d: %v", file, len(got), len(want), err)
			continue
		}
		checkPoints(t, blob, want, points, minSpan)
	}
}

func TestWrong(t *testing.T) {
	good := pack(t, 6, text(100_000, 2))
	bad := func(at int, with byte) []byte {
		b := bytes.Clone(good)
		b[(at+len(b))%len(b)] ^= with
		return b
	}
	for name, c := range map[string]struct {
		blob []byte
		want error
	}{
		"magic":    {bad(0, 1), ErrCorrupt},
		"method":   {bad(2, 1), ErrCorrupt},
		"checksum": {bad(-8, 1), ErrChecksum},
		"length":   {bad(-1, 1), ErrChecksum},
		"nothing":  {nil, io.ErrUnexpectedEOF},
		"member":   {slicesOf(good, []byte{0x1f, 0x8b, 7, 0, 0, 0, 0, 0, 0, 0}), ErrCorrupt},
		"reserved": {slicesOf(good[:10], []byte{7, 0, 0, 0}), ErrCorrupt},
		"far":      {slicesOf(good[:10], []byte{0x03 | 0x04<<3, 0x3f, 0x7f, 0, 0, 0, 0, 0, 0, 0}), nil},
	} {
		_, _, err := unpack(t, c.blob, minSpan, plainly)
		if err == nil || c.want != nil && !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
	z := NewReader(bytes.NewReader(pack(t, 9, make([]byte, 4<<20))), Options{MaxOutput: 1 << 20})
	n, err := io.Copy(io.Discard, struct{ io.Reader }{z})
	if !errors.Is(err, ErrTooLarge) || n > 1<<20 {
		t.Errorf("a bomb: %d bytes, %v", n, err)
	}
	broken := errors.New("the line is dead")
	z = NewReader(io.MultiReader(bytes.NewReader(good[:5000]), iotest.ErrReader(broken)), Options{})
	if _, err := io.Copy(io.Discard, struct{ io.Reader }{z}); !errors.Is(err, broken) {
		t.Errorf("an error of the reader came back as %v", err)
	}
}

// Windows hold little of what compresses well: most of it nobody refers to.
func TestSparseWindows(t *testing.T) {
	data := text(2<<20, 3)
	blob := pack(t, 6, data)
	_, points, err := unpack(t, blob, 200_000, plainly)
	if err != nil {
		t.Fatal(err)
	}
	kept, all := 0, 0
	for _, c := range points {
		all += len(c.Window)
		for _, b := range c.Window {
			if b != 0 {
				kept++
			}
		}
	}
	t.Logf("%d checkpoints; %d of %d bytes of windows are kept", len(points), kept, all)
	if len(points) < 8 || kept == 0 || kept > all*9/10 {
		t.Errorf("%d checkpoints; %d of %d bytes of windows are kept", len(points), kept, all)
	}
}

// A checkpoint of an index that lies: it fails, or gives wrong bytes, and no
// more than was asked for.
func TestHostileCheckpoints(t *testing.T) {
	data := text(1<<20, 4)
	blob := pack(t, 6, data)
	_, points, err := unpack(t, blob, minSpan, plainly)
	if err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(5, 5))
	z := NewReader(strings.NewReader(""), Options{})
	for range 500 {
		c := *points[r.IntN(len(points))]
		c.Lengths = bytes.Clone(c.Lengths)
		switch r.IntN(6) {
		case 0:
			c.In = r.Int64N(int64(len(blob)))
		case 1:
			c.Bits, c.Byte = uint8(r.IntN(10)), uint8(r.Uint32())
		case 2:
			c.State = State(r.IntN(9))
		case 3:
			c.Window = c.Window[:r.IntN(len(c.Window)+1)]
		case 4:
			c.Left = uint16(r.Uint32())
		case 5:
			c.State, c.Literal = Dynamic, uint16(r.IntN(300))
			c.Lengths = make([]byte, r.IntN(330))
			for i := range c.Lengths {
				c.Lengths[i] = byte(r.IntN(17))
			}
		}
		size := r.Int64N(1 << 17)
		if z.ResetAt(bytes.NewReader(blob[c.In:]), &c, size) != nil {
			continue
		}
		if n, _ := io.Copy(io.Discard, struct{ io.Reader }{z}); n > size {
			t.Fatalf("%d bytes, asked for %d", n, size)
		}
	}
}

func FuzzInflate(f *testing.F) {
	data := text(70_000, 6)
	for _, level := range []int{0, 1, 6, 9, flate.HuffmanOnly} {
		f.Add(pack(f, level, data[:3000]))
	}
	f.Add(pack(f, 6, make([]byte, 300_000)))
	f.Add(slicesOf(pack(f, 6, data[:100]), pack(f, 6, data[:200]), []byte("x")))
	f.Fuzz(func(t *testing.T, blob []byte) {
		const limit = 4 << 20
		var want []byte
		var werr error
		members := 0
		// Member by member, as compress/gzip does not take what follows the last.
		src := bytes.NewReader(blob)
		oracle, err := stdgzip.NewReader(src)
		if err != nil {
			werr = err
		}
		for werr == nil {
			oracle.Multistream(false)
			part, err := io.ReadAll(io.LimitReader(oracle, limit))
			want = append(want, part...)
			if len(want) >= limit {
				return
			}
			if err != nil {
				werr = err
				break
			}
			members++
			rest := blob[len(blob)-src.Len():]
			if len(rest) < 2 || rest[0] != 0x1f || rest[1] != 0x8b {
				break
			}
			if werr = oracle.Reset(src); werr != nil {
				break
			}
		}
		got, points, gerr := unpack(t, blob, minSpan, plainly)
		if (gerr == nil) != (werr == nil) {
			t.Fatalf("error %v, compress/gzip says %v", gerr, werr)
		}
		if gerr == nil {
			if !bytes.Equal(got, want) {
				t.Fatalf("%d bytes, compress/gzip gives %d others", len(got), len(want))
			}
			checkPoints(t, blob, want, points, minSpan)
		}
	})
}

func BenchmarkInflate(b *testing.B) {
	data := text(32<<20, 7)
	if path := os.Getenv("INFLATE_BENCH"); path != "" {
		var err error
		if data, err = os.ReadFile(path); err != nil {
			b.Fatal(err)
		}
	}
	blob := pack(b, 6, data)
	b.Run("ours", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		z := NewReader(bytes.NewReader(nil), Options{})
		for b.Loop() {
			z.Reset(bytes.NewReader(blob), Options{Span: 4 << 20})
			for {
				if _, _, err := z.Next(); err == io.EOF {
					break
				} else if err != nil {
					b.Fatal(err)
				}
			}
		}
	})
	b.Run("klauspost", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			z, err := gzip.NewReader(bytes.NewReader(blob))
			if err == nil {
				_, err = io.Copy(io.Discard, z)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("compress-gzip", func(b *testing.B) {
		b.SetBytes(int64(len(data)))
		for b.Loop() {
			z, err := stdgzip.NewReader(bytes.NewReader(blob))
			if err == nil {
				_, err = io.Copy(io.Discard, z)
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	})
}
