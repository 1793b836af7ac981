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
	group := newCgroup(t)
	cmd := exec.Command("sh", "-c", `echo $$ >"$1/cgroup.procs" && exec unshare --mount --pid --cgroup --fork --kill-child --mount-proc --propagation private sh -c "$2" sh "$3"`,
		"sh", group, systemdScript, units)
	var console bytes.Buffer
	cmd.Stdout, cmd.Stderr = &console, &console
	cmd.WaitDelay = time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := func() string {
		text, _ := os.ReadFile(out)
		return string(text)
	}
	for end := time.Now().Add(time.Minute); !strings.Contains(said(), "\nend\n") && time.Now().Before(end); {
		time.Sleep(50 * time.Millisecond)
	}
	cmd.Process.Kill()
	cmd.Wait()
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
	if got := said(); norm(got) != norm(want) {
		t.Errorf("said:\n%s\nwant:\n%s\nconsole:\n%s", got, want, console.String())
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
