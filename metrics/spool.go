package metrics

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/durable"
)

// What several processes count becomes a node's by way of a folder, the spool:
//
//	PID-….lock  locked as long as the process lives
//	PID-….pb    what it had counted when it was last asked, or when it ended
//	total.lock  locked by who changes or adds up what is here
//	total.pb    what processes that have ended had counted
//
// Files *.pb are metric families in delimited protocol buffers. A process
// writes its file before it answers who asks; whoever adds up first moves the
// counts of ended processes to the total. So no count that was ever seen is
// missing later, and none is there twice.
const (
	lockSuffix  = ".lock"
	countSuffix = ".pb"
	totalName   = "total"
	maxCounts   = 16 << 20 // bytes of one file, or of a process's answer
)

var protobuf = expfmt.NewFormat(expfmt.TypeProtoDelim)

// A spoolFile is this process's part of a spool.
type spoolFile struct {
	dir, id string
	lock    *os.File
}

// Spool has this process leave in the folder dir, which is made, what it has
// counted: at each Snapshot and at Retire.
func (m *Metrics) Spool(dir string) error {
	if m == nil {
		return nil
	}
	m.spooling.Lock()
	defer m.spooling.Unlock()
	if m.spool != nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("spool of metrics: %w", err)
	}
	for {
		f, err := os.CreateTemp(dir, fmt.Sprintf("%d-*%s", os.Getpid(), lockSuffix))
		if err != nil {
			return fmt.Errorf("spool of metrics: %w", err)
		}
		// Who adds up may have taken it for that of a process that has ended.
		err = flock(f, unix.LOCK_EX)
		if err == nil {
			_, err = os.Lstat(f.Name())
		}
		if err == nil {
			m.spool = &spoolFile{dir, strings.TrimSuffix(filepath.Base(f.Name()), lockSuffix), f}
			return nil
		}
		f.Close()
		if !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("spool of metrics: lock %s: %w", f.Name(), err)
		}
	}
}

// Snapshot returns what this process has counted and what it observes now, as
// delimited protocol buffers, and the name by which its spool has it. Without a
// spool the name is empty.
func (m *Metrics) Snapshot() (id string, data []byte, err error) {
	if m == nil {
		return "", nil, nil
	}
	families, err := m.own.Gather()
	if err != nil {
		return "", nil, fmt.Errorf("gather metrics: %w", err)
	}
	if data, err = encode(families); err != nil {
		return "", nil, err
	}
	m.spooling.Lock()
	defer m.spooling.Unlock()
	if m.spool == nil {
		return "", data, nil
	}
	return m.spool.id, data, m.spool.save(data)
}

func (s *spoolFile) save(data []byte) error {
	return durable.WriteFile(filepath.Join(s.dir, s.id+countSuffix), data, 0o600)
}

// Retire leaves in the spool what was counted, for good. It is the last of a
// process.
func (m *Metrics) Retire() error {
	if m == nil {
		return nil
	}
	_, _, err := m.Snapshot()
	m.spooling.Lock()
	defer m.spooling.Unlock()
	if m.spool == nil {
		return err
	}
	dir := m.spool.dir
	err = errors.Join(err, m.spool.lock.Close())
	m.spool = nil
	// Else files of many mounts would add up where nobody scrapes. Who scrapes
	// does it later.
	total, terr := lockTotal(context.Background(), dir, false)
	if errors.Is(terr, unix.EWOULDBLOCK) {
		return err
	}
	if terr != nil {
		return errors.Join(err, terr)
	}
	defer total.Close()
	_, ferr := fold(dir)
	return errors.Join(err, ferr)
}

// Node adds up what all processes of a spool have counted, those that have
// ended included, and what those observe that live. ask asks these, and
// returns their Snapshots by name, and what else is to be added; a process that
// does not answer counts with what it said before.
func Node(ctx context.Context, dir string, ask func() (map[string][]byte, []*dto.MetricFamily, error)) ([]*dto.MetricFamily, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("spool of metrics: %w", err)
	}
	total, err := lockTotal(ctx, dir, true)
	if err != nil {
		return nil, err
	}
	defer total.Close()
	all, err := fold(dir)
	if err != nil {
		return nil, err
	}
	answers, more, err := ask()
	if err != nil {
		return nil, err
	}
	locks, err := filepath.Glob(filepath.Join(dir, "*"+lockSuffix))
	if err != nil {
		return nil, err
	}
	for _, path := range locks {
		id := strings.TrimSuffix(filepath.Base(path), lockSuffix)
		if _, ok := answers[id]; ok || id == totalName {
			continue
		}
		families, err := load(filepath.Join(dir, id+countSuffix))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		all.add(families, false)
	}
	for _, data := range answers {
		families, err := decode(bytes.NewReader(data))
		if err != nil {
			return nil, err
		}
		all.add(families, true)
	}
	all.add(more, true)
	return all.families(), nil
}

// fold moves the counts of ended processes into the total, and returns it.
// total.lock is held.
func fold(dir string) (sum, error) {
	path := filepath.Join(dir, totalName+countSuffix)
	all := sum{}
	families, err := load(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	all.add(families, false)
	locks, err := filepath.Glob(filepath.Join(dir, "*"+lockSuffix))
	if err != nil {
		return nil, err
	}
	var done []string
	for _, lock := range locks {
		id := strings.TrimSuffix(filepath.Base(lock), lockSuffix)
		if id == totalName || !ended(lock) {
			continue
		}
		families, err := load(filepath.Join(dir, id+countSuffix))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
		all.add(families, false)
		done = append(done, id)
	}
	if len(done) == 0 {
		return all, nil
	}
	data, err := encode(all.families())
	if err == nil {
		err = durable.WriteFile(path, data, 0o600)
	}
	for _, id := range done {
		if err == nil {
			os.Remove(filepath.Join(dir, id+countSuffix))
			err = os.Remove(filepath.Join(dir, id+lockSuffix))
		}
	}
	if err != nil {
		return nil, fmt.Errorf("spool of metrics: %w", err)
	}
	return all, nil
}

// ended reports whether nobody holds the lock.
func ended(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return flock(f, unix.LOCK_EX|unix.LOCK_NB) == nil
}

// lockTotal waits for total.lock if wait is set, and else fails with EWOULDBLOCK.
func lockTotal(ctx context.Context, dir string, wait bool) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, totalName+lockSuffix), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("spool of metrics: %w", err)
	}
	for {
		err := flock(f, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !wait || !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("spool of metrics: lock %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("spool of metrics: lock %s: %w", f.Name(), ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func flock(f *os.File, how int) error {
	for {
		if err := unix.Flock(int(f.Fd()), how); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func encode(families []*dto.MetricFamily) ([]byte, error) {
	var b bytes.Buffer
	enc := expfmt.NewEncoder(&b, protobuf)
	for _, f := range families {
		if err := enc.Encode(f); err != nil {
			return nil, fmt.Errorf("encode metrics: %w", err)
		}
	}
	return b.Bytes(), nil
}

func load(path string) ([]*dto.MetricFamily, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	families, err := decode(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return families, nil
}

// decode reads delimited families.
func decode(r io.Reader) (all []*dto.MetricFamily, err error) {
	dec := expfmt.NewDecoder(io.LimitReader(r, maxCounts), protobuf)
	for {
		f := &dto.MetricFamily{}
		if err := dec.Decode(f); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, fmt.Errorf("decode metrics: %w", err)
		}
		all = append(all, f)
	}
}
