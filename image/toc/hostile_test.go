package toc_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

const tarLen = 1000 // of the blobs that the functions below make

func stargzBlob(h tar.Header, content io.Reader, level int) []byte {
	b := bytes.NewBuffer(make([]byte, tarLen))
	z := imagetest.Must(gzip.NewWriterLevel(b, level))
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&h); err != nil {
		panic(err)
	}
	imagetest.Must(io.Copy(w, content))
	if err := z.Close(); err != nil {
		panic(err)
	}
	b.Write(stargzFooter(tarLen))
	return b.Bytes()
}

func stargzFooter(off int64) []byte {
	return estargz.CreateGzipFooter(append([]byte("SG\x16\x00"), fmt.Sprintf("%016xSTARGZ", off)...))
}

// estargzOf is an eStargz blob with the given TOC after a tar of tarLen bytes.
func estargzOf(toc string) []byte {
	return stargzBlob(tar.Header{Typeflag: tar.TypeReg, Name: "stargz.index.json", Size: int64(len(toc))}, strings.NewReader(toc), gzip.NoCompression)
}

var encoder = imagetest.Must(zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest)))

// zstdOf is a zstd:chunked blob with the given TOC, said to have length bytes,
// after a tar of tarLen bytes.
func zstdOf(content []byte, length int) []byte {
	return zstdBlob(encoder.EncodeAll(content, nil), length)
}

// zstdStored is zstdOf without compression (RFC 8878, 3.1.1: a frame of one
// segment and raw blocks).
func zstdStored(content string) []byte {
	frame := binary.LittleEndian.AppendUint32([]byte("\x28\xb5\x2f\xfd\xa0"), uint32(len(content)))
	for rest := content; ; {
		n := min(len(rest), 100_000)
		header := uint32(n << 3)
		if n == len(rest) {
			header |= 1
		}
		frame = append(frame, byte(header), byte(header>>8), byte(header>>16))
		frame = append(frame, rest[:n]...)
		if rest = rest[n:]; rest == "" {
			return zstdBlob(frame, len(content))
		}
	}
}

func zstdBlob(compressed []byte, length int) []byte {
	b := make([]byte, tarLen, tarLen+len(compressed)+100)
	frame := func(p []byte) {
		b = append(b, "\x50\x2a\x4d\x18"...)
		b = append(binary.LittleEndian.AppendUint32(b, uint32(len(p))), p...)
	}
	frame(compressed)
	footer := make([]byte, 0, 40)
	for _, n := range []int{tarLen + 8, len(compressed), length, 1} {
		footer = binary.LittleEndian.AppendUint64(footer, uint64(n))
	}
	frame(append(footer, "GnUlInUx"...))
	return b
}

func readInsecure(blob []byte) (*toc.TOC, error) {
	return toc.Read(bytes.NewReader(blob), int64(len(blob)), toc.Options{InsecureTOC: true})
}

// D1, D2 and so on in the cases below are digests.
func expand(s string) string {
	for i := range 4 {
		s = strings.ReplaceAll(s, fmt.Sprintf("D%d", i), "sha256:"+strings.Repeat(fmt.Sprint(i), 64))
	}
	return s
}

// Each case is the list of entries, short for members whose quotes are left
// out: "type:reg name:a size:5 digest:D1" and so on, one entry a line.
func entriesJSON(lines string) string {
	var out []string
	for line := range strings.Lines(expand(strings.TrimSpace(lines))) {
		var members []string
		for field := range strings.FieldsSeq(line) {
			key, value, _ := strings.Cut(field, ":")
			switch {
			case strings.Trim(value, "-0123456789.e") != "" && value[0] != '{' && value[0] != '"' && value != "null",
				key == "name", key == "digest", value == "":
				value = `"` + value + `"`
			}
			members = append(members, fmt.Sprintf("%q:%s", key, value))
		}
		out = append(out, "{"+strings.Join(members, ",")+"}")
	}
	return `{"version":1,"entries":[` + strings.Join(out, ",") + `]}`
}

