package e2e

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// systemdScript makes systemd process 1 of namespaces of its own.
const systemdScript = `set -e
mount -t tmpfs tmpfs /run
umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup
mkdir -p /run/systemd/system
cp "$1"/*.service /run/systemd/system/
export container=podman
exec /usr/lib/systemd/systemd --system --unit=acts.service --log-target=console --show-status=0`

// A real systemd keeps the session in its descriptor store, restarts the
// server when it is killed, and is told when it is over.
func TestSystemd(t *testing.T) {
	b := newBench(t)
	point := b.point()
	units := filepath.Join(b.dir, "units")
	acts, out := filepath.Join(b.dir, "acts.sh"), filepath.Join(b.dir, "acts.out")
	cfs := binary + " --runtime-dir " + b.runtime
	for path, text := range map[string]string{
		filepath.Join(units, "image.service"): fmt.Sprintf(`[Unit]
StartLimitIntervalSec=0
DefaultDependencies=no
[Service]
Type=notify
ExecStart=%s mount --foreground --root %s --swap never --backend fuse oci:%s:%s %s
FileDescriptorStoreMax=8
# Which systemd 254 sets by itself
Environment=FDSTORE=8
Restart=on-failure
RestartSec=10ms
`, cfs, b.root, set.Layout(images.EStargz), images.Small, point),
		filepath.Join(units, "acts.service"): fmt.Sprintf(`[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/sh %s
StandardOutput=file:%s
StandardError=inherit
`, acts, out),
		acts: fmt.Sprintf(`systemctl start image.service
exec 3<%[2]s/d00/f01
for i in 1 2 3; do
	systemctl kill -s KILL image.service
	stat -f %[2]s >/dev/null && echo served
	%[1]s status %[2]s | grep session
done
sum=$(md5sum <%[2]s/d00/f01); exec 4<&3; [ "$(md5sum <&4)" = "$sum" ] && echo held
exec 3<&- 4<&-
systemctl show -p NRestarts image.service
systemctl stop image.service
systemctl show -p NFileDescriptorStore image.service
grep -c %[2]s /proc/self/mountinfo
echo end
`, cfs, point),
	} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, console := underSystemd(t, units, out)
	want := ""
	for i := range 3 {
		want += fmt.Sprintf("served\n  session    kept by systemd, restarted %d times\n", i+1)
	}
	want += "held\nNRestarts=3\nNFileDescriptorStore=0\n0\nend\n"
	squeeze := strings.NewReplacer("  ", " ")
	norm := func(s string) string {
		for strings.Contains(s, "  ") {
			s = squeeze.Replace(s)
		}
		return s
	}
	if norm(got) != norm(want) {
		t.Errorf("said:\n%s\nwant:\n%s\nconsole:\n%s", got, want, console)
	}
}

// underSystemd starts a systemd with the units of a folder, of which acts.service
// writes the file out; it returns that, and what was said on the console, once
// its last line is "end".
func underSystemd(t *testing.T, units, out string) (said, console string) {
	t.Helper()
	group := newCgroup(t)
	cmd := exec.Command("sh", "-c", `echo $$ >"$1/cgroup.procs" && exec unshare --mount --pid --cgroup --fork --kill-child --mount-proc --propagation private sh -c "$2" sh "$3"`,
		"sh", group, systemdScript, units)
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &errs, &errs
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(time.Minute); !strings.Contains(said, "\nend\n") && time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		text, _ := os.ReadFile(out)
		said = string(text)
	}
	cmd.Process.Kill()
	cmd.Wait()
	return said, errs.String()
}

