package toc

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Options say what is known of the layer beforehand. The zero value is right
// for a layer whose descriptor has no annotations, and refuses it.
type Options struct {
	// Annotations of the layer's descriptor (OCI image-spec, descriptor.md).
	Annotations map[string]string

	// InsecureTOC accepts a layer whose descriptor promises no TOC digest.
	// A digest that is promised must match all the same.
	InsecureTOC bool
}

// ErrNoTOC says that a layer is neither eStargz nor zstd:chunked.
var ErrNoTOC = errors.New("neither eStargz nor zstd:chunked")

// ErrNoTOCDigest says that the layer's descriptor has no annotation that gives
// the TOC's digest, so that nothing ties the TOC to the manifest.
var ErrNoTOCDigest = errors.New("the manifest promises no digest of the TOC")

// A DigestError says that something has another digest than the manifest
// promises.
type DigestError struct {
	What      string // "TOC" (its JSON) or "compressed TOC"
	Want, Got Digest
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("digest of the %s: the manifest promises %s, found %s", e.What, e.Want, e.Got)
}

// The annotations of a layer's descriptor that we read. tocDigest is of the
// uncompressed JSON (stargz-snapshotter, estargz.TOCJSONDigestAnnotation). The
// others, of the compressed bytes, come under two prefixes: stargz-snapshotter's
// and containers/storage's.
const (
	annotationTOCDigest = "containerd.io/snapshot/stargz/toc.digest"
	suffixChecksum      = ".zstd-chunked.manifest-checksum"
	suffixPosition      = ".zstd-chunked.manifest-position"
)

var annotationPrefixes = []string{"io.github.containers", "io.containers"}

// promises is what the annotations say.
type promises struct {
	toc, compressed Digest    // zero: no such annotation
	position        *position // nil: no such annotation
}

// A position says where in a blob the TOC is.
type position struct {
	off, len int64 // of the compressed bytes
	tarEnd   int64 // the tar is the blob's bytes [0, tarEnd)
	jsonLen  int64 // of the uncompressed JSON (zstd:chunked only)
	format   Format
}

func parsePromises(annotations map[string]string) (p promises, err error) {
	if s, ok := annotations[annotationTOCDigest]; ok {
		if p.toc, err = ParseDigest(s); err != nil {
			return p, fmt.Errorf("annotation %s: %w", annotationTOCDigest, err)
		}
	}
	for _, prefix := range annotationPrefixes {
		if s, ok := annotations[prefix+suffixChecksum]; ok {
			d, err := ParseDigest(s)
			if err == nil && !p.compressed.IsZero() && d != p.compressed {
				err = errors.New("another annotation gives another digest")
			}
			if err != nil {
				return p, fmt.Errorf("annotation %s: %w", prefix+suffixChecksum, err)
			}
			p.compressed = d
		}
		if s, ok := annotations[prefix+suffixPosition]; ok {
			pos, err := parsePosition(s)
			if err == nil && p.position != nil && *pos != *p.position {
				err = errors.New("another annotation gives another position")
			}
			if err != nil {
				return p, fmt.Errorf("annotation %s: %w", prefix+suffixPosition, err)
			}
			p.position = pos
		}
	}
	return p, nil
}

// parsePosition reads "offset:length:uncompressed length:type", where the only
// type is 1.
func parsePosition(s string) (*position, error) {
	fields := strings.Split(s, ":")
	if len(fields) != 4 {
		return nil, fmt.Errorf("%.100q: want four numbers with colons between", s)
	}
	var n [4]uint64
	for i, f := range fields {
		var err error
		if n[i], err = strconv.ParseUint(f, 10, 64); err != nil {
			return nil, fmt.Errorf("%.100q: %w", s, err)
		}
	}
	return zstdPosition(n[0], n[1], n[2], n[3])
}

func zstdPosition(off, length, jsonLen, typ uint64) (*position, error) {
	switch {
	case typ != 1:
		return nil, fmt.Errorf("TOC type %d is not known", typ)
	case length > maxCompressedTOC || jsonLen > maxTOC:
		return nil, fmt.Errorf("the TOC has %d bytes, %d uncompressed; the limits are %d and %d", length, jsonLen, maxCompressedTOC, maxTOC)
	case length == 0 || jsonLen == 0 || off < frameHeader || off > 1<<62:
		return nil, fmt.Errorf("no TOC can be %d bytes at offset %d", length, off)
	}
	return &position{off: int64(off), len: int64(length), tarEnd: int64(off) - frameHeader, jsonLen: int64(jsonLen), format: ZstdChunked}, nil
}