func TestStructure(t *testing.T) {
	for _, c := range []struct {
		name, entries string
		want          string // part of the error; "": none
	}{
		{"file", "type:reg name:a size:5 offset:10 digest:D1", ""},
		{"file with the digest at its chunk", "type:reg name:a size:5 offset:10 chunkDigest:D1", ""},
		{"both digests the same", "type:reg name:a size:5 offset:10 digest:D1 chunkDigest:D1", ""},
		{"two digests of one content", "type:reg name:a size:5 offset:10 digest:D1 chunkDigest:D2", "that of its only chunk"},
		{"no digest", "type:reg name:a size:5 offset:10", "no digest"},
		{"digest of zeros", "type:reg name:a size:5 offset:10 digest:D0", "no digest"},
		{"empty file", "type:reg name:a digest:D1", ""},
		{"empty file, all fields", "type:reg name:a size:0 offset:10 chunkSize:0 digest:D1", ""},
		{"empty file with a chunk", "type:reg name:a\ntype:chunk name:a chunkOffset:0 chunkSize:1 offset:5", "an empty file has chunks"},
		{"offset 0 with innerOffset", "type:reg name:a size:5 innerOffset:512 digest:D1", ""},
		{"at the end of the tar", "type:reg name:a size:5 offset:999 digest:D1", ""},
		{"in the TOC", "type:reg name:a size:5 offset:1000 digest:D1", "not within the 1000 bytes"},
		{"after the blob", "type:reg name:a size:5 offset:99999 digest:D1", "not within"},
		{"offset negative", "type:reg name:a size:5 offset:-1 digest:D1", "offset: want 0 to"},
		{"offset overflows", "type:reg name:a size:5 offset:9223372036854775807 digest:D1", "offset: want 0 to"},
		{"offset overflows 64 bits", "type:reg name:a size:5 offset:9223372036854775808 digest:D1", "whole number"},
		{"offset not whole", "type:reg name:a size:5 offset:1.5 digest:D1", "whole number"},
		{"size negative", "type:reg name:a size:-5 offset:10 digest:D1", "size: want 0 to"},
		{"size huge", "type:reg name:a size:9223372036854775807 offset:10 digest:D1", "size: want 0 to"},
		{"chunk over a gibibyte", "type:reg name:a size:1073741825 offset:10 digest:D1", "the limit is 1073741824"},
		{"chunk of a gibibyte", "type:reg name:a size:1073741824 offset:10 digest:D1", ""},
		{"file over 4 GiB", `
			type:reg name:a size:5000000000 offset:10 digest:D1 chunkSize:1000000000 chunkDigest:D2
			type:chunk name:a chunkOffset:1000000000 chunkSize:1000000000 offset:20 chunkDigest:D2
			type:chunk name:a chunkOffset:2000000000 chunkSize:1000000000 offset:30 chunkDigest:D2
			type:chunk name:a chunkOffset:3000000000 chunkSize:1000000000 offset:40 chunkDigest:D2
			type:chunk name:a chunkOffset:4000000000 offset:50 chunkDigest:D2`, ""},
		{"chunk without digest", `
			type:reg name:a size:10 offset:10 digest:D1 chunkSize:5 chunkDigest:D2
			type:chunk name:a chunkOffset:5 chunkSize:5 offset:20`, "chunk 1 has no digest"},
		{"chunks without the file's digest", `
			type:reg name:a size:10 offset:10 chunkSize:5 chunkDigest:D2
			type:chunk name:a chunkOffset:5 chunkSize:5 offset:20 chunkDigest:D2`, "no digest"},
		{"chunks leave a gap", `
			type:reg name:a size:10 offset:10 digest:D1 chunkSize:4 chunkDigest:D2
			type:chunk name:a chunkOffset:5 chunkSize:5 offset:20 chunkDigest:D2`, "chunk 1 begins at 5"},
		{"chunks overlap in the file", `
			type:reg name:a size:10 offset:10 digest:D1 chunkSize:6 chunkDigest:D2
			type:chunk name:a chunkOffset:5 chunkSize:5 offset:20 chunkDigest:D2`, "chunk 1 begins at 5"},
		{"chunks do not reach the end", `
			type:reg name:a size:10 offset:10 digest:D1 chunkSize:5 chunkDigest:D2
			type:chunk name:a chunkOffset:5 chunkSize:4 offset:20 chunkDigest:D2`, "have 9 bytes together, the file 10"},
		{"chunks exceed the end", `
			type:reg name:a size:10 offset:10 digest:D1 chunkSize:5 chunkDigest:D2
			type:chunk name:a chunkOffset:5 chunkSize:6 offset:20 chunkDigest:D2`, "6 bytes at 5 of a file of 10"},
		{"a chunk after the end", `
			type:reg name:a size:10 offset:10 digest:D1 chunkDigest:D2
			type:chunk name:a chunkOffset:10 offset:20 chunkDigest:D2`, "0 bytes at 10"},
		{"chunk without a file", "type:chunk name:a chunkSize:5", "follows no regular file"},
		{"chunk after a directory", "type:dir name:a\ntype:chunk name:a chunkSize:5", "follows no regular file"},
		{"chunk of another file", "type:reg name:a size:5 digest:D1\ntype:chunk name:b chunkSize:5", "follows no regular file"},
		{"chunk without a name", `
			type:reg name:a size:10 offset:10 digest:D1 chunkSize:5 chunkDigest:D2
			type:chunk chunkOffset:5 chunkSize:5 offset:20 chunkDigest:D2`, ""},

		{"two files in one span", "type:reg name:a size:5 offset:10 digest:D1\ntype:reg name:b size:5 offset:10 innerOffset:5 digest:D2", ""},
		{"two files in one span overlap", "type:reg name:a size:5 offset:10 digest:D1\ntype:reg name:b size:5 offset:10 innerOffset:4 digest:D2", `entry "b": its chunk at [10, 1000)+4 of the blob overlaps that at [10, 1000)+0 of entry "a"`},
		{"two files in one place", "type:reg name:a size:5 offset:10 digest:D1\ntype:reg name:b size:5 offset:10 digest:D2", "overlaps"},
		{"two files in one place, two sizes", "type:reg name:a size:5 offset:10 digest:D1\ntype:reg name:b size:6 offset:10 digest:D1", "overlaps"},
		{"one content stored once", "type:reg name:a size:5 offset:10 digest:D1\ntype:reg name:b size:5 offset:10 digest:D1", ""},
		{"innerOffset negative", "type:reg name:a size:5 offset:10 innerOffset:-1 digest:D1", "innerOffset: want 0 to"},
		{"innerOffset huge", "type:reg name:a size:5 offset:10 innerOffset:9223372036854775807 digest:D1", "innerOffset: want 0 to"},

		{"endOffset", "type:reg name:a size:5 offset:10 endOffset:20 digest:D1", ""},
		{"endOffset before offset", "type:reg name:a size:5 offset:10 endOffset:9 digest:D1", "nothing is between its offset 10 and its end 9"},
		{"endOffset in the TOC", "type:reg name:a size:5 offset:10 endOffset:1001 digest:D1", "endOffset 1001 is not within"},
		{"spans overlap", "type:reg name:a size:5 offset:10 endOffset:20 digest:D1\ntype:reg name:b size:5 offset:19 endOffset:30 digest:D2", `of entry "a"`},
		{"spans within another", "type:reg name:a size:5 offset:10 endOffset:40 digest:D1\ntype:reg name:b size:5 offset:10 endOffset:20 digest:D2", "overlaps"},
		{"spans overlap, TOC out of order", "type:reg name:b size:5 offset:19 endOffset:30 digest:D2\ntype:dir name:d\ntype:reg name:a size:5 offset:10 endOffset:20 digest:D1", `entry "b"`},
		{"spans one after another, TOC out of order", "type:reg name:b size:5 offset:20 endOffset:30 digest:D2\ntype:reg name:a size:5 offset:10 endOffset:20 digest:D1", ""},
		{"chunks go backwards", `
			type:reg name:a size:10 offset:20 endOffset:40 digest:D1 chunkSize:5 chunkDigest:D2
			type:chunk name:a chunkOffset:5 chunkSize:5 offset:10 chunkDigest:D2`, "nothing is between"},

		{"hole", `
			type:reg name:a size:30 offset:10 endOffset:40 digest:D1 chunkSize:10 chunkDigest:D2
			type:chunk name:a chunkOffset:10 chunkSize:10 offset:20 chunkDigest:D2 chunkType:zeros
			type:chunk name:a chunkOffset:20 chunkSize:10 offset:30 chunkDigest:D2`, ""},
		{"hole without digest", `
			type:reg name:a size:20 offset:10 endOffset:40 digest:D1 chunkSize:10 chunkType:zeros
			type:chunk name:a chunkOffset:10 chunkSize:10 offset:20 chunkDigest:D2`, ""},
		{"huge hole", `
			type:reg name:a size:1000000000010 offset:10 endOffset:40 digest:D1 chunkSize:10 chunkDigest:D2
			type:chunk name:a chunkOffset:10 chunkSize:1000000000000 offset:20 chunkType:zeros`, ""},
		{"hole without the file's digest", "type:reg name:a size:10 offset:10 chunkType:zeros chunkDigest:D1", "no digest"},
		{"unknown chunk type", "type:reg name:a size:10 offset:10 chunkType:ones digest:D1", `chunk type "ones"`},

		{"no type", "name:a", "no type"},
		{"unknown type", "name:a type:socket", `type "socket"`},
		{"uid too large", "type:dir name:a uid:4294967295", "uid: want"},
		{"gid negative", "type:dir name:a gid:-1", "gid: want"},
		{"mode negative", "type:dir name:a mode:-1", "mode: want"},
		{"mode with a file type", "type:dir name:a mode:16877", ""},
		{"major too large", "type:char name:a devMajor:4096", "devMajor: want"},
		{"minor too large", "type:char name:a devMinor:1048576", "devMinor: want"},
		{"time", "type:dir name:a modtime:2026-01-02T03:04:05.123456789+01:00", ""},
		{"no time", "type:dir name:a modtime:0001-01-01T00:00:00Z", ""},
		{"not a time", "type:dir name:a modtime:yesterday", "modtime"},
		{"digest in capitals", "type:reg name:a digest:sha256:" + strings.Repeat("A", 64), "digest: "},
		{"digest too short", "type:reg name:a digest:sha256:00", "digest: "},
		{"digest of another kind", "type:reg name:a digest:sha512:" + strings.Repeat("0", 128), "digest: "},
		{"xattr not base64", `type:dir name:a xattrs:{"user.a":"!"}`, `extended attribute "user.a"`},
		{"xattr without a name", `type:dir name:a xattrs:{"":"AA=="}`, "no extended attribute"},
		{"xattr with NUL in the name", `type:dir name:a xattrs:{"a\u0000":"AA=="}`, "no extended attribute"},
		{"xattr name too long", `type:dir name:a xattrs:{"` + strings.Repeat("a", 256) + `":"AA=="}`, "no extended attribute"},
		{"xattr too large", `type:dir name:a xattrs:{"a":"` + strings.Repeat("A", 4*22000) + `"}`, "66000 bytes"},
		{"null everywhere", "type:dir name:a modtime:null xattrs:null size:null digest:D1 linkName:null", ""},
		{"unknown members", `type:dir name:a future:{"a":[1,{"b":-2.5e7}]} userName:root`, ""},

		{"landmark", "type:reg name:.prefetch.landmark size:1 offset:10 digest:D1", ""},
		{"landmark in the TOC", "type:reg name:./.prefetch.landmark size:1 offset:1000", "not within"},
		{"landmark that goes on", "type:reg name:.no.prefetch.landmark size:2 chunkSize:1 offset:10\ntype:chunk name:.no.prefetch.landmark chunkOffset:1 offset:20", "follows no regular file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			text := entriesJSON(c.entries)
			if !json.Valid([]byte(text)) {
				t.Fatalf("the test's own JSON is wrong: %s", text)
			}
			for _, blob := range [][]byte{estargzOf(text), zstdOf([]byte(text), len(text))} {
				x, err := readInsecure(blob)
				if err == nil {
					checkTOC(t, x, tarLen)
				}
				if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
					t.Errorf("got %v, want %q", err, c.want)
				}
			}
		})
	}
}

