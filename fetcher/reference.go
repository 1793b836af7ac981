package fetcher

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// A reference names an image in a registry:
//
//	reference = host "/" name [ ":" tag ] [ "@" digest ]
//
// (OCI distribution-spec, "Pulling manifests", and docker's short forms.)
type reference struct {
	host   string // "docker.io", "localhost:5000", "[::1]:5000"
	name   string // the repository: "library/debian"
	tag    string
	digest digest.Digest
}

func (r reference) String() string {
	s := "docker://" + r.host + "/" + r.name
	if r.tag != "" {
		s += ":" + r.tag
	}
	if r.digest != "" {
		s += "@" + r.digest.String()
	}
	return s
}

// object is what to ask the registry for: the digest if there is one.
func (r reference) object() string {
	if r.digest != "" {
		return r.digest.String()
	}
	return r.tag
}

// Limits of distribution-spec and of docker's references, in bytes.
const (
	maxName = 255
	maxTag  = 128
)

// parseReference reads a reference as docker does: a first component without
// dot, colon or capital that is not "localhost" is no host, the host is then
// docker.io, and there a name of one component is in library/. Without tag
// and digest, the tag is latest.
func parseReference(s string) (reference, error) {
	var r reference
	rest, d, ok := strings.Cut(s, "@")
	if ok {
		if strings.Contains(d, "/") {
			return r, hint.Wrap(errors.New("a reference holds no user name"), "use 'docker login', which keeps it in docker's config.json")
		}
		r.digest = digest.Digest(d)
		if _, err := toc.ParseDigest(d); err != nil {
			return r, err
		}
	}
	first, path, ok := strings.Cut(rest, "/")
	if ok && (strings.ContainsAny(first, ".:") || first == "localhost" || strings.ToLower(first) != first) {
		r.host = first
	} else {
		r.host, path = "docker.io", rest
	}
	r.name, r.tag, ok = strings.Cut(path, ":")
	if ok && !validTag(r.tag) {
		return r, fmt.Errorf("tag %.150q: want 1 to %d letters, digits, '_', '.' or '-', the first not '.' or '-'", r.tag, maxTag)
	}
	if r.host == "index.docker.io" || r.host == "registry-1.docker.io" {
		r.host = "docker.io"
	}
	if r.host == "docker.io" && r.name != "" && !strings.Contains(r.name, "/") {
		r.name = "library/" + r.name
	}
	if err := checkHost(r.host); err != nil {
		return r, err
	}
	if len(r.name) > maxName {
		return r, fmt.Errorf("name of %d bytes, the limit is %d", len(r.name), maxName)
	}
	for c := range strings.SplitSeq(r.name, "/") {
		if !validComponent(c) {
			return r, hint.Wrap(fmt.Errorf("name %q: bad component %q", r.name, c),
				"names are of lower-case letters and digits, with '.', '_', '__' or '-' inside")
		}
	}
	if r.tag == "" && r.digest == "" {
		r.tag = "latest"
	}
	return r, nil
}

// checkHost wants a host name or address, and a port if there is a colon.
func checkHost(h string) error {
	name := h
	if strings.HasPrefix(h, "[") || strings.Contains(h, ":") {
		if strings.HasSuffix(h, "]") {
			name = strings.Trim(h, "[]")
		} else {
			var port string
			var err error
			if name, port, err = net.SplitHostPort(h); err != nil {
				return fmt.Errorf("host %.300q: want HOST or HOST:PORT", h)
			}
			if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
				return fmt.Errorf("host %.300q: bad port", h)
			}
		}
		if strings.HasPrefix(h, "[") {
			if ip := net.ParseIP(name); ip == nil || ip.To4() != nil {
				return fmt.Errorf("host %.300q: bad IPv6 address", h)
			}
			return nil
		}
	}
	if len(name) > 253 {
		return fmt.Errorf("host of %d bytes, the limit is 253", len(name))
	}
	for label := range strings.SplitSeq(name, ".") {
		if label == "" || label[0] == '-' || label[len(label)-1] == '-' || strings.IndexFunc(label, func(c rune) bool {
			return !alphanumeric(c) && c != '-' && !('A' <= c && c <= 'Z')
		}) >= 0 {
			return fmt.Errorf("host %q: not a host name", h)
		}
	}
	return nil
}

func alphanumeric(c rune) bool { return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' }

// validComponent follows distribution-spec:
// [a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*
func validComponent(c string) bool {
	separator := "start"
	for _, r := range c {
		switch {
		case alphanumeric(r):
			separator = ""
		case separator == "" && (r == '.' || r == '_' || r == '-'),
			separator == "_" && r == '_',
			strings.HasPrefix(separator, "-") && r == '-':
			separator += string(r)
		default:
			return false
		}
	}
	return separator == ""
}

// validTag follows distribution-spec: [a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}
func validTag(t string) bool {
	if t == "" || len(t) > maxTag || t[0] == '.' || t[0] == '-' {
		return false
	}
	return strings.IndexFunc(t, func(c rune) bool {
		return !alphanumeric(c) && !('A' <= c && c <= 'Z') && c != '_' && c != '.' && c != '-'
	}) < 0
}
