package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// measurePull pulls the image as gzip layers, runs the application on it, and
// then reads it.
func (b *bench) measurePull(ctx context.Context) (s sample, err error) {
	dir, root := b.work, filepath.Join(b.work, "root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return s, err
	}
	used, err := ownCPU()
	if err != nil {
		return s, err
	}
	start, before := time.Now(), b.reg.Counts().Bytes
	if err := b.pull(ctx, dir, root); err != nil {
		return s, err
	}
	if s.cpu, err = ownCPU(); err != nil {
		return s, err
	}
	s.cpu -= used
	defer func() { err = errors.Join(err, unix.Unmount(root, 0)) }()
	s.local, s.mounted = time.Since(start), time.Since(start)
	app, err := b.startApp(root)
	if err != nil {
		return s, err
	}
	defer app.stop()
	if s.modules, err = app.answer(ctx, b.page()); err != nil {
		return s, err
	}
	s.answer, s.bytes = time.Since(start), b.reg.Counts().Bytes-before
	begin := time.Now()
	if err := readAll(ctx, root); err != nil {
		return s, err
	}
	s.tar = s.local + time.Since(begin)
	return s, nil
}

// ownCPU is the processor time of this process, with the registry in it, and of
// the programs that it ran and that have ended.
func ownCPU() (time.Duration, error) {
	var all time.Duration
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			return 0, fmt.Errorf("getrusage: %w", err)
		}
		all += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return all, nil
}

// pull does what a container runtime does: manifest, configuration, all layers
// at once, each checked and then unpacked by a tar of its own into a folder of
// its own; whiteouts become those of overlayfs, which makes one tree of them
// at root.
func (b *bench) pull(ctx context.Context, dir, root string) error {
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
	defer client.CloseIdleConnections()
	base := "http://" + b.reg.Host() + "/v2/" + repository
	raw, err := get(ctx, client, base+"/manifests/"+images.Plain, nil)
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		_, err := get(ctx, client, base+"/blobs/"+m.Config.Digest.String(), nil)
		return err
	})
	lowers := make([]string, len(m.Layers))
	for i, l := range m.Layers {
		blob, tree := filepath.Join(dir, "blob"+strconv.Itoa(i)), filepath.Join(dir, "l"+strconv.Itoa(i))
		lowers[len(m.Layers)-1-i] = tree // overlayfs has the topmost first
		g.Go(func() error {
			if err := os.Mkdir(tree, 0o755); err != nil {
				return err
			}
			if err := download(ctx, client, base+"/blobs/"+l.Digest.String(), blob, l.Digest); err != nil {
				return err
			}
			_, err := output(ctx, "tar", "--extract", "--gzip", "--file", blob, "--directory", tree, "--numeric-owner",
				"--same-owner", "--preserve-permissions", "--xattrs", "--xattrs-include=*")
			if err != nil {
				return err
			}
			return whiteouts(tree)
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := unix.Mount("overlay", root, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lowers, ":")); err != nil {
		return fmt.Errorf("stack the layers: %w", err)
	}
	return nil
}

func download(ctx context.Context, client *http.Client, url, path string, want digest.Digest) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := get(ctx, client, url, io.MultiWriter(f, h)); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, h); got != want {
		return fmt.Errorf("get %s: its digest is %s", url, got)
	}
	return f.Close()
}

// get gets a URL into w, or returns it when w is nil.
func get(ctx context.Context, client *http.Client, url string, w io.Writer) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("get %s: %s", url, resp.Status)
	}
	if w == nil {
		return io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	}
	_, err = io.CopyBuffer(struct{ io.Writer }{w}, resp.Body, make([]byte, 256<<10))
	return nil, err
}

// whiteouts turns the whiteouts of a layer (OCI image-spec, layer.md) into
// those of overlayfs.
func whiteouts(tree string) error {
	const opaque = ".wh..wh..opq"
	return filepath.WalkDir(tree, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasPrefix(d.Name(), ".wh.") {
			return err
		}
		if err := os.Remove(path); err != nil {
			return err
		}
		dir := filepath.Dir(path)
		if d.Name() == opaque {
			return unix.Setxattr(dir, "trusted.overlay.opaque", []byte("y"), 0)
		}
		return unix.Mknod(filepath.Join(dir, strings.TrimPrefix(d.Name(), ".wh.")), unix.S_IFCHR, 0)
	})
}

// readAll reads the whole tree below root by tar.
func readAll(ctx context.Context, root string) error {
	out, err := output(ctx, "sh", "-c", `tar --directory "$1" --create --file - . | wc --bytes`, "sh", root)
	if err != nil {
		return err
	}
	if n, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64); err != nil || n < 400e6 {
		return fmt.Errorf("tar read %q bytes of %s, and the image has more than 400 MB", slices.Clone(out), root)
	}
	return nil
}
