package store

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// Two images that share 90 % of their bytes: the second costs at most 12 % of
// them on the wire and on disk, whether they share a layer, files that are
// scattered over one layer, or the chunks of one large file.
func TestShareMost(t *testing.T) {
	const n, size = 200, 100_000
	for name, c := range map[string]struct {
		layers func(release int) [][]file
		fs     []string // where the store is; what is cut elsewhere shares blocks where it can
		disk   float64  // share that it may cost
	}{
		"a layer": {func(release int) [][]file {
			return [][]file{files("usr", 60, n*9/10, size), files("opt", uint64(61+release), n/10, size)}
		}, nil, 0.12},
		"files in one layer": {func(release int) [][]file {
			all := files("usr", 60, n, size)
			for i := range all {
				if i%10 == 3 {
					all[i].seed += uint64(release) << 40
				}
			}
			return [][]file{all}
		}, nil, 0.12},
		"folders in one layer": {func(release int) [][]file {
			var all []file
			for d := range 20 {
				dir := files(fmt.Sprintf("usr/d%02d", d), uint64(100+d), n/20, size)
				if d%10 == 5 {
					for i := range dir {
						dir[i].seed += uint64(release) << 40
					}
				}
				all = append(all, dir...)
			}
			return [][]file{all}
		}, nil, 0.12},
		"a large file": {nil, []string{"mkfs.xfs", "-q"}, 0.12},
	} {
		t.Run(name, func(t *testing.T) {
			b, r := newBench(t), serve(t)
			if c.fs != nil {
				b.onFilesystem(600, c.fs...)
			}
			var images [2]built
			for i := range images {
				if c.layers != nil {
					images[i] = push(t, r, fmt.Sprintf("s%d", i), 0, c.layers(i)...)
				} else {
					images[i] = pushLarge(t, r, fmt.Sprintf("s%d", i), i)
				}
			}
			var total int64
			for _, s := range images[1].blobs {
				total += s
			}
			var wire, disk [2]int64
			for i, img := range images {
				before, used := r.Counts().Bytes, b.used()
				p := b.mount(img.name, "--swap", "never")
				b.waitFor("sealed", p)
				wire[i], disk[i] = r.Counts().Bytes-before, b.used()-used
				if err := readAll(p, img); err != nil {
					t.Error(err)
				}
				b.must("umount", p)
			}
			t.Logf("first: %d KiB on the wire, %d on disk; second: %d (%.1f %%), %d (%.1f %%)", wire[0]>>10, disk[0]>>10,
				wire[1]>>10, 100*float64(wire[1])/float64(total), disk[1]>>10, 100*float64(disk[1])/float64(disk[0]))
			if float64(wire[1]) > 0.12*float64(total) {
				t.Errorf("%d of %d bytes were fetched", wire[1], total)
			}
			if float64(disk[1]) > c.disk*float64(disk[0]) {
				t.Errorf("%d bytes on disk, the first had %d", disk[1], disk[0])
			}
		})
	}
}

// used is what the filesystem of the store has in use if it is its own, else
// what the store's files take.
func (b *bench) used() int64 {
	if filepath.Dir(b.root) == b.dir {
		return sizeOf(b.root)
	}
	var st unix.Statfs_t
	f, err := os.Open(filepath.Dir(b.root))
	if err != nil {
		b.t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		b.t.Fatal(err)
	}
	if err := unix.Fstatfs(int(f.Fd()), &st); err != nil {
		b.t.Fatal(err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

// pushLarge pushes an image of one file of 40 MiB in chunks of 1 MiB, four of
// which are the release's own.
func pushLarge(t testing.TB, r *registrytest.Registry, name string, release int) built {
	t.Helper()
	var data []byte
	for i := range 40 {
		seed := uint64(5000 + i)
		if i >= 20 && i < 24 {
			seed += uint64(release+1) << 32
		}
		data = append(data, imagetest.RandomBytes(1<<20, seed)...)
	}
	blob := imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.File("large", string(data)))), imagetest.Options{ChunkSize: 1 << 20, Level: 1}))
	o := imagetest.Must(imagetest.Image(blob))
	for d, data := range o.Blobs {
		r.Add(d, bytes.NewReader(data), int64(len(data)))
	}
	r.AddManifest(name, "latest", o.Desc.MediaType, o.Raw)
	return built{
		name: "docker://" + r.Host() + "/" + name + ":latest", blobs: map[string]int64{blob.Desc.Digest.String(): blob.Desc.Size},
		files: []file{{name: "large", fixed: data}},
	}
}
