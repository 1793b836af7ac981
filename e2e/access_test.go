package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

// The user of the registries here; htpasswd has the password by bcrypt.
const (
	userName = "alice"
	password = "correct horse"
	htpasswd = userName + ":$2b$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"
)

// A pki is a certificate authority in files.
type pki struct {
	t    *testing.T
	dir  string
	ca   *x509.Certificate
	key  *ecdsa.PrivateKey
	last int64
}

func newPKI(t *testing.T, dir string) *pki {
	p := &pki{t: t, dir: dir}
	p.issue("ca")
	return p
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

// issue makes NAME.crt and NAME.key for 127.0.0.1, servers and clients.
func (p *pki) issue(name string) (*x509.Certificate, *ecdsa.PrivateKey) {
	p.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		p.t.Fatal(err)
	}
	p.last++
	c := &x509.Certificate{
		SerialNumber: big.NewInt(p.last), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	parent, signer := p.ca, p.key
	if parent == nil {
		c.IsCA, c.KeyUsage = true, x509.KeyUsageCertSign
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err == nil {
		c, err = x509.ParseCertificate(der)
	}
	raw, kerr := x509.MarshalPKCS8PrivateKey(key)
	if err := errors.Join(err, kerr,
		os.WriteFile(p.path(name+".crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644),
		os.WriteFile(p.path(name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: raw}), 0o600)); err != nil {
		p.t.Fatal(err)
	}
	if p.ca == nil {
		p.ca, p.key = c, key
	}
	return c, key
}

// A tokenServer gives tokens that docker-registry takes (distribution, "Token
// Authentication Specification"), for a few seconds each.
type tokenServer struct {
	*httptest.Server
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	life time.Duration

	mu     sync.Mutex
	given  []string
	denied int
}

func newTokenServer(t *testing.T, p *pki, life time.Duration) *tokenServer {
	s := &tokenServer{life: life}
	s.cert, s.key = p.issue("token")
	s.Server = httptest.NewServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

func (s *tokenServer) serve(w http.ResponseWriter, r *http.Request) {
	user, pass, _ := r.BasicAuth()
	if r.Method == http.MethodPost {
		user, pass = r.PostFormValue("username"), r.PostFormValue("password")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if user != userName || pass != password {
		s.denied++
		http.Error(w, "no", http.StatusUnauthorized)
		return
	}
	var access []map[string]any
	for _, scope := range strings.Fields(strings.Join(append(r.URL.Query()["scope"], r.PostFormValue("scope")), " ")) {
		if f := strings.SplitN(scope, ":", 3); len(f) == 3 {
			access = append(access, map[string]any{"type": f[0], "name": f[1], "actions": strings.Split(f[2], ",")})
		}
	}
	now := time.Now()
	token, err := s.sign(map[string]any{
		"iss": "tokens", "aud": "registry", "sub": user, "access": access, "jti": rand.Text(),
		"iat": now.Unix(), "nbf": now.Add(-time.Minute).Unix(), "exp": now.Add(s.life).Unix(),
	})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.given = append(s.given, token)
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": int(s.life.Seconds())})
}

// sign makes a JSON Web Token (RFC 7519) by ES256 with its certificate in it.
func (s *tokenServer) sign(claims map[string]any) (string, error) {
	header := map[string]any{"typ": "JWT", "alg": "ES256", "x5c": []string{base64.StdEncoding.EncodeToString(s.cert.Raw)}}
	h, err1 := json.Marshal(header)
	c, err2 := json.Marshal(claims)
	text := base64.RawURLEncoding.EncodeToString(h) + "." + base64.RawURLEncoding.EncodeToString(c)
	sum := sha256.Sum256([]byte(text))
	x, y, err3 := ecdsa.Sign(rand.Reader, s.key, sum[:])
	if err := errors.Join(err1, err2, err3); err != nil {
		return "", err
	}
	sig := make([]byte, 64)
	x.FillBytes(sig[:32])
	y.FillBytes(sig[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(sig), nil
}

func (s *tokenServer) tokens() (given []string, denied int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.given...), s.denied
}

// A mirror is nginx, which caches, in front of a registry, by slices of a megabyte,
// for who shows a certificate.
type mirror struct {
	addr, dir string
	cmd       *exec.Cmd
	done      chan error
}

func startMirror(t *testing.T, dir string, p *pki, registry string) *mirror {
	t.Helper()
	n := &mirror{addr: freeAddr(t), dir: dir, done: make(chan error, 1)}
	p.issue("mirror")
	conf := strings.NewReplacer("DIR", dir, "ADDR", n.addr, "REGISTRY", registry, "PKI", p.dir).Replace(`
daemon off;
user root;
worker_processes 2;
pid DIR/pid;
error_log DIR/error.log warn;
events { worker_connections 512; }
http {
  log_format one '$request_method $uri $http_range $status $upstream_cache_status $server_protocol';
  access_log DIR/access.log one;
  client_body_temp_path DIR/body;
  proxy_temp_path DIR/temp;
  fastcgi_temp_path DIR/fastcgi;
  uwsgi_temp_path DIR/uwsgi;
  scgi_temp_path DIR/scgi;
  proxy_cache_path DIR/cache keys_zone=blobs:1m max_size=1g;
  proxy_http_version 1.1;
  proxy_ssl_trusted_certificate PKI/ca.crt;
  proxy_ssl_verify on;
  proxy_ssl_name registry;
  proxy_set_header Host REGISTRY;
  server {
    listen ADDR ssl http2;
    ssl_certificate PKI/mirror.crt;
    ssl_certificate_key PKI/mirror.key;
    ssl_client_certificate PKI/ca.crt;
    ssl_verify_client on;
    location / { proxy_pass https://REGISTRY; }
    location ~ /blobs/ {
      slice 1m;
      proxy_cache blobs;
      proxy_cache_key $uri$slice_range;
      proxy_cache_valid 200 206 1h;
      proxy_set_header Range $slice_range;
      proxy_pass https://REGISTRY;
    }
  }
}
`)
	path := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(path, []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	n.cmd = exec.Command("nginx", "-p", dir, "-e", filepath.Join(dir, "error.log"), "-c", path)
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := n.cmd.Start(); err != nil {
		t.Fatal("start nginx: ", err)
	}
	go func() { n.done <- n.cmd.Wait() }()
	t.Cleanup(n.stop)
	eventually(t, 10*time.Second, "nginx listens", func() bool {
		c, err := net.Dial("tcp", n.addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return n
}

// stop ends nginx and its workers. Twice is no error.
func (n *mirror) stop() {
	if n.done != nil {
		n.cmd.Process.Signal(syscall.SIGTERM)
		<-n.done
		n.done = nil
	}
}

// dockerLogin writes docker's config.json, which the commands of this test see.
func dockerLogin(t *testing.T, dir string, hosts ...string) {
	t.Helper()
	auths := map[string]any{}
	for _, h := range hosts {
		auths[h] = map[string]string{"auth": base64.StdEncoding.EncodeToString([]byte(userName + ":" + password))}
	}
	raw, err := json.Marshal(map[string]any{"auths": auths})
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "config.json"), raw, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
}

// hostsToml makes a folder with the hosts.toml of one registry.
func hostsToml(t *testing.T, dir, registry, toml string) string {
	t.Helper()
	d := filepath.Join(dir, strings.Replace(registry, ":", "_", 1)+"_")
	err := os.MkdirAll(d, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(d, "hosts.toml"), []byte(toml), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// tempDir makes a folder of the test's outside of the bench.
func tempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(runDir, "a")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// A registry with TLS and tokens of a few seconds, and nginx as a caching mirror
// in front of it that wants a certificate: an image is filled over them while
// tokens expire and, halfway, the mirror goes. Nothing secret is left anywhere.
func TestTokensAndMirror(t *testing.T) {
	b, dir := newBench(t), tempDir(t)
	p := newPKI(t, dir)
	tokens := newTokenServer(t, p, 3*time.Second)
	p.issue("registry")
	own, err := images.StartRegistry(context.Background(), images.RegistryOptions{
		Storage: set.Storage(), Dir: dir, ReadOnly: true, Cert: p.path("registry.crt"), Key: p.path("registry.key"),
		Auth: map[string]any{"token": map[string]any{
			"realm": tokens.URL + "/token", "service": "registry", "issuer": "tokens", "rootcertbundle": p.path("token.crt")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	m := startMirror(t, tempDir(t), p, own.Addr)
	p.issue("client")
	hostsDir := hostsToml(t, tempDir(t), own.Addr, fmt.Sprintf("server = \"https://%s\"\nca = %q\n[host.\"https://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\nca = %q\nclient = [[%q, %q]]\n",
		own.Addr, p.path("ca.crt"), m.addr, p.path("ca.crt"), p.path("client.crt"), p.path("client.key")))
	src := "docker://" + own.Addr + "/" + images.Debian + ":" + images.EStargz
	metricsAddr, point := freeAddr(t), b.point()
	flags := func(more ...string) []string {
		return append(append([]string{"--log-level", "debug", "mount", "--root", b.root, "--hosts-dir", hostsDir}, more...), src, point)
	}

	t.Setenv("DOCKER_CONFIG", tempDir(t))
	b.refused(1, []string{"401", "docker login"}, flags()...)
	dockerLogin(t, tempDir(t), own.Addr, m.addr)
	_, refused := tokens.tokens()
	// 100 MB at 12 MB/s: tokens expire twice meanwhile.
	start := time.Now()
	b.must(flags("--limit-rate", "12MB", "--metrics", metricsAddr)...)
	if err := python.run(point); err != nil {
		t.Error(err)
	}
	time.Sleep(3 * time.Second)
	text := scrape(t, metricsAddr)
	m.stop()
	b.waitFor("swapped", point)
	isKernel(t, point)
	sameTree(t, set.Reference(images.Debian), point, treediff.Options{})
	given, denied := tokens.tokens()
	access, err := os.ReadFile(filepath.Join(m.dir, "access.log"))
	if err != nil {
		t.Fatal(err)
	}
	served := strings.Count(string(access), " 206 ")
	t.Logf("swapped after %v; %d tokens; %d ranges by the mirror, %d of them over HTTP/2", time.Since(start).Round(time.Millisecond), len(given), served,
		strings.Count(string(access), "HTTP/2.0"))
	if len(given) < 4 || denied > refused { // two hosts, each with a token of its own
		t.Errorf("%d tokens were given, %d denied", len(given), denied-refused)
	}
	if served < 5 || !strings.Contains(string(access), " MISS ") {
		t.Errorf("the mirror served little:\n%s", access)
	}
	b.must("umount", point)
	basic := base64.StdEncoding.EncodeToString([]byte(userName + ":" + password))
	secrets := append(given, password, basic)
	for _, secret := range secrets {
		if strings.Contains(text, secret) {
			t.Error("a secret is in the metrics")
		}
	}
	nowhere(t, b.dir, secrets)
}

// nowhere checks that no file below dir has one of the secrets in it.
func nowhere(t *testing.T, dir string, secrets []string) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.Contains(path, "/objects/") || strings.Contains(path, "/contents/") {
			return err // an object has the digest that the image promises
		}
		text, err := os.ReadFile(path)
		files++
		for _, secret := range secrets {
			if strings.Contains(string(text), secret) {
				t.Errorf("%s has a secret in it", path)
			}
		}
		return err
	})
	if err != nil || files < 5 {
		t.Errorf("%d files, %v", files, err)
	}
}

// A registry with basic authentication by htpasswd.
func TestBasicAuth(t *testing.T) {
	b, dir := newBench(t), tempDir(t)
	file := filepath.Join(dir, "htpasswd")
	if err := os.WriteFile(file, []byte(htpasswd), 0o600); err != nil {
		t.Fatal(err)
	}
	own, err := images.StartRegistry(context.Background(), images.RegistryOptions{
		Storage: set.Storage(), Dir: dir, ReadOnly: true,
		Auth: map[string]any{"htpasswd": map[string]any{"realm": "test", "path": file}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { own.Close() })
	src, point := "docker://"+own.Addr+"/"+images.Small+":"+images.EStargz, b.point()
	t.Setenv("DOCKER_CONFIG", tempDir(t))
	b.refused(1, []string{"401", "docker login"}, "mount", "--plain-http", "--root", b.root, src, point)
	dockerLogin(t, tempDir(t), own.Addr)
	b.mountAt(src, point)
	b.waitFor("swapped", point)
	sameTree(t, set.Reference(images.Small), point, treediff.Options{})
}
