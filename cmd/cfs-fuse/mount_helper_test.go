package main

import (
	"slices"
	"strings"
	"testing"
)

func TestMountHelper(t *testing.T) {
	for _, c := range []struct {
		args, want string // want "!…": an error that says so
		fake       bool
	}{
		{"src /mnt -o rw", "mount -- src /mnt", false},
		{"src /mnt", "mount -- src /mnt", false},
		{"-t cfs-fuse src /mnt -v -o ro,nosuid,swap=never", "mount --options=ro --options=nosuid --swap=never -- src /mnt", false},
		{"src /mnt -sfn -o defaults,_netdev,nofail,x-systemd.automount,fill=false,plain-http,runtime-dir=/r", "mount --fill=false --plain-http --runtime-dir=/r -- src /mnt", true},
		{"src /mnt -o verity", "!no value", false},
		{"src /mnt -o nonsense", `!unknown option "nonsense"`, false},
		{"src /mnt -o foreground", `!unknown option "foreground"`, false},
		{"src -o ro", "!1 names", false},
		{"src /mnt -o", "!-o without a value", false},
		{"src /mnt --bad", "!unknown flag --bad", false},
		{"src /mnt -N 1", "!namespace", false},
	} {
		line, fake, err := mountHelperLine(strings.Fields(c.args))
		if text, ok := strings.CutPrefix(c.want, "!"); ok {
			if err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v, want %q", c.args, err, text)
			}
			continue
		}
		if err != nil || fake != c.fake || !slices.Equal(line, strings.Fields(c.want)) {
			t.Errorf("%s: %q %v (%v), want %q", c.args, line, fake, err, c.want)
		}
	}
}
