package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// What the commands that look into an image say of the Debian image, without a
// mount, is what coreutils say of the tree that umoci unpacks; a copy out of it
// is that tree.
func TestLookIntoDebian(t *testing.T) {
	b, k := newBench(t), newLink(t, registry.Addr, lan)
	source := "docker://" + k.addr + "/" + images.Debian + ":" + images.EStargz
	reference := set.Reference(images.Debian)
	at := func(command string, args ...string) string {
		return b.must(append([]string{command, "--root", b.root, "--plain-http"}, args...)...)
	}
	gnu := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = reference
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C", "TZ=" + os.Getenv("TZ")}
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return string(out)
	}
	same := func(what, got, want string) {
		t.Helper()
		g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
		for i := range min(len(g), len(w)) {
			if g[i] != w[i] {
				t.Fatalf("%s, line %d: %q, want %q", what, i, g[i], w[i])
			}
		}
		if len(g) != len(w) {
			t.Errorf("%s: %d lines, want %d", what, len(g), len(w))
		}
	}
	// Columns are as wide as what is in them, and the sizes of folders are the
	// filesystem's.
	columns := regexp.MustCompile(`(?m)^([-a-zA-Z]{10}[+]?) +(\d+) +(\d+) +(\d+) +(\d+|\d+, +\d+) `)
	plain := func(s string) string {
		s = regexp.MustCompile(`(?m)^total \d+\n`).ReplaceAllString(s, "")
		return columns.ReplaceAllStringFunc(s, func(line string) string {
			f := strings.Fields(line)
			if line[0] == 'd' {
				f[1], f[4] = "-", "-"
			}
			return strings.Join(f, " ") + " "
		})
	}
	same("ls -lR", plain(at("ls", "-lRa", source)), lsOf(plain(gnu("ls", "-lRAn", "--time-style=long-iso", "."))))

	lines := func(s string) string {
		all := strings.Split(strings.TrimSuffix(s, "\n"), "\n")
		slices.Sort(all)
		return strings.Join(all, "\n")
	}
	for _, c := range []struct{ ours, theirs []string }{
		{[]string{"-type", "f", "-perm", "/6000"}, nil},
		{[]string{"-type", "l", "-name", "*.so.*"}, nil},
		{[]string{"-empty", "-type", "d"}, nil},
		{[]string{"-path", "/usr/share/*/copyright"}, []string{"-path", "./usr/share/*/copyright"}},
		{[]string{"-type", "bcps"}, []string{"-type", "b,c,p,s"}},
		{[]string{"-size", "+100000"}, []string{"-size", "+100000c", "-type", "f"}},
		{[]string{"-maxdepth", "2", "-mindepth", "2"}, nil},
	} {
		if c.theirs == nil {
			c.theirs = c.ours
		}
		want := strings.ReplaceAll("\n"+gnu("find", append([]string{"."}, c.theirs...)...), "\n./", "\n/")[1:]
		same("find "+strings.Join(c.ours, " "), lines(at("find", append([]string{source}, c.ours...)...)), lines(want))
	}
	release, err := os.ReadFile(filepath.Join(reference, "etc/os-release"))
	if err != nil {
		t.Fatal(err)
	}
	if got := at("cat", source+":/etc/os-release"); got != string(release) {
		t.Errorf("cat: %q", got)
	}

	to := filepath.Join(b.dir, "copy")
	if err := os.Mkdir(to, 0o755); err != nil {
		t.Fatal(err)
	}
	at("cp", "-r", source+":/", to)
	when, err := os.Stat(reference)
	if err == nil {
		err = os.Chtimes(to, when.ModTime(), when.ModTime()) // a folder that is there stays as it is
	}
	if err != nil {
		t.Fatal(err)
	}
	sameTree(t, reference, to, treediff.Options{})
}

// lsOf turns the headers of 'ls -R .' into those of 'ls -R /'.
func lsOf(s string) string {
	s = strings.ReplaceAll("\n"+s, "\n.:\n", "\n/:\n")
	return strings.ReplaceAll(s, "\n./", "\n/")[1:]
}
