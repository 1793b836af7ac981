package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

const deploy = "../deploy/prometheus/"

// The rules are valid, and fire when they should and only then.
func TestAlertRules(t *testing.T) {
	for _, args := range [][]string{{"check", "rules", "alerts.yaml"}, {"check", "config", "scrape.yaml"}, {"test", "rules", "alerts_test.yaml"}} {
		cmd := exec.Command("promtool", args...)
		cmd.Dir = deploy
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// Debian's Prometheus scrapes the exporter while images are mounted, one of
// them swapped and its process gone. Every query of the dashboard and of the
// alerts has an answer.
func TestPrometheus(t *testing.T) {
	b := newBench(t)
	addr := startExporter(t, b)
	prom := startPrometheus(t, b.dir, addr)
	// Counters before the first scrape have no rate.
	eventually(t, 30*time.Second, "Prometheus scrapes", func() bool { return prom.query(`up{job="cfs-fuse"} == 1`) == 1 })

	// A registry that wants a login and fails once.
	var failed atomic.Bool
	r, err := registrytest.New(registrytest.Options{
		Auth: registrytest.Auth{User: userName, Password: password, TTL: time.Hour},
		Fault: func(q registrytest.Request) (f registrytest.Fault) {
			if q.Kind == "blob" && failed.CompareAndSwap(false, true) {
				f = registrytest.Fault{Kind: registrytest.Status, Status: http.StatusServiceUnavailable}
			}
			return f
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	small := serveImage(t, r, images.EStargz, images.Small)
	dockerLogin(t, t.TempDir(), r.Host())

	b.must("mount", "--root", b.root, "--plain-http", "--store-size", "10GB", small, b.point())
	swapped := filepath.Join(b.dir, "m1")
	if _, err := os.ReadFile(filepath.Join(swapped, "d07/f07")); err != nil {
		t.Fatal(err)
	}
	b.waitFor("swapped", swapped)
	noProcess(t, swapped)
	lazy := b.mount(serveImage(t, r, images.ZstdChunked, images.Small), "--swap", "never", "--backend", fuseBackend)
	b.refused(1, []string{"404"}, "mount", "--root", b.root, "--plain-http", "docker://"+r.Host()+"/missing:1", b.point())

	queries := append(dashboardQueries(t), alertQueries(t)...)
	if len(queries) < 50 {
		t.Errorf("only %d queries found", len(queries))
	}
	left := queries
	for deadline := time.Now().Add(time.Minute); len(left) > 0; time.Sleep(500 * time.Millisecond) {
		if _, err := os.ReadFile(filepath.Join(lazy, "d07/f07")); err != nil {
			t.Fatal(err)
		}
		var without []string
		for _, q := range left {
			if n := prom.query(q); n == 0 {
				without = append(without, q)
			}
		}
		if left = without; time.Now().After(deadline) {
			break
		}
	}
	for _, q := range left {
		t.Errorf("no data for %s", q)
	}
	t.Logf("%d queries, all but %d with data", len(queries), len(left))
	for q, want := range map[string]int{
		`cfs_fuse_mounts{state="swapped",backend="kernel"} == 1`:                   1,
		`cfs_fuse_mounts{state="sealed",backend="fuse"} == 1`:                      1,
		`cfs_fuse_session_resumes_total == 0`:                                      1,
		`cfs_fuse_mounts_started_total == 1`:                                       1, // failed
		`cfs_fuse_mounts_started_total == 2`:                                       1, // ok
		`histogram_count(cfs_fuse_milestone_seconds{milestone="swapped"}) == 1`:    1, // native, of a process that has ended
		`cfs_fuse_source_errors_total{kind="server",host="` + r.Host() + `"} == 1`: 1,
		`cfs_fuse_source_errors_total{kind="missing"} == 1`:                        1,
		`cfs_fuse_store_budget_bytes`:                                              1,
		`cfs_fuse_not_fetched_bytes_total{reason="shared"} > 0`:                    1,
		`sum(cfs_fuse_source_bytes_total{class="fill"}) + 0 > 0 and sum(cfs_fuse_files) == 2*` + fmt.Sprint(b.status(lazy).Files): 1,
	} {
		if n := prom.query(q); n != want {
			t.Errorf("%s: %d series, want %d", q, n, want)
		}
	}

	lint := exec.Command("promtool", "check", "metrics")
	lint.Stdin = strings.NewReader(onlyOurs(scrape(t, addr)))
	if out, err := lint.CombinedOutput(); err != nil || len(bytes.TrimSpace(out)) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}

	// A server that is killed: what it had counted stays, another goes on.
	s := b.status(lazy)
	before := metric(t, addr, `cfs_fuse_read_duration_seconds_count{source="local"}`)
	if err := killed(s.PID); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "another server goes on", func() bool { now := b.status(lazy); return now.PID != s.PID && now.PID != 0 })
	if n := metric(t, addr, `cfs_fuse_read_duration_seconds_count{source="local"}`); n < before {
		t.Errorf("%v reads are counted after the server was killed, %v before", n, before)
	}
	if n := metric(t, addr, `cfs_fuse_session_resumes_total`); n != 1 {
		t.Errorf("%v resumes, want 1", n)
	}
	b.killAll(lazy)
	eventually(t, 20*time.Second, "one dead mount", func() bool { return metric(t, addr, `cfs_fuse_mounts_dead`) == 1 })
	b.must("umount", lazy)
	if n := metric(t, addr, `cfs_fuse_mounts_dead`); n != 0 {
		t.Errorf("%v dead mounts after the unmount", n)
	}
}

// startExporter has the bench's mounts served at the address it returns.
func startExporter(t *testing.T, b *bench) string {
	t.Helper()
	addr := freeAddr(t)
	start(t, exec.Command(binary, "--runtime-dir", b.runtime, "exporter", "--listen", addr))
	answers(t, "http://"+addr+"/metrics")
	return addr
}

// start starts a program that is ended with the test, and must live until then.
func start(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil || t.Failed() {
			t.Logf("%s: %v\n%s", cmd, err, said.Bytes()[max(0, said.Len()-4000):])
		}
	})
}

func answers(t *testing.T, url string) {
	t.Helper()
	eventually(t, 30*time.Second, url+" answers", func() bool {
		resp, err := http.Get(url)
		if err == nil {
			resp.Body.Close()
		}
		return err == nil && resp.StatusCode == http.StatusOK
	})
}

type prometheus struct {
	t   *testing.T
	api string
}

// startPrometheus starts one that scrapes target each second, with the deployed
// rules.
func startPrometheus(t *testing.T, dir, target string) *prometheus {
	t.Helper()
	rules, err := filepath.Abs(deploy + "alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(deploy + "scrape.yaml")
	if err != nil {
		t.Fatal(err)
	}
	config := "global:\n  scrape_interval: 1s\n  evaluation_interval: 1s\n" +
		strings.NewReplacer("- alerts.yaml", "- "+rules, "127.0.0.1:9750", target).Replace(string(raw))
	path := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(path, []byte(config), 0o644); err != nil {
		t.Fatal(err)
	}
	addr := freeAddr(t)
	start(t, exec.Command("prometheus", "--config.file="+path, "--storage.tsdb.path="+filepath.Join(dir, "tsdb"),
		"--web.listen-address="+addr, "--enable-feature=native-histograms"))
	answers(t, "http://"+addr+"/-/ready")
	return &prometheus{t, "http://" + addr + "/api/v1/query"}
}

// query returns how many series the query has now.
func (p *prometheus) query(q string) int {
	p.t.Helper()
	resp, err := http.Get(p.api + "?query=" + url.QueryEscape(q))
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          struct{ Result []json.RawMessage }
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil || answer.Status != "success" {
		p.t.Fatalf("%s: %v %s", q, err, answer.Error)
	}
	return len(answer.Data.Result)
}

// dashboardQueries are those of all panels, with what Grafana fills in.
func dashboardQueries(t *testing.T) (all []string) {
	t.Helper()
	raw, err := os.ReadFile("../deploy/grafana/cfs-fuse.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct{ Targets []struct{ Expr string } }
	}
	if err := json.Unmarshal(raw, &dashboard); err != nil {
		t.Fatal(err)
	}
	fill := strings.NewReplacer("$instance", ".*", "$__rate_interval", "1m")
	for _, p := range dashboard.Panels {
		for _, target := range p.Targets {
			all = append(all, fill.Replace(target.Expr))
		}
	}
	return all
}

// alertQueries are those of the rules, without the bounds that nothing should
// be over.
func alertQueries(t *testing.T) (all []string) {
	t.Helper()
	raw, err := os.ReadFile(deploy + "alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	bound := regexp.MustCompile(` (>|<|==) -?[0-9.]+$`)
	text := regexp.MustCompile(`>-\n\s+(.*)\n\s+(.*)\n`).ReplaceAllString(string(raw), "$1 $2\n")
	for line := range strings.Lines(text) {
		expr, ok := strings.CutPrefix(strings.TrimSpace(line), "expr: ")
		if !ok {
			continue
		}
		for _, part := range strings.Split(expr, " and on (instance) ") {
			bare := bound.ReplaceAllString(part, "")
			if bare == part {
				t.Errorf("an alert without a bound at its end: %s", part)
			}
			all = append(all, bare)
		}
	}
	return all
}

// onlyOurs leaves out what client_golang says of any Go program.
func onlyOurs(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.Contains(line, "cfs_fuse_") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// serveImage serves an image of the set from the registry, and returns its
// source.
func serveImage(t *testing.T, r *registrytest.Registry, form, name string) string {
	t.Helper()
	manifest, desc, err := set.Manifest(form, name)
	if err != nil {
		t.Fatal(err)
	}
	blob := func(d digest.Digest) string {
		return filepath.Join(set.Layout(form), "blobs", d.Algorithm().String(), d.Encoded())
	}
	for _, d := range append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...) {
		f, err := os.Open(blob(d.Digest))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		r.Add(d.Digest, f, d.Size)
	}
	raw, err := os.ReadFile(blob(desc.Digest))
	if err != nil {
		t.Fatal(err)
	}
	r.AddManifest(name, form, desc.MediaType, raw)
	return "docker://" + r.Host() + "/" + name + ":" + form
}

// killed kills a process and waits until it has ended.
func killed(pid int) error {
	p, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	if err := p.Kill(); err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); !ended(pid); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			return context.DeadlineExceeded
		}
	}
	return nil
}
