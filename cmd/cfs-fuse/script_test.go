package main

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

var updateScripts = flag.Bool("update-scripts", false, "write what the commands print into the scripts of testdata/script")

// TestScripts runs the scripts of testdata/script (testscript's language). Each
// has the program as cfs-fuse, the images of scriptImages as oci:img/TAG and in
// a registry of its own, $REGISTRY/app:TAG, and a store. Besides testscript's
// commands there is
//
//	fetched REQUESTS BYTES   fails if more was asked of the registry since the last call
func TestScripts(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	images := scriptImages()
	testscript.Run(t, testscript.Params{
		Dir:           "testdata/script",
		UpdateScripts: *updateScripts,
		Setup: func(env *testscript.Env) error {
			r, err := registrytest.New(registrytest.Options{})
			if err != nil {
				return err
			}
			env.Defer(r.Close)
			before := r.Counts()
			env.Values["counts"] = func() registrytest.Counts {
				now := r.Counts()
				n := registrytest.Counts{Requests: now.Requests - before.Requests, Bytes: now.Bytes - before.Bytes}
				before = now
				return n
			}
			for tag, oci := range images {
				for d, b := range oci.Blobs {
					r.Add(d, bytes.NewReader(b), int64(len(b)))
				}
				r.AddManifest("app", tag, ocispec.MediaTypeImageManifest, oci.Raw)
				if err := oci.WriteLayout(filepath.Join(env.WorkDir, "img", tag), "latest"); err != nil {
					return err
				}
			}
			bin := filepath.Join(env.WorkDir, ".bin")
			if err := os.Mkdir(bin, 0o755); err != nil {
				return err
			}
			if err := os.Symlink(exe, filepath.Join(bin, "cfs-fuse")); err != nil {
				return err
			}
			env.Setenv(programEnv, "1")
			env.Setenv("PATH", bin+":"+os.Getenv("PATH"))
			env.Setenv("REGISTRY", r.Host())
			env.Setenv("ROOT", filepath.Join(env.WorkDir, ".store"))
			env.Setenv("TZ", "UTC")
			env.Setenv("LC_ALL", "C.UTF-8")
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fetched": func(ts *testscript.TestScript, neg bool, args []string) {
				var most [2]int64
				for i := range most {
					var err error
					if most[i], err = strconv.ParseInt(args[i], 10, 64); err != nil {
						ts.Fatalf("fetched: %v", err)
					}
				}
				n := ts.Value("counts").(func() registrytest.Counts)()
				if (n.Requests > most[0] || n.Bytes > most[1]) != neg {
					ts.Fatalf("%d requests and %d bytes, want at most %d and %d", n.Requests, n.Bytes, most[0], most[1])
				}
			},
		},
	})
}

// scriptImages are the images of the scripts, by tag. Their digests are the
// same in each run.
func scriptImages() map[string]*imagetest.OCI {
	layer := func(items ...imagetest.Item) *imagetest.Blob {
		return imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(items...)), imagetest.Options{ChunkSize: 64 << 10}))
	}
	base := layer(
		imagetest.Dir("bin.d"), imagetest.Dir("etc"), imagetest.Dir("usr"), imagetest.Dir("usr/bin"), imagetest.Dir("var"), imagetest.Dir("var/cache"),
		imagetest.File("etc/os-release", "NAME=example\nVERSION=1\n"), imagetest.File("etc/old", "removed above\n"),
		imagetest.File("etc/passwd", "root:x:0:0::/:/bin/sh\n", imagetest.Mode(0o600), imagetest.Owner(0, 42)),
		imagetest.File("etc/.hidden", ""),
		imagetest.Random("usr/bin/tool", 300000, 1, imagetest.Mode(0o4755), imagetest.Xattr("user.note", "a\nb")),
		imagetest.Hardlink("usr/bin/tool2", "usr/bin/tool"),
		imagetest.Symlink("bin", "usr/bin"), imagetest.Symlink("etc/loop", "loop"), imagetest.Symlink("etc/out", "/../../etc/passwd"),
		imagetest.File("var/cache/x", "hidden by an opaque folder\n"), imagetest.Fifo("var/pipe"),
		imagetest.Sparse("var/sparse", 1<<20, "end"),
	)
	app := layer(
		imagetest.Dir("etc"), imagetest.Whiteout("etc/old"), imagetest.File("etc/os-release", "NAME=example\nVERSION=1.1\n"),
		imagetest.Opaque("var/cache"), imagetest.File("var/cache/new", "new\n"),
		imagetest.Dir("odd"), imagetest.File("odd/a b", "space"), imagetest.File("odd/\x1b[31mred", "escape"), imagetest.File("odd/new\nline", "line"),
		imagetest.File("odd/it's", "quote"),
	)
	next := layer(
		imagetest.Dir("etc"), imagetest.Whiteout("etc/passwd"), imagetest.File("etc/os-release", "NAME=example\nVERSION=2\n"),
		imagetest.File("etc/old", "removed above\n", imagetest.Mode(0o755)), imagetest.Random("usr/bin/large", 200000, 2),
	)
	// What would lead a copy out of its folder, if links were followed.
	hostile := layer(
		imagetest.Symlink("a", "/tmp"), imagetest.Dir("dir"), imagetest.Symlink("dir/up", "../../.."), imagetest.File("dir/file", "x"),
		imagetest.Hardlink("dir/hard", "dir/file"), imagetest.Symlink("dir/abs", "/etc/passwd"), imagetest.File("z", "last"),
	)
	return map[string]*imagetest.OCI{
		"1":       imagetest.Must(imagetest.Image(base, app)),
		"2":       imagetest.Must(imagetest.Image(base, next)),
		"hostile": imagetest.Must(imagetest.Image(hostile)),
		"plain":   imagetest.Must(imagetest.Image(imagetest.Must(imagetest.Gzip(imagetest.Must(imagetest.Tar(imagetest.File("f", "plain"))))))),
	}
}
