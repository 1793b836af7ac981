package mount

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// A State is how far an image has come at a mount point.
type State int

// The states, in their order.
const (
	Lazy State = iota
	Complete
	Sealed
	Swapped
)

var stateNames = []string{"lazy", "complete", "sealed", "swapped"}

// String returns the state's name in lower case, as commands take and print it.
func (s State) String() string { return stateNames[s] }

// MarshalText writes the state's name.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText reads the state's name.
func (s *State) UnmarshalText(text []byte) error {
	for i, name := range stateNames {
		if name == string(text) {
			*s = State(i)
			return nil
		}
	}
	return fmt.Errorf("state %q: want lazy, complete, sealed or swapped", text)
}

// Work is what was asked of a source for one class of work.
type Work struct {
	Requests int64 `json:"requests"`
	Bytes    int64 `json:"bytes"` // compressed, as they came
}

// Status is what is known of a mount. Sizes are in bytes.
type Status struct {
	Source         string          `json:"source"`
	Mountpoint     string          `json:"mountpoint"`
	ManifestDigest string          `json:"manifest_digest,omitempty"`
	State          State           `json:"state"`
	Backend        string          `json:"backend"`                  // fuse, hybrid or kernel
	BackendReason  string          `json:"backend_reason,omitempty"` // why it is fuse or hybrid
	Files          int             `json:"files"`                    // distinct contents
	FilesLocal     int             `json:"files_local"`
	FilesSealed    int64           `json:"files_sealed,omitempty"` // names that sealing has come to, while it goes on
	Bytes          int64           `json:"bytes"`                  // of distinct contents, uncompressed
	BytesLocal     int64           `json:"bytes_local"`
	Fetched        map[string]Work `json:"fetched"` // by class of work
	// FUSERequests is how often the kernel asked this process, by operation.
	FUSERequests map[string]int64 `json:"fuse_requests,omitempty"`
	// Verity is what was obtained: "enforced", "not enforced (…)", or "none
	// yet" before the image is sealed.
	Verity string `json:"verity"`
	// ComposefsDigest is the fs-verity digest of the sealed image, in
	// hexadecimal, once there is one.
	ComposefsDigest   string  `json:"composefs_digest,omitempty"`
	OldestWaitSeconds float64 `json:"oldest_wait_seconds"` // of a read that waits
	// Reads of this process: those that wait now, those that found their bytes
	// in the store, and those that have waited for the source.
	ReadsWaiting int   `json:"reads_waiting"`
	ReadsLocal   int64 `json:"reads_local"`
	ReadsWaited  int64 `json:"reads_waited"`
	// IDMap, Upper, Work and Context are as View has them, if set.
	IDMap   string `json:"idmap,omitempty"`
	Upper   string `json:"upperdir,omitempty"`
	Work    string `json:"workdir,omitempty"`
	Context string `json:"context,omitempty"`
	// Elsewhere lists the other places from which the mount was used when it was
	// swapped, and what became of them.
	Elsewhere []Elsewhere `json:"elsewhere,omitempty"`
	// Note says why the state goes no further, if it does not.
	Note string `json:"swap_note,omitempty"`
	// StoreNote says that nothing can be stored, and why, while that is so.
	StoreNote string `json:"store_note,omitempty"`
	PID       int    `json:"pid,omitempty"` // of the process that serves, 0 when none
	// Keeper is what keeps the session should that process die ("holder",
	// "systemd", "" for nothing), KeeperPID its process (0: none of its own),
	// Restarts how many processes have served the mount before this one.
	Keeper    string `json:"keeper,omitempty"`
	KeeperPID int    `json:"keeper_pid,omitempty"`
	Restarts  int    `json:"restarts"`
	Root      string `json:"root,omitempty"`
	Log       string `json:"log,omitempty"`

	stuck    error // what ended the conductor
	retrying bool  // Note is an error that may come right
}

// Status returns what is known now.
func (m *Mount) Status() Status {
	m.mu.Lock()
	s, keeper := m.status, m.keeper
	m.mu.Unlock()
	if keeper != nil {
		s.Keeper, s.KeeperPID = keeper.Name()
	}
	if m.contents != nil {
		p := m.contents.Progress()
		s.Files, s.FilesLocal, s.Bytes, s.BytesLocal = p.Files, p.FilesLocal, p.Bytes, p.BytesLocal
	}
	if s.State == Complete {
		s.FilesSealed = m.sealing.Load()
	}
	if m.server != nil {
		s.FUSERequests = m.server.Requests()
	}
	s.Fetched = map[string]Work{}
	if m.image != nil {
		s.Fetched["metadata"] = m.image.fetched
	}
	if m.fetch != nil {
		for class, w := range m.fetch.Stats() {
			s.Fetched[class] = Work{Requests: w.Requests, Bytes: w.Bytes}
			if class == metrics.Fill {
				s.Fetched[class] = Work{Requests: w.Requests + m.image.streamed.Requests, Bytes: w.Bytes + m.image.streamed.Bytes}
			}
		}
		s.OldestWaitSeconds = m.fetch.OldestWait().Seconds()
		s.ReadsWaiting = m.fetch.Waiting()
		s.ReadsLocal, s.ReadsWaited = m.story.reads()
		s.StoreNote = m.spare.note()
	}
	return s
}

func (m *Mount) state() State {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status.State
}

// update changes the status and wakes those who wait for a change.
func (m *Mount) update(f func(*Status)) {
	m.mu.Lock()
	before := m.status.State
	f(&m.status)
	state := m.status.State
	close(m.change)
	m.change = make(chan struct{})
	m.mu.Unlock()
	if m.lazyFrom {
		for s := before + 1; s <= state; s++ {
			m.milestone(s.String())
		}
	}
	m.story.reached(state)
}

func (m *Mount) setState(s State) {
	m.update(func(st *Status) { st.State = max(st.State, s) })
}

func (m *Mount) note(text string) {
	m.update(func(st *Status) { st.Note, st.retrying = text, false })
}

// blocked records why the conductor stopped, unless it was told to.
func (m *Mount) blocked(ctx context.Context, err error) {
	if ctx.Err() != nil {
		return
	}
	text := withHint(err)
	m.log.Warn("the image goes no further", "state", m.state().String(), "error", text)
	m.update(func(st *Status) { st.Note, st.stuck = text, err })
}

// withHint returns an error's text with what can be done about it.
func withHint(err error) string {
	if h := hint.Of(err); h != "" {
		return err.Error() + "; " + h
	}
	return err.Error()
}

// ErrStuck says that a state will not be reached.
var ErrStuck = errors.New("will not be reached")

// WaitFor returns nil once the mount has reached state. It fails with
// ErrStuck, wrapped with the reason, when it never will, and with ctx's error
// when that ends first.
func (m *Mount) WaitFor(ctx context.Context, state State) error {
	for {
		m.mu.Lock()
		st, change := m.status, m.change
		m.mu.Unlock()
		switch {
		case st.State >= state:
			return nil
		case st.stuck != nil:
			return fmt.Errorf("state %s %w: %w", state, ErrStuck, st.stuck)
		case state == Swapped && m.stays() != "":
			return fmt.Errorf("state %s %w: %s", state, ErrStuck, m.stays())
		case m.server == nil && st.State < state:
			return fmt.Errorf("state %s %w: this source is served as it is", state, ErrStuck)
		}
		select {
		case <-change:
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Minute): // a lost change costs a minute, no more
		}
	}
}
