package look

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// names are names that a hostile image may have, and some that are only odd.
var names = []string{
	"plain", "a b", "it's", "it's a b", "it's $5", "\x1b[31mred", "a\nb", "\nb", "a\n", "a\tb\r", "\x01\x02\x7f", "\xff\xfe", "a\xffb",
	"~", "a~", "~a", "#", "#a", "a#", "{", "}", "{}", "a{b}", "a{'", "-x", "a=b", "x!", "a\\b", "a\"b", "$(reboot)", "`id`", "a;b", "a|b", "a&b",
	"ünï", "日本", "'", "''", "a'b\nc", bidi + "x", "?", "*", "[x]", "a^b", "<>", "(x)", "a:b,c+d%e@f", ".hidden", "…", "\a\b\v\f", "a\nb\nc", "it's~", "~it's",
	"'\x1b'",
}

// bidi turns the direction of what follows: ls prints it, which we do not.
const bidi = "\u202e"

// TestQuote compares with ls.
func TestQuote(t *testing.T) {
	dir := t.TempDir()
	for _, n := range names {
		if err := os.WriteFile(filepath.Join(dir, n), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("ls", "-A1", "--quoting-style=shell-escape", dir)
	cmd.Env = []string{"LC_ALL=C.UTF-8", "PATH=" + os.Getenv("PATH")}
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	want := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	var got []string
	for _, n := range names {
		got = append(got, Quote(n))
	}
	for _, w := range want {
		if !slices.Contains(got, w) && !strings.Contains(w, bidi) {
			t.Errorf("ls has %s, which is not among %s", w, got)
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d names, ls has %d", len(got), len(want))
	}
}

// FuzzQuote asks bash what a quoted name is.
func FuzzQuote(f *testing.F) {
	for _, n := range names {
		f.Add(n)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if strings.ContainsRune(name, 0) {
			return // no name has one
		}
		q := Quote(name)
		for _, c := range []byte(q) {
			if c < ' ' || c == 0x7f {
				t.Fatalf("%q has a control character", q)
			}
		}
		cmd := exec.Command("bash", "-c", "printf %s "+q)
		cmd.Env = []string{"LC_ALL=C.UTF-8"}
		if out, err := cmd.Output(); err != nil || !bytes.Equal(out, []byte(name)) {
			t.Fatalf("%s is %q to bash (%v), want %q", q, out, err, name)
		}
	})
}
