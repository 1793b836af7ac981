package fetcher

import (
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/finding"
	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// What a registry does is found out by asking it.
func TestExamine(t *testing.T) {
	leakFree(t)
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	auths := fmt.Sprintf(`{"auths":{%%q:{"username":%q,"password":%q}}}`, "u", "p")
	big := build(t, imagetest.Must(imagetest.EStargz(imagetest.Must(imagetest.Tar(imagetest.Random("big", 1<<20, 1))), imagetest.Options{})))
	only := func(kind string, f registrytest.Fault) func(registrytest.Request) registrytest.Fault {
		return func(q registrytest.Request) registrytest.Fault {
			if q.Kind == kind {
				return f
			}
			return registrytest.Fault{}
		}
	}
	for _, c := range []struct {
		name string
		o    registrytest.Options
		want map[string]string // by name of the finding: its state, and a word of its detail
	}{
		{"plain", registrytest.Options{}, map[string]string{
			"image": "ok 1 layers", "login": "ok none", "ranges": "ok bytes", "multi-range": "ok one range", "protocol": "degraded HTTP/1.1",
			"redirect": "ok none", "latency": "ok first byte", "bandwidth": "ok MB/s", "token": "ok none"}},
		{"all of it", registrytest.Options{TLS: true, HTTP2: true, Redirect: true, RedirectTTL: 10 * time.Minute, Auth: registrytest.Auth{User: "u", Password: "p", TTL: 5 * time.Minute}}, map[string]string{
			"login": "ok as u at", "protocol": "ok HTTP/2", "redirect": "ok are good for", "token": "ok good for", "bandwidth": "ok MB/s"}},
		{"no ranges", registrytest.Options{Fault: only("blob", registrytest.Fault{Kind: registrytest.Whole})}, map[string]string{
			"ranges": "degraded whole layer", "latency": "", "bandwidth": ""}},
		{"wrong ranges", registrytest.Options{Fault: only("blob", registrytest.Fault{Kind: registrytest.WrongRange})}, map[string]string{"ranges": "missing Content-Range", "bandwidth": ""}},
		{"no layer", registrytest.Options{Fault: only("blob", registrytest.Fault{Kind: registrytest.Status, Status: http.StatusForbidden})}, map[string]string{"image": "ok 1 layers", "layer": "missing 403"}},
		{"no image", registrytest.Options{Fault: only("manifest", registrytest.Fault{Kind: registrytest.Status, Status: http.StatusNotFound})}, map[string]string{"image": "missing 404", "login": "ok none", "ranges": ""}},
		{"far away", registrytest.Options{Link: registrytest.Link{Latency: 250 * time.Millisecond}}, map[string]string{"latency": "degraded first byte"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := registryOf(t, c.o)
			o := quick()
			o.StallTimeout = 5 * time.Second
			dir := t.TempDir()
			if c.o.TLS {
				ca := filepath.Join(dir, "ca.crt")
				if err := os.WriteFile(ca, r.CA(), 0o600); err != nil {
					t.Fatal(err)
				}
				o.PlainHTTP = false
				o.HostsDir = hosts(t, map[string]string{r.Host(): fmt.Sprintf("server = \"https://%s\"\nca = %q\n[host.\"https://%s\"]\nca = %q\n", r.Host(), ca, r.Host(), ca)})
			}
			if c.o.Auth.User != "" {
				if err := os.WriteFile(filepath.Join(dir, "config.json"), fmt.Appendf(nil, auths, r.Host()), 0o600); err != nil {
					t.Fatal(err)
				}
				t.Setenv("DOCKER_CONFIG", dir)
			}
			s := open(t, big.serve(r, "a"), o)
			all := map[string]finding.Finding{}
			for _, f := range Examine(ctx, s) {
				all[f.Name] = f
				if f.Group == "" || f.Detail == "" || f.State != finding.OK && f.Cost == "" {
					t.Errorf("not a whole finding: %+v", f)
				}
				for _, secret := range r.Secrets() {
					if strings.Contains(f.Detail+f.Advice, secret) {
						t.Errorf("a secret is in %+v", f)
					}
				}
			}
			for name, want := range c.want {
				f, ok := all[name]
				if want == "" {
					if ok {
						t.Errorf("not to be known: %+v", f)
					}
					continue
				}
				state, word, _ := strings.Cut(want, " ")
				if string(f.State) != state || !strings.Contains(f.Detail, word) {
					t.Errorf("%s: %+v, want %s", name, f, want)
				}
			}
			s.Close()
		})
	}
	if all := Examine(ctx, open(t, "oci:/nonexistent:x", quick())); len(all) != 1 || all[0].State != finding.Missing {
		t.Errorf("no layout: %+v", all)
	}
}
