package images

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// RegistryOptions say how StartRegistry serves.
type RegistryOptions struct {
	Storage  string // docker-registry's root directory
	Dir      string // a folder for the configuration file and the log
	ReadOnly bool   // refuse pushes, and write nothing below Storage

	Cert, Key string         // files in PEM: serve HTTPS with them
	Auth      map[string]any // the section auth of docker-registry's configuration; nil: none
}

// A Registry is a running docker-registry on a loopback port.
type Registry struct {
	Addr string // "127.0.0.1:port"
	Log  string // path of what it says
	cmd  *exec.Cmd
	done chan error
}

// StartRegistry starts docker-registry and waits until it answers, at most
// ten seconds. End it with Close; it also ends with this process.
func StartRegistry(ctx context.Context, o RegistryOptions) (*Registry, error) {
	addr, err := freeAddr()
	if err != nil {
		return nil, err
	}
	// The configuration is YAML, of which JSON is a part.
	config := map[string]any{
		"version": "0.1",
		"log":     map[string]any{"level": "warn", "accesslog": map[string]any{"disabled": true}},
		"storage": map[string]any{
			"filesystem":  map[string]any{"rootdirectory": o.Storage},
			"maintenance": map[string]any{"uploadpurging": map[string]any{"enabled": false}, "readonly": map[string]any{"enabled": o.ReadOnly}},
		},
		"http": map[string]any{"addr": addr},
	}
	scheme := "http"
	if o.Cert != "" {
		scheme = "https"
		config["http"] = map[string]any{"addr": addr, "tls": map[string]any{"certificate": o.Cert, "key": o.Key}}
	}
	if o.Auth != nil {
		config["auth"] = o.Auth
	}
	// Any answer will do, from whomever.
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	text, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return nil, err
	}
	path := filepath.Join(o.Dir, "registry.yml")
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return nil, err
	}
	r := &Registry{Addr: addr, Log: filepath.Join(o.Dir, "registry.log"), done: make(chan error, 1)}
	out, err := os.Create(r.Log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	r.cmd = exec.Command("docker-registry", "serve", path)
	r.cmd.Stdout, r.cmd.Stderr = out, out
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := r.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start docker-registry: %w", err)
	}
	go func() { r.done <- r.cmd.Wait() }()
	for deadline := time.Now().Add(10 * time.Second); ; {
		resp, err := client.Get(scheme + "://" + addr + "/v2/")
		if err == nil {
			resp.Body.Close()
			return r, nil
		}
		select {
		case err := <-r.done:
			text, _ := os.ReadFile(r.Log)
			return nil, fmt.Errorf("docker-registry ended: %w\n%s", err, text)
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), r.Close())
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("docker-registry does not answer: %w", err), r.Close())
		}
	}
}

// Close ends the registry and waits for its process. Twice is no error.
func (r *Registry) Close() error {
	if r.done == nil {
		return nil
	}
	err := r.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-r.done
	r.done = nil
	return err
}

// freeAddr finds a loopback port that nobody listens on.
func freeAddr() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}
