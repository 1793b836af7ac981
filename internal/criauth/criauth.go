// Package criauth passes kubelet's requests on to containerd's CRI image
// service, and remembers the credentials that pulls come with: who fetches
// the layers of those images later needs them too. It knows nothing of
// registries, and keeps nothing on the disk.
//
//	kubelet ──PullImage(image, credentials)──► Proxy ──the same──► containerd
//	                                             └─► Keyring: by repository
//
// Requests and answers are passed on as the bytes they are, so that the service
// may have methods that this program has never heard of.
package criauth

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// A Keyring has the credentials of the last pull from each repository.
type Keyring struct {
	mu   sync.Mutex
	keys map[string]Auth
}

// maxKeys bounds the repositories that are remembered.
const maxKeys = 4096

// An Auth is what a pull came with. Without a user, Secret is a refresh token.
type Auth struct{ User, Secret string }

// put remembers the credentials of a pull. A pull without any forgets them.
func (k *Keyring) put(image string, a Auth) {
	name := Repository(image)
	k.mu.Lock()
	defer k.mu.Unlock()
	if a == (Auth{}) {
		delete(k.keys, name)
		return
	}
	if k.keys == nil || len(k.keys) >= maxKeys {
		k.keys = map[string]Auth{}
	}
	k.keys[name] = a
}

// Credentials returns what the last pull from the repository of a reference
// came with, for the registry of that repository and no other host.
func (k *Keyring) Credentials(reference, host string) (user, secret string, ok bool) {
	name := Repository(reference)
	registry, _, _ := strings.Cut(name, "/")
	if host != registry && (registry != "docker.io" || host != "registry-1.docker.io") {
		return "", "", false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	a, ok := k.keys[name]
	return a.User, a.Secret, ok
}

// Repository returns the host and name of a reference, in full, without tag
// and digest.
func Repository(reference string) string {
	name := strings.TrimPrefix(reference, "docker://")
	name, _, _ = strings.Cut(name, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name = name[:i]
	}
	host, rest, ok := strings.Cut(name, "/")
	switch {
	case !ok:
		return "docker.io/library/" + name
	case !strings.ContainsAny(host, ".:") && host != "localhost":
		return "docker.io/" + name
	case host == "docker.io" && !strings.Contains(rest, "/"):
		return "docker.io/library/" + rest
	}
	return name
}

// A Proxy passes requests on.
type Proxy struct {
	to   *grpc.ClientConn
	keys *Keyring
}

// NewProxy passes on to the service behind to, and remembers in keys.
func NewProxy(to *grpc.ClientConn, keys *Keyring) *Proxy { return &Proxy{to, keys} }

// Options are what a gRPC server needs that is to pass on, besides its own
// services, those of CRI.
func (p *Proxy) Options() []grpc.ServerOption {
	return []grpc.ServerOption{grpc.ForceServerCodec(codec{}), grpc.UnknownServiceHandler(p.handle), grpc.MaxRecvMsgSize(maxMessage)}
}

// maxMessage is how many bytes kubelet and containerd take of a message
// (maxMsgSize in k8s.io/cri-client, DefaultMaxRecvMsgSize in containerd's
// defaults): the list of a node's images may exceed gRPC's 4 MiB.
const maxMessage = 16 << 20

// The services are named by their package and name; of v1alpha2 (containerd 1.6)
// the messages are the same.
const servicePrefix, serviceSuffix = "/runtime.", ".ImageService/"

const pullMethod = "PullImage"

func (p *Proxy) handle(_ any, in grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(in)
	if !ok || !strings.HasPrefix(method, servicePrefix) || !strings.Contains(method, serviceSuffix) {
		return status.Errorf(codes.Unimplemented, "unknown method %s", method)
	}
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md.Copy())
	}
	out, err := p.to.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method,
		grpc.ForceCodec(codec{}), grpc.MaxCallRecvMsgSize(maxMessage))
	if err != nil {
		return err
	}
	// One request, any number of answers: all methods of the service.
	var request frame
	if err := in.RecvMsg(&request); err != nil {
		return err
	}
	if strings.HasSuffix(method, serviceSuffix+pullMethod) {
		if image, auth, err := parsePull(request); err == nil {
			p.keys.put(image, auth)
		}
	}
	if err := out.SendMsg(&request); err != nil && err != io.EOF {
		return err
	}
	if err := out.CloseSend(); err != nil {
		return err
	}
	for {
		var answer frame
		err := out.RecvMsg(&answer)
		if err == io.EOF {
			in.SetTrailer(out.Trailer())
			return nil
		}
		if err == nil {
			err = in.SendMsg(&answer)
		}
		if err != nil {
			return err
		}
	}
}

// A frame is a message that is passed on as it is.
type frame []byte

// A codec is gRPC's for protocol buffers, and leaves frames alone.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(v any) ([]byte, error) {
	switch m := v.(type) {
	case *frame:
		return *m, nil
	case proto.Message:
		return proto.Marshal(m)
	}
	return nil, fmt.Errorf("marshal %T: not a message", v)
}

func (codec) Unmarshal(data []byte, v any) error {
	switch m := v.(type) {
	case *frame:
		*m = append((*m)[:0], data...)
		return nil
	case proto.Message:
		return proto.Unmarshal(data, m)
	}
	return fmt.Errorf("unmarshal %T: not a message", v)
}

var errPull = errors.New("not a PullImageRequest")

// The fields of k8s.io/cri-api's api.proto, v1, that are looked at.
const (
	pullImageSpec    = 1 // PullImageRequest.image
	pullAuth         = 2 // PullImageRequest.auth
	specImage        = 1 // ImageSpec.image
	authUsername     = 1 // AuthConfig
	authPassword     = 2
	authAuth         = 3 // user:password in base64
	authIdentity     = 5 // a refresh token
	maxFieldsOfAPull = 64
)

// parsePull reads the image and the credentials of a PullImageRequest.
func parsePull(b []byte) (image string, a Auth, err error) {
	err = eachField(b, func(n protowire.Number, value []byte) error {
		switch n {
		case pullImageSpec:
			return eachField(value, func(n protowire.Number, value []byte) error {
				if n == specImage {
					image = string(value)
				}
				return nil
			})
		case pullAuth:
			return eachField(value, func(n protowire.Number, value []byte) error {
				switch n {
				case authUsername:
					a.User = string(value)
				case authPassword:
					a.Secret = string(value)
				case authAuth:
					text, err := base64.StdEncoding.DecodeString(string(value))
					if err == nil && a == (Auth{}) {
						a.User, a.Secret, _ = strings.Cut(strings.TrimRight(string(text), "\x00"), ":")
					}
				case authIdentity:
					if len(value) > 0 && a.Secret == "" {
						a = Auth{Secret: string(value)}
					}
				}
				return nil
			})
		}
		return nil
	})
	if err == nil && image == "" {
		err = errPull
	}
	return image, a, err
}

// eachField calls do for each field of a message that has bytes.
func eachField(b []byte, do func(n protowire.Number, value []byte) error) error {
	for range maxFieldsOfAPull {
		if len(b) == 0 {
			return nil
		}
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return errPull
		}
		b = b[size:]
		if kind != protowire.BytesType {
			if size = protowire.ConsumeFieldValue(n, kind, b); size < 0 {
				return errPull
			}
			b = b[size:]
			continue
		}
		value, size := protowire.ConsumeBytes(b)
		if size < 0 {
			return errPull
		}
		b = b[size:]
		if err := do(n, value); err != nil {
			return err
		}
	}
	return errPull
}
