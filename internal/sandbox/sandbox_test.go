package sandbox

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/bin/tool", "", 0o755)
	write(t, dir+"/sbin/tool", "", 0o644)
	write(t, dir+"/sbin/text", "", 0o644)
	path := dir + "/sbin:" + dir + "/none:" + dir + "/bin"
	for _, c := range []struct {
		name, want string
		err        error
	}{
		{"tool", dir + "/bin/tool", nil},
		{"text", "", os.ErrPermission},
		{"nothing", "", os.ErrNotExist},
		{dir + "/bin/tool", dir + "/bin/tool", nil},
		{"bin/tool", dir + "/bin/tool", nil},
		{"./bin", dir + "/bin", os.ErrPermission},
	} {
		got, err := find(c.name, path, dir)
		if !errors.Is(err, c.err) || err == nil && got != c.want {
			t.Errorf("%s: %q, %v; want %q, %v", c.name, got, err, c.want, c.err)
		}
	}
	if got, err := find("tool", "bin", dir); err != nil || got != dir+"/bin/tool" {
		t.Errorf("by a relative PATH: %q, %v", got, err)
	}
}

func TestLookUpUser(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/passwd", "root:x:0:0:root:/root:/bin/sh\nbad:x:no:0::/:\nshort\nweb:x:33:33:www:/var/www:/bin/sh\n1000:x:5:6:digits:/odd:/bin/sh\n", 0o644)
	write(t, dir+"/group", "root:x:0:\nweb:x:33:\nlog:x:4:web,other\nmail:x:8:other\n", 0o644)
	for s, want := range map[string]account{
		"":           {home: "/root"},
		"root":       {home: "/root"},
		"web":        {uid: 33, gid: 33, groups: []uint32{4}, home: "/var/www"},
		"33":         {uid: 33, gid: 33, groups: []uint32{4}, home: "/var/www"},
		"web:mail":   {uid: 33, gid: 8, home: "/var/www"},
		"web:8":      {uid: 33, gid: 8, home: "/var/www"},
		"web:77":     {uid: 33, gid: 77, home: "/var/www"},
		"1234":       {uid: 1234, home: "/"},
		"1234:5678":  {uid: 1234, gid: 5678, home: "/"},
		"1000":       {uid: 5, gid: 6, home: "/odd"},
		"nobody":     {uid: 1 << 31},
		"web:nobody": {uid: 1 << 31},
		"4294967295": {uid: 1 << 31},
	} {
		got, err := lookUpUser(s, dir+"/passwd", dir+"/group")
		if want.uid == 1<<31 {
			if err == nil {
				t.Errorf("%s: no error", s)
			}
			continue
		}
		if err != nil || got.uid != want.uid || got.gid != want.gid || got.home != want.home || !slices.Equal(got.groups, want.groups) {
			t.Errorf("%s: %+v, %v; want %+v", s, got, err, want)
		}
	}
	if got, err := lookUpUser("7", dir+"/none", dir+"/none"); err != nil || got.uid != 7 {
		t.Errorf("without files: %+v, %v", got, err)
	}
}

func TestEscape(t *testing.T) {
	if got := escape(`/a:b,c\d`); got != `/a\:b\,c\\d` {
		t.Error(got)
	}
}

// Whatever an image's files say, it is an account or an error.
func FuzzLookUpUser(f *testing.F) {
	f.Add("web:log", "web:x:33:33:www:/var/www:/bin/sh\n", "log:x:4:web\n")
	f.Fuzz(func(t *testing.T, user, passwd, group string) {
		dir := t.TempDir()
		write(t, dir+"/passwd", passwd, 0o644)
		write(t, dir+"/group", group, 0o644)
		lookUpUser(user, dir+"/passwd", dir+"/group")
	})
}