// Read finds the TOC of the layer blob of size bytes that r reads, checks it
// against the annotations and parses it. It reads r once where the annotations
// give the TOC's position or the TOC lies within the blob's tail, else twice,
// and no file data. Layers that are neither eStargz nor zstd:chunked give an
// error that wraps ErrNoTOC; other sentinels are ErrNoTOCDigest and
// *DigestError, and errors of r are wrapped.
//
// A nil error promises that the TOC is the one the manifest promises (unless
// o.InsecureTOC, and there was no promise), and what the fields of Entry and
// Chunk say. Names and links are not looked at.
func Read(r io.ReaderAt, size int64, o Options) (*TOC, error) {
	t, err := read(r, size, o)
	if err != nil {
		return nil, fmt.Errorf("read table of contents: %w", err)
	}
	return t, nil
}

func read(r io.ReaderAt, size int64, o Options) (*TOC, error) {
	p, err := parsePromises(o.Annotations)
	if err != nil {
		return nil, err
	}
	var tail []byte
	pos := p.position
	if pos == nil {
		if tail, err = readRange(r, size-tailSize(size), tailSize(size)); err != nil {
			return nil, err
		}
		if pos, err = findFooter(tail, size); err != nil {
			return nil, err
		}
	}
	if pos.off > size || pos.len > size-pos.off {
		return nil, fmt.Errorf("the TOC at offset %d, %d bytes long, is not within the blob's %d bytes", pos.off, pos.len, size)
	}
	if p.toc.IsZero() && p.compressed.IsZero() && !o.InsecureTOC {
		return nil, ErrNoTOCDigest
	}
	compressed, err := readTOC(r, size, tail, pos)
	if err != nil {
		return nil, err
	}
	if got := Digest(sha256.Sum256(compressed)); !p.compressed.IsZero() && got != p.compressed {
		return nil, &DigestError{What: "compressed TOC", Want: p.compressed, Got: got}
	}
	t := &TOC{Format: pos.format}
	var text []byte
	if t.Format == EStargz {
		t.Compression = Gzip
		text, err = gunzipTOC(compressed)
	} else {
		t.Compression = Zstd
		text, err = unzstdTOC(compressed, pos.jsonLen)
	}
	if err != nil {
		return nil, fmt.Errorf("decompress the TOC: %w", err)
	}
	t.Digest = sha256.Sum256(text)
	if !p.toc.IsZero() && t.Digest != p.toc {
		return nil, &DigestError{What: "TOC", Want: p.toc, Got: t.Digest}
	}
	if err := parse(t, text, pos.tarEnd); err != nil {
		return nil, err
	}
	return t, nil
}

func readRange(r io.ReaderAt, off, n int64) ([]byte, error) {
	b := make([]byte, n)
	// A ReaderAt may say EOF with the last byte.
	if m, err := r.ReadAt(b, off); int64(m) < n {
		if err == nil || err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read %d bytes of the layer at %d: %w", n, off, err)
	}
	return b, nil
}

// readTOC returns the compressed TOC. What the tail, the blob's last bytes,
// has of it is not read again.
func readTOC(r io.ReaderAt, size int64, tail []byte, pos *position) ([]byte, error) {
	tailOff := size - int64(len(tail))
	if pos.off >= tailOff {
		return tail[pos.off-tailOff:][:pos.len], nil
	}
	b, err := readRange(r, pos.off, min(pos.len, tailOff-pos.off))
	if err != nil {
		return nil, err
	}
	return append(b, tail[:pos.len-int64(len(b))]...), nil
}

// The sizes and magic numbers drawn in the package comment.
const (
	stargzFooter     = 51
	legacyFooter     = 47
	stargzMagic      = "STARGZ"
	frameHeader      = 8 // of a skippable frame: magic and length (RFC 8878, 3.1.2)
	frameMagic       = "\x50\x2a\x4d\x18"
	zstdFooter       = 40
	zstdMagic        = "GnUlInUx"
	containersFooter = 64
	containersMagic  = "GNUlInUx"
)

