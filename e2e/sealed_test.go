package e2e

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// mkcomposefsEnv names a mkcomposefs besides our own, such as the C project's,
// that has to make the same of each dump.
const mkcomposefsEnv = "CFS_FUSE_E2E_MKCOMPOSEFS"

// A sealed image is what 'mkcomposefs --from-file --min-version=1' makes of the
// dump of its own tree, in which each payload is the path of its digest.
func TestSealedIsMkcomposefs(t *testing.T) {
	b := newBench(t)
	tool := filepath.Join(b.dir, "mkcomposefs")
	if err := os.Symlink(binary, tool); err != nil {
		t.Fatal(err)
	}
	tools := []string{tool}
	if other := os.Getenv(mkcomposefsEnv); other != "" {
		tools = append(tools, other)
	}
	for _, c := range []struct{ form, name string }{
		{images.EStargz, images.Debian}, {images.ZstdChunked, images.Debian}, {images.ZstdChunked, images.Odd}, {images.EStargz, images.Small},
	} {
		point := b.mount("oci:"+set.Layout(c.form)+":"+c.name, "--swap", "never")
		b.waitFor("sealed", point)
		s := b.status(point)
		sealed := filepath.Join(b.root, "images", strings.TrimPrefix(s.ManifestDigest, "sha256:"), "sealed.erofs")
		want, err := os.ReadFile(sealed)
		if err != nil {
			t.Fatal(err)
		}
		dump := b.must("erofs", "dump", "--content-paths", sealed)
		for _, tool := range tools {
			made := filepath.Join(b.dir, "made")
			cmd := exec.Command(tool, "--from-file", "--min-version=1", "--print-digest", "-", made)
			cmd.Stdin = strings.NewReader(dump)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%s: %v: %s", tool, err, out)
			}
			if got := strings.TrimSpace(string(out)); got != s.Composefs {
				t.Errorf("%s %s: %s says %s, status %s", c.form, c.name, tool, got, s.Composefs)
			}
			if got, err := os.ReadFile(made); err != nil || !bytes.Equal(got, want) {
				t.Errorf("%s %s: %s makes %d bytes, other than the %d of the sealed image, %v", c.form, c.name, tool, len(got), len(want), err)
			}
		}
		t.Logf("%s %s: %d bytes, %d lines of dump, by %d tools", c.form, c.name, len(want), strings.Count(dump, "\n"), len(tools))
		b.must("umount", point)
	}
}
