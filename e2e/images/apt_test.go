package images

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestParseSources(t *testing.T) {
	for _, c := range []struct {
		name string
		got  []AptSource
		want []AptSource
	}{
		{"one line", parseList("deb http://m/debian bookworm main contrib\n"),
			[]AptSource{{"http://m/debian", "bookworm", []string{"main", "contrib"}, ""}}},
		{"options", parseList("deb [arch=amd64 signed-by=/k.gpg] https://m x main # note\n"),
			[]AptSource{{"https://m", "x", []string{"main"}, "/k.gpg"}}},
		{"not binary", parseList("deb-src http://m x main\n# deb http://m y main\n\n"), nil},
		{"exact path", parseList("deb http://m ./\n"), nil},
		{"tabs", parseList("deb\thttp://m\tx\tmain\n"), []AptSource{{"http://m", "x", []string{"main"}, ""}}},
		{"stanzas", parseDeb822("Types: deb deb-src\nURIs: http://m\nSuites: a a-updates\nComponents: main\nSigned-By: /k.gpg\n\n# note\nTypes: deb\nURIs: http://s\nSuites: a-security\nComponents: main\n"),
			[]AptSource{
				{"http://m", "a", []string{"main"}, "/k.gpg"}, {"http://m", "a-updates", []string{"main"}, "/k.gpg"},
				{"http://s", "a-security", []string{"main"}, ""}}},
		{"comment within", parseDeb822("Types: deb\n# where from\nURIs: http://m\nSuites: a\nComponents: main\n"),
			[]AptSource{{"http://m", "a", []string{"main"}, ""}}},
		{"key inside", parseDeb822("Types: deb\nURIs: http://m\nSuites: a\nComponents: main\nSigned-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEY\n"),
			[]AptSource{{"http://m", "a", []string{"main"}, ""}}},
		{"continued", parseDeb822("Types: deb\nURIs: http://m\nSuites: a\nComponents: main\n  contrib\n"),
			[]AptSource{{"http://m", "a", []string{"main", "contrib"}, ""}}},
		{"disabled", parseDeb822("Types: deb\nURIs: http://m\nSuites: a\nComponents: main\nEnabled: no\n"), nil},
		{"source only", parseDeb822("Types: deb-src\nURIs: http://m\nSuites: a\nComponents: main\n"), nil},
	} {
		if !reflect.DeepEqual(c.got, c.want) {
			t.Errorf("%s: got %+v, want %+v", c.name, c.got, c.want)
		}
	}
}

func TestMachineSource(t *testing.T) {
	write := func(t *testing.T, etc, path, text string) {
		t.Helper()
		p := filepath.Join(etc, path)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(p, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		name  string
		files []string // path, text, ...; KEY and ETC are replaced
		uri   string
		err   string
	}{
		{"others first", []string{
			"apt/sources.list", "deb [signed-by=KEY] http://cloud cloud-x main\ndeb [signed-by=KEY] http://docker x stable\n",
			"apt/sources.list.d/d.sources", "Types: deb\nURIs: http://m\nSuites: x x-updates\nComponents: main\nSigned-By: KEY\n"},
			"http://m", ""},
		{"mirror list", []string{"mirrors", "# fastest\nhttp://first\nhttp://second\n",
			"apt/sources.list", "deb [signed-by=KEY] mirror+file:ETC/mirrors x main\n"}, "http://first", ""},
		{"compact disc first", []string{"apt/sources.list", "deb cdrom:[Debian]/ x main\ndeb [signed-by=KEY] http://m x main\n"}, "http://m", ""},
		{"none", []string{"apt/sources.list", "deb http://m y main\n"}, "", `none for release "x"`},
		{"no key", []string{"apt/sources.list", "deb [signed-by=/nowhere] http://m x main\n"}, "", "keyring of http://m"},
	} {
		t.Run(c.name, func(t *testing.T) {
			etc := t.TempDir()
			key := filepath.Join(etc, "key.gpg")
			write(t, etc, "key.gpg", "key")
			write(t, etc, "os-release", "NAME=\"D\"\nVERSION_CODENAME=x\n")
			r := strings.NewReplacer("KEY", key, "ETC", etc)
			for i := 0; i < len(c.files); i += 2 {
				write(t, etc, c.files[i], r.Replace(c.files[i+1]))
			}
			s, err := MachineSource(etc)
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("got error %v, want one with %q", err, c.err)
				}
				return
			}
			if err != nil || s.URI != c.uri || s.SignedBy != key {
				t.Fatalf("got %+v, %v; want URI %s and key %s", s, err, c.uri, key)
			}
		})
	}
}