// findFooter finds the footer at the end of tail, the last bytes of a blob of
// size bytes.
func findFooter(tail []byte, size int64) (*position, error) {
	end := func(n int) []byte { return tail[max(0, len(tail)-n):] }
	for _, n := range []int{stargzFooter, legacyFooter} {
		hex, ok := cutStargzFooter(end(n), n)
		if !ok {
			continue
		}
		off, err := strconv.ParseUint(hex, 16, 63)
		if err != nil {
			return nil, fmt.Errorf("eStargz footer: TOC offset %q: %w", hex, err)
		}
		length := size - int64(n) - int64(off)
		if length <= 0 || length > maxCompressedTOC {
			return nil, fmt.Errorf("eStargz footer: TOC offset %d in a blob of %d bytes leaves %d for the TOC; want 1 to %d", off, size, length, maxCompressedTOC)
		}
		return &position{off: int64(off), len: length, tarEnd: int64(off), format: EStargz}, nil
	}
	for _, kind := range []struct {
		n     int
		magic string
	}{{zstdFooter, zstdMagic}, {containersFooter, containersMagic}} {
		n, magic := kind.n, kind.magic
		f := end(frameHeader + n)
		if len(f) < frameHeader+n || string(f[:4]) != frameMagic || binary.LittleEndian.Uint32(f[4:]) != uint32(n) || !bytes.HasSuffix(f, []byte(magic)) {
			continue
		}
		u := func(i int) uint64 { return binary.LittleEndian.Uint64(f[frameHeader+8*i:]) }
		pos, err := zstdPosition(u(0), u(1), u(2), u(3))
		if err != nil {
			return nil, fmt.Errorf("zstd:chunked footer: %w", err)
		}
		if pos.off > size-int64(frameHeader+n) || pos.len > size-int64(frameHeader+n)-pos.off {
			return nil, fmt.Errorf("zstd:chunked footer: the TOC at offset %d, %d bytes long, is not before the footer at %d", pos.off, pos.len, size-int64(frameHeader+n))
		}
		return pos, nil
	}
	return nil, fmt.Errorf("%w: the layer's %d bytes end in %x, which is no footer", ErrNoTOC, size, end(16))
}

// cutStargzFooter returns the hexadecimal TOC offset of a footer of n bytes.
func cutStargzFooter(f []byte, n int) (hex string, ok bool) {
	// ID1, ID2, deflate, FEXTRA (RFC 1952, 2.3.1); MTIME, XFL and OS are free.
	if len(f) != n || string(f[:4]) != "\x1f\x8b\x08\x04" {
		return "", false
	}
	want := "\x1a\x00SG\x16\x00" // XLEN 26, subfield "SG" of 22
	if n == legacyFooter {
		want = "\x16\x00" // XLEN 22
	}
	extra, ok := strings.CutPrefix(string(f[10:]), want)
	if !ok || extra[16:22] != stargzMagic {
		return "", false
	}
	return extra[:16], true
}

// tocTarName is the one file in an eStargz TOC's tar.
const tocTarName = "stargz.index.json"

func gunzipTOC(compressed []byte) ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(compressed))
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	t := tar.NewReader(z)
	h, err := t.Next()
	if err == io.EOF {
		return nil, fmt.Errorf("an empty tar, want %s in it", tocTarName)
	} else if err != nil {
		return nil, err
	}
	if h.Name != tocTarName || h.Typeflag != tar.TypeReg {
		return nil, fmt.Errorf("the tar begins with %q, want %s", h.Name, tocTarName)
	}
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") { // a size out of nothing
			return nil, fmt.Errorf("%s is a sparse file", tocTarName)
		}
	}
	if h.Size > maxTOC {
		return nil, fmt.Errorf("the TOC has %d bytes, the limit is %d", h.Size, maxTOC)
	}
	return readAll(t, h.Size, len(compressed))
}

func unzstdTOC(compressed []byte, size int64) ([]byte, error) {
	z, err := zstd.NewReader(bytes.NewReader(compressed), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	defer z.Close()
	return readAll(z, size, len(compressed))
}

// readAll reads r to its end, which must come after size bytes. It allocates
// in proportion to what has been read, not to what size promises.
func readAll(r io.Reader, size int64, compressed int) ([]byte, error) {
	var b bytes.Buffer
	b.Grow(int(min(size, 8*int64(compressed))) + bytes.MinRead)
	n, err := b.ReadFrom(io.LimitReader(r, size+1))
	if err != nil {
		return nil, err
	}
	if n != size {
		return nil, fmt.Errorf("%w: %d bytes promised, found %d", io.ErrUnexpectedEOF, size, n)
	}
	return b.Bytes(), nil
}

// Promised tells from the annotations of a layer's descriptor alone which format
// the layer claims to have, and the digest of its TOC: of the JSON, or else of
// its compressed bytes. ok is false if they promise none.
func Promised(annotations map[string]string) (f Format, digest string, ok bool) {
	p, err := parsePromises(annotations)
	switch f = EStargz; {
	case err != nil:
		return 0, "", false
	case p.position != nil || !p.compressed.IsZero():
		f = ZstdChunked
	}
	if d := p.toc; !d.IsZero() {
		return f, d.String(), true
	}
	return f, p.compressed.String(), !p.compressed.IsZero()
}
