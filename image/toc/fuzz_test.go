package toc_test

import (
	"bytes"
	"encoding/json"
	"maps"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// TOCs of real writers, and of each kind of trouble.
func seedTexts() []string {
	return []string{
		entriesJSON("type:dir name:a mode:493\ntype:reg name:a/b size:5 offset:10 digest:D1 modtime:2026-01-02T03:04:05Z"),
		entriesJSON(`type:reg name:a size:30 offset:10 endOffset:40 digest:D1 chunkSize:10 chunkDigest:D2
			type:chunk name:a chunkOffset:10 chunkSize:10 offset:20 chunkDigest:D2 chunkType:zeros
			type:chunk name:a chunkOffset:20 chunkSize:10 offset:30 chunkDigest:D2
			type:hardlink name:b linkName:a`),
		entriesJSON("type:reg name:.prefetch.landmark size:1 offset:20\ntype:reg name:b size:5 offset:10 innerOffset:5 digest:D2\ntype:reg name:c size:5 offset:10 digest:D1"),
		entriesJSON(`type:char name:a devMajor:1 devMinor:3 xattrs:{"user.a":"AAEC"} uid:1 gid:2` + "\ntype:symlink name:b linkName:c\ntype:fifo name:p\ntype:block name:q"),
		`{"version":1,"entries":[{"name":"\ud83d\ude00\u0000` + "\xff" + `","type":"dir","x":[1,-2.5e7,true,null,{"y":"z"}]}]}`,
	}
}

// FuzzTOC feeds texts that the digest vouches for.
func FuzzTOC(f *testing.F) {
	for _, text := range seedTexts() {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		x, err := readInsecure(estargzOf(string(text)))
		if err != nil {
			return
		}
		checkTOC(t, x, tarLen)
		if !json.Valid(text) {
			t.Fatalf("read what is no JSON: %q", text)
		}
		y, err := readInsecure(zstdOf(text, len(text)))
		if err != nil {
			t.Fatalf("as zstd:chunked: %v", err)
		}
		if y.Digest != x.Digest || len(y.Entries) != len(x.Entries) {
			t.Fatalf("eStargz and zstd:chunked differ")
		}
	})
}

func fuzzBlob(t *testing.T, blob []byte, annotations map[string]string) {
	for _, o := range []toc.Options{{InsecureTOC: true}, {Annotations: annotations}} {
		x, err := toc.Read(bytes.NewReader(blob), int64(len(blob)), o)
		if err == nil {
			checkTOC(t, x, int64(len(blob)))
		}
	}
}

// FuzzEStargz feeds whole blobs.
func FuzzEStargz(f *testing.F) {
	for _, o := range []imagetest.Options{{}, {ChunkSize: 1000}, {MinChunkSize: 1 << 20, Prioritized: []string{"a"}}} {
		b := imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.Dir("d"), imagetest.File("a", "x"), imagetest.Random("b", 3000, 1))), o))
		f.Add(b.Data)
		f.Add(imagetest.Must(imagetest.LegacyFooter(b)).Data)
	}
	for _, text := range seedTexts() {
		f.Add(estargzOf(text))
	}
	f.Fuzz(func(t *testing.T, blob []byte) { fuzzBlob(t, blob, nil) })
}

// FuzzZstdChunked feeds whole blobs, and positions.
func FuzzZstdChunked(f *testing.F) {
	position := "io.github.containers.zstd-chunked.manifest-position"
	for _, write := range []func([]byte, imagetest.Options) (*imagetest.Blob, error){imagetest.ZstdChunked, imagetest.ContainersZstdChunked} {
		b := imagetest.Must(write(imagetest.Must(imagetest.Tar(imagetest.File("a", "x"), imagetest.Random("b", 3000, 1))), imagetest.Options{ChunkSize: 1000}))
		f.Add(b.Data, b.Desc.Annotations[position])
	}
	blob, annotations := containersStorage(f)
	f.Add(blob, annotations[position])
	for _, text := range seedTexts() {
		f.Add(zstdOf([]byte(text), len(text)), "")
	}
	f.Fuzz(func(t *testing.T, blob []byte, pos string) {
		annotations := maps.Clone(annotations)
		annotations[position] = pos
		fuzzBlob(t, blob, annotations)
	})
}
