package images

import (
	"context"
	"embed"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/containerd/stargz-snapshotter/estargz"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Web is the image that starts are measured on: Debian with python3 and a web
// application of Django, pandas and SQLAlchemy (webapp/serve.py) that imports
// more than a thousand modules, and 100 MB of data that it reads. Five layers,
// more than 400 MB unpacked: base, Python with its libraries, the packages of
// the application, the data, the application (with whiteouts). As gzip by
// umoci, as eStargz without prioritized files, and as zstd:chunked by skopeo.
const Web = "web"

// WebServer is what to run in Web with python3: it serves HTTP on the port of
// 127.0.0.1 that is its argument, until its standard input ends. "/" needs a
// part of the data, "/all" the whole; both name the number of modules.
const WebServer = "/srv/web/serve.py"

// WebVersion is the key of Web's cache.
const WebVersion = "web-v1"

//go:embed webapp
var webapp embed.FS

// EnsureWeb is as Ensure for the image Web alone, in its own folder of the
// cache. It takes five minutes and 2 GB.
func EnsureWeb(ctx context.Context, cache string, progress io.Writer) (*Set, error) {
	tools := []string{"debootstrap", "umoci", "skopeo", "tar", "unshare", "chroot"}
	return ensure(ctx, cache, WebVersion, tools, func(b *builder) []step {
		return []step{
			{"plain layout", b.newLayout},
			{"web image", b.web},
			{"eStargz", func(ctx context.Context) error {
				return b.convert(ctx, EStargz, Web, func(int) recipe {
					return recipe{mediaType: ocispec.MediaTypeImageLayerGzip, options: []estargz.Option{estargz.WithCompressionLevel(6)}}
				})
			}},
			{"zstd:chunked (skopeo)", func(ctx context.Context) error {
				return b.run(ctx, "skopeo", "copy", "--dest-compress-format", "zstd:chunked",
					"oci:"+b.path(Plain)+":"+Web, "oci:"+b.path(ZstdChunked)+":"+Web)
			}},
		}
	}, progress)
}

func (b *builder) web(ctx context.Context) error {
	home := filepath.Dir(WebServer)
	return b.layers(ctx, Web, []change{
		{"minbase", b.minbase},
		{"python3, numpy", func(ctx context.Context, rootfs string) error {
			return b.packages(ctx, rootfs, "python3 -c 'import numpy'", "python3", "python3-numpy")
		}},
		{"django, pandas, sqlalchemy, and what a server has", func(ctx context.Context, rootfs string) error {
			return b.packages(ctx, rootfs, "python3 -c 'import django, pandas, sqlalchemy, waitress'",
				"python3-django", "python3-pandas", "python3-sqlalchemy", "python3-waitress",
				"python3-lxml", "python3-pil", "python3-requests", "python3-cryptography", "git", "openssl")
		}},
		{"data", func(ctx context.Context, rootfs string) error {
			if err := os.MkdirAll(filepath.Join(rootfs, home), 0o755); err != nil {
				return err
			}
			script := filepath.Join(rootfs, "makedata.py")
			if err := writeWebapp(script); err != nil {
				return err
			}
			if err := b.run(ctx, "chroot", rootfs, "python3", "-B", "/makedata.py", filepath.Join(home, "readings.sqlite")); err != nil {
				return err
			}
			return os.Remove(script)
		}},
		{"application", func(ctx context.Context, rootfs string) error {
			for _, name := range []string{"serve.py", "page.html"} {
				if err := writeWebapp(filepath.Join(rootfs, home, name)); err != nil {
					return err
				}
			}
			// What a build throws away in a later layer than it came with.
			for _, path := range []string{"usr/share/doc", "usr/share/man"} {
				if err := os.RemoveAll(filepath.Join(rootfs, path)); err != nil {
					return err
				}
			}
			return nil
		}},
	})
}

// writeWebapp writes a file of the application at path.
func writeWebapp(path string) error {
	text, err := webapp.ReadFile("webapp/" + filepath.Base(path))
	if err == nil {
		err = os.WriteFile(path, text, 0o644)
	}
	if err != nil {
		return fmt.Errorf("write a file of the web application: %w", err)
	}
	return nil
}