// The units of the package: an image of a configuration file, whose server is
// killed, and the exporter, which sees it and what the kernel serves.
func TestUnits(t *testing.T) {
	b := newBench(t)
	units, acts, out, addr := filepath.Join(b.dir, "units"), filepath.Join(b.dir, "acts.sh"), filepath.Join(b.dir, "acts.out"), freeAddr(t)
	host, port, _ := strings.Cut(addr, ":")
	kernel, point := b.point(), b.point()
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Small
	b.mountAt(source, kernel)
	b.waitFor("swapped", kernel) // seals it; mounted again below
	b.must("umount", kernel)
	files := map[string]string{
		filepath.Join(b.dir, "mounts/small.conf"): fmt.Sprintf("SOURCE=%s\nMOUNTPOINT=%s\nOPTIONS=--root %s --swap never --backend fuse\n", source, point, b.root),
		filepath.Join(units, "acts.service"): fmt.Sprintf(`[Unit]
DefaultDependencies=no
[Service]
Type=oneshot
ExecStart=/bin/bash %s
StandardOutput=file:%s
StandardError=inherit
`, acts, out),
		acts: fmt.Sprintf(`export PATH=/usr/sbin:/usr/bin:/sbin:/bin
ours() {
	exec 5<>/dev/tcp/%[4]s/%[5]s; printf 'GET /metrics HTTP/1.0\r\n\r\n' >&5
	grep -E '^cfs_fuse_(mounts|session_resumes_total|mounts_at_risk|mounts_dead)(\{.*\})? [0-9]' <&5 | grep -v ' 0$'; exec 5<&-
}
%[1]s mount --root %[2]s %[6]s %[3]s
systemctl start cfs-fuse-mount@small.service
systemctl start cfs-fuse-exporter.service
for i in $(seq 100); do (exec 5<>/dev/tcp/%[4]s/%[5]s) 2>/dev/null && break; sleep 0.1; done
%[1]s wait --for sealed %[7]s
ours
systemctl kill -s KILL cfs-fuse-mount@small.service
stat -f %[7]s >/dev/null && echo served
ours
systemctl stop cfs-fuse-mount@small.service
%[1]s umount %[3]s
grep -c -e %[3]s -e %[7]s /proc/self/mountinfo
echo end
`, binary, b.root, kernel, host, port, source, point),
	}
	shipped, err := filepath.Glob("../deploy/systemd/cfs-fuse-[em]*.service")
	if err != nil || len(shipped) != 2 {
		t.Fatalf("units: %v, %v", shipped, err)
	}
	replace := strings.NewReplacer("/usr/bin/cfs-fuse exporter", binary+" exporter --listen "+addr, "/usr/bin/cfs-fuse", binary, "/etc/cfs-fuse/mounts", filepath.Join(b.dir, "mounts"),
		"[Unit]", "[Unit]\nDefaultDependencies=no", "network-online.target", "")
	for _, path := range shipped {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Join(units, filepath.Base(path))] = replace.Replace(string(text))
	}
	for path, text := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, console := underSystemd(t, units, out)
	const both = `cfs_fuse_mounts{backend="fuse",state="sealed"} 1
cfs_fuse_mounts{backend="kernel",state="swapped"} 1
`
	if want := both + "served\n" + both + "cfs_fuse_session_resumes_total 1\n0\nend\n"; got != want {
		t.Errorf("said:\n%s\nwant:\n%s\nconsole:\n%s", got, want, console)
	}
}

// newCgroup makes a group below this process's, for a systemd to do in what it
// likes.
func newCgroup(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	root := ""
	for line := range strings.Lines(string(text)) {
		if before, after, _ := strings.Cut(line, " - "); strings.HasPrefix(after, "cgroup2 ") {
			root = strings.Fields(before)[4]
		}
	}
	if root == "" {
		t.Fatal("no cgroup2 is mounted, which systemd needs")
	}
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(own)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			root = filepath.Join(root, path)
		}
	}
	dir, err := os.MkdirTemp(root, "cfs-fuse-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// A group can be removed once its last process is.
		var err error
		for range 100 {
			var groups []string
			filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					groups = append(groups, path)
				}
				return nil
			})
			err = nil
			for i := len(groups) - 1; i >= 0; i-- {
				err = unix.Rmdir(groups[i])
			}
			if err == nil {
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
		t.Errorf("control group %s: %v", dir, err)
	})
	return dir
}
