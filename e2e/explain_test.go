package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// An explanation is what is looked at of 'cfs-fuse explain --json'.
type explanation struct {
	Start map[string]float64 `json:"start"`
	Story struct {
		Began   time.Time `json:"began"`
		Fetched map[string]struct {
			Bytes int64 `json:"bytes"`
		} `json:"fetched"`
		Image       float64 `json:"image_bytes"`
		Needed      float64 `json:"needed_bytes"`
		LocalBefore float64 `json:"local_before_bytes"`
		Shared      float64 `json:"shared_bytes"`
	} `json:"story"`
	Users []struct {
		PID int    `json:"pid"`
		How string `json:"how"`
	} `json:"users"`
}

func (b *bench) explain(point string, flags ...string) (e explanation) {
	b.t.Helper()
	out := b.must(append([]string{"explain", "--json", point}, flags...)...)
	if err := json.Unmarshal([]byte(out), &e); err != nil {
		b.t.Fatalf("explain --json: %v", err)
	}
	return e
}

// coldProgram is what the start is measured with: it imports much, says so, and
// stays.
const coldProgram = "import json, ssl, asyncio, unittest, xml.dom.minidom, http.server, sqlite3, decimal, email.mime.text, sys; print('ready', flush=True); sys.stdin.read()"

// A cold start of a program over a link is accounted for: the steps of the
// mount, the reads that waited, and the time in which the program ran or could
// have run, by the kernel's count, are at least 95 % of all time until it
// answers. On a busy machine the server waits for a processor too, which is in
// nobody's count: as much as the kernel says that somebody waited for one is
// allowed for, up to a tenth. The page about it has the same numbers, in a browser that has nothing
// to complain about.
func TestExplain(t *testing.T) {
	best := 0.0
	for try := range 3 {
		b := newBench(t)
		part, stalled, until, point := b.coldStart()
		t.Logf("%.1f %% of %.3f s are accounted for; for %.1f %% somebody waited for a processor", 100*part, until, 100*stalled)
		if try == 0 {
			b.sameInBrowser(point, until)
		}
		if best = max(best, part+min(stalled, 0.1)); best >= 0.95 {
			return
		}
	}
	t.Errorf("%.1f %% of a start are accounted for, want 95", 100*best)
}

// stalls is for how long the kernel has seen somebody wait for a processor, in
// seconds since it was started (Documentation/accounting/psi.rst).
func stalls(t testing.TB) float64 {
	t.Helper()
	text, err := os.ReadFile("/proc/pressure/cpu")
	if err != nil {
		return 0 // nothing is allowed for
	}
	_, total, _ := strings.Cut(string(text), "total=")
	total, _, _ = strings.Cut(total, "\n")
	us, err := strconv.ParseFloat(total, 64)
	if err != nil {
		t.Fatalf("/proc/pressure/cpu: %q", text)
	}
	return us / 1e6
}

// coldStart mounts and runs coldProgram. It returns which part of the time until
// the answer is accounted for, in which part somebody waited for a processor, and
// that time in seconds.
func (b *bench) coldStart() (part, stalled, until float64, point string) {
	t := b.t
	before := stalls(t)
	k := newLink(t, registry.Addr, speed{mbit: 200, delay: 20 * time.Millisecond})
	point = b.mount("docker://" + k.addr + "/" + images.Debian + ":" + images.EStargz)
	// By chroot(1): a program that this process executed would come over the
	// link that this process is.
	cmd := exec.Command("chroot", point, "/usr/bin/python3", "-c", coldProgram)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE=1"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	hold, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer hold.Close()
	line, err := bufio.NewReader(out).ReadString('\n')
	answered := time.Now()
	if err != nil || line != "ready\n" {
		t.Fatalf("the program said %q, %v", line, err)
	}
	// proc_pid_schedstat: nanoseconds on a processor, and waiting for one.
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	var ran, runnable float64
	if _, err := fmt.Sscan(string(text), &ran, &runnable); err != nil {
		t.Fatal(err)
	}
	stalled = stalls(t) - before
	until = answered.Sub(b.explain(point).Story.Began).Seconds()
	e := b.explain(point, "--until", fmt.Sprintf("%.9fs", until))
	if len(e.Users) != 1 || e.Users[0].PID != cmd.Process.Pid || e.Users[0].How != "root" {
		t.Errorf("used by %+v, want process %d by its root", e.Users, cmd.Process.Pid)
	}
	if e.Start["reads_waited"] < 10 || e.Start["waiting_seconds"] < 0.1 || e.Start["mount_seconds"] <= 0 {
		t.Errorf("start: %+v", e.Start)
	}
	return (e.Start["mount_seconds"] + e.Start["waiting_seconds"] + (ran+runnable)/1e9) / until, stalled / until, until, point
}

