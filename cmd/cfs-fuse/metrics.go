package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/cfs-fuse/cfs-fuse/metrics"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// A metricsServer serves /metrics. A nil one does nothing.
type metricsServer struct {
	http    *http.Server
	refresh atomic.Pointer[func()]
	done    chan struct{}
}

func listenMetrics(addr string, reg *prometheus.Registry) (*metricsServer, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	s := &metricsServer{done: make(chan struct{})}
	inner := promhttp.HandlerFor(reg, promhttp.HandlerOpts{Registry: reg, EnableOpenMetrics: true})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, r *http.Request) {
		if refresh := s.refresh.Load(); refresh != nil {
			(*refresh)()
		}
		inner.ServeHTTP(w, r)
	})
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(s.done)
		s.http.Serve(l)
	}()
	return s, nil
}

// observe makes each scrape show the mount's progress as it is then.
func (s *metricsServer) observe(m *mount.Mount, to *metrics.Metrics) {
	if s == nil {
		return
	}
	refresh := func() {
		st := m.Status()
		to.Progress(st.Files, st.FilesLocal, st.Bytes, st.BytesLocal)
	}
	s.refresh.Store(&refresh)
}

// Close ends the server, letting a scrape under way finish for a second.
func (s *metricsServer) Close() {
	if s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	if s.http.Shutdown(ctx) != nil {
		s.http.Close()
	}
	<-s.done
}
