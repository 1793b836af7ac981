//go:build docs

package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/cfs-fuse/cfs-fuse/internal/version"
)

// writeMan writes a manual page for each command, and one for mount(8)'s helper,
// into a folder. cobra's own generator runs the lines of a help text into one
// another, and its lists.
func writeMan(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	root := newRoot(&global{})
	root.InitDefaultHelpFlag()
	if err := writePages(dir, root, 1); err != nil {
		return err
	}
	helper := newMountHelper()
	return os.WriteFile(filepath.Join(dir, helperName+".8"), []byte(page(helper, 8)), 0o644)
}

func writePages(dir string, cmd *cobra.Command, section int) error {
	name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
	if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("%s.%d", name, section)), []byte(page(cmd, section)), 0o644); err != nil {
		return err
	}
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() && c.Name() != "help" {
			if err := writePages(dir, c, section); err != nil {
				return err
			}
		}
	}
	return nil
}

// page returns a command's manual page in the man(7) language.
func page(cmd *cobra.Command, section int) string {
	var b strings.Builder
	name := strings.ReplaceAll(cmd.CommandPath(), " ", "-")
	fmt.Fprintf(&b, ".TH %q %d %q \"cfs-fuse %s\" \"cfs-fuse\"\n", strings.ToUpper(name), section, date(), version.Get().Version)
	fmt.Fprintf(&b, ".SH NAME\n%s \\- %s\n", roff(name), roff(lowerFirst(cmd.Short)))
	use := cmd.UseLine()
	if cmd.HasAvailableSubCommands() {
		use = cmd.CommandPath() + " COMMAND"
	}
	path, rest := cmd.CommandPath(), ""
	if !cmd.HasParent() && section == 8 {
		path = cmd.Name()
	}
	rest = strings.TrimPrefix(use, path)
	fmt.Fprintf(&b, ".SH SYNOPSIS\n.B %s\n%s\n", roff(path), roff(strings.TrimSpace(rest)))
	long, codes, _ := strings.Cut(cmd.Long, "\nExit codes:\n")
	if long == "" {
		long = cmd.Short + "."
	}
	b.WriteString(".SH DESCRIPTION\n")
	prose(&b, long)
	if cmd.HasAvailableSubCommands() {
		b.WriteString(".SH COMMANDS\n")
		for _, c := range cmd.Commands() {
			if c.IsAvailableCommand() && c.Name() != "help" {
				fmt.Fprintf(&b, ".TP\n.BR %s (1)\n%s\n", roff(name+"-"+c.Name()), roff(c.Short))
			}
		}
	}
	flags(&b, "OPTIONS", cmd.NonInheritedFlags())
	flags(&b, "OPTIONS OF ALL COMMANDS", cmd.InheritedFlags())
	if codes != "" {
		b.WriteString(".SH EXIT STATUS\n")
		for line := range strings.Lines(codes) {
			code, what, _ := strings.Cut(strings.TrimSpace(line), "  ")
			fmt.Fprintf(&b, ".TP\n.B %s\n%s\n", roff(code), roff(what))
		}
	}
	if cmd.Example != "" {
		b.WriteString(".SH EXAMPLES\n")
		verbatim(&b, strings.Split(cmd.Example, "\n"), false)
	}
	if !cmd.HasParent() && section == 1 {
		b.WriteString(".SH FILES\n")
		for _, f := range [][2]string{
			{"/var/lib/cfs-fuse", "the store, of root; of others ~/.local/share/cfs-fuse"},
			{"/run/cfs-fuse", "records, sockets and logs of what is mounted; of others $XDG_RUNTIME_DIR/cfs-fuse"},
			{"/etc/containerd/certs.d", "hosts.toml files: mirrors and certificates of registries"},
			{"~/.docker/config.json", "logins; another folder with $DOCKER_CONFIG"},
		} {
			fmt.Fprintf(&b, ".TP\n.I %s\n%s\n", roff(f[0]), roff(f[1]))
		}
	}
	b.WriteString(".SH SEE ALSO\n")
	see := []string{}
	if cmd.HasParent() {
		see = append(see, strings.ReplaceAll(cmd.Parent().CommandPath(), " ", "-")+" 1")
	}
	if section == 8 {
		see = append(see, "cfs-fuse-mount 1", "fstab 5", "mount 8")
	} else if !cmd.HasParent() {
		see = append(see, helperName+" 8")
	}
	for i, s := range see {
		n, sec, _ := strings.Cut(s, " ")
		comma := ","
		if i == len(see)-1 {
			comma = ""
		}
		fmt.Fprintf(&b, ".BR %s (%s)%s\n", roff(n), sec, comma)
	}
	return b.String()
}

// date is that of $SOURCE_DATE_EPOCH, so that two builds are equal, or today's.
func date() string {
	t := time.Now()
	if n, err := strconv.ParseInt(os.Getenv("SOURCE_DATE_EPOCH"), 10, 64); err == nil {
		t = time.Unix(n, 0)
	}
	return t.UTC().Format(time.DateOnly)
}

func lowerFirst(s string) string { return strings.ToLower(s[:1]) + s[1:] }

// prose writes paragraphs; lines that are indented keep their form.
func prose(b *strings.Builder, text string) {
	gap := false // a paragraph must begin
	for _, paragraph := range strings.Split(strings.TrimSpace(text), "\n\n") {
		var kept []string
		for line := range strings.Lines(paragraph) {
			line = strings.TrimRight(line, "\n")
			if strings.HasPrefix(line, "  ") {
				kept = append(kept, line)
				continue
			}
			if kept != nil {
				verbatim(b, kept, true)
				kept, gap = nil, true
			}
			if gap {
				b.WriteString(".PP\n")
				gap = false
			}
			b.WriteString(roff(line) + "\n")
		}
		verbatim(b, kept, true)
		gap = true
	}
}

func verbatim(b *strings.Builder, lines []string, gap bool) {
	if len(lines) == 0 {
		return
	}
	if gap {
		b.WriteString(".PP\n")
	}
	b.WriteString(".nf\n")
	for _, line := range lines {
		b.WriteString(roff(line) + "\n")
	}
	b.WriteString(".fi\n")
}

// flags writes a section of options.
func flags(b *strings.Builder, title string, set *pflag.FlagSet) {
	if !set.HasAvailableFlags() {
		return
	}
	fmt.Fprintf(b, ".SH %s\n", title)
	set.VisitAll(func(f *pflag.Flag) {
		if f.Hidden {
			return
		}
		name, usage := pflag.UnquoteUsage(f)
		head := `\fB` + roff("--"+f.Name) + `\fR`
		if f.Shorthand != "" {
			head = `\fB` + roff("-"+f.Shorthand) + `\fR, ` + head
		}
		if name != "" {
			head += ` \fI` + roff(name) + `\fR`
		}
		value := f.DefValue
		switch f.Name { // of root, whoever writes the pages
		case "root":
			value = "/var/lib/cfs-fuse"
		case "runtime-dir":
			value = "/run/cfs-fuse"
		}
		if value != "" && value != "false" && value != "[]" && value != "0" && !strings.Contains(usage, "(default") {
			usage += " (default " + value + ")"
		}
		fmt.Fprintf(b, ".TP\n%s\n%s\n", head, roff(usage))
	})
}

// roff escapes text that is none of the language's.
func roff(s string) string {
	s = strings.NewReplacer(`\`, `\e`, "-", `\-`, "…", "...", "→", "\\(->").Replace(s)
	if strings.HasPrefix(s, ".") || strings.HasPrefix(s, "'") {
		s = `\&` + s
	}
	return s
}
