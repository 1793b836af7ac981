// Package images makes the real images that the end-to-end tests run on, and
// serves them from a real registry. It knows nothing of cfs-fuse: everything
// here is made by the tools of the distribution (debootstrap, umoci, skopeo,
// docker-registry) and by the estargz package.
//
// Three images are made. "debian" is a Debian root filesystem with python3,
// numpy, perl and nginx in three layers with whiteouts between them. "odd" is small
// and holds what GNU tar can carry and umoci's own layers cannot: nanosecond
// and far-away mtimes, an opaque directory. "small" has some hundreds of
// ordinary files in one layer, for tests that mount it many times.
//
// They are made once, under a cache folder. A folder of the running Version
// is complete; anything else is litter of an interrupted build:
//
//	<cache>/lock                  flock(2) held while building
//	<cache>/v1/plain/             OCI layout, gzip layers, tags debian, odd, small
//	<cache>/v1/estargz/           OCI layout, tags debian and small (mtimes are whole seconds: a TOC holds no more)
//	<cache>/v1/estargz.tar        its debian as an oci-archive
//	<cache>/v1/zstdchunked/       OCI layout by skopeo, containers/storage's dialect, tags debian and odd
//	<cache>/v1/zstdstargz/        OCI layout, zstd:chunked in stargz's dialect, tag debian
//	<cache>/v1/reference/debian/  what umoci unpacks
//	<cache>/v1/reference/odd/, reference/small/
//	<cache>/v1/registry/          docker-registry's storage: a repository per image, tagged by form
//	<cache>/v1/build.log          what the tools said
//	<cache>/podman-trixie/rootfs/ a root filesystem with Podman (Podman)
//
// A fourth one, "web", is large and made only for measurements (EnsureWeb), in
// a folder of its own:
//
//	<cache>/web-v1/plain/, estargz/, zstdchunked/   OCI layouts, tag web
package images

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Version is the key of the cache: it changes whenever what is built changes.
const Version = "v1"

// The forms an image is kept in: the names of the OCI layouts and the tags in
// the registry.
const (
	Plain       = "plain"       // gzip layers as umoci wrote them
	EStargz     = "estargz"     // gzip, TOC in stargz.index.json
	ZstdChunked = "zstdchunked" // zstd:chunked as skopeo writes it
	ZstdStargz  = "zstdstargz"  // zstd:chunked as stargz-snapshotter writes it
)

// The images, by the name of their tag in each layout and of their repository
// in the registry.
const (
	Debian = "debian"
	Odd    = "odd"
	Small  = "small"
)

// Tools are the programs a build needs, and Packages the Debian packages that
// have them and those the tests run beside.
var (
	Tools    = []string{"debootstrap", "umoci", "skopeo", "docker-registry", "tar", "unshare", "chroot"}
	Packages = []string{"debian-archive-keyring", "debootstrap", "docker-registry", "skopeo", "tar", "umoci", "util-linux"}
)

// A Set is the folder of one finished build.
type Set struct {
	Dir string // absolute
}

// Layout is the OCI layout that has all images of the given form.
func (s *Set) Layout(form string) string { return filepath.Join(s.Dir, form) }

// Archive is the oci-archive of the debian image as eStargz.
func (s *Set) Archive() string { return filepath.Join(s.Dir, "estargz.tar") }

// Reference is the tree that umoci unpacks from the named image.
func (s *Set) Reference(name string) string { return filepath.Join(s.Dir, "reference", name) }

// Storage is docker-registry's root directory. Serve it with StartRegistry
// and ReadOnly.
func (s *Set) Storage() string { return filepath.Join(s.Dir, "registry") }

// Manifest returns the manifest of the named image in the given form, and its
// descriptor.
func (s *Set) Manifest(form, name string) (ocispec.Manifest, ocispec.Descriptor, error) {
	return readManifest(s.Layout(form), name)
}

// CompressedSize is the sum of the layer sizes of an image: the bytes a full
// pull would fetch.
func (s *Set) CompressedSize(form, name string) (int64, error) {
	m, _, err := s.Manifest(form, name)
	if err != nil {
		return 0, err
	}
	var n int64
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, nil
}

// DefaultCache is $CFS_FUSE_E2E_CACHE, else cfs-fuse-e2e in the user's cache
// folder.
func DefaultCache() (string, error) {
	if d := os.Getenv("CFS_FUSE_E2E_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find cache folder: %w", err)
	}
	return filepath.Join(d, "cfs-fuse-e2e"), nil
}

// Ensure returns the finished set under the folder cache, building it first
// if it is not there (some minutes; root and the package mirror of this
// machine are needed). Each step is told to progress. A nil error promises
// that every path of Set exists; an interrupted build leaves only a temporary
// folder, which the next one removes. Processes that call it at the same time
// build once.
func Ensure(ctx context.Context, cache string, progress io.Writer) (*Set, error) {
	return ensure(ctx, cache, Version, Tools, (*builder).set, progress)
}

// ensure makes the folder version below cache by steps, unless it is there.
func ensure(ctx context.Context, cache, version string, tools []string, steps func(*builder) []step, progress io.Writer) (*Set, error) {
	cache, err := filepath.Abs(cache)
	if err != nil {
		return nil, fmt.Errorf("cache folder: %w", err)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fmt.Errorf("make cache folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(cache, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock cache folder: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock cache folder %s: %w", cache, err)
	}
	final := filepath.Join(cache, version)
	if _, err := os.Stat(final); err == nil {
		return &Set{Dir: final}, nil
	}
	if os.Geteuid() != 0 {
		return nil, fmt.Errorf("build images in %s: only root can make device nodes and run debootstrap", final)
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("build images: %w (apt-get install the packages of the end-to-end tests: 'go run ./e2e/buildimage -packages' names them)", err)
		}
	}
	tmp := final + ".building"
	if err := os.RemoveAll(tmp); err != nil {
		return nil, fmt.Errorf("remove interrupted build: %w", err)
	}
	b := &builder{dir: tmp, progress: log.New(progress, "images: ", log.Ltime)}
	if err := b.build(ctx, steps(b)); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, final); err != nil {
		return nil, fmt.Errorf("finish build: %w", err)
	}
	return &Set{Dir: final}, nil
}

// readManifest reads from an OCI layout the manifest of a tag.
func readManifest(layout, tag string) (ocispec.Manifest, ocispec.Descriptor, error) {
	var index ocispec.Index
	if err := readJSON(filepath.Join(layout, "index.json"), &index); err != nil {
		return ocispec.Manifest{}, ocispec.Descriptor{}, err
	}
	for _, d := range index.Manifests {
		if d.Annotations[ocispec.AnnotationRefName] != tag {
			continue
		}
		var m ocispec.Manifest
		err := readJSON(blobPath(layout, d), &m)
		return m, d, err
	}
	return ocispec.Manifest{}, ocispec.Descriptor{}, fmt.Errorf("layout %s: no tag %q", layout, tag)
}

func blobPath(layout string, d ocispec.Descriptor) string {
	return filepath.Join(layout, "blobs", d.Digest.Algorithm().String(), d.Digest.Encoded())
}

func readJSON(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("parse %s: %w", path, err)
	}
	return nil
}
