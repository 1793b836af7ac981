package main

import (
	"context"
	"os"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"

	dto "github.com/prometheus/client_model/go"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const exporterHelp = `Serve the metrics of all mounts of this machine at http://ADDRESS/metrics, for
Prometheus, until it is told to end. It may be started and ended at any time:
what processes have counted is in the runtime folder, also of those that have
ended. docs/metrics.md has the metrics, deploy/ a dashboard and alerts.`

func newExporter(g *global) *cobra.Command {
	var addr string
	cmd := &cobra.Command{
		Use:     "exporter",
		Short:   "Serve the metrics of all mounts at one address",
		Long:    exporterHelp,
		Example: "  cfs-fuse exporter\n  cfs-fuse exporter --listen :9750   # for a Prometheus elsewhere",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := filepath.Abs(g.runtimeDir)
			if err != nil {
				return err
			}
			log, err := g.logger()
			if err != nil {
				return err
			}
			own := prometheus.NewRegistry()
			own.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
			server, err := serveMetrics(addr, prometheus.Gatherers{own, prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
				return gatherNode(cmd.Context(), dir)
			})})
			if err != nil {
				return hint.Wrap(err, "name a free address with --listen")
			}
			log.Info("metrics are served", "address", server.Addr(), "runtime_dir", dir)
			<-cmd.Context().Done()
			server.Close()
			return nil
		},
	}
	cmd.Flags().StringVar(&addr, "listen", "127.0.0.1:9750", "`address` to serve at")
	return cmd
}

// spoolDir is where processes leave what they have counted.
func spoolDir(runtimeDir string) string { return filepath.Join(runtimeDir, "metrics") }

// gatherNode adds up what all mounts of a runtime folder have to say.
func gatherNode(ctx context.Context, runtimeDir string) ([]*dto.MetricFamily, error) {
	reg := prometheus.NewRegistry()
	node := metrics.New(reg)
	if err := os.MkdirAll(runtimeDir, 0o700); err != nil {
		return nil, err
	}
	return metrics.Node(ctx, spoolDir(runtimeDir), func() (map[string][]byte, []*dto.MetricFamily, error) {
		answers, alone, err := mount.AskMetrics(ctx, runtimeDir)
		if err != nil {
			return nil, nil, err
		}
		for _, o := range alone {
			defer node.Watch(func() metrics.Observation { return o })()
		}
		more, err := reg.Gather()
		return answers, more, err
	})
}
