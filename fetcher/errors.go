package fetcher

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// ErrClosed is what a closed Source or Fetcher answers.
var ErrClosed = errors.New("fetcher: closed")

// errStalled says that a host sent no byte for StallTimeout.
var errStalled = errors.New("no answer")

// errTrickle says that a host sends, but as good as nothing.
var errTrickle = errors.New("hardly a byte comes")

// A StatusError says that a host answered a request, but not as asked.
type StatusError struct {
	Host       string        // host[:port]
	Object     string        // what was asked for: "blob sha256:…", "manifest 13"
	Status     int           // of the HTTP answer
	RetryAfter time.Duration // how long the host asks to be left alone; 0: not said
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("get %s from %s: %d %s", e.Object, e.Host, e.Status, http.StatusText(e.Status))
}

// Is reports whether target is a StatusError of the same status, and says
// nothing else.
func (e *StatusError) Is(target error) bool {
	t, ok := target.(*StatusError)
	return ok && *t == StatusError{Status: e.Status}
}

// permanent reports whether the same host would answer the same again.
func (e *StatusError) permanent() bool {
	switch e.Status {
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	}
	return e.Status >= 300 && e.Status < 500
}

// gone reports whether the host does not have what was asked for: no other
// moment will do, while a refusal ends with new credentials or a repair.
func (e *StatusError) gone() bool {
	return e.Status == http.StatusNotFound || e.Status == http.StatusGone
}

// A DigestError says that a chunk's bytes, from two requests, do not have the
// digest that the layer's TOC promises. Nothing of them was stored.
type DigestError struct {
	Layer       int          // from 0, the lowest
	LayerDigest image.Digest // of the blob
	Chunk       int          // number in the index
	Content     image.Digest // of the file the chunk belongs to
	Want, Got   image.Digest // of the chunk
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("chunk %d of content %s, layer %d (%s): digest is %s, want %s",
		e.Chunk, e.Content, e.Layer, e.LayerDigest, e.Got, e.Want)
}

// A DecodeError says that a chunk's span, from two requests, is not a valid
// compressed stream, or too short for the chunk. Nothing of it was stored.
type DecodeError struct {
	Layer       int          // from 0, the lowest
	LayerDigest image.Digest // of the blob
	Chunk       int          // number in the index
	Content     image.Digest // of the file the chunk belongs to
	Err         error
}

func (e *DecodeError) Error() string {
	return fmt.Sprintf("chunk %d of content %s, layer %d (%s): decompress: %v",
		e.Chunk, e.Content, e.Layer, e.LayerDigest, e.Err)
}

// Unwrap returns Err.
func (e *DecodeError) Unwrap() error { return e.Err }

// A StoreError says that the Sink did not take a chunk whose bytes were right:
// the fault is with the disk, not with the source.
type StoreError struct {
	Chunk int // number in the index
	Err   error
}

func (e *StoreError) Error() string { return fmt.Sprintf("store chunk %d: %v", e.Chunk, e.Err) }

// Unwrap returns Err.
func (e *StoreError) Unwrap() error { return e.Err }

// A scrubbed error has the text of another without what may be secret in it,
// and still is that error for errors.Is and errors.As.
type scrubbed struct {
	text string
	err  error
}

func (s *scrubbed) Error() string { return s.text }
func (s *scrubbed) Unwrap() error { return s.err }

// scrub returns err with a text that holds neither the query strings nor the
// user names and passwords of the URLs that net/http and containerd put there.
func scrub(err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err
	}
	if e, ok := errors.AsType[remoteerrors.ErrUnexpectedStatus](err); ok {
		host := "the token server"
		if u, perr := url.Parse(e.RequestURL); perr == nil && u.Host != "" {
			host += " " + u.Host
		}
		return &scrubbed{fmt.Sprintf("%s answered %d %s", host, e.StatusCode, http.StatusText(e.StatusCode)), err}
	}
	text := err.Error()
	if !strings.Contains(text, "://") {
		return err
	}
	words := strings.Fields(text)
	for i, w := range words {
		if at := strings.Index(w, "://"); at >= 0 {
			head, rest := w[:at+3], w[at+3:]
			rest, _, _ = strings.Cut(rest, "?")
			if slash := strings.IndexByte(rest+"/", '/'); strings.Contains(rest[:slash], "@") {
				rest = rest[strings.LastIndexByte(rest[:slash], '@')+1:]
			}
			words[i] = head + rest
		}
	}
	return &scrubbed{strings.Join(words, " "), err}
}

