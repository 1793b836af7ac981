package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func seconds(n ...float64) (all []sample) {
	for _, s := range n {
		d := time.Duration(s * float64(time.Second))
		all = append(all, sample{answer: d, local: 2 * d, tar: 3 * d})
	}
	return all
}

func TestVerdicts(t *testing.T) {
	r := &result{speed: speeds[2], samples: map[string][]sample{
		"pull": seconds(10, 30, 20), "lazy": seconds(7, 1, 9), "profile": seconds(4, 3, 2),
	}}
	if got, want := r.cell("lazy", answered), "7.00 s (1.00-9.00)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	lazy, profile := answerMost("100mbit")
	for _, c := range []struct{ got, want string }{
		{r.ratio("lazy", answered, lazy), "0.35 (at most 0.35: met)"},
		{r.ratio("profile", answered, 0.14), "0.15 (at most 0.14: NOT MET)"},
		{r.ratio("profile", answered, profile), "0.15 (at most 0.15: met)"},
		{r.ratio("tar", read, readMost), "-"},
		{r.ratio("lazy", whole, 0), "0.35"},
	} {
		if c.got != c.want {
			t.Errorf("got %q, want %q", c.got, c.want)
		}
	}
}

// TestWhiteouts needs root, as the measurement does: device nodes and trusted
// xattrs.
func TestWhiteouts(t *testing.T) {
	root := t.TempDir()
	for _, name := range []string{"a/.wh.gone", "a/kept", "b/.wh..wh..opq", "b/new"} {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := whiteouts(root); err != nil {
		t.Fatal(err)
	}
	var left []string
	filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			left = append(left, strings.TrimPrefix(path, root+"/"))
		}
		return err
	})
	if got := strings.Join(left, " "); got != "a/gone a/kept b/new" {
		t.Errorf("left %q", got)
	}
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(root, "a/gone"), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != 0 {
		t.Errorf("a/gone: mode %o, device %d, %v", st.Mode, st.Rdev, err)
	}
	value := make([]byte, 8)
	if n, err := unix.Getxattr(filepath.Join(root, "b"), "trusted.overlay.opaque", value); err != nil || string(value[:n]) != "y" {
		t.Errorf("b: opaque is %q, %v", value[:max(n, 0)], err)
	}
}
