package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	introspection "github.com/containerd/containerd/api/services/introspection/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cfs-fuse/cfs-fuse/internal/finding"
)

// examineContainerd asks containerd at socket which snapshotters it has, and
// whether ours answers at own. A machine without containerd is none the worse.
func examineContainerd(ctx context.Context, socket, own string) []finding.Finding {
	l := &finding.List{Group: "containerd"}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	ours := dials(own)
	if err := dials(socket); err != nil {
		if errors.Is(err, os.ErrNotExist) && ours != nil {
			l.Good("containerd", "not here; mounts by hand do not need it")
			return l.All
		}
		l.Missing("containerd", err.Error(), "containers are not started from images that are not there yet", "start containerd, or name its socket with --containerd")
		return l.All
	}
	plugins, err := snapshotters(ctx, socket)
	if err != nil {
		l.Missing("containerd", fmt.Sprintf("%s: %v", socket, err), "it is not known whether containers can be started", "look into containerd's log")
		return l.All
	}
	l.Good("containerd", socket+" answers")
	const cost = "containerd downloads and unpacks images before it starts containers"
	p, ok := plugins["cfs"]
	switch {
	case !ok:
		l.Degraded("snapshotter", "containerd has no snapshotter cfs", cost, "add [proxy_plugins.cfs] to containerd's config.toml ('cfs-fuse snapshotter --help' has it), and start containerd anew")
	case p != "":
		l.Missing("snapshotter", "containerd could not start the snapshotter cfs: "+p, "containers that ask for it do not start", "start 'cfs-fuse snapshotter', then containerd")
	default:
		l.Good("snapshotter", "containerd knows the snapshotter cfs")
	}
	switch {
	case ours == nil:
		l.Good("service", own+" answers")
	case ok:
		l.Missing("service", ours.Error(), "containers that ask for the snapshotter cfs do not start", "start 'cfs-fuse snapshotter', or name its socket with --snapshotter")
	default:
		l.Degraded("service", ours.Error(), cost, "start 'cfs-fuse snapshotter'")
	}
	return l.All
}

func dials(socket string) error {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err == nil {
		c.Close()
	}
	return err
}

// snapshotters returns containerd's snapshotters by name, with the error that
// keeps each from working, if any.
func snapshotters(ctx context.Context, socket string) (map[string]string, error) {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	res, err := introspection.NewIntrospectionClient(conn).Plugins(ctx, &introspection.PluginsRequest{Filters: []string{"type==io.containerd.snapshotter.v1"}})
	if err != nil {
		return nil, err
	}
	all := map[string]string{}
	for _, p := range res.Plugins {
		all[p.ID] = p.GetInitErr().GetMessage()
	}
	return all, nil
}
