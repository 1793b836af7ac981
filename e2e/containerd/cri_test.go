package containerd

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/registrytest"
)

// bytesCodec has gRPC send and receive bytes as they are.
type bytesCodec struct{}

func (bytesCodec) Name() string                       { return "proto" }
func (bytesCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = bytes.Clone(data); return nil }

func field(n protowire.Number, value ...[]byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, n, protowire.BytesType), bytes.Join(value, nil))
}

// Kubelet's pull from a registry that wants a password, with the password that
// the pod's secret has, by way of the snapshotter: the image is lazy, and is
// filled with that password.
func TestCRI(t *testing.T) {
	t.Run("debian", func(t *testing.T) { testCRI(t, "") })
	t.Run("go", func(t *testing.T) { testCRI(t, built) })
}

func testCRI(t *testing.T, bin string) {
	reg, err := registrytest.New(registrytest.Options{Auth: registrytest.Auth{User: "pod", Password: "secret"}})
	if err != nil {
		t.Fatal(err)
	}
	defer reg.Close()
	tar := imagetest.Must(imagetest.Tar(imagetest.Dir("etc/"), imagetest.File("etc/passwd", "root:x:0:0::/:/\n"), imagetest.Random("data", 1<<20, 5)))
	oci := imagetest.Must(imagetest.Image(imagetest.Must(imagetest.EStargz(tar, imagetest.Options{}))))
	for d, b := range oci.Blobs {
		reg.Add(d, bytes.NewReader(b), int64(len(b)))
	}
	reg.AddManifest("pod/app", "1", oci.Desc.MediaType, oci.Raw)
	n := start(t, bin, "--cri", "/run/containerd/containerd.sock")
	ref := reg.Host() + "/pod/app:1"
	c, err := grpc.NewClient("unix://"+n.Runtime()+"/snapshotter.sock", grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.ForceCodec(bytesCodec{})))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	pull := func(password string) error {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		request := append(field(1, field(1, []byte(ref))), field(2, field(1, []byte("pod")), field(2, []byte(password)))...)
		var answer []byte
		err := c.Invoke(ctx, "/runtime.v1.ImageService/PullImage", &request, &answer, grpc.WaitForReady(true))
		if err == nil && !strings.Contains(string(answer), "sha256:") {
			err = fmt.Errorf("the answer is %q", answer)
		}
		return err
	}
	if err := pull("wrong"); err == nil {
		t.Fatal("the registry lets anybody in")
	}
	if err := pull("secret"); err != nil {
		t.Fatal(err)
	}
	out := must(t)(n.Ctr(t.Context(), "--namespace", "k8s.io", "content", "ls", "-q"))
	if blobs := strings.Fields(out); len(blobs) != 2 {
		t.Errorf("containerd has downloaded %s, want the manifest and the config", blobs)
	}
	must(t)(n.Ctr(t.Context(), "--namespace", "k8s.io", "snapshot", "--snapshotter", "cfs", "view", "look", must(t)(n.top(t))))
	eventually(t, time.Minute, "the image is filled", func() bool { return strings.Contains(n.Log("cfs-fuse"), "msg=sealed") })
}

// top returns the name of the one snapshot that there is.
func (n *Node) top(t *testing.T) (string, error) {
	out, err := n.Ctr(t.Context(), "--namespace", "k8s.io", "snapshot", "--snapshotter", "cfs", "ls")
	if err != nil {
		return "", err
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if len(lines) != 2 {
		return "", fmt.Errorf("snapshots: %s", out)
	}
	return strings.Fields(lines[1])[0], nil
}
