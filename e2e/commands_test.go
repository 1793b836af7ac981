package e2e

import (
	"encoding/json"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// The metrics of a mount keep to Prometheus' rules of naming, and have the
// families and labels they are documented with, no more.
func TestMetrics(t *testing.T) {
	b, addr := newBench(t), freeAddr(t)
	point := b.mount("oci:"+set.Layout(images.EStargz)+":"+images.Small, "--swap", "never", "--metrics", addr)
	want, err := os.ReadFile(filepath.Join(point, "d07/f07"))
	if err != nil || len(want) == 0 {
		t.Fatalf("%d bytes, %v", len(want), err)
	}
	b.waitFor("sealed", point)
	text := scrape(t, addr)
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "cfs_fuse_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	for _, sample := range []string{
		`cfs_fuse_source_requests_total{class="demand",result="ok",source="registry"}`, `cfs_fuse_source_bytes_total{class="fill",result="ok",source="file"}`,
		`cfs_fuse_read_duration_seconds_count{source="local"}`, `cfs_fuse_milestone_seconds_bucket{milestone="sealed",le="+Inf"}`,
		`cfs_fuse_chunks_failed_total{reason="digest"}`,
	} {
		metric(t, addr, sample)
	}
	s := b.status(point)
	for sample, want := range map[string]float64{
		`cfs_fuse_mounts{backend="hybrid",state="sealed"}`: 1, `cfs_fuse_mounts{backend="hybrid",state="lazy"}`: 0, `cfs_fuse_mounts_at_risk`: 0,
		`cfs_fuse_files`: float64(s.Files), `cfs_fuse_files_local`: float64(s.Files),
		`cfs_fuse_image_bytes`: float64(s.Bytes), `cfs_fuse_image_local_bytes`: float64(s.Bytes),
	} {
		if got := metric(t, addr, sample); got != want {
			t.Errorf("%s is %v, want %v", sample, got, want)
		}
	}
	var fetched float64
	for _, class := range []string{"demand", "prefetch", "fill"} {
		fetched += metric(t, addr, `cfs_fuse_source_bytes_total{class="`+class+`",result="ok",source="file"}`)
	}
	total, err := set.CompressedSize(images.EStargz, images.Small)
	if err != nil {
		t.Fatal(err)
	}
	if fetched < 0.5*float64(total) || fetched > 1.1*float64(total) {
		t.Errorf("%v bytes counted for an image of %d", fetched, total)
	}
	req, err := http.NewRequest(http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", "application/openmetrics-text;version=1.0.0")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	open, err := io.ReadAll(resp.Body)
	if exemplar := `# {image="` + s.ManifestDigest + `"}`; err != nil || !strings.Contains(string(open), exemplar) {
		t.Errorf("no exemplar %s: %v", exemplar, err)
	}
	labels := regexp.MustCompile(`[{,]([a-z_]+)="`)
	for line := range strings.Lines(text) {
		if !strings.HasPrefix(line, "cfs_fuse_") {
			continue
		}
		for _, m := range labels.FindAllStringSubmatch(line, -1) {
			switch m[1] {
			case "class", "result", "source", "reason", "state", "le", "backend", "operation", "milestone", "verity", "root", "version", "revision", "goversion":
			default:
				t.Errorf("label %s: %s", m[1], line)
			}
		}
	}
}

// The commands say what is wrong in one line, with the exit codes of the help.
func TestCommands(t *testing.T) {
	b := newBench(t)
	point := b.point()
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Small
	for _, c := range []struct {
		code  int
		words []string
		args  []string
	}{
		{2, []string{"SOURCE"}, []string{"mount"}},
		{2, []string{"--swap"}, []string{"mount", "--swap", "perhaps", source, point}},
		{2, []string{"--backend", "hybrid"}, []string{"mount", "--backend", "kernel", source, point}},
		{2, nil, []string{"wait", "--for", "nothing", point}},
		{2, nil, []string{"no-such-command"}},
		{3, []string{point}, []string{"status", point}},
		{3, []string{point}, []string{"umount", point}},
		{3, []string{point}, []string{"wait", "--for", "swapped", point}},
		{1, []string{"none"}, []string{"mount", "--root", b.root, source, filepath.Join(b.dir, "none")}},
		{1, []string{"nowhere"}, []string{"mount", "--root", b.root, "oci:" + b.dir + "/nowhere", point}},
		{1, []string{"no-such-tag"}, []string{"mount", "--root", b.root, "oci:" + set.Layout(images.EStargz) + ":no-such-tag", point}},
	} {
		b.refused(c.code, c.words, c.args...)
	}
	if out := b.must("status"); !strings.Contains(out, "nothing is mounted") {
		t.Errorf("status said %q", out)
	}
	k := newLink(t, registry.Addr, lan)
	b.mountAt(source, point, "--swap", "never")
	b.waitFor("sealed", point)
	b.refused(1, []string{"mounted"}, "mount", "--root", b.root, source, point)
	b.refused(4, []string{"--swap never"}, "wait", "--for", "swapped", point)
	lazy := b.mount("docker://"+k.addr+"/"+images.Debian+":"+images.EStargz, "--fill=false")
	b.refused(5, nil, "wait", "--for", "complete", "--timeout", "200ms", lazy)

	var all []status
	if err := json.Unmarshal([]byte(b.must("status", "--json")), &all); err != nil || len(all) != 2 {
		t.Errorf("status --json of two mounts: %+v, %v", all, err)
	}
	text := b.must("status", point)
	for _, word := range []string{point, source, "sealed", "hybrid", "verity", "--swap never"} {
		if !strings.Contains(text, word) {
			t.Errorf("status does not say %q:\n%s", word, text)
		}
	}
	// A mount in use stays, and the mount point stays what it was.
	f, err := os.Open(filepath.Join(point, "d00/f01"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	start := time.Now()
	b.refused(1, []string{point}, "umount", point)
	if took := time.Since(start); took > 20*time.Second {
		t.Errorf("umount of a mount in use took %v", took)
	}
	b.isServed(point)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	b.must("umount", point)
	b.must("umount", lazy)
	b.refused(3, nil, "umount", point)
	noProcess(t, b.dir)
}

// The quick start of README.md works as it stands there, but for the names of
// the registry and of the folders.
func TestReadme(t *testing.T) {
	b := newBench(t)
	raw, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(raw), "## Quick start")
	text, _, _ = strings.Cut(text, "\n## ")
	var script []string
	for i, block := range strings.Split(text, "```") {
		for line := range strings.Lines(block) {
			if i%2 == 1 && strings.TrimSpace(line) != "" && !strings.HasPrefix(line, "make ") {
				script = append(script, strings.TrimSpace(line))
			}
		}
	}
	if len(script) < 6 {
		t.Fatalf("the quick start has only %q", script)
	}
	point := b.point()
	lines := strings.NewReplacer("registry.example.com/debian:12", registry.Addr+"/"+images.Debian+":"+images.EStargz, "/mnt", point,
		"cfs-fuse mount", "cfs-fuse mount --root "+b.root, "cfs-fuse ", "cfs-fuse --runtime-dir "+b.runtime+" ").Replace(strings.Join(script, "\n"))
	lines = strings.ReplaceAll(lines, "cfs-fuse mount --root", "cfs-fuse --runtime-dir "+b.runtime+" mount --root")
	cmd := exec.Command("sh", "-e", "-c", lines)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Dir(binary)+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "\n1\n") || !strings.Contains(string(out), "state") {
		t.Errorf("%v: %s\n%s", err, lines, out)
	}
	if left := mountOn(t, point); len(left) > 0 {
		t.Errorf("left: %+v", left)
	}
}

// doctor finds nothing missing where the other tests work, asks the registry
// what it does, and says so by its exit code when something is missing.
func TestDoctor(t *testing.T) {
	b := newBench(t)
	source := "docker://" + registry.Addr + "/" + images.Small + ":" + images.EStargz
	args := []string{"doctor", "--root", b.root, "--plain-http", "--containerd", filepath.Join(b.dir, "none"), "--snapshotter", filepath.Join(b.dir, "none"), "--json"}
	out := b.must(append(args, source)...)
	var all []struct{ Group, Name, State, Detail, Cost, Advice string }
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	state := map[string]string{}
	for _, f := range all {
		state[f.Name] = f.State
	}
	for _, name := range []string{"fuse", "hybrid backend", "swap", "space", "eviction", "sockets", "containerd", "image", "ranges", "latency", "bandwidth", "token"} {
		if state[name] != "ok" {
			t.Errorf("%s is %q: %s", name, state[name], out)
		}
	}
	if left := mountOn(t, b.dir); len(left) > 0 {
		t.Errorf("left behind: %+v", left)
	}
	b.refused(1, []string{"1 of", "missing"}, append(args, "docker://"+registry.Addr+"/none:1")...)
	b.refused(1, []string{"bad component"}, append(args, "docker://"+registry.Addr+"/NONE")...)
}
