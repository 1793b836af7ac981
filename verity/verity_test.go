package verity

import (
	"bytes"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"

	"golang.org/x/sys/unix"
)

// TestVectors holds the digests that section 2.12 of the format document
// lists, by their first and last digits where it gives no more.
func TestVectors(t *testing.T) {
	for _, c := range []struct {
		data        string
		alg         Algorithm
		first, last string
	}{
		{"", SHA256, "3d248ca5", "f1af95"},
		{"hello world", SHA256, "1e2eaa42", "362ba64"},
		{"hello world", SHA512, "18430270", "6f570409"},
		{"hello world\n", SHA256, "37061ef2", "7cd92"},
		{"foo bar baz\n", SHA256, "91e7d88c", "4e70b"},
	} {
		sum, err := Digest(strings.NewReader(c.data), c.alg)
		if err != nil {
			t.Fatal(err)
		}
		if got := hex.EncodeToString(sum); !strings.HasPrefix(got, c.first) || !strings.HasSuffix(got, c.last) || len(sum) != c.alg.Size() {
			t.Errorf("%q %v: got %s, want %s…%s", c.data, c.alg, got, c.first, c.last)
		}
	}
}

// wholeTree computes the digest level by level, as the drawing in the package
// comment reads.
func wholeTree(data []byte, alg Algorithm) []byte {
	sum := func(b []byte) []byte { s := sha256.Sum256(b); return s[:] }
	if alg == SHA512 {
		sum = func(b []byte) []byte { s := sha512.Sum512(b); return s[:] }
	}
	desc := make([]byte, 256)
	desc[0], desc[1], desc[2] = 1, byte(alg), 12
	binary.LittleEndian.PutUint64(desc[8:], uint64(len(data)))
	for level := data; len(data) > 0; {
		var above []byte
		for len(level) > 0 {
			block := make([]byte, BlockSize)
			level = level[copy(block, level):]
			above = append(above, sum(block)...)
		}
		if level = above; len(level) == alg.Size() {
			copy(desc[16:], level)
			break
		}
	}
	return sum(desc)
}

// TestAgainstWholeTree compares streaming, in writes of many sizes, with the
// plain construction around every boundary of blocks and levels.
func TestAgainstWholeTree(t *testing.T) {
	data := make([]byte, 64*64*BlockSize+3*BlockSize)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range data {
		data[i] = byte(rnd.Uint32())
	}
	for _, alg := range []Algorithm{SHA256, SHA512} {
		h := New(alg)
		for _, blocks := range []int{0, 1, 2, 63, 64, 65, 127, 128, 129, 4095, 4096, 4097} {
			for _, d := range []int{-1, 0, 1, 100} {
				size := blocks*BlockSize + d
				if size < 0 || size > len(data) {
					continue
				}
				want := wholeTree(data[:size], alg)
				h.Reset()
				for p := data[:size]; len(p) > 0; {
					n := min(len(p), 1+rnd.IntN(5*BlockSize))
					if n < 64 && h.Size()%3 == 0 { // Sum in between changes nothing
						h.Sum()
					}
					h.Write(p[:n])
					p = p[n:]
				}
				if got := h.Sum(); !bytes.Equal(got, want) {
					t.Errorf("%v of %d bytes: got %x, want %x", alg, size, got, want)
				}
				if h.Size() != int64(size) {
					t.Errorf("size %d, want %d", h.Size(), size)
				}
			}
		}
	}
}

func TestDigestReadError(t *testing.T) {
	broken := errors.New("broken")
	_, err := Digest(io.MultiReader(strings.NewReader("x"), iotest.ErrReader(broken)), SHA256)
	if !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
}

func TestWriteDoesNotAllocate(t *testing.T) {
	h, p := New(SHA256), make([]byte, 300*BlockSize)
	h.Write(p)
	if n := testing.AllocsPerRun(10, func() { h.Write(p) }); n > 0 {
		t.Errorf("%v allocations for a write of 300 blocks", n)
	}
}

func TestMismatch(t *testing.T) {
	if err := Compare("x", SHA256, []byte{1}, []byte{1}); err != nil {
		t.Error(err)
	}
	err := Compare("objects/ab/cd", SHA256, []byte{0xab}, []byte{0xcd})
	var m *MismatchError
	if !errors.As(err, &m) || err.Error() != "objects/ab/cd: fs-verity digest is sha256:cd, want sha256:ab" {
		t.Errorf("got %v", err)
	}
}

