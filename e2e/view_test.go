package e2e

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// Who owns /bin/true of an image, as the mount says.
func ownerOf(t *testing.T, point, path string) (uid, gid uint32) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(filepath.Join(point, path), &st); err != nil {
		t.Fatal(err)
	}
	return st.Uid, st.Gid
}

// --idmap holds from the first second, for a successor of a server that was
// killed, across the swap, and for the kernel's mount of a sealed image.
func TestIDMap(t *testing.T) {
	b := newBench(t)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Debian
	const ids = "0-100000-65536:0-200000-65536"
	check := func(when, point string) {
		t.Helper()
		if uid, gid := ownerOf(t, point, "usr/bin/true"); uid != 100000 || gid != 200000 {
			t.Errorf("%s: usr/bin/true belongs to %d:%d", when, uid, gid)
		}
		// Of group mail or shadow, by the image.
		if uid, gid := ownerOf(t, point, "etc/shadow"); uid != 100000 || gid != 200042 {
			t.Errorf("%s: etc/shadow belongs to %d:%d", when, uid, gid)
		}
	}
	point := b.mount(source, "--idmap", ids, "--fill=false")
	b.isServed(point)
	check("lazy", point)
	b.must("umount", point)
	point = b.mount(source, "--idmap", ids, "--swap", "never")
	s := b.status(point)
	if err := unix.Kill(s.PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.waitFor("sealed", point)
	if s := b.status(point); s.Restarts != 1 {
		t.Errorf("status: %+v", s)
	}
	check("after a restart", point)
	b.must("swap", point)
	check("swapped", point)
	isKernel(t, point)
	if out := b.must("status", point); !strings.Contains(out, ids) {
		t.Errorf("status says nothing of --idmap:\n%s", out)
	}
	b.must("umount", point)
	check("sealed", b.mount(source, "--idmap", ids))
	b.refused(2, []string{"--idmap", "IMAGE-HOST-COUNT"}, "mount", "--idmap", "0:1000", source, point)
	b.refused(1, []string{"user namespace", "no such file"}, "mount", "--root", b.root, "--idmap", "/proc/1/ns/nothing", source, b.point())
	b.refused(1, []string{"--backend fuse"}, "mount", "--root", b.root, "--backend", "fuse", "--idmap", ids, source, b.point())
}

// A program that runs in a writable mount, and what it wrote, before and after
// everything is local, with a server that is killed between.
func TestUpperdir(t *testing.T) {
	b := newBench(t)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Debian
	upper, work := filepath.Join(b.dir, "upper"), filepath.Join(b.dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	flags := []string{"--upperdir", upper, "--workdir", work}
	point := b.mount(source, flags...)
	b.isServed(point)
	run := func(script string) string {
		t.Helper()
		out, err := inRoot(context.Background(), point, "sh", "-ec", script)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	run("echo written >/root/new; chgrp mail /usr/bin/chage; chmod 2755 /usr/bin/chage; chmod 4755 /usr/bin/passwd; mknod /root/null c 1 3; rm /etc/issue; chown 5:6 /usr/bin/true; mv /etc/hostname /etc/name 2>/dev/null || echo x >/etc/name; echo more >>/etc/passwd")
	check := func(when string) {
		t.Helper()
		out := run("cat /root/new; test ! -e /etc/issue; stat -c %u:%g /usr/bin/true; /usr/bin/true; test -e /etc/name; tail -n 1 /etc/passwd; stat -c %a:%G /usr/bin/chage /usr/bin/passwd; stat -c %F /root/null")
		if out != "written\n5:6\nmore\n2755:mail\n4755:root\ncharacter special file\n" {
			t.Errorf("%s: %q", when, out)
		}
	}
	check("at once")
	if err := unix.Kill(b.status(point).PID, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	check("after a restart")
	b.refused(4, []string{"upperdir"}, "wait", "--for", "swapped", point)
	b.waitFor("sealed", point)
	eventually(t, commandTime, "status says why", func() bool { return strings.Contains(b.status(point).Note, "upperdir") })
	check("sealed")
	run("echo later >/root/later")
	b.refused(1, []string{"uses it", "unmount"}, append(append([]string{"mount", "--root", filepath.Join(b.dir, "root2")}, flags...), source, b.point())...)
	b.must("umount", point)
	noProcess(t, point)

	point = b.mount(source, flags...)
	isKernel(t, point)
	check("by the kernel")
	if out := run("cat /root/later; echo again >/root/again; cat /root/again"); out != "later\nagain\n" {
		t.Errorf("by the kernel: %q", out)
	}
	b.must("umount", point)
	point = b.mount(source, append(flags, "-o", "ro")...)
	if err := os.WriteFile(filepath.Join(point, "x"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("write with -o ro: %v, want EROFS", err)
	}
	b.refused(2, []string{"--workdir"}, "mount", "--upperdir", upper, source, b.point())
}

// --context is refused in the kernel's words where there is no SELinux.
func TestContext(t *testing.T) {
	if _, err := os.Stat("/sys/fs/selinux/enforce"); err == nil {
		return // package mount tests it there
	}
	b := newBench(t)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Small
	for _, backend := range []string{fuseBackend, hybridBackend} {
		p := b.point()
		b.refused(1, []string{"Unknown parameter 'context'", "SELinux"}, "mount", "--root", b.root, "--backend", backend,
			"--context", "system_u:object_r:container_file_t:s0", source, p)
		if all := mountOn(t, p); len(all) != 0 {
			t.Errorf("mounted: %+v", all)
		}
	}
}