// sameInBrowser draws a mount's start, and compares what a browser shows of the
// page with what explain says.
func (b *bench) sameInBrowser(point string, until float64) {
	t := b.t
	b.waitFor("sealed", point) // so that nothing changes any more
	page := filepath.Join(b.dir, "start.html")
	flag := fmt.Sprintf("%.9fs", until)
	b.must("report", "--until", flag, "-o", page, point)
	e := b.explain(point, "--until", flag)
	want := map[string]float64{
		"image_bytes": e.Story.Image, "needed_bytes": e.Story.Needed, "local_before_bytes": e.Story.LocalBefore, "shared_bytes": e.Story.Shared,
	}
	for _, name := range []string{"until", "mount", "waiting", "idle", "network", "inflate", "prefetch_saves"} {
		want[name+"_seconds"] = e.Start[name+"_seconds"]
	}
	want["reads_waited"] = e.Start["reads_waited"]
	for _, class := range []string{"metadata", "demand", "prefetch", "fill"} {
		want[class+"_bytes"] = float64(e.Story.Fetched[class].Bytes)
	}
	dom := b.browse(page)
	shown := map[string]float64{}
	for _, m := range regexp.MustCompile(`data-key="([a-z_]+)" data-value="([^"]+)"`).FindAllStringSubmatch(dom, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Errorf("the page has %q", m[0])
		}
		shown[m[1]] = v
	}
	for name, v := range want {
		if got, ok := shown[name]; !ok || got != v {
			t.Errorf("the page says %s is %v, explain %v", name, got, v)
		}
	}
	if shown["chunks_absent"] != 0 || shown["chunks_read"] == 0 || shown["chunks_local"] == 0 {
		t.Errorf("chunks by state: %v", shown)
	}
	for _, id := range []string{"timeline", "states", "uses"} {
		if !strings.Contains(dom, `<svg id="`+id+`"`) {
			t.Errorf("the page has no picture %s", id)
		}
	}
	if n := strings.Count(dom, `class="network"`); float64(n) < e.Start["reads_waited"]/2 {
		t.Errorf("%d bars of the network for %v reads", n, e.Start["reads_waited"])
	}
	if strings.Contains(dom, "http://") || strings.Contains(dom, "https://") || strings.Contains(dom, "<script") {
		t.Error("the page refers to something outside of it, or runs something")
	}
}

// browse opens a page in Chromium and returns what became of it. It fails if the
// page made Chromium complain, or looks like nothing.
func (b *bench) browse(page string) string {
	t := b.t
	chrome := func(args ...string) (stdout, stderr string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), commandTime)
		defer cancel()
		args = append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr",
			"--user-data-dir=" + filepath.Join(b.dir, "chromium")}, args...)
		cmd := exec.CommandContext(ctx, "chromium", append(args, "file://"+page)...)
		var errs strings.Builder
		cmd.Stderr = &errs
		cmd.Env = append(os.Environ(), "HOME="+b.dir)
		cmd.WaitDelay = time.Second
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("chromium: %v: %s", err, errs.String())
		}
		return string(out), errs.String()
	}
	dom, said := chrome("--dump-dom")
	if strings.Contains(said, "CONSOLE") {
		t.Errorf("chromium complains: %s", said)
	}
	shot := filepath.Join(b.dir, "start.png")
	chrome("--window-size=1180,2000", "--screenshot="+shot)
	if fi, err := os.Stat(shot); err != nil || fi.Size() < 20_000 {
		t.Errorf("a picture of the page: %v, %v", fi, err)
	}
	return dom
}
