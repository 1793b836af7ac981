package fetcher

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// A Name is the name of a source in its parts.
type Name struct {
	Kind       string        // "docker", "oci", "oci-archive" or "layer"
	Host       string        // docker: the registry, "docker.io" or "localhost:5000"
	Repository string        // docker: "library/debian"
	Path       string        // of the folder or file of the other kinds
	Tag        string        // "" if there is none; of docker, "latest" if there is no digest either
	Digest     digest.Digest // "" if there is none
}

// ParseName reads a name as OpenSource does.
func ParseName(source string) (Name, error) {
	s, err := OpenSource(source, Options{})
	if err != nil {
		return Name{}, err
	}
	defer s.Close()
	switch s := s.(type) {
	case *registry:
		return Name{Kind: "docker", Host: s.ref.host, Repository: s.ref.name, Tag: s.ref.tag, Digest: s.ref.digest}, nil
	case *layout:
		n := Name{Kind: s.kind, Path: s.path}
		if d, ok := strings.CutPrefix(s.ref, "@"); ok {
			n.Digest = digest.Digest(d)
		} else {
			n.Tag = s.ref
		}
		return n, nil
	case *layerFile:
		return Name{Kind: "layer", Path: s.path}, nil
	}
	return Name{}, fmt.Errorf("source %s: unknown kind", source)
}

// String returns the name as OpenSource reads it.
func (n Name) String() string {
	if n.Kind == "docker" {
		return reference{n.Host, n.Repository, n.Tag, n.Digest}.String()
	}
	s := n.Kind + ":" + n.Path
	if n.Tag != "" {
		s += ":" + n.Tag
	}
	if n.Digest != "" {
		s += "@" + n.Digest.String()
	}
	return s
}

// An Endpoint is where a registry is spoken to, by others than a Source.
type Endpoint struct {
	Base   url.URL      // with scheme, host and the path of the API, "/v2"
	Header http.Header  // that the operator wants in each request
	Client *http.Client // with the operator's certificates, without authorisation

	// Credentials gives what docker's config.json has for a host. Without a
	// user, the secret is a refresh token; without both there are none.
	Credentials func(host string) (user, secret string, err error)

	r *registry
}

// OpenEndpoint finds the host that stands for the registry of n (containerd's
// hosts.toml) and that may be pushed to, or, if write is false, the first that
// may be asked for referrers.
func OpenEndpoint(n Name, write bool, o Options) (*Endpoint, error) {
	if n.Kind != "docker" {
		return nil, fmt.Errorf("%s: not in a registry", n)
	}
	r, err := newRegistry(reference{n.Host, n.Repository, n.Tag, n.Digest}, ocispec.Platform{}, nil, o.withDefaults())
	if err != nil {
		return nil, err
	}
	need := docker.HostCapabilityReferrers
	if write {
		need = docker.HostCapabilityPush
	}
	for i := range r.hosts {
		// The last is the registry itself, which is asked for referrers when
		// no host is said to have them.
		if h := r.hosts[i]; h.can.Has(need) || !write && i == len(r.hosts)-1 {
			e := &Endpoint{Base: h.base, Header: h.header, Client: h.tokens.client, Credentials: r.credentials, r: r}
			e.Base.Path = strings.TrimSuffix(e.Base.Path, "/"+n.Repository)
			return e, nil
		}
	}
	r.Close()
	return nil, hint.Wrap(fmt.Errorf("registry %s: no host takes what is pushed", n.Host), `give one the capability "push" in hosts.toml in `+r.opts.HostsDir)
}

// Scheme asks the host which of HTTPS and HTTP it speaks: on a loopback address
// it may be either.
func (e *Endpoint) Scheme(ctx context.Context) (string, error) {
	u := e.Base
	u.Path += "/"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return "", err
	}
	client := *e.Client // where a redirect leads says nothing of the host
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	resp, err := client.Do(req)
	if err != nil {
		return "", advise(fmt.Errorf("ask registry %s: %w", e.r.ref.host, scrub(err)), e.r.ref.host)
	}
	resp.Body.Close()
	if resp.Request == nil || resp.Request.URL == nil {
		return "", errors.New("ask registry: an answer to no request")
	}
	return resp.Request.URL.Scheme, nil
}

// Close gives back its connections.
func (e *Endpoint) Close() error { return e.r.Close() }
