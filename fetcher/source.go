package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// Options of OpenSource. The zero value is right.
type Options struct {
	// Platform is os/arch[/variant], as in "linux/arm64/v8"; empty: this
	// machine's.
	Platform string

	// PlainHTTP speaks HTTP without TLS to every registry that no hosts.toml
	// names. Without it, a registry on a loopback address is tried by HTTPS
	// and then by HTTP, as containerd does, and every other by HTTPS.
	PlainHTTP bool

	// HostsDir has one folder per registry with a hosts.toml or certificates
	// in it (containerd, docs/hosts.md). Empty: /etc/containerd/certs.d.
	HostsDir string

	// StallTimeout is how long a registry may send nothing, before the first
	// byte of an answer or after it, until the request has failed. 0: 10 s.
	StallTimeout time.Duration

	// ReadTimeout is how long one range may fail on all hosts, with nothing
	// gained, until its error is final. 0: 60 s. Negative: for ever, so that
	// reads wait for the registry to come back. What a host says it does not
	// have (404) is an error at once.
	ReadTimeout time.Duration

	// Credentials is asked, if set, before docker's config.json for the user and
	// password with which a host is to be asked for the source of that String. A
	// user of "" makes secret a refresh token.
	Credentials func(source, host string) (user, secret string, ok bool)

	// Metrics counts the requests. Nil: not counted.
	Metrics *metrics.Metrics

	// Logger hears of failures that a retry may heal. Nil: silence.
	Logger *slog.Logger
}

func (o Options) withDefaults() Options {
	if o.HostsDir == "" {
		o.HostsDir = "/etc/containerd/certs.d"
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = 10 * time.Second
	}
	if o.ReadTimeout == 0 {
		o.ReadTimeout = 60 * time.Second
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return o
}

// A Source is where an image comes from. It is safe for concurrent use.
type Source interface {
	// String returns the source in full, with what the user left out
	// ("docker://docker.io/library/debian:latest"). It holds no secrets.
	String() string

	// Resolve gets the image's manifest for the platform of the Options. A
	// nil error promises that the manifest has the digest that the source,
	// or the index that led to it, named.
	Resolve(ctx context.Context) (*Manifest, error)

	// Blob returns the blob that a descriptor of the manifest names. It does
	// no request, needs no Resolve before it, and can be read until Close.
	Blob(desc ocispec.Descriptor) Blob

	// Close ends every request under way and what it holds open.
	Close() error
}

// A Blob is a sequence of bytes with a digest, read by ranges.
type Blob interface {
	// ReadRange starts to read the n > 0 bytes from off on. The body gives
	// exactly these, or an error other than io.EOF, and must be closed.
	// Nothing has been compared with a digest. Cancelling ctx ends the body too.
	//
	// A body may also have the method Whole() io.Reader. If that, called
	// before the first Read, gives a reader that is not nil, the server sends
	// no ranges but the whole blob, and the reader, used in place of the body,
	// gives it from its first byte to its last.
	ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error)
}

