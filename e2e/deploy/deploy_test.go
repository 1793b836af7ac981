// Package deploy checks what is in the folder of the same name with the programs
// that read it: systemd, helm, and the containerds. It has tests only.
package deploy

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/e2e/containerd"
	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// helmVersion is the helm that the chart is checked with.
const helmVersion = "v3.22.0"

const (
	chart = "../../deploy/helm/cfs-fuse"
	unit  = "../../deploy/systemd/cfs-fuse-snapshotter.service"
)

func cacheDir(t *testing.T) string {
	t.Helper()
	dir, err := images.DefaultCache()
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// systemd finds nothing wrong with the snapshotter's unit. The one of Debian 12
// does not know a setting of systemd 254.
func TestUnit(t *testing.T) {
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "cfs-fuse-snapshotter.service")
	if err := os.WriteFile(path, bytes.ReplaceAll(text, []byte("/usr/bin/cfs-fuse"), []byte("/bin/true")), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "verify", path).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if !strings.Contains(line, "Unknown key 'FileDescriptorStorePreserve'") {
			t.Errorf("systemd-analyze verify: %s", line)
		}
	}
}

// The drop-ins are taken by the containerds that they are for.
func TestDropIns(t *testing.T) {
	built, err := containerd.Build(t.Context(), cacheDir(t), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	for file, program := range map[string]string{"config-2.x.toml": filepath.Join(built, "containerd"), "config-1.7.toml": "/usr/bin/containerd"} {
		out, err := exec.Command(program, "--config", "../../deploy/containerd/"+file, "config", "dump").CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", file, err, out)
		}
		text := strings.ReplaceAll(string(out), `"`, "'")
		for _, want := range []string{"snapshotter = 'cfs'", "[proxy_plugins.cfs]", "address = '/run/cfs-fuse/snapshotter.sock'", "disable_snapshot_annotations = false"} {
			if !strings.Contains(text, want) {
				t.Errorf("%s: what containerd makes of it has no %s", file, want)
			}
		}
	}
}

// helm finds nothing wrong with the chart, and what it makes of it has what the
// values ask for.
func TestChart(t *testing.T) {
	dir, err := images.GoInstall(t.Context(), cacheDir(t), "helm-"+helmVersion, os.Stderr, nil, "helm.sh/helm/v3/cmd/helm@"+helmVersion)
	if err != nil {
		t.Fatal(err)
	}
	helm := func(args ...string) (string, error) {
		cmd := exec.Command(filepath.Join(dir, "helm"), append(args, "--kube-version", "1.31")...)
		cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := helm("lint", "--strict", chart); err != nil {
		t.Errorf("helm lint: %v\n%s", err, out)
	}
	for name, c := range map[string]struct {
		set   []string
		want  []string
		not   []string
		error string
	}{
		"as it is": {
			want: []string{"kind: DaemonSet", "install.sh", "version = 3", "ExecStart=/usr/local/bin/cfs-fuse --runtime-dir /run/cfs-fuse snapshotter --root /var/lib/cfs-fuse\n"},
			not:  []string{"PodMonitor", "mountPropagation"},
		},
		"in the pod": {
			set:  []string{"mode=pod", "containerd.version=1", "args={--store-size,50GB}"},
			want: []string{"mountPropagation: Bidirectional", "privileged: true", "version = 2", `"--store-size","50GB"`, "memory: 1Gi"},
			not:  []string{"initContainers:\n        - name: install"},
		},
		"metrics": {
			set:  []string{"metrics.address=0.0.0.0:9110", "metrics.podMonitor.enabled=true"},
			want: []string{"kind: PodMonitor", "containerPort: 9110", "--metrics 0.0.0.0:9110"},
		},
		"no drop-in":    {set: []string{"containerd.dropInDir="}, not: []string{"name: dropin"}, want: []string{`value: ""`}},
		"wrong mode":    {set: []string{"mode=vm"}, error: "want systemd or pod"},
		"monitor alone": {set: []string{"metrics.podMonitor.enabled=true"}, error: "needs metrics.address"},
	} {
		args := []string{"template", "release", chart}
		for _, s := range c.set {
			args = append(args, "--set", s)
		}
		out, err := helm(args...)
		if c.error != "" {
			if err == nil || !strings.Contains(out, c.error) {
				t.Errorf("%s: %v, want %s\n%s", name, err, c.error, out)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
		for _, w := range c.want {
			if !strings.Contains(out, w) {
				t.Errorf("%s: no %q in\n%s", name, w, out)
			}
		}
		for _, w := range c.not {
			if strings.Contains(out, w) {
				t.Errorf("%s: %q in\n%s", name, w, out)
			}
		}
	}
}

// A chart cannot use files outside of it: its unit is a copy.
func TestCopies(t *testing.T) {
	a, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(chart, "files", "cfs-fuse-snapshotter.service"))
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("the chart's unit is not the one of deploy/systemd: copy it (%v)", err)
	}
}
