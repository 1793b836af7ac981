package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/zstdchunked"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// maxMembers bounds the members of a tar that are kept in memory.
const maxMembers = 4 << 20

// An archive is a layer's tar, and what is where in it.
type archive struct {
	f       *os.File
	size    int64
	end     int64 // of the last member; padding follows
	members []member
	names   map[string]int // the last member of each name
	twice   map[string]bool
	global  bool // a header in it is for all members after it

	files  map[image.Digest]int          // the first member with a content
	verity map[image.Digest]image.Digest // of each content
}

// A member is the bytes [start, end) of the tar: headers, content, padding.
type member struct {
	name       string // clean, relative to the root, which is ""
	link       string // of a hard link: likewise
	start, end int64
	size       int64 // of the content
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// scan reads a tar of size bytes. With digests, it reads all contents for
// their SHA-256, and with seal for their fs-verity digests.
func scan(ctx context.Context, f *os.File, size int64, digests, seal bool) (*archive, error) {
	a := &archive{f: f, size: size, names: map[string]int{}, twice: map[string]bool{}}
	if digests {
		a.files = map[image.Digest]int{}
	}
	if seal {
		a.verity = map[image.Digest]image.Digest{}
	}
	// archive/tar reads no further than it must, and seeks over the rest.
	in := io.NewSectionReader(f, 0, size)
	tr := tar.NewReader(in)
	buf := make([]byte, 256<<10)
	for {
		if err := ctx.Err(); err != nil {
			return nil, context.Cause(ctx)
		}
		h, err := tr.Next()
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return nil, err
		}
		if err := a.add(h, in, tr, buf); err != nil {
			return nil, fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
}

func (a *archive) add(h *tar.Header, in io.Seeker, tr io.Reader, buf []byte) error {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse") {
			h.Typeflag = tar.TypeGNUSparse
		}
	}
	if h.Typeflag == tar.TypeGNUSparse {
		return hint.Wrap(zstdchunked.ErrSparse, "build the layer without sparse files (tar without --sparse)")
	}
	if len(a.members) == maxMembers {
		return fmt.Errorf("more than %d entries in a layer", maxMembers)
	}
	pos, err := in.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	m := member{name: clean(h.Name), start: a.end, end: pos}
	switch h.Typeflag {
	case tar.TypeLink:
		m.link = clean(h.Linkname)
	case tar.TypeXGlobalHeader:
		a.global = true
	case tar.TypeDir, tar.TypeSymlink, tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
	default: // all others have content, for archive/tar too
		m.size = h.Size
		m.end = pos + (h.Size+511)/512*512
		if m.end > a.size && pos+h.Size > a.size {
			return io.ErrUnexpectedEOF
		}
	}
	i := len(a.members)
	a.members, a.end = append(a.members, m), m.end
	if _, ok := a.names[m.name]; ok {
		a.twice[m.name] = true
	}
	a.names[m.name] = i
	if a.files == nil || m.size == 0 {
		return nil
	}
	var to io.Writer
	sum := sha256.New()
	to = sum
	var v *verity.Hash
	if a.verity != nil {
		v = verity.New(verity.SHA256)
		to = io.MultiWriter(sum, v)
	}
	if n, err := io.CopyBuffer(to, tr, buf); err != nil {
		return err
	} else if n != m.size {
		return io.ErrUnexpectedEOF
	}
	d := image.Digest(sum.Sum(nil))
	if _, ok := a.files[d]; !ok {
		a.files[d] = i
	}
	if v != nil {
		a.verity[d] = image.Digest(v.Sum())
	}
	return nil
}

// maxUnread is how much of a file that a start reads a part of may be fetched
// for nothing, in bytes: of larger ones the profile's parts are fetched by
// themselves.
const maxUnread = 8 << 20

// wanted returns the names of the files that the profile has, in its order.
func (a *archive) wanted(p *image.Profile) []string {
	if p == nil {
		return nil
	}
	read := map[int]int64{}
	var order []int
	for _, x := range p.Accesses {
		i, ok := a.files[x.Content]
		if !ok || a.twice[a.members[i].name] {
			continue
		}
		if _, ok := read[i]; !ok {
			order = append(order, i)
		}
		read[i] += min(x.N, a.members[i].size)
	}
	var names []string
	for _, i := range order {
		if a.members[i].size-read[i] <= maxUnread {
			names = append(names, a.members[i].name)
		}
	}
	return names
}

// ordered returns the tar with the named files in front, before a landmark (as
// estargz has it), each after the directories on its path. Nothing of the
// members changes. What an eStargz layer had for itself is left out, and so is
// a member that another one of its name replaces later: tar-split knows no
// such tars. Without names, and with nothing left out, it is the tar as it is.
func (a *archive) ordered(first []string) (io.Reader, error) {
	if a.global {
		first = nil // an order in which headers mean something
	}
	gone := func(i int) bool {
		m := a.members[i]
		return a.names[m.name] != i || m.name == estargz.TOCTarName || m.name == estargz.PrefetchLandmark || m.name == estargz.NoPrefetchLandmark
	}
	var parts []io.Reader
	put := func(m member) { parts = append(parts, io.NewSectionReader(a.f, m.start, m.end-m.start)) }
	moved := map[int]bool{}
	var move func(name string, depth int)
	move = func(name string, depth int) {
		i, ok := a.names[name]
		if !ok || moved[i] || a.twice[name] || depth > 4096 {
			return
		}
		if name != "" {
			move(clean(path.Dir("/"+name)), depth+1)
		}
		if l := a.members[i].link; l != "" && l != name {
			move(l, depth+1)
		}
		if !moved[i] {
			moved[i] = true
			put(a.members[i])
		}
	}
	for _, name := range first {
		move(name, 0)
	}
	if len(first) > 0 {
		mark, err := landmark()
		if err != nil {
			return nil, err
		}
		parts = append(parts, bytes.NewReader(mark))
	}
	start := int64(-1) // of members that stay together
	flush := func(end int64) {
		if start >= 0 && end > start {
			parts = append(parts, io.NewSectionReader(a.f, start, end-start))
		}
		start = -1
	}
	for i, m := range a.members {
		if moved[i] || gone(i) {
			flush(m.start)
		} else if start < 0 {
			start = m.start
		}
	}
	if start < 0 {
		start = a.end
	}
	flush(a.size)
	return io.MultiReader(parts...), nil
}

// landmark is the tar member that ends the prioritized files
// (stargz-snapshotter, docs/estargz.md, "Prioritized Files and Landmark Files").
func landmark() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: estargz.PrefetchLandmark, Size: 1})
	if err == nil {
		_, err = w.Write([]byte{0xf}) // estargz's landmarkContents
	}
	if err = errors.Join(err, w.Flush()); err != nil {
		return nil, fmt.Errorf("make the landmark: %w", err)
	}
	return b.Bytes(), nil
}