// errorKind says what kind of failure of one request to one host an error is,
// in the words of package metrics.
func errorKind(err error) string {
	if status, ok := errors.AsType[*StatusError](err); ok {
		switch {
		case status.Status == http.StatusUnauthorized, status.Status == http.StatusForbidden:
			return metrics.ErrorAuth
		case status.gone():
			return metrics.ErrorMissing
		case status.Status == http.StatusTooManyRequests:
			return metrics.ErrorLimit
		case status.Status >= 500:
			return metrics.ErrorServer
		}
		return metrics.ErrorRefused
	}
	if errors.Is(err, errStalled) || errors.Is(err, errTrickle) {
		return metrics.ErrorStall
	}
	if errors.Is(err, docker.ErrInvalidAuthorization) {
		return metrics.ErrorAuth
	}
	if _, ok := errors.AsType[*net.DNSError](err); ok {
		return metrics.ErrorName
	}
	_, unknown := errors.AsType[x509.UnknownAuthorityError](err)
	_, wrongFor := errors.AsType[x509.HostnameError](err)
	_, invalid := errors.AsType[x509.CertificateInvalidError](err)
	_, record := errors.AsType[tls.RecordHeaderError](err)
	if unknown || wrongFor || invalid || record || strings.Contains(err.Error(), "HTTP response to HTTPS client") {
		return metrics.ErrorTLS
	}
	_, op := errors.AsType[*net.OpError](err)
	if op || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return metrics.ErrorNetwork
	}
	return metrics.ErrorAnswer
}

// advise adds to an error what a person can do about it.
func advise(err error, registry string) error {
	if err == nil || hint.Of(err) != "" || errors.Is(err, context.Canceled) {
		return err
	}
	var (
		status   *StatusError
		dns      *net.DNSError
		unknown  x509.UnknownAuthorityError
		wrongFor x509.HostnameError
		record   tls.RecordHeaderError
	)
	switch {
	case errors.Is(err, &StatusError{Status: http.StatusUnauthorized}): // of any of several hosts
		return hint.Wrap(err, "log in with 'docker login "+registry+"', or check that the name is right")
	case errors.As(err, &status):
		switch status.Status {
		case http.StatusForbidden:
			return hint.Wrap(err, "log in with 'docker login "+registry+"', or check that the name is right")
		case http.StatusNotFound:
			return hint.Wrap(err, "check the name and tag; a private image needs 'docker login "+registry+"'")
		case http.StatusTooManyRequests:
			return hint.Wrap(err, "the registry limits requests; log in or use a mirror (hosts.toml)")
		case http.StatusRequestedRangeNotSatisfiable:
			return hint.Wrap(err, "the registry's blob is shorter than the manifest says; push the image again")
		}
		if status.Status >= 500 {
			return hint.Wrap(err, "the registry is in trouble; try again later or name a mirror in hosts.toml")
		}
	case errors.Is(err, docker.ErrInvalidAuthorization):
		return hint.Wrap(err, "log in with 'docker login "+registry+"'")
	case errors.As(err, &dns):
		return hint.Wrap(err, "check the registry's name and this machine's DNS")
	case errors.As(err, &unknown), errors.As(err, &wrongFor):
		return hint.Wrap(err, "put the registry's CA into /etc/containerd/certs.d/"+registry+"/ca.crt")
	case errors.As(err, &record), strings.Contains(err.Error(), "HTTP response to HTTPS client"):
		return hint.Wrap(err, "the registry speaks plain HTTP; use --plain-http if you trust the way to it")
	case errors.Is(err, syscall.ECONNREFUSED):
		return hint.Wrap(err, "check that the registry runs and that the port is right")
	case errors.Is(err, errStalled), errors.Is(err, errTrickle), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.ETIMEDOUT):
		return hint.Wrap(err, "check the network, and HTTPS_PROXY if the registry is behind a proxy")
	}
	return err
}
