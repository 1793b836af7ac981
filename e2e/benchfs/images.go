package main

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"runtime/debug"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// What the image of files holds.
const (
	bigSize    = 1 << 30
	smallFiles = 50_000
	smallSize  = 4096
	entries    = 100_000
	million    = 1_000_000
)

func smallName(i int) string { return fmt.Sprintf("small/d%03d/f%05d", i/250, i) }

// layout writes an image of one layer, made by write, and returns its source.
func (b *bench) layout(name string, chunk int, write func(*tar.Writer) error) (string, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := write(w); err != nil {
		return "", err
	}
	if err := w.Close(); err != nil {
		return "", err
	}
	blob, err := imagetest.ContainersZstdChunked(buf.Bytes(), imagetest.Options{ChunkSize: chunk})
	if err != nil {
		return "", err
	}
	oci, err := imagetest.Image(blob)
	if err != nil {
		return "", err
	}
	if err := oci.WriteLayout(b.path(name), "latest"); err != nil {
		return "", err
	}
	buf = bytes.Buffer{}
	blob, oci = nil, nil
	debug.FreeOSMemory()
	return "oci:" + b.path(name) + ":latest", nil
}

func put(w *tar.Writer, name string, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

// fileImage has one big file, many small ones that all differ, and a tree of
// many names.
func (b *bench) fileImage() (string, error) {
	return b.layout("image", 1<<20, func(w *tar.Writer) error {
		big := make([]byte, b.sized(bigSize))
		for i := 0; i+8 <= len(big); i += 8 { // no two pages alike, and soon compressed
			binary.LittleEndian.PutUint64(big[i:], uint64(i/4096))
		}
		if err := put(w, "big", big); err != nil {
			return err
		}
		rng := rand.NewChaCha8([32]byte{1})
		data := make([]byte, smallSize)
		for i := range b.sized(smallFiles) {
			rng.Read(data)
			if err := put(w, smallName(i), data); err != nil {
				return err
			}
		}
		// A tree as in images: some twenty files to a folder, two levels, a
		// tenth of them empty.
		for i := range b.sized(entries) {
			text := fmt.Appendf(nil, "content %d", i%1000)
			if i%10 == 0 {
				text = nil
			}
			if err := put(w, fmt.Sprintf("entries/d%02d/d%04d/name-of-a-file-%06d", i/2000, i/20, i), text); err != nil {
				return err
			}
		}
		return nil
	})
}

// millionImage has a million files, each with bytes of its own.
func (b *bench) millionImage() (string, error) {
	return b.layout("image-million", 0, func(w *tar.Writer) error {
		for i := range b.sized(million) {
			if err := put(w, fmt.Sprintf("d%03d/d%05d/file-%07d", i/10_000, i/100, i), fmt.Appendf(nil, "bytes of file %d", i)); err != nil {
				return err
			}
		}
		return nil
	})
}