// TestKernel runs where the kernel or the filesystem of the temporary
// folder has no fs-verity; elsewhere it checks that the kernel's digest is
// ours. Either way the requests reach the kernel.
func TestKernel(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("hello world"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var unsupported *NotSupportedError
	err = Enable(f)
	if errors.As(err, &unsupported) {
		if unsupported.Op != "enable" || unsupported.Path != path || !errors.Is(err, unsupported.Err) || !strings.Contains(err.Error(), unsupported.Err.Error()) {
			t.Errorf("%#v", unsupported)
		}
		if _, _, err := Measure(f); !errors.As(err, &unsupported) && !errors.Is(err, ErrNotEnabled) {
			t.Errorf("measure: %v", err)
		}
		t.Logf("this kernel has no fs-verity on %s, so sealing a file is not tested here: %v", path, err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := Enable(f); err != nil {
		t.Errorf("enabling again: %v", err)
	}
	alg, sum, err := Measure(f)
	if want := wholeTree([]byte("hello world"), SHA256); err != nil || alg != SHA256 || !bytes.Equal(sum, want) {
		t.Errorf("measure: %v %x %v, want %x", alg, sum, err, want)
	}
}

// TestKernelErrors gives each errno its kind, as the kernel's document lists
// them for FS_IOC_ENABLE_VERITY and FS_IOC_MEASURE_VERITY.
func TestKernelErrors(t *testing.T) {
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for errno, kind := range map[unix.Errno]string{
		unix.ENOTTY: "unsupported", unix.EOPNOTSUPP: "unsupported", unix.ENOSYS: "unsupported", unix.ENOPKG: "unsupported",
		unix.ENODATA: "not enabled", unix.ETXTBSY: "other", unix.EPERM: "other", unix.EEXIST: "other",
	} {
		err := kernelError("enable", f, errno)
		got := "other"
		var unsupported *NotSupportedError
		switch {
		case errors.As(err, &unsupported):
			got = "unsupported"
		case errors.Is(err, ErrNotEnabled):
			got = "not enabled"
		}
		if got != kind {
			t.Errorf("%v is %q, want %q", errno, got, kind)
		}
		if kind == "other" && !errors.Is(err, errno) {
			t.Errorf("%v does not wrap %v", err, errno)
		}
	}
}

func BenchmarkHash(b *testing.B) {
	p := make([]byte, 1<<20)
	b.Run("plain sha256", func(b *testing.B) {
		b.SetBytes(int64(len(p)))
		for b.Loop() {
			sha256.Sum256(p)
		}
	})
	for _, alg := range []Algorithm{SHA256, SHA512} {
		b.Run(alg.String(), func(b *testing.B) {
			b.SetBytes(int64(len(p)))
			b.ReportAllocs()
			h := New(alg)
			for b.Loop() {
				h.Write(p)
			}
		})
	}
}

// Large blocks against fsverity(1).
func TestLargeBlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, alg := range []Algorithm{SHA256, SHA512} {
		for _, size := range []int{0, 1, 65535, 65536, 65537, 200_000} {
			data := bytes.Repeat([]byte("large block "), size/12+1)[:size]
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := exec.Command("fsverity", "digest", "--compact", "--hash-alg="+alg.String(), "--block-size=65536", path).Output()
			if err != nil {
				t.Fatal("fsverity: ", err)
			}
			h := NewLarge(alg)
			h.Write(data[:size/2])
			h.Write(data[size/2:])
			if got := hex.EncodeToString(h.Sum()); got != strings.TrimSpace(string(out)) {
				t.Errorf("%v of %d bytes: %s, fsverity says %s", alg, size, got, out)
			}
		}
	}
	// Of a tree of three levels, which fsverity(1) is slow to read from a disk:
	// that of zeros follows from the hashes of one block a level.
	h := NewLarge(SHA512)
	zeros := make([]byte, 1<<20)
	for range (LargeBlock/64)*LargeBlock/len(zeros) + 1 {
		h.Write(zeros)
	}
	size := h.Size()
	blocks := size / LargeBlock
	level := sha512.Sum512(zeros[:LargeBlock])
	full := sha512.Sum512(bytes.Repeat(level[:], LargeBlock/64))
	rest := append(bytes.Repeat(level[:], int(blocks%(LargeBlock/64))), make([]byte, LargeBlock)...)[:LargeBlock]
	last := sha512.Sum512(rest)
	top := append(append([]byte{}, full[:]...), last[:]...)
	root := sha512.Sum512(append(top, make([]byte, LargeBlock-len(top))...))
	desc := make([]byte, 256)
	desc[0], desc[1], desc[2] = 1, 2, 16
	binary.LittleEndian.PutUint64(desc[8:], uint64(size))
	copy(desc[16:], root[:])
	if want := sha512.Sum512(desc); !bytes.Equal(h.Sum(), want[:]) {
		t.Errorf("three levels: %x, want %x", h.Sum(), want)
	}
}
