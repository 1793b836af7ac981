package criauth

import (
	"context"
	"encoding/base64"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// field is a field of bytes.
func field(n protowire.Number, value string) []byte {
	return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), value)
}

func pull(image string, auth ...[]byte) []byte {
	b := field(pullImageSpec, string(field(specImage, image)))
	var a []byte
	for _, f := range auth {
		a = append(a, f...)
	}
	if a != nil {
		b = append(b, field(pullAuth, string(a))...)
	}
	return protowire.AppendVarint(protowire.AppendTag(b, 9, protowire.VarintType), 7) // of a later version
}

func TestParsePull(t *testing.T) {
	for name, c := range map[string]struct {
		request []byte
		want    Auth
	}{
		"none":       {pull("a/b"), Auth{}},
		"password":   {pull("a/b", field(authUsername, "u"), field(authPassword, "p")), Auth{"u", "p"}},
		"auth":       {pull("a/b", field(authAuth, base64.StdEncoding.EncodeToString([]byte("u:p:q")))), Auth{"u", "p:q"}},
		"identity":   {pull("a/b", field(authUsername, "u"), field(authIdentity, "token")), Auth{"", "token"}},
		"bad base64": {pull("a/b", field(authAuth, "!")), Auth{}},
	} {
		if image, got, err := parsePull(c.request); image != "a/b" || got != c.want || err != nil {
			t.Errorf("%s: %q, %+v, %v", name, image, got, err)
		}
	}
	for name, b := range map[string][]byte{"empty": nil, "cut": pull("a/b")[:4], "no image": field(pullAuth, ""), "text": []byte("hello")} {
		if image, a, err := parsePull(b); err == nil {
			t.Errorf("%s: %q, %+v", name, image, a)
		}
	}
}

func FuzzParsePull(f *testing.F) {
	f.Add(pull("a/b", field(authUsername, "u"), field(authPassword, "p")))
	f.Add(pull("a/b", field(authAuth, "dTpw")))
	f.Fuzz(func(t *testing.T, b []byte) {
		image, _, err := parsePull(b)
		if err == nil && image == "" {
			t.Error("no image and no error")
		}
	})
}

func TestRepository(t *testing.T) {
	for ref, want := range map[string]string{
		"debian":                                "docker.io/library/debian",
		"debian:13":                             "docker.io/library/debian",
		"docker.io/debian@sha256:00":            "docker.io/library/debian",
		"user/app:1":                            "docker.io/user/app",
		"localhost/app":                         "localhost/app",
		"registry.example.com:5000/a/b:1@sha:0": "registry.example.com:5000/a/b",
		"docker://registry.example.com/a":       "registry.example.com/a",
	} {
		if got := Repository(ref); got != want {
			t.Errorf("%s: %s, want %s", ref, got, want)
		}
	}
}

// images is a CRI image service of one method.
type images struct{ got []byte }

func (i *images) handle(_ any, s grpc.ServerStream) error {
	method, _ := grpc.MethodFromServerStream(s)
	if method != "/runtime.v1.ImageService/PullImage" {
		return status.Error(codes.NotFound, method)
	}
	var request frame
	if err := s.RecvMsg(&request); err != nil {
		return err
	}
	i.got = request
	answer := frame(field(1, "the image"))
	if len(request) > 5<<20 {
		answer = request
	}
	return s.SendMsg(&answer)
}

func listen(t *testing.T, name string, s *grpc.Server) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	go s.Serve(l)
	t.Cleanup(s.Stop)
	c, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// What kubelet asks reaches containerd as it is, the answer comes back, and the
// credentials are remembered for their repository and registry only.
func TestProxy(t *testing.T) {
	back := &images{}
	to := listen(t, "back", grpc.NewServer(grpc.MaxRecvMsgSize(16<<20), grpc.ForceServerCodec(codec{}), grpc.UnknownServiceHandler(back.handle)))
	keys := &Keyring{}
	front := grpc.NewServer(NewProxy(to, keys).Options()...)
	healthpb.RegisterHealthServer(front, health.NewServer()) // a service of the server's own
	c := listen(t, "front", front)
	ctx := context.Background()

	request := frame(pull("registry.example.com/app:1", field(authUsername, "u"), field(authPassword, "p")))
	var answer frame
	if err := c.Invoke(ctx, "/runtime.v1.ImageService/PullImage", &request, &answer, grpc.ForceCodec(codec{})); err != nil {
		t.Fatal(err)
	}
	if string(answer) != string(field(1, "the image")) || string(back.got) != string(request) {
		t.Errorf("containerd got %q, kubelet %q", back.got, answer)
	}
	if u, p, ok := keys.Credentials("docker://registry.example.com/app@sha256:00", "registry.example.com"); u != "u" || p != "p" || !ok {
		t.Errorf("credentials: %s, %s, %t", u, p, ok)
	}
	for _, other := range [][2]string{{"registry.example.com/app", "mirror.example.com"}, {"registry.example.com/other", "registry.example.com"}} {
		if u, p, ok := keys.Credentials(other[0], other[1]); ok {
			t.Errorf("%s at %s: %s, %s", other[0], other[1], u, p)
		}
	}
	request = frame(pull("registry.example.com/app:2"))
	if err := c.Invoke(ctx, "/runtime.v1.ImageService/PullImage", &request, &answer, grpc.ForceCodec(codec{})); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := keys.Credentials("registry.example.com/app", "registry.example.com"); ok {
		t.Error("a pull without credentials left those of the one before")
	}
	request = frame(pull(strings.Repeat("a", 6<<20)))
	large := grpc.MaxCallRecvMsgSize(16 << 20)
	if err := c.Invoke(ctx, "/runtime.v1.ImageService/PullImage", &request, &answer, grpc.ForceCodec(codec{}), large); err != nil || len(answer) != len(request) {
		t.Errorf("messages of %d bytes: an answer of %d, %v", len(request), len(answer), err)
	}
	if err := c.Invoke(ctx, "/runtime.v1.ImageService/Other", &request, &answer, grpc.ForceCodec(codec{})); status.Code(err) != codes.NotFound {
		t.Errorf("an error of containerd became %v", err)
	}
	if err := c.Invoke(ctx, "/runtime.v1.RuntimeService/Version", &request, &answer, grpc.ForceCodec(codec{})); status.Code(err) != codes.Unimplemented {
		t.Errorf("another service: %v", err)
	}
	if _, err := healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil {
		t.Errorf("the server's own service: %v", err)
	}
}
