package images

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// debianKeyring is where the package debian-archive-keyring puts its keys;
// used when the machine's sources name none.
const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// An AptSource is one place packages come from: what one "deb" line of
// sources.list(5) says, for one URI and one suite.
type AptSource struct {
	URI        string
	Suite      string
	Components []string
	SignedBy   string // a file, or "" when the source names none or holds the key itself
}

// MachineSource finds where this machine gets its distribution from: the
// first source for its own release, of component main, in sources.list or
// sources.list.d below etc (usually "/etc").
func MachineSource(etc string) (AptSource, error) {
	codename, err := osRelease(filepath.Join(etc, "os-release"), "VERSION_CODENAME")
	if err != nil {
		return AptSource{}, err
	}
	sources, err := machineSources(filepath.Join(etc, "apt"))
	if err != nil {
		return AptSource{}, err
	}
	for _, s := range sources {
		if s.Suite != codename || !slices.Contains(s.Components, "main") {
			continue
		}
		if list, ok := strings.CutPrefix(s.URI, "mirror+file:"); ok {
			if s.URI, err = firstMirror(list); err != nil {
				return AptSource{}, err
			}
		}
		if !strings.HasPrefix(s.URI, "http://") && !strings.HasPrefix(s.URI, "https://") && !strings.HasPrefix(s.URI, "file:") {
			continue // cdrom: and the like: debootstrap cannot use them
		}
		if s.SignedBy == "" {
			s.SignedBy = debianKeyring
		}
		if _, err := os.Stat(s.SignedBy); err != nil {
			return AptSource{}, fmt.Errorf("keyring of %s: %w", s.URI, err)
		}
		return s, nil
	}
	return AptSource{}, fmt.Errorf("apt sources below %s: none for release %q with component main", etc, codename)
}

// machineSources reads every source of the folder of apt's configuration.
// Files that cannot be read as sources are an error: guessing another mirror
// would be worse.
func machineSources(dir string) ([]AptSource, error) {
	var paths []string
	for _, pattern := range []string{"sources.list", "sources.list.d/*.list", "sources.list.d/*.sources"} {
		m, err := filepath.Glob(filepath.Join(dir, pattern))
		if err != nil {
			return nil, err
		}
		paths = append(paths, m...)
	}
	var all []AptSource
	for _, p := range paths {
		b, err := os.ReadFile(p)
		if err != nil {
			return nil, err
		}
		if strings.HasSuffix(p, ".sources") {
			all = append(all, parseDeb822(string(b))...)
		} else {
			all = append(all, parseList(string(b))...)
		}
	}
	return all, nil
}

// parseList reads the one-line style: deb [options] uri suite components...
func parseList(text string) []AptSource {
	var all []AptSource
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		rest, ok := strings.CutPrefix(strings.TrimSpace(line), "deb ")
		if !ok {
			if rest, ok = strings.CutPrefix(strings.TrimSpace(line), "deb\t"); !ok {
				continue
			}
		}
		rest = strings.TrimSpace(rest)
		var s AptSource
		if inner, after, ok := strings.Cut(rest, "]"); ok && strings.HasPrefix(inner, "[") {
			for _, opt := range strings.Fields(inner[1:]) {
				if v, ok := strings.CutPrefix(opt, "signed-by="); ok {
					s.SignedBy = v
				}
			}
			rest = after
		}
		f := strings.Fields(rest)
		if len(f) < 3 {
			continue // "suite/" without components: an exact path, not a distribution
		}
		s.URI, s.Suite, s.Components = f[0], f[1], f[2:]
		all = append(all, s)
	}
	return all
}

// parseDeb822 reads the stanza style of files named *.sources.
func parseDeb822(text string) []AptSource {
	var all []AptSource
	fields := map[string]string{}
	last := ""
	flush := func() {
		if slices.Contains(strings.Fields(fields["types"]), "deb") && !strings.EqualFold(fields["enabled"], "no") {
			key := strings.TrimSpace(fields["signed-by"])
			if !strings.HasPrefix(key, "/") {
				key = "" // the key itself, or a fingerprint
			}
			for _, uri := range strings.Fields(fields["uris"]) {
				for _, suite := range strings.Fields(fields["suites"]) {
					all = append(all, AptSource{uri, suite, strings.Fields(fields["components"]), key})
				}
			}
		}
		fields, last = map[string]string{}, ""
	}
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		switch {
		case strings.HasPrefix(line, "#"):
		case strings.TrimSpace(line) == "":
			flush()
		case line[0] == ' ' || line[0] == '\t':
			if last != "" {
				fields[last] += " " + strings.TrimSpace(line)
			}
		default:
			name, value, ok := strings.Cut(line, ":")
			if !ok {
				continue
			}
			last = strings.ToLower(strings.TrimSpace(name))
			fields[last] = strings.TrimSpace(value)
		}
	}
	flush()
	return all
}

// firstMirror returns the first address of a file of apt's mirror method.
func firstMirror(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("mirror list: %w", err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if w := strings.Fields(s.Text()); len(w) > 0 && !strings.HasPrefix(w[0], "#") {
			return w[0], nil
		}
	}
	return "", fmt.Errorf("mirror list %s: empty", path)
}

// osRelease returns one field of an os-release(5) file.
func osRelease(path, field string) (string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), field+"="); ok {
			return strings.Trim(v, `"'`), nil
		}
	}
	return "", fmt.Errorf("%s: no %s", path, field)
}
