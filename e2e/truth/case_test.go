package truth

import (
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// A testCase is an image of some layers.
type testCase struct {
	name   string
	layers [][]imagetest.Item
	form   form

	// loose names what is not compared at a path, and why: what the reference
	// does not say.
	loose    map[string]treediff.Attr
	looseWhy string
	// fix, if set, adds to the reference what umoci leaves out, and why.
	fix    func(root string) error
	fixWhy string
	// noStack is why overlayfs is not asked: layers it cannot stack.
	noStack string
	// bareRoot leaves out the entry of the root that the lowest layer gets.
	bareRoot bool
	// guest makes the case one of those that run in the machine too.
	guest bool
	// large runs the case alone, and on the disk, not in a tmpfs.
	large bool
}

// A form is how layers are written for cfs-fuse.
type form int

const (
	eStargz    form = iota // times of whole seconds
	containers             // zstd:chunked as Podman writes it: with nanoseconds
	zstdStargz             // zstd:chunked as stargz-snapshotter writes it
	ordinary               // gzip without a table of contents
)

func (f form) String() string {
	return [...]string{"eStargz", "zstd:chunked (Podman)", "zstd:chunked (stargz)", "gzip without a table of contents"}[f]
}

// The words that cases are written in.
var (
	file     = imagetest.File
	dir      = imagetest.Dir
	symlink  = imagetest.Symlink
	link     = imagetest.Hardlink
	char     = imagetest.Char
	block    = imagetest.Block
	fifo     = imagetest.Fifo
	whiteout = imagetest.Whiteout
	opaque   = imagetest.Opaque
	random   = imagetest.Random
	sparse   = imagetest.Sparse
	mode     = imagetest.Mode
	owner    = imagetest.Owner
	mtime    = imagetest.Mtime
	xattr    = imagetest.Xattr
)

// L is a layer, layers are those of an image, the lowest first.
func L(items ...imagetest.Item) []imagetest.Item        { return items }
func layers(all ...[]imagetest.Item) [][]imagetest.Item { return all }
func each[T any](n int, f func(int) T) (all []T) {
	for i := range n {
		all = append(all, f(i))
	}
	return all
}

// acl is the value of a POSIX ACL (linux/posix_acl_xattr.h) with an entry for
// a user and one for a group beside the owner's.
func acl(uid, gid uint32) string {
	b := binary.LittleEndian.AppendUint32(nil, 2)
	for _, e := range []struct {
		tag, perm uint16
		id        uint32
	}{{1, 6, ^uint32(0)}, {2, 7, uid}, {4, 4, ^uint32(0)}, {8, 5, gid}, {16, 7, ^uint32(0)}, {32, 0, ^uint32(0)}} {
		b = binary.LittleEndian.AppendUint16(b, e.tag)
		b = binary.LittleEndian.AppendUint16(b, e.perm)
		b = binary.LittleEndian.AppendUint32(b, e.id)
	}
	return string(b)
}

// capability is the value of security.capability (linux/capability.h, version
// 2) with the given permitted set, effective.
func capability(permitted uint64) string {
	b := binary.LittleEndian.AppendUint32(nil, 0x02000001)
	for _, v := range []uint32{uint32(permitted), 0, uint32(permitted >> 32), 0} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	return string(b)
}

// items are a layer's, with the root's entry in the lowest.
func (c *testCase) items(layer int) []imagetest.Item {
	if layer > 0 || c.bareRoot {
		return c.layers[layer]
	}
	return append(L(dir(".", mode(0o755))), c.layers[0]...)
}

// A written layer is its tar, in a file.
type writtenLayer struct {
	f    *os.File
	size int64
}

func (w *writtenLayer) section() *io.SectionReader { return io.NewSectionReader(w.f, 0, w.size) }

// writeLayer writes a tar to a new file in dir.
func writeLayer(dir string, items []imagetest.Item) (*writtenLayer, error) {
	f, err := os.CreateTemp(dir, "layer*.tar")
	if err != nil {
		return nil, err
	}
	if err := imagetest.WriteTar(f, items...); err != nil {
		return nil, err
	}
	size, err := f.Seek(0, io.SeekCurrent)
	return &writtenLayer{f, size}, err
}

// writeImages writes the image twice below dir, from the same tars: "lazy"
// for cfs-fuse and "plain" for umoci. Their tags are "t".
func (c *testCase) writeImages(work string) error {
	var lazy, plain []*imagetest.Blob
	for i := range c.layers {
		w, err := writeLayer(work, c.items(i))
		if err != nil {
			return err
		}
		l, err := c.form.blob(w)
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		p, err := imagetest.BuildGzip(w.section())
		w.f.Close()
		if err != nil {
			return fmt.Errorf("layer %d: %w", i, err)
		}
		lazy, plain = append(lazy, l), append(plain, p)
	}
	for name, blobs := range map[string][]*imagetest.Blob{"lazy": lazy, "plain": plain} {
		im, err := imagetest.Image(blobs...)
		if err != nil {
			return err
		}
		if err := im.WriteLayout(filepath.Join(work, name), "t"); err != nil {
			return err
		}
	}
	return nil
}

func (f form) blob(w *writtenLayer) (*imagetest.Blob, error) {
	if f == eStargz {
		return imagetest.BuildEStargz(w.section(), imagetest.Options{Level: 1})
	}
	if f == ordinary {
		return imagetest.BuildGzip(w.section())
	}
	data, err := io.ReadAll(w.section())
	if err != nil {
		return nil, err
	}
	if f == zstdStargz {
		return imagetest.ZstdChunked(data, imagetest.Options{})
	}
	return imagetest.ContainersZstdChunked(data, imagetest.Options{})
}

// isWhiteout says what a tar's entry hides: a name, or everything in a folder.
func isWhiteout(name string) (hidden string, isOpaque, ok bool) {
	parent, base := filepath.Split(clean(name))
	if base == ".wh..wh..opq" {
		return strings.TrimSuffix(parent, "/"), true, true
	}
	hidden, ok = strings.CutPrefix(base, ".wh.")
	return parent + hidden, false, ok
}

// clean is a path of a tar without "./" and slashes at its ends; the root is "".
func clean(name string) string { return strings.TrimPrefix(filepath.Clean("/"+name), "/") }
