package e2e

import (
	"encoding/json"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// takingRegistry starts a registry that takes pushes.
func takingRegistry(t *testing.T, b *bench) *images.Registry {
	t.Helper()
	dir := filepath.Join(b.dir, "registry")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	r, err := images.StartRegistry(t.Context(), images.RegistryOptions{Storage: filepath.Join(dir, "storage"), Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func plain(name string) string { return "oci:" + set.Layout(images.Plain) + ":" + name }

// tool runs a program that is not ours.
func tool(t *testing.T, argv ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(argv, " "), err, &errs)
	}
	return string(out)
}

// An ordinary image, converted to either form and pushed to a real registry, is
// what skopeo, tar and stargz's own library take it for, is the same when it is
// converted again, mounts with its tree, and has the digest that it was sealed with.
func TestConvert(t *testing.T) {
	b := newBench(t)
	r := takingRegistry(t, b)
	for format, image := range map[string]string{"estargz": images.Small, "zstd:chunked": images.Odd} {
		t.Run(format, func(t *testing.T) {
			tag := strings.TrimSuffix(format, ":chunked")
			dest := "docker://" + r.Addr + "/" + image + ":" + tag
			name := strings.TrimSpace(b.must("convert", "-q", "--seal", "--format", format, "--plain-http", plain(image), dest))
			_, sum, ok := strings.Cut(name, "@")
			if !ok || !strings.HasPrefix(name, dest) {
				t.Fatalf("convert printed %q", name)
			}
			raw := tool(t, "skopeo", "inspect", "--raw", "--tls-verify=false", dest)
			if got := digest.FromString(raw).String(); got != sum {
				t.Errorf("the registry has %s, convert said %s", got, sum)
			}
			tool(t, "skopeo", "inspect", "--tls-verify=false", dest) // reads the config, too

			copied := filepath.Join(b.dir, "copy-"+tag)
			tool(t, "skopeo", "copy", "--src-tls-verify=false", "--preserve-digests", dest, "dir:"+copied)
			var m ocispec.Manifest
			if err := json.Unmarshal([]byte(raw), &m); err != nil {
				t.Fatal(err)
			}
			checkLayers(t, copied, m, format)

			again := strings.TrimSpace(b.must("convert", "-q", "--seal", "--format", format, plain(image), "oci:"+copied+"-again:x"))
			if !strings.HasSuffix(again, "@"+sum) {
				t.Errorf("a second time: %s, want %s", again, sum)
			}

			b.root = filepath.Join(b.dir, "root-"+tag)
			point := b.mount(dest, "--swap", "never")
			sameTree(t, set.Reference(image), point, treediff.Options{})
			b.waitFor("sealed", point)
			b.must("umount", point)
			point = b.mount(dest)
			isKernel(t, point)
			sealed := m.Annotations["composefs.merged.erofs.v1.fsverity-sha256-12"]
			if got := b.status(point).Composefs; got != sealed || len(got) != 64 {
				t.Errorf("sealed as %s, the manifest's annotation says %s", got, sealed)
			}
			if out := b.must("verify", "--root", b.root, "--plain-http", "--blobs", dest); !strings.Contains(out, " 0 wrong") {
				t.Errorf("verify says:\n%s", out)
			}
			b.must("umount", point)
		})
	}
}

// checkLayers reads the blobs of an image that skopeo has copied to a folder.
func checkLayers(t *testing.T, dir string, m ocispec.Manifest, format string) {
	t.Helper()
	blob := func(d ocispec.Descriptor) string { return filepath.Join(dir, d.Digest.Encoded()) }
	var config ocispec.Image
	text, err := os.ReadFile(blob(m.Config))
	if err == nil {
		err = json.Unmarshal(text, &config)
	}
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range m.Layers {
		unpack := []string{"gzip", "-dc", blob(l)}
		list := []string{"tar", "tzf", blob(l)}
		if format == "zstd:chunked" {
			unpack[0], list[1] = "zstd", "--zstd"
			list = []string{"tar", "--zstd", "-tf", blob(l)}
		}
		if got := digest.FromString(tool(t, unpack...)); got != config.RootFS.DiffIDs[i] {
			t.Errorf("layer %d: DiffID %s, the config has %s", i, got, config.RootFS.DiffIDs[i])
		}
		if names := strings.Fields(tool(t, list...)); len(names) < 2 {
			t.Errorf("layer %d: tar lists %q", i, names)
		}
		if format != "estargz" {
			continue
		}
		f, err := os.Open(blob(l))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, err := estargz.Open(io.NewSectionReader(f, 0, l.Size))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.VerifyTOC(digest.Digest(l.Annotations[estargz.TOCJSONDigestAnnotation])); err != nil {
			t.Errorf("layer %d: %v", i, err)
		}
	}
}

// A command that is recorded runs as in a container, and what it reads first is
// in the profile, in the converted image's front, with the image in the registry,
// and used by a mount elsewhere.
func TestRecord(t *testing.T) {
	b := newBench(t)
	r := takingRegistry(t, b)
	image := "docker://" + r.Addr + "/debian:1"
	b.must("convert", "-q", "--format", "zstd:chunked", "--plain-http", plain(images.Debian), image)
	record := func(args ...string) []string {
		return append([]string{"record", "--root", b.root, "--plain-http"}, args...)
	}
	profile := filepath.Join(b.dir, "profile.json")
	out := b.must(record("-o", profile, "-e", "GREETING=hello", image, "--", "python3", "-c",
		"import os, json; print(os.environ['GREETING'], os.getuid(), os.listdir('/proc/self/fd') != [], open('/tmp/x', 'w').write('y'), os.path.exists('/dev/null'))")...)
	if out != "hello 0 True 1 True\n" {
		t.Errorf("the command printed %q", out)
	}
	if out := b.must(record("-u", "www-data", image, "--", "id", "-u")...); out != "33\n" {
		t.Errorf("as www-data: %q", out)
	}
	for want, command := range map[int][]string{7: {"sh", "-c", "exit 7"}, 137: {"sh", "-c", "kill -9 $$"}, 127: {"no-such-program"}, 126: {"/etc/passwd"}} {
		b.exits(want, record(append([]string{image, "--"}, command...)...)...)
	}
	// A child that stays behind does not hold record up, and a server is ended.
	b.must(record(image, "--", "sh", "-c", "sleep 1000 & sleep 1000 >/dev/null 2>&1 &")...)
	b.must(record("--timeout", "300ms", image, "--", "sleep", "1000")...)
	b.refused(1, []string{"resolve"}, record(image+"-none", "--", "true")...)
	b.refused(2, []string{"no command"}, record(plain(images.Small))...)
	nothingLeft(t)

	// A store that has all of the image hides no read.
	point := b.mount(image, "--swap", "never")
	b.waitFor("sealed", point)
	b.must("umount", point)
	whole := filepath.Join(b.dir, "whole.json")
	b.must(record("-o", whole, image, "--", "python3", "-c", "import json")...)
	if shown := b.must("profile", "show", "--root", b.root, whole); !strings.Contains(shown, "/usr/bin/python3") {
		t.Errorf("the profile of an image that is whole:\n%s", shown)
	}

	shown := b.must("profile", "show", "--root", b.root, profile)
	if !strings.Contains(shown, "/usr/bin/python3") || strings.Contains(shown, "/usr/sbin/nginx") {
		t.Errorf("the profile:\n%s", shown)
	}

	// Attached to the image, whose registry has no referrers API, it is found
	// by a tag, and a mount of a store that knows nothing starts with it.
	b.must("profile", "push", "--plain-http", image, profile)
	b.must("profile", "push", "--plain-http", image, profile) // once is enough
	if tags := tool(t, "skopeo", "list-tags", "--tls-verify=false", "docker://"+r.Addr+"/debian"); strings.Count(tags, "sha256-") != 1 {
		t.Errorf("tags: %s", tags)
	}
	text, err := os.ReadFile(profile)
	if err != nil {
		t.Fatal(err)
	}
	if got := b.must("profile", "pull", "--plain-http", image); got != string(text) {
		t.Errorf("pulled:\n%s\nwant:\n%s", got, text)
	}
	if merged := b.must("profile", "merge", profile, profile); strings.Count(merged, "content") != strings.Count(string(text), "content") {
		t.Errorf("merged with itself:\n%s\nwant:\n%s", merged, text)
	}
	other := filepath.Join(b.dir, "other")
	point = b.point()
	b.must("mount", "--root", other, "--plain-http", "--backend", "fuse", "--swap", "never", "--profile", "auto", "--log-level", "debug", image, point)
	log, err := os.ReadFile(b.status(point).Log)
	if err != nil || !strings.Contains(string(log), `msg="access profile"`) || strings.Contains(string(log), " accesses=0 ") {
		t.Errorf("the mount's log, %v:\n%s", err, log)
	}
	sameTree(t, set.Reference(images.Debian), point, treediff.Options{})
	b.must("umount", point)

	// In the converted image those files are in front.
	dir := filepath.Join(b.dir, "sorted")
	b.must("convert", "-q", "--format", "zstd:chunked", "--profile", "auto", "--root", other+"-none", "--plain-http", image, "oci:"+dir+":1")
	first := 0
	for _, l := range layersOf(t, dir) {
		names := strings.Fields(tool(t, "tar", "--zstd", "-tf", l))
		end := slices.Index(names, estargz.PrefetchLandmark)
		for _, n := range names[:max(end, 0)] {
			if strings.Contains(n, "bin/python3") {
				first++
			}
		}
	}
	if first != 1 {
		t.Errorf("python3 is %d times among the prioritized files", first)
	}
}

// layersOf lists the layers' files of the one image in a layout.
func layersOf(t *testing.T, dir string) (paths []string) {
	t.Helper()
	blob := func(d digest.Digest) string { return filepath.Join(dir, "blobs/sha256", d.Encoded()) }
	read := func(path string, v any) {
		text, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(text, v)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	var x ocispec.Index
	read(filepath.Join(dir, "index.json"), &x)
	var m ocispec.Manifest
	read(blob(x.Manifests[0].Digest), &m)
	for _, l := range m.Layers {
		paths = append(paths, blob(l.Digest))
	}
	return paths
}

// exits runs a command that has to end with the given code, whatever it says.
func (b *bench) exits(code int, args ...string) {
	b.t.Helper()
	got := 0
	if _, err := b.run(args...); err != nil {
		ce, ok := err.(*commandError)
		if !ok {
			b.t.Fatal(err)
		}
		got = ce.code
	}
	if got != code {
		b.t.Errorf("cfs-fuse %s: exit code %d, want %d", strings.Join(args, " "), got, code)
	}
}

// nothingLeft fails if record has left a mount or a folder.
func nothingLeft(t *testing.T) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), "cfs-fuse-record") {
		t.Errorf("mounts are left: %s, %v", mounts, err)
	}
	if dirs, _ := filepath.Glob(filepath.Join(os.TempDir(), "cfs-fuse-record-*")); len(dirs) > 0 {
		t.Errorf("folders are left: %q", dirs)
	}
}
