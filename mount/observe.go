package mount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// milestone records how long the mount took to come so far.
func (m *Mount) milestone(name string) {
	m.opts.Metrics.Milestone(name, time.Since(m.begun), m.status.ManifestDigest)
}

func resultOf(err error) string {
	if err != nil {
		return metrics.Failed
	}
	return metrics.OK
}

// observe says what a scrape wants to know of the mount.
func (m *Mount) observe() metrics.Observation {
	s := m.Status()
	o := s.observation()
	o.AtRisk = m.server != nil && s.State < Swapped && s.Keeper == ""
	o.Dead = false
	o.StoreFull = s.StoreNote != ""
	o.OldestWait = time.Duration(s.OldestWaitSeconds * float64(time.Second))
	if m.fetch != nil {
		o.Waiting = m.fetch.Waiting()
	}
	if m.src != nil {
		o.Credentials = fetcher.CredentialsExpire(m.src)
	}
	if m.store != nil {
		o.Store.Root = m.opts.Root
		o.Store.Bytes, o.Store.Budget, o.Store.Free = m.store.Level()
	}
	return o
}

// observation is what a status tells of a mount, which no process need serve.
func (s Status) observation() metrics.Observation {
	o := metrics.Observation{
		State: s.State.String(), Backend: s.Backend, Verity: metrics.VerityNotEnforced,
		Blocked: s.stuck != nil || s.retrying, Dead: s.PID == 0 && s.State < Swapped,
		Files: s.Files, FilesLocal: s.FilesLocal, Bytes: s.Bytes, BytesLocal: s.BytesLocal,
	}
	switch {
	case strings.HasPrefix(s.Verity, verityEnforced):
		o.Verity = metrics.VerityEnforced
	case s.State < Sealed:
		o.Verity = metrics.VerityNone
	}
	return o
}

// processHeader names, in an answer with metrics, the process in its spool.
const processHeader = "Cfs-Fuse-Process"

func (c *Control) metrics(w http.ResponseWriter, _ *http.Request) {
	id, data, err := c.mount.opts.Metrics.Snapshot()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set(processHeader, id)
	w.Write(data)
}

const (
	scrapeTime  = 2 * time.Second // for a process to say what it has counted
	scrapeBytes = 16 << 20        // at most
	scrapers    = 16              // processes that are asked at once
)

// AskMetrics asks the processes that serve the mounts of a runtime folder what
// they have counted. It returns the answers by the names that their spool has
// for them (metrics.Node), and what is to be said of mounts without a process,
// or with one that does not answer.
func AskMetrics(ctx context.Context, runtimeDir string) (map[string][]byte, []metrics.Observation, error) {
	files, err := records(runtimeDir)
	if err != nil {
		return nil, nil, fmt.Errorf("records of mounts: %w", err)
	}
	var mu sync.Mutex
	var alone []metrics.Observation
	answers := map[string][]byte{}
	var work errgroup.Group
	work.SetLimit(scrapers)
	for _, f := range files {
		work.Go(func() error {
			id, data, err := f.askMetrics(ctx)
			if err == nil {
				mu.Lock()
				defer mu.Unlock()
				answers[id] = data
				return nil
			}
			o := metrics.Observation{Unreachable: true}
			if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
				s, err := f.load()
				if err == nil {
					s, err = fromKernel(s)
				}
				if errors.Is(err, kmount.ErrNotMounted) || errors.Is(err, os.ErrNotExist) {
					return nil
				}
				if err != nil {
					return err
				}
				o = s.observation()
			}
			mu.Lock()
			defer mu.Unlock()
			alone = append(alone, o)
			return nil
		})
	}
	err = work.Wait()
	return answers, alone, err
}

func (f Files) askMetrics(ctx context.Context) (id string, data []byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, scrapeTime)
	defer cancel()
	res, err := f.ask(ctx, http.MethodGet, "/metrics")
	if err != nil {
		return "", nil, err
	}
	defer res.Body.Close()
	data, err = io.ReadAll(io.LimitReader(res.Body, scrapeBytes))
	id = res.Header.Get(processHeader)
	if err == nil && (res.StatusCode != http.StatusOK || id == "") {
		err = fmt.Errorf("ask for metrics: %s", res.Status)
	}
	return id, data, err
}
