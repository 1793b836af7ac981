package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every command line of ours in README.md, in docs/ and in examples of --help
// is one that the program takes: its command, its flags and their values.
func TestCommandLinesOfDocs(t *testing.T) {
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	check := func(where, text string) {
		for line := range strings.Lines(text) {
			for _, words := range commandLines(line) {
				found++
				if err := takes(words); err != nil {
					t.Errorf("%s: %s: %v", where, strings.Join(words, " "), err)
				}
			}
		}
	}
	for _, path := range append(files, "../../README.md") {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for i, block := range strings.Split(string(raw), "```") {
			if i%2 == 1 {
				check(path, block)
			} else {
				for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(block, -1) {
					check(path, strings.Join(strings.Fields(m[1]), " "))
				}
			}
		}
	}
	root := newRoot(&global{})
	for _, cmd := range root.Commands() {
		check(cmd.CommandPath(), cmd.Example)
		for _, sub := range cmd.Commands() {
			check(sub.CommandPath(), sub.Example)
		}
	}
	if found < 100 {
		t.Errorf("only %d command lines found", found)
	}
}

// commandLines finds calls of cfs-fuse in a line, as words.
func commandLines(line string) (all [][]string) {
	line, _, _ = strings.Cut(line, "   ") // what is said of it
	for _, part := range regexp.MustCompile(`&&|\|\||[;|#]|\$\(|\)`).Split(line, -1) {
		words := strings.Fields(strings.NewReplacer(`'`, "", `"`, "").Replace(part))
		for i, w := range words {
			if i > 0 && words[i-1] != "sudo" {
				break
			}
			if w != "cfs-fuse" && w != "bin/cfs-fuse" && w != "/usr/bin/cfs-fuse" && !strings.HasPrefix(w, "ExecStart=") {
				continue
			}
			if len(words) > i+1 {
				all = append(all, words[i+1:])
			}
			break
		}
	}
	return all
}

// takes parses a command line without running it.
func takes(words []string) error {
	root := newRoot(&global{})
	cmd, rest, err := root.Find(words)
	if err != nil || cmd == root && !strings.HasPrefix(words[0], "-") {
		if strings.ContainsAny(words[0], "|<…") || strings.ToUpper(words[0]) == words[0] {
			return nil // stands for several
		}
		if words[0] == "store" || words[0] == "map" {
			return nil // how files of the store begin
		}
		return fmt.Errorf("no such command (%v)", err)
	}
	var flags []string
	for _, w := range rest {
		if w == "--" {
			break // what follows is another program's
		}
		if strings.HasPrefix(w, "-") && !strings.ContainsAny(w, "[]|") {
			flags = append(flags, w)
		}
	}
	cmd.InitDefaultHelpFlag()
	for _, f := range flags {
		name, _, _ := strings.Cut(strings.TrimLeft(f, "-"), "=")
		if strings.HasPrefix(f, "--") {
			if cmd.Flag(name) == nil {
				return fmt.Errorf("no flag %s", f)
			}
		} else if len(name) > 0 && cmd.Flags().ShorthandLookup(name[:1]) == nil && cmd.Flag(name) == nil {
			return fmt.Errorf("no flag %s", f)
		}
	}
	return nil
}

// The links of README.md and docs/ between files of this repository lead
// somewhere.
func TestLinksOfDocs(t *testing.T) {
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	top, err := filepath.Glob("../../*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(files, top...) {
		raw, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\]\(([^)#]+)(#[^)]*)?\)`).FindAllStringSubmatch(string(raw), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
}

func TestLogFormat(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	before := os.Stderr
	os.Stderr = w
	for _, format := range []string{"json", "text"} {
		log, err := (&global{logLevel: "info", logFormat: format}).logger()
		if err != nil {
			t.Error(err)
			break
		}
		log.With("mountpoint", "/mnt").Info("sealed")
	}
	os.Stderr = before
	w.Close()
	var said bytes.Buffer
	said.ReadFrom(r)
	lines := strings.Split(strings.TrimSpace(said.String()), "\n")
	var line struct{ Level, Msg, Mountpoint string }
	if len(lines) != 2 || json.Unmarshal([]byte(lines[0]), &line) != nil || line.Mountpoint != "/mnt" || line.Level != "INFO" || !strings.HasSuffix(lines[1], "level=INFO msg=sealed mountpoint=/mnt") {
		t.Errorf("logged %q", lines)
	}
	if _, err := (&global{logLevel: "info", logFormat: "xml"}).logger(); err == nil {
		t.Error("xml is taken")
	}
}
