package main

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

func describe(o mount.ComposefsOptions) string {
	return fmt.Sprintf("%q %x %s %q %q ro=%t %q", o.Basedirs, o.Digest, o.Verity, o.Upper, o.Work, o.ReadOnly, o.IDMap)
}

func TestMountOptions(t *testing.T) {
	sum := strings.Repeat("0a", 32)
	for _, c := range []struct{ in, want string }{
		{"basedir=/o", `["/o"]   "" "" ro=false ""`},
		{"basedir=a:b::c", `["a" "b" "c"]   "" "" ro=false ""`},
		{`basedir=a\,b\\c,ro`, `["a,b\\c"]   "" "" ro=true ""`},
		{"rw,basedir=a=b,,ro,rw,", `["a=b"]   "" "" ro=false ""`},
		{"basedir=o,verity", `["o"]  require "" "" ro=false ""`},
		{"basedir=o,tryverity", `["o"]  try "" "" ro=false ""`},
		{"basedir=o,verity,tryverity", `["o"]  require "" "" ro=false ""`},
		{"digest=" + sum + ",basedir=o", `["o"] ` + sum + `  "" "" ro=false ""`},
		{"basedir=o,upperdir=u,workdir=w,idmap=/proc/1/ns/user", `["o"]   "u" "w" ro=false "/proc/1/ns/user"`},
		{"basedir=a,basedir=b", `["b"]   "" "" ro=false ""`},
	} {
		o, err := parseMountOptions(c.in)
		if got := describe(o); err != nil || got != c.want {
			t.Errorf("%s: %s, %v; want %s", c.in, got, err, c.want)
		}
	}
	for in, want := range map[string]string{
		"":                                  "no folder of objects",
		"ro":                                "no folder of objects",
		"basedir":                           "the option basedir has no value",
		"basedir=":                          "the option basedir has no value",
		"basedir=::":                        "no folder of objects",
		"basedir=o,upperdir=u":              "only one",
		"basedir=o,workdir=w":               "only one",
		"basedir=o,digest=12":               "want 64 hexadecimal digits",
		"basedir=o,digest=" + sum[1:] + "g": "want 64 hexadecimal digits",
		"basedir=o,ro=1":                    `unknown option "ro=1"`,
		"basedir=o,noexec":                  `unknown option "noexec"`,
	} {
		if _, err := parseMountOptions(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %s", in, err, want)
		}
	}
}

func FuzzMountOptions(f *testing.F) {
	for _, s := range []string{"basedir=a", `basedir=a\,b,verity`, `\`, `a\`, ",,", "basedir=a,digest=00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		o, err := parseMountOptions(s)
		if err == nil && len(o.Basedirs) == 0 {
			t.Errorf("%q: no folder of objects and no error", s)
		}
		// A path survives when it is escaped.
		if s == "" || strings.Contains(s, ":") {
			return
		}
		o, err = parseMountOptions("ro,basedir=" + strings.NewReplacer(`\`, `\\`, ",", `\,`).Replace(s) + ",rw")
		if err != nil || len(o.Basedirs) != 1 || o.Basedirs[0] != s {
			t.Errorf("%q became %q, %v", s, o.Basedirs, err)
		}
	})
}