// OpenSource reads the name of a source; the image is not looked for yet.
//
//	docker://HOST/NAME[:TAG][@DIGEST]  a registry; "docker://" may be left out,
//	                                   and HOST as docker allows ("debian:13")
//	oci:DIR[:TAG|@DIGEST]              an OCI image layout
//	oci-archive:FILE[:TAG|@DIGEST]     the same in an uncompressed tar
//	layer:FILE                         one layer blob
//
// A path that itself ends in what looks like a tag needs one after it.
func OpenSource(source string, o Options) (Source, error) {
	o = o.withDefaults()
	platform, err := parsePlatform(o.Platform)
	if err != nil {
		return nil, err
	}
	metadata := &tally{class: metrics.Metadata, metrics: o.Metrics}
	scheme, rest, ok := strings.Cut(source, ":")
	switch {
	case ok && (scheme == "oci" || scheme == "oci-archive"):
		path, ref, err := parseLayoutName(rest)
		if err != nil {
			return nil, fmt.Errorf("source %.200q: %w", source, err)
		}
		return newLayout(scheme, path, ref, platform, metadata), nil
	case ok && scheme == "layer":
		if rest == "" {
			return nil, hint.Wrap(fmt.Errorf("source %.200q: no file", source), "write layer:FILE")
		}
		return &layerFile{path: rest, metadata: metadata}, nil
	case ok && scheme == "docker" && !strings.HasPrefix(rest, "//"):
		return nil, hint.Wrap(fmt.Errorf("source %.200q: no //", source), "write docker://HOST/NAME:TAG")
	case ok && strings.HasPrefix(rest, "//") && scheme != "docker":
		return nil, hint.Wrap(fmt.Errorf("source %.200q: unknown kind %q", source, scheme),
			"use docker://HOST/NAME:TAG, oci:DIR, oci-archive:FILE or layer:FILE")
	}
	ref, err := parseReference(strings.TrimPrefix(source, "docker://"))
	if err != nil {
		return nil, fmt.Errorf("source %.200q: %w", redactSource(source), err)
	}
	return newRegistry(ref, platform, metadata, o)
}

// redactSource hides what may be a password in front of the host.
func redactSource(s string) string {
	if user, host, ok := strings.Cut(s, "@"); ok && strings.Contains(host, "/") && !strings.Contains(strings.TrimPrefix(user, "docker://"), "/") {
		return "docker://…@" + host
	}
	return s
}

// ReadConfig gets the image's config. A nil error promises that it has the
// digest that the manifest names. Nothing needs it to mount an image, so
// Resolve does not wait for it.
func ReadConfig(ctx context.Context, s Source, m *Manifest) ([]byte, error) {
	if m.Config.Size < 0 || m.Config.Size > maxConfig {
		return nil, fmt.Errorf("config %s: %d bytes, the limit is %d", m.Config.Digest, m.Config.Size, maxConfig)
	}
	if m.Config.Size == 0 {
		return nil, checkDigest(m.Config.Digest, nil)
	}
	b := s.Blob(m.Config)
	raw, err := readDigest(ctx, b, m.Config)
	if other, ok := Elsewhere(b); ok && errors.Is(err, errDigest) {
		raw, err = readDigest(ctx, other, m.Config)
	}
	if err != nil {
		return nil, fmt.Errorf("config %s: %w", m.Config.Digest, err)
	}
	return raw, nil
}

// readDigest reads a small blob and checks it.
func readDigest(ctx context.Context, b Blob, d ocispec.Descriptor) ([]byte, error) {
	body, err := b.ReadRange(ctx, 0, d.Size)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	raw, err := io.ReadAll(io.LimitReader(body, d.Size))
	if err == nil {
		err = checkDigest(d.Digest, raw)
	}
	return raw, err
}

// ReaderAt reads a blob of size bytes, each ReadAt by one request under ctx.
func ReaderAt(ctx context.Context, b Blob, size int64) io.ReaderAt {
	return &readerAt{ctx, b, size, nil}
}

type readerAt struct {
	ctx  context.Context
	b    Blob
	size int64
	link *Link // measures the requests; may be nil
}

func (r *readerAt) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read blob: negative offset")
	}
	want := int64(len(p))
	if off >= r.size {
		want = 0
	} else if off+want > r.size {
		want = r.size - off
	}
	n := 0
	if want > 0 {
		start := time.Now()
		body, err := r.b.ReadRange(r.ctx, off, want)
		if err != nil {
			return 0, err
		}
		defer body.Close()
		in := io.Reader(body)
		if r.link != nil {
			r.link.answered(time.Since(start))
			r.link.receive(1)
			defer r.link.receive(-1)
			in = linkReader{body, r.link}
		}
		if n, err = io.ReadFull(in, p[:want]); err != nil {
			return n, noEOF(err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
