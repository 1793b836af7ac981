package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// A metricsServer serves /metrics. A nil one does nothing.
type metricsServer struct {
	addr net.Addr
	http *http.Server
	done chan struct{}
}

// serveMetrics serves what from gathers at http://addr/metrics until Close.
func serveMetrics(addr string, from prometheus.Gatherer) (*metricsServer, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	s := &metricsServer{addr: l.Addr(), done: make(chan struct{})}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(from, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	s.http = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(s.done)
		s.http.Serve(l)
	}()
	return s, nil
}

// Addr returns the address that is served.
func (s *metricsServer) Addr() string { return s.addr.String() }

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
