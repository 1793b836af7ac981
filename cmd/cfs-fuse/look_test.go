package main

import "testing"

func TestSplitSource(t *testing.T) {
	for _, c := range []struct{ arg, source, path string }{
		{"docker://h:5000/a/b:tag:/etc/passwd", "docker://h:5000/a/b:tag", "/etc/passwd"},
		{"docker://h/a@sha256:00:/x:/y", "docker://h/a@sha256:00", "/x:/y"},
		{"docker://h/a", "docker://h/a", ""},
		{"h:5000/a:1", "h:5000/a:1", ""},
		{"debian:12:/", "debian:12", "/"},
		{"oci:/tmp/l", "oci:/tmp/l", ""},
		{"oci:/tmp/l:latest:/etc", "oci:/tmp/l:latest", "/etc"},
		{"oci:./l:/etc", "oci:./l", "/etc"},
		{"oci-archive:/a.tar:/etc", "oci-archive:/a.tar", "/etc"},
		{"layer:/a.tgz:/etc", "layer:/a.tgz", "/etc"},
		{"composefs:/a.erofs:/etc", "composefs:/a.erofs", "/etc"},
		{"sha256:abc:/etc", "sha256:abc", "/etc"},
		{"/mnt:/etc", "/mnt", "/etc"},
		{"/mnt", "/mnt", ""},
		{":/etc", ":/etc", ""},
	} {
		if s, p := splitSource(c.arg); s != c.source || p != c.path {
			t.Errorf("%s is %q and %q, want %q and %q", c.arg, s, p, c.source, c.path)
		}
	}
}

func TestShortSize(t *testing.T) {
	for n, want := range map[int64]string{ // as du -h --apparent-size and ls -lh say
		0: "0", 1023: "1023", 1024: "1.0K", 1025: "1.1K", 10137: "9.9K", 10138: "10K", 10240: "10K", 10241: "11K", 1047553: "1.0M", 1048576: "1.0M", 123456789: "118M", 1 << 62: "4.0E",
	} {
		if got := shortSize(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
}
