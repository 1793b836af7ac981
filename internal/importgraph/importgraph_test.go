package importgraph

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/cfs-fuse/cfs-fuse/"

// The sources are parsed, not listed by the go command: Go's test cache would
// not see an import that was added elsewhere, but it sees files being read.
func TestImports(t *testing.T) {
	root := "../.."
	files := 0
	err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && strings.HasPrefix(d.Name(), ".") && file != root {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return nil
		}
		files++
		rel, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		src, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, src, parser.ImportsOnly)
		if err != nil {
			return err
		}
		from := filepath.ToSlash(filepath.Dir(rel))
		for _, imp := range f.Imports {
			p, err := strconv.Unquote(imp.Path.Value)
			if err != nil {
				return err
			}
			if to, ok := strings.CutPrefix(p, module); ok && !mayImport(from, to) {
				t.Errorf("%s imports %s, which ARCHITECTURE.md does not allow", rel, to)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if files == 0 {
		t.Fatal("no sources found")
	}
}

func mayImport(from, to string) bool {
	if strings.HasPrefix(to, "internal/") || strings.HasPrefix(from, "internal/") {
		return true
	}
	for dir := from; dir != "."; dir = path.Dir(dir) {
		if allowed, ok := Allowed[dir]; ok {
			return slices.Contains(allowed, "*") || slices.Contains(allowed, to)
		}
	}
	return false
}

func TestMayImport(t *testing.T) {
	for _, c := range []struct {
		from, to string
		want     bool
	}{
		{"fetcher", "image", true},
		{"fetcher", "cache", false},
		{"erofs", "internal/durable", true},
		{"erofs", "verity", false},
		{"e2e/demo", "mount", true},
		{"surprise", "mount", false},
	} {
		if got := mayImport(c.from, c.to); got != c.want {
			t.Errorf("mayImport(%s, %s) = %t", c.from, c.to, got)
		}
	}
}
