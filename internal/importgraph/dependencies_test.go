package importgraph

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// docs/dependencies.md must give a reason for each direct dependency, and for
// nothing else.
func TestDependencies(t *testing.T) {
	mod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("../../docs/dependencies.md")
	if err != nil {
		t.Fatal(err)
	}
	direct := map[string]bool{}
	for line := range strings.Lines(string(mod)) {
		f := strings.Fields(line)
		if len(f) == 2 && strings.Contains(f[0], ".") && strings.HasPrefix(f[1], "v") {
			direct[f[0]] = true
		}
	}
	if len(direct) < 10 {
		t.Fatalf("only %d direct dependencies found in go.mod", len(direct))
	}
	listed := map[string]bool{}
	for line := range strings.Lines(string(doc)) {
		if cell, _, ok := strings.Cut(strings.TrimPrefix(line, "|"), "|"); ok && strings.HasPrefix(line, "|") {
			for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cell, -1) {
				listed[m[1]] = true
			}
		}
	}
	for m := range direct {
		if !listed[m] {
			t.Errorf("docs/dependencies.md has no reason for %s", m)
		}
	}
	for m := range listed {
		if !direct[m] {
			t.Errorf("docs/dependencies.md lists %s, which is no direct dependency", m)
		}
	}
}
