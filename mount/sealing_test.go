package mount

import (
	"encoding/json"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
)

// byFsverity is the digest of a file by the program of that name.
func byFsverity(t *testing.T, path, alg, blockSize string) string {
	t.Helper()
	out, err := exec.Command("fsverity", "digest", "--compact", "--hash-alg="+alg, "--block-size="+blockSize, path).Output()
	if err != nil {
		t.Fatal("fsverity: ", err)
	}
	return strings.TrimSpace(string(out))
}

// The tree of sealingImage as an author's program has it, all digests by
// fsverity(1).
func authorsTree(t *testing.T, alg, blockSize string, oci bool) *erofs.Node {
	t.Helper()
	dir := t.TempDir()
	file := func(name, data string) *erofs.Node {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(data), 0o644); err != nil {
			t.Fatal(err)
		}
		n := &erofs.Node{Name: name, Mode: unix.S_IFREG | 0o644, Nlink: 1, Size: uint64(len(data))}
		if oci && len(data) <= 64 {
			n.Content = []byte(data)
			return n
		}
		sum := byFsverity(t, path, alg, blockSize)
		n.Target = sum[:2] + "/" + sum[2:]
		n.Digest = unhex(t, sum)
		return n
	}
	const mtime = 1_600_000_000
	folder := func(name string, mode uint32, children ...*erofs.Node) *erofs.Node {
		return &erofs.Node{Name: name, Mode: unix.S_IFDIR | mode, MtimeSec: mtime, Children: children}
	}
	large, small, linked := file("large", string(imagetest.RandomBytes(600_000, 3))), file("small", "small"), file("linked", strings.Repeat("x", 65))
	linked.Nlink = 2
	usr := folder("usr", 0o751, large, small, linked, &erofs.Node{Name: "link", Link: linked})
	usr.UID, usr.GID = 5, 6
	usr.Xattrs = []erofs.Xattr{{Name: "user.x", Value: []byte("y")}}
	run := folder("run", 0o755)
	if !oci {
		run.Children = []*erofs.Node{file("pid", "1")}
	}
	for _, n := range []*erofs.Node{large, small, linked} {
		n.MtimeSec = mtime
	}
	for _, c := range run.Children {
		c.MtimeSec = mtime
	}
	root := folder("", 0o755, usr, run)
	root.MtimeSec = mtime
	if oci {
		usr.Xattrs = nil
		root.Mode, root.UID, root.GID = usr.Mode, 5, 6
	}
	return root
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	var b []byte
	for i := 0; i+1 < len(s); i += 2 {
		var v byte
		for _, c := range []byte(s[i : i+2]) {
			v = v<<4 | byte(strings.IndexByte("0123456789abcdef", c))
		}
		b = append(b, v)
	}
	return b
}

// An author's images of all merged forms are made again; what cannot be is said.
func TestSealings(t *testing.T) {
	at := imagetest.Mtime(time.Unix(1_600_000_000, 0))
	tar := imagetest.Must(imagetest.Tar(
		imagetest.Dir("./", at, imagetest.Mode(0o755)),
		imagetest.Dir("usr", at, imagetest.Mode(0o751), imagetest.Owner(5, 6), imagetest.Xattr("user.x", "y")),
		imagetest.Random("usr/large", 600_000, 3, at), imagetest.File("usr/small", "small", at),
		imagetest.File("usr/linked", strings.Repeat("x", 65), at), imagetest.Hardlink("usr/link", "usr/linked", at),
		imagetest.Dir("run", at, imagetest.Mode(0o755)), imagetest.File("run/pid", "1", at),
	))
	im := imagetest.Must(imagetest.Image(imagetest.Must(imagetest.EStargz(tar, imagetest.Options{}))))
	author := func(oci bool, alg, blockSize string) string {
		path := filepath.Join(t.TempDir(), "image")
		if err := erofs.WriteFile(path, authorsTree(t, alg, blockSize, oci), imageFormat); err != nil {
			t.Fatal(err)
		}
		return byFsverity(t, path, alg, blockSize)
	}
	const merged, large = "composefs.merged.erofs.v1.fsverity-", "65536"
	claims := map[string]string{
		sealingKey: author(false, "sha256", "4096"), merged + "sha512-12": author(true, "sha512", "4096"),
		merged + "sha256-16": author(false, "sha256", large), merged + "sha512-16": "sha512:" + author(true, "sha512", large),
		sealingKey + ".sig": "AAAA", "composefs.merged.bootable.erofs.v1.fsverity-sha256-12": strings.Repeat("ab", 32),
		"composefs.merged.erofs.v2.fsverity-sha256-12": "of another version", "org.example": "x",
	}
	load := func(claims map[string]string, layer map[string]string) (source string) {
		t.Helper()
		var manifest ocispec.Manifest
		if err := json.Unmarshal(im.Raw, &manifest); err != nil {
			t.Fatal(err)
		}
		manifest.Annotations = claims
		for key, value := range layer {
			manifest.Layers[0].Annotations[key] = value
		}
		by, err := imagetest.WithManifest(im, manifest)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := by.WriteLayout(dir, "t"); err != nil {
			t.Fatal(err)
		}
		return "oci:" + dir + ":t"
	}
	check := func(top *Link, key string, want Finding) {
		t.Helper()
		for _, l := range top.find("annotation " + key) {
			if l.What == "annotation "+key || strings.HasPrefix(l.What, "annotation "+key+" of") {
				if l.Finding != want {
					t.Errorf("%s: %v (%s), want %v", l.What, l.Finding, l.Why, want)
				}
				return
			}
		}
		t.Errorf("nothing is said of %s", key)
	}
	layer := map[string]string{"composefs.layer.erofs.v1.fsverity-sha512-12": strings.Repeat("ab", 64)}
	source := load(claims, layer)
	o := Options{Root: filepath.Join(t.TempDir(), "root")}
	m, mnt := start(t, source, o)
	waitFor(t, m, Sealed)
	end(t, m, mnt)
	top := verify(t, source, VerifyOptions{Options: o})
	for _, key := range []string{sealingKey, merged + "sha512-12", merged + "sha256-16", merged + "sha512-16"} {
		check(top, key, Proven)
	}
	for _, key := range []string{sealingKey + ".sig", "composefs.merged.bootable.erofs.v1.fsverity-sha256-12", "composefs.layer.erofs.v1.fsverity-sha512-12"} {
		check(top, key, Unproven)
	}
	if n := len(top.find("annotation")); n != 7 {
		t.Errorf("%d annotations, want 7", n)
	}

	// Who seals as composefs-rs does has sealed the same image, too; a wrong
	// claim in another form does not stop the mount, and verify says so.
	other := maps.Clone(claims)
	other[sealingKey] = author(true, "sha256", "4096")
	other[merged+"sha512-12"] = strings.Repeat("cd", 64)
	other[merged+"sha256-16"] = "short"
	source = load(other, nil)
	m, mnt = start(t, source, o)
	waitFor(t, m, Sealed)
	end(t, m, mnt)
	m, mnt = start(t, source, o) // by its record
	waitFor(t, m, Swapped)
	end(t, m, mnt)
	top = verify(t, source, VerifyOptions{Options: o})
	check(top, sealingKey, Proven)
	check(top, merged+"sha512-12", Wrong)
	check(top, merged+"sha256-16", Wrong)
	check(top, merged+"sha512-16", Proven)
}
