package main

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"google.golang.org/grpc"

	"github.com/cfs-fuse/cfs-fuse/internal/finding"
)

// fakeContainerd has some plugins.
type fakeContainerd struct {
	introspection.UnimplementedIntrospectionServer
	plugins []*introspection.Plugin
}

func (f *fakeContainerd) Plugins(context.Context, *introspection.PluginsRequest) (*introspection.PluginsResponse, error) {
	return &introspection.PluginsResponse{Plugins: f.plugins}, nil
}

// like makes a value of a type whose package is no dependency of ours.
func like[T any](*T) *T { return new(T) }

func TestExamineContainerd(t *testing.T) {
	dir := t.TempDir()
	none := filepath.Join(dir, "none")
	listen := func(name string) (string, net.Listener) {
		l, err := net.Listen("unix", filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l.Addr().String(), l
	}
	ours, _ := listen("ours")
	socket, l := listen("containerd")
	fake := &fakeContainerd{}
	broken := &introspection.Plugin{ID: "cfs"}
	broken.InitErr = like(broken.InitErr)
	broken.InitErr.Message = "no"
	server := grpc.NewServer()
	introspection.RegisterIntrospectionServer(server, fake)
	go server.Serve(l)
	t.Cleanup(server.Stop)
	for _, c := range []struct {
		socket, own string
		plugins     []*introspection.Plugin
		want        string
	}{
		{none, none, nil, "containerd ok"},
		{none, ours, nil, "containerd missing"},
		{ours + "x", ours, nil, "containerd missing"},
		{socket, none, nil, "containerd ok, snapshotter degraded, service degraded"},
		{socket, ours, []*introspection.Plugin{{ID: "overlayfs"}, {ID: "cfs"}}, "containerd ok, snapshotter ok, service ok"},
		{socket, none, []*introspection.Plugin{{ID: "cfs"}}, "containerd ok, snapshotter ok, service missing"},
		{socket, ours, []*introspection.Plugin{broken}, "containerd ok, snapshotter missing, service ok"},
	} {
		fake.plugins = c.plugins
		var got []string
		for _, f := range examineContainerd(t.Context(), c.socket, c.own) {
			got = append(got, f.Name+" "+string(f.State))
			if f.State != finding.OK && (f.Cost == "" || f.Advice == "") {
				t.Errorf("not a whole finding: %+v", f)
			}
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("%+v: %q", c, got)
		}
	}
}

func TestPrintFindings(t *testing.T) {
	var b strings.Builder
	err := printFindings(&b, []finding.Finding{
		{Group: "kernel", Name: "fuse", State: finding.OK, Detail: "works"},
		{Group: "kernel", Name: "swap", State: finding.Degraded, Detail: "does not", Cost: "time", Advice: "wait"},
		{Group: "store", Name: "space", State: finding.Missing, Detail: "none", Cost: "all", Advice: "make some"},
	})
	const want = `kernel
  ok        fuse   works
  degraded  swap   does not
                   cost: time
                   do:   wait
store
  missing   space  none
                   cost: all
                   do:   make some
`
	if err != nil || b.String() != want {
		t.Errorf("%v\n%s", err, b.String())
	}
}
