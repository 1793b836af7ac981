package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/mount"
)

// A lazyMount is the image mounted by cfs-fuse with an empty store.
type lazyMount struct {
	b      *bench
	mnt    string
	start  time.Time
	before int64 // bytes the registry had sent
}

// mount mounts the image, with the access profile in the file profile if that
// is not empty. The time begins with the command.
func (b *bench) mount(ctx context.Context, profile string) (*lazyMount, error) {
	m := &lazyMount{b: b, mnt: filepath.Join(b.work, "mnt")}
	if err := os.Mkdir(m.mnt, 0o755); err != nil {
		return nil, err
	}
	if profile != "" {
		if _, err := m.cfs(ctx, "profile", "import", "--root", m.root(), profile); err != nil {
			return nil, err
		}
	}
	args := append([]string{"mount", "--plain-http", "--root", m.root()}, b.options...)
	args = append(args, m.source(), m.mnt)
	if b.log != "" {
		args = append([]string{"--log-level", "debug"}, args...)
	}
	m.start, m.before = time.Now(), b.reg.Counts().Bytes
	if _, err := m.cfs(ctx, args...); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *lazyMount) root() string { return filepath.Join(m.b.work, "store") }

func (m *lazyMount) source() string {
	return "docker://" + m.b.reg.Host() + "/" + repository + ":" + m.b.form
}

func (m *lazyMount) cfs(ctx context.Context, args ...string) ([]byte, error) {
	return output(ctx, m.b.bin, append([]string{"--runtime-dir", filepath.Join(m.b.work, "run")}, args...)...)
}

func (m *lazyMount) await(ctx context.Context, state string) (time.Duration, error) {
	_, err := m.cfs(ctx, "wait", "--for", state, m.mnt)
	return time.Since(m.start), err
}

// end unmounts, and waits until the serving process has left. The context of
// the measurement may be over.
func (m *lazyMount) end() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	var st mount.Status
	if out, err := m.cfs(ctx, "status", "--json", m.mnt); err == nil {
		json.Unmarshal(out, &st)
	}
	var err error
	if m.b.log != "" && st.Log != "" {
		err = appendFile(m.b.log, st.Log) // it goes with the mount
	}
	if _, uerr := m.cfs(ctx, "umount", m.mnt); uerr != nil {
		err = errors.Join(err, uerr)
	}
	for st.PID > 0 && ctx.Err() == nil && unix.Kill(st.PID, 0) == nil {
		time.Sleep(time.Millisecond) // it still has the store open
	}
	return err
}

func appendFile(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// work says what has been asked of the registry so far.
func (m *lazyMount) work(ctx context.Context) string {
	var st mount.Status
	out, err := m.cfs(ctx, "status", "--json", m.mnt)
	if err != nil || json.Unmarshal(out, &st) != nil {
		return ""
	}
	var all []string
	for _, class := range slices.Sorted(maps.Keys(st.Fetched)) {
		w := st.Fetched[class]
		all = append(all, fmt.Sprintf("%s %.1f MB in %d", class, float64(w.Bytes)/1e6, w.Requests))
	}
	return " (" + strings.Join(all, ", ") + ")"
}

// cpu is the processor time that the serving process has used.
func (m *lazyMount) cpu(ctx context.Context) (time.Duration, error) {
	out, err := m.cfs(ctx, "status", "--json", m.mnt)
	if err != nil {
		return 0, err
	}
	var st mount.Status
	if err := json.Unmarshal(out, &st); err != nil {
		return 0, err
	}
	text, err := os.ReadFile("/proc/" + strconv.Itoa(st.PID) + "/stat")
	if err != nil {
		return 0, nil // it is swapped, and gone
	}
	// proc_pid_stat(5): utime and stime are the 14th and 15th, in ticks of
	// 1/100 s; the name before may hold anything.
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/%d/stat: %q", st.PID, text)
	}
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, err
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

func (b *bench) measureLazy(ctx context.Context) (sample, error) { return b.start(ctx, "") }

func (b *bench) measureProfile(ctx context.Context) (sample, error) { return b.start(ctx, b.profile) }

// start mounts, runs the application at once and waits for its answer and for
// every byte.
func (b *bench) start(ctx context.Context, profile string) (s sample, err error) {
	used, err := ownCPU()
	if err != nil {
		return s, err
	}
	m, err := b.mount(ctx, profile)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	s.mounted = time.Since(m.start)
	type waited struct {
		local, sealed, cpu time.Duration
		err                error
	}
	complete := make(chan waited, 1)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		var w waited
		if w.local, w.err = m.await(ctx, "complete"); w.err == nil {
			w.cpu, w.err = m.cpu(ctx)
			if own, err := ownCPU(); w.err == nil && err == nil {
				w.cpu += own - used // the application is not in it before it ends
				w.sealed, w.err = m.await(ctx, "sealed")
			}
		}
		complete <- w
	}()
	app, err := b.startApp(m.mnt)
	if err == nil {
		defer app.stop()
		s.modules, err = app.answer(ctx, b.page())
	}
	s.answer, s.bytes, s.work = time.Since(m.start), b.reg.Counts().Bytes-m.before, m.work(ctx)
	if err != nil {
		return s, err
	}
	if slices.Contains(b.options, "--fill=false") {
		return s, nil // it will never be whole
	}
	w := <-complete
	s.local, s.sealed, s.cpu = w.local, w.sealed, w.cpu
	return s, w.err
}

// record makes the access profile, by a start as the measured ones.
func (b *bench) record(ctx context.Context) (_ sample, err error) {
	m, err := b.mount(ctx, "")
	if err != nil {
		return sample{}, err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	app, err := b.startApp(m.mnt)
	if err != nil {
		return sample{}, err
	}
	defer app.stop()
	if _, err := app.answer(ctx, b.page()); err != nil {
		return sample{}, err
	}
	out, err := m.cfs(ctx, "profile", "export", m.mnt)
	if err != nil {
		return sample{}, err
	}
	return sample{}, os.WriteFile(b.profile, out, 0o644)
}

// measureTar reads the whole image through a mount that has just come to be.
func (b *bench) measureTar(ctx context.Context) (s sample, err error) {
	m, err := b.mount(ctx, "")
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, m.end()) }()
	s.mounted = time.Since(m.start)
	if err := readAll(ctx, m.mnt); err != nil {
		return s, err
	}
	s.tar = time.Since(m.start)
	return s, nil
}