func TestJSON(t *testing.T) {
	const ok = `{"version":1,"entries":[{"name":"a","type":"dir"}]}`
	for text, want := range map[string]string{
		ok:                    "",
		" \t\r\n" + ok + "\n": "",
		`{"entries":[],"version":1,"tarSplitDigest":"x"}`: "",
		`{"version":1,"entries":null}`:                    "",
		ok + "x":                                          "something follows",
		ok + "\x00":                                       "something follows",
		``:                                                "want '{'",
		`[]`:                                              "want '{'",
		`{}`:                                              "version 0",
		`{"version":2,"entries":[]}`:                      "version 2",
		`{"version":1,"entries":[],"entries":[]}`:         "second list",
		`{"version":1,"entries":[{}]}`:                    "no type",
		`{"version":1,"entries":[null]}`:                  "want '{'",
		`{"version":1,"entries":[`:                        "want '{'",
		`{"version":1,"entries":[{"name":"a`:              "ends too early",
		`{"version":1,"entries":[{"name":"a\`:             "ends too early",
		`{"version":1,"entries":[{"name":"\u12`:           "ends too early",
		`{"version":1,"entries":[{"name":"\u12xy"`:        "hexadecimal",
		`{"version":1,"entries":[{"name":"\x"`:            "unknown escape",
		"{\"version\":1,\"entries\":[{\"name\":\"\n\"":    "control character",
		"{\"version\":1,\"entries\":[{\"name\":\"\\t\n\"": "control character",
		`{"version":1 "entries":[]}`:                      "want ','",
		`{"version":01}`:                                  "want ','",
		`{"version":-}`:                                   "want a number",
		`{"version":1,"x":1.}`:                            "want a digit",
		`{"version":1,"x":1e}`:                            "want a digit",
		`{"version":1,"x":nul}`:                           "want null",
		`{"version":1,"x":tru}`:                           "want true",
		`{"version":1,"x":?}`:                             "want a value",
		`{"version":1,"x":` + strings.Repeat("[", 1000):   "deep",
		`{"version":1,"x":` + strings.Repeat(`{"a":`, 99): "deep",
	} {
		_, err := readInsecure(estargzOf(text))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%.60s: got %v, want %q", text, err, want)
		}
	}
}

// File names are bytes: those that are not UTF-8 stay as they are.
func TestNames(t *testing.T) {
	for in, want := range map[string]string{
		"a":                           "a",
		"\xff\xfe":                    "\xff\xfe",
		`a\/b\"\\`:                    `a/b"\`,
		`\b\f\n\r\t\u0001`:            "\b\f\n\r\t\x01",
		`\u00e9\u20ac`:                "é€",
		`\ud83d\ude00`:                "😀",
		`\ud83d`:                      "\ufffd",
		`\ud83dx`:                     "\ufffdx",
		`\ud83d\u0041`:                "\ufffdA",
		`\ude00\ud83d\ude00`:          "\ufffd😀",
		"\xff\\n\xfe":                 "\xff\n\xfe",
		strings.Repeat("x", 10_000):   strings.Repeat("x", 10_000),
		"../" + `\u002e\u002e` + "/x": "../../x",
	} {
		x, err := readInsecure(estargzOf(`{"version":1,"entries":[{"name":"` + in + `","linkName":"` + in + `","type":"symlink"}]}`))
		if err != nil {
			t.Errorf("%s: %v", in, err)
		} else if e := x.Entries[0]; e.Name != want || e.Linkname != want {
			t.Errorf("%s: got %q, link %q", in, e.Name, e.Linkname)
		}
	}
}

// xattrs come out sorted; of two with one name the last counts.
func TestXattrs(t *testing.T) {
	x, err := readInsecure(estargzOf(`{"version":1,"entries":[{"name":"a","type":"dir","xattrs":{"b":"AQ==","a":"AGIA","b":"Ag==","c":""}}]}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []toc.Xattr{{Name: "a", Value: []byte("\x00b\x00")}, {Name: "b", Value: []byte("\x02")}, {Name: "c"}}
	if fmt.Sprint(x.Entries[0].Xattrs) != fmt.Sprint(want) {
		t.Errorf("got %v", x.Entries[0].Xattrs)
	}
}

func TestLandmarks(t *testing.T) {
	x, err := readInsecure(estargzOf(entriesJSON(`
		type:reg name:a size:5 offset:10 digest:D1
		type:reg name:.prefetch.landmark size:1 offset:20 digest:D2
		type:reg name:b size:5 offset:30 digest:D1
		type:reg name:sub/.prefetch.landmark size:5 offset:40 digest:D1`)))
	if err != nil {
		t.Fatal(err)
	}
	if len(x.Entries) != 3 || x.PrefetchEnd != 20 {
		t.Errorf("%d entries, PrefetchEnd %d", len(x.Entries), x.PrefetchEnd)
	}
	if end := x.Entries[0].Chunks[0].BlobEnd; end != 20 {
		t.Errorf("the span before the landmark ends at %d", end)
	}
}

func TestFooter(t *testing.T) {
	at := func(footer []byte, off int, s string) []byte {
		return slices.Concat(make([]byte, 100), footer[:off], []byte(s), footer[off+len(s):])
	}
	es := stargzFooter(0)
	zs := zstdOf([]byte("{}"), 2)
	zs = zs[len(zs)-48:]
	for name, c := range map[string]struct {
		blob []byte
		want string
	}{
		"offset not hexadecimal":   {at(es, 16, "x"), "TOC offset"},
		"offset negative":          {at(es, 16, "-000000000000001"), "TOC offset"},
		"offset with a sign":       {at(es, 16, "+"), "TOC offset"},
		"offset overflows":         {at(es, 16, "ffffffffffffffff"), "TOC offset"},
		"offset after the end":     {at(es, 16, "0fffffffffffffff"), "want 1 to"},
		"offset at the footer":     {at(es, 16, "0000000000000064"), "want 1 to"},
		"not gzip":                 {at(es, 0, "x"), "neither eStargz"},
		"no FEXTRA":                {at(es, 3, "\x00"), "neither eStargz"},
		"other XLEN":               {at(es, 10, "\x1b"), "neither eStargz"},
		"other subfield":           {at(es, 12, "XX"), "neither eStargz"},
		"other magic":              {at(es, 32, "stargz"), "neither eStargz"},
		"zstd, other frame":        {at(zs, 0, "x"), "neither eStargz"},
		"zstd, other frame length": {at(zs, 4, "\x29"), "neither eStargz"},
		"zstd, other magic":        {at(zs, 40, "x"), "neither eStargz"},
		"zstd, TOC in the footer":  {at(zs, 8, "\x64\x00\x00\x00\x00\x00\x00\x00"), "is not before the footer"},
		"zstd, offset overflows":   {at(zs, 8, "\xff\xff\xff\xff\xff\xff\xff\xff"), "no TOC can be"},
		"zstd, length overflows":   {at(zs, 16, "\xff\xff\xff\xff\xff\xff\xff\xff"), "limit"},
		"zstd, other type":         {at(zs, 32, "\x07"), "type 7"},
	} {
		if _, err := readInsecure(c.blob); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
}

// What decompresses to more than it may, or than it says, ends with an error
// before it takes memory.
func TestBombs(t *testing.T) {
	spaces := bytes.Repeat([]byte(" "), 1<<20)
	text := entriesJSON("type:dir name:a")
	index := tar.Header{Typeflag: tar.TypeReg, Name: "stargz.index.json"}
	with := func(size int64, records map[string]string) tar.Header {
		h := index
		h.Size, h.PAXRecords = size, records
		return h
	}
	for name, c := range map[string]struct {
		blob []byte
		want string
	}{
		"tar says too much":       {stargzBlob(with(1<<40, nil), bytes.NewReader(spaces), gzip.BestSpeed), "the limit is"},
		"tar has less":            {stargzBlob(with(1<<21, nil), bytes.NewReader(spaces), gzip.BestSpeed), "unexpected EOF"},
		"another file":            {stargzBlob(tar.Header{Typeflag: tar.TypeReg, Name: "x"}, strings.NewReader(""), gzip.BestSpeed), `begins with "x"`},
		"a directory":             {stargzBlob(tar.Header{Typeflag: tar.TypeDir, Name: "stargz.index.json"}, strings.NewReader(""), gzip.BestSpeed), "begins with"},
		"zstd has more":           {zstdOf(append([]byte(text), spaces...), len(text)), "promised"},
		"zstd has less":           {zstdOf([]byte(text), len(text)+1), "promised"},
		"zstd says the limit":     {zstdOf([]byte(text), 256<<20), "promised"},
		"zstd says over it":       {zstdOf([]byte(text), 256<<20+1), "limit"},
		"not gzip":                {append(make([]byte, 1000), stargzFooter(0)...), "decompress the TOC"},
		"gzip without a tar":      {slices.Concat(make([]byte, 10), estargz.CreateGzipFooter(make([]byte, 22)), stargzFooter(10)), "an empty tar"},
		"truncated in the middle": {slices.Concat(estargzOf(text)[:tarLen+60], stargzFooter(tarLen)), "decompress the TOC"},
	} {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := readInsecure(c.blob); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
		runtime.ReadMemStats(&after)
		if n := after.TotalAlloc - before.TotalAlloc; n > 16<<20 {
			t.Errorf("%s: took %d bytes of memory", name, n)
		}
	}
}

// A sparse header makes a terabyte of zeros out of nothing.
func TestSparseTOC(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	record := func(k, v string) string { // "len key=value\n" (pax)
		for n := len(k) + len(v) + 3; ; n++ {
			if s := fmt.Sprintf("%d %s=%s\n", n, k, v); len(s) == n {
				return s
			}
		}
	}
	pax := record("GNU.sparse.major", "0") + record("GNU.sparse.minor", "1") + record("GNU.sparse.size", "200000000") +
		record("GNU.sparse.numblocks", "1") + record("GNU.sparse.map", "199999999,1")
	for _, h := range []tar.Header{{Typeflag: 'x', Name: "pax", Size: int64(len(pax)), Format: tar.FormatUSTAR}, {Typeflag: tar.TypeReg, Name: "stargz.index.json", Size: 1}} {
		if h.Typeflag == 'x' {
			// archive/tar writes no headers of this type: make it from a file's.
			h.Typeflag = tar.TypeReg
			start := b.Len()
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			block := b.Bytes()[start:][:512]
			block[156] = 'x'
			sum := 0
			copy(block[148:], "        ")
			for _, c := range block {
				sum += int(c)
			}
			copy(block[148:], fmt.Sprintf("%06o\x00 ", sum))
			imagetest.Must(io.WriteString(w, pax))
			continue
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		imagetest.Must(w.Write([]byte("x")))
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	blob := bytes.NewBuffer(make([]byte, tarLen))
	z := gzip.NewWriter(blob)
	imagetest.Must(z.Write(b.Bytes()))
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := readInsecure(append(blob.Bytes(), stargzFooter(tarLen)...)); err == nil || !strings.Contains(err.Error(), "sparse") {
		t.Errorf("got %v", err)
	}
}

// A flipped bit anywhere in the TOC is found out by its digest.
func TestFlippedBits(t *testing.T) {
	for _, write := range []func([]byte, imagetest.Options) (*imagetest.Blob, error){imagetest.EStargz, imagetest.ZstdChunked, imagetest.ContainersZstdChunked} {
		b := imagetest.Must(write(sample(), imagetest.Options{}))
		good := imagetest.Must(read(b))
		rnd := rand.New(rand.NewPCG(1, 2))
		for range 300 {
			i, bit := len(b.Data)-1-rnd.IntN(2000), byte(1)<<rnd.IntN(8)
			b.Data[i] ^= bit
			if x, err := read(b); err == nil && x.Digest != good.Digest {
				t.Fatalf("byte %d changed: another TOC was accepted", i)
			}
			b.Data[i] ^= bit
		}
	}
}
