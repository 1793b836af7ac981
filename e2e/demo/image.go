package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// A link is the registry with the image, and the wire to it.
type link struct {
	*registrytest.Registry
	reference string
	files     int
	compare   treediff.Options
}

// Bytes returns how many bytes of bodies have gone over the wire.
func (l *link) Bytes() int64 { return l.Counts().Bytes }

// serveImage makes an eStargz image of the folder tree and serves it over a
// link of that speed and round trip.
func serveImage(ctx context.Context, tree, tmp string, mbit float64, latency time.Duration) (*link, error) {
	step("Making an eStargz image of %s", tree)
	begin := time.Now()
	path := filepath.Join(tmp, "layer.tar")
	files, err := writeTar(ctx, path, tree)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	// A light level: the demo is about what comes after.
	blob, err := imagetest.BuildEStargz(io.NewSectionReader(f, 0, fi.Size()), imagetest.Options{Level: 3, Workers: runtime.NumCPU()})
	if err != nil {
		return nil, fmt.Errorf("make the layer: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return nil, err
	}
	image, err := imagetest.Image(blob)
	if err != nil {
		return nil, err
	}
	reg, err := registrytest.New(registrytest.Options{
		Link: registrytest.Link{Latency: latency, BytesPerSecond: int64(mbit * 1e6 / 8)},
	})
	if err != nil {
		return nil, err
	}
	for d, b := range image.Blobs {
		reg.Add(d, bytes.NewReader(b), int64(len(b)))
	}
	reg.AddManifest("demo/go", "latest", image.Desc.MediaType, image.Raw)
	fmt.Printf("    %d files, %.0f MB; compressed %.0f MB; took %.1f s\n",
		files, float64(fi.Size())/1e6, float64(len(blob.Data))/1e6, time.Since(begin).Seconds())
	fmt.Printf("    a registry in this process serves it at %g Mbit/s with a round trip of %v\n", mbit, latency)
	return &link{Registry: reg, reference: "docker://" + reg.Host() + "/demo/go:latest", files: files,
		// eStargz has times of whole seconds, and a file's further names may
		// lie outside of the tree.
		compare: treediff.Options{MtimeSlack: time.Second, Without: treediff.Nlink}}, nil
}

// writeTar writes the tree as a tar with times of whole seconds, which is what
// eStargz can tell, and returns how many names it has.
func writeTar(ctx context.Context, path, tree string) (files int, err error) {
	f, err := os.Create(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	w := tar.NewWriter(f)
	names := map[[2]uint64]string{} // of files that have several, by device and inode
	err = filepath.WalkDir(tree, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		target := ""
		if fi.Mode()&fs.ModeSymlink != 0 {
			if target, err = os.Readlink(p); err != nil {
				return err
			}
		}
		h, err := tar.FileInfoHeader(fi, target)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(tree, p)
		if err != nil {
			return err
		}
		h.Name = filepath.ToSlash(rel)
		if d.IsDir() {
			h.Name += "/"
		}
		h.ModTime = h.ModTime.Truncate(time.Second)
		if st := fi.Sys().(*syscall.Stat_t); st.Nlink > 1 && fi.Mode().IsRegular() {
			id := [2]uint64{st.Dev, st.Ino}
			if first, ok := names[id]; ok {
				h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			} else {
				names[id] = h.Name
			}
		}
		files++
		if err := w.WriteHeader(h); err != nil || h.Typeflag != tar.TypeReg {
			return err
		}
		in, err := os.Open(p)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(w, in)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("pack %s: %w", tree, err)
	}
	if err := w.Close(); err != nil {
		return 0, err
	}
	return files, f.Close()
}
