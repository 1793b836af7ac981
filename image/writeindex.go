package image

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
)

// A source is the file that a content's chunks are taken from.
type source struct {
	node *Node
	path string // in the tree; for errors
}

// before reports whether a is to be preferred to b, which has the same
// content: the lower layer's, there what comes first in the blob. Among files
// that are all holes it does not matter.
func (a source) before(b source) bool {
	return cmp.Or(
		cmp.Compare(a.node.Layer, b.node.Layer),
		cmp.Compare(a.node.Chunks[0].BlobOffset, b.node.Chunks[0].BlobOffset),
		cmp.Compare(a.node.Chunks[0].InnerOffset, b.node.Chunks[0].InnerOffset),
	) < 0
}

// sources finds every content of the tree, in the order of digests.
func sources(t *Tree, layers []Layer) ([]source, error) {
	found := make(map[Digest]source)
	var path []string
	var walk func(dir *Node) error
	walk = func(dir *Node) error {
		for _, n := range dir.Children {
			path = append(path, n.Name)
			if n.IsDir() {
				if err := walk(n); err != nil {
					return err
				}
			} else if n.IsReg() && n.Size > 0 {
				s := source{n, strings.Join(path, "/")}
				old, ok := found[n.Content]
				if ok && old.node.Size != n.Size {
					return &EntryError{n.Layer, layers[n.Layer].Digest, s.path, fmt.Errorf("it has %d bytes and the digest %s, which %q of layer %d claims for %d bytes",
						n.Size, n.Content, old.path, old.node.Layer, old.node.Size)}
				}
				if !ok || s.before(old) {
					found[n.Content] = s
				}
			}
			path = path[:len(path)-1]
		}
		return nil
	}
	if err := walk(t.Root); err != nil {
		return nil, err
	}
	all := make([]source, 0, len(found))
	for _, s := range found {
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b source) int { return bytes.Compare(a.node.Content[:], b.node.Content[:]) })
	return all, nil
}

// WriteIndex writes the "chunks" file of the tree t that Merge made of layers:
// each content once, from the lowest layer that shows it. Two files that claim
// one digest for contents of different sizes are an *EntryError. A nil error
// promises that OpenIndex takes what was written; it says nothing of the disk.
func WriteIndex(w io.Writer, t *Tree, layers []Layer) error {
	contents, err := sources(t, layers)
	if err != nil {
		return fmt.Errorf("write chunk index: %w", err)
	}
	var chunks []Chunk
	for i, s := range contents {
		for _, c := range s.node.Chunks {
			chunks = append(chunks, Chunk{c, s.node.Layer, i})
		}
	}
	if len(chunks) > math.MaxUint32 || len(layers) > math.MaxUint32 {
		return errors.New("write chunk index: too many chunks")
	}
	slices.SortFunc(chunks, Chunk.compare)

	sum := sha256.New()
	b := bufio.NewWriterSize(io.MultiWriter(w, sum), 64<<10)
	writeTables(b, layers, contents, chunks)
	if err := b.Flush(); err != nil {
		return fmt.Errorf("write chunk index: %w", err)
	}
	if _, err := w.Write(sum.Sum(nil)); err != nil {
		return fmt.Errorf("write chunk index: %w", err)
	}
	return nil
}

// writeTables writes all but the trailer. A failed write stays with b.
func writeTables(b *bufio.Writer, layers []Layer, contents []source, chunks []Chunk) {
	u32 := func(n int) { b.Write(le.AppendUint32(b.AvailableBuffer(), uint32(n))) }
	u64 := func(n int64) { b.Write(le.AppendUint64(b.AvailableBuffer(), uint64(n))) }

	b.WriteString(indexMagic)
	u32(indexVersion)
	u32(len(layers))
	u32(len(contents))
	u32(len(chunks))
	u64(0)

	for _, l := range layers {
		b.Write(l.Digest[:])
		u64(l.Size)
		u64(l.TOC.PrefetchEnd)
		b.WriteByte(byte(l.TOC.Compression))
		b.Write(make([]byte, layerSize-49))
	}

	firsts := make([]int, len(contents))
	first := 0
	for i, s := range contents {
		b.Write(s.node.Content[:])
		u64(s.node.Size)
		u32(first)
		u32(len(s.node.Chunks))
		firsts[i] = first
		first += len(s.node.Chunks)
	}

	// The chunks of a content are found in the file's order by sorting their
	// numbers, which are in the blob's.
	refs := make([]int, len(chunks))
	filled := make([]int, len(contents))
	for j, c := range chunks {
		refs[firsts[c.Content]+filled[c.Content]] = j
		filled[c.Content]++
	}
	for i := range contents {
		own := refs[firsts[i]:][:filled[i]]
		slices.SortFunc(own, func(a, b int) int { return cmp.Compare(chunks[a].FileOffset, chunks[b].FileOffset) })
		for _, j := range own {
			u32(j)
		}
	}

	for _, c := range chunks {
		u64(c.BlobOffset)
		u64(c.BlobEnd)
		u64(c.InnerOffset)
		u64(c.FileOffset)
		u64(c.Size)
		u32(c.Layer)
		u32(c.Content)
		b.Write(c.Digest[:])
	}
}
