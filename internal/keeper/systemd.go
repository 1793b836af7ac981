package keeper

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// A Store is systemd's descriptor store of the service that this process is
// (sd_notify(3), FDSTORE=1). It is used when the unit has
// FileDescriptorStoreMax=, which systemd 254 and later say by $FDSTORE; for
// older ones the unit can say it with Environment=FDSTORE=8.
//
// Descriptors have the names of Kept.Files, after storePrefix; a memory file
// of one more name has the state, after the number of restarts and a newline.
// Of Update's states, which have a number in their name, the last counts.
type Store struct {
	socket string
	most   int // descriptors that it takes; it drops others without a word
	names  []string
	states int // the last number of a state of Update
}

const (
	storePrefix = "cfs-fuse-"
	stateName   = storePrefix + "state"
)

// FromSystemd returns the store, nil when there is none, and what an earlier
// process of the service has put there, nil when nothing.
func FromSystemd() (*Store, *Kept, error) {
	socket := os.Getenv("NOTIFY_SOCKET")
	n, err := strconv.Atoi(os.Getenv("FDSTORE"))
	if socket == "" || err != nil || n <= 0 {
		return nil, nil, nil
	}
	s := &Store{socket: socket, most: n}
	k := &Kept{Files: map[string]*os.File{}}
	var state *os.File
	var states []string
	defer func() { state.Close() }()                       // nil: no error that counts
	for name, files := range activation.FilesWithNames() { // and takes $LISTEN_FDS away
		rest, ours := strings.CutPrefix(name, storePrefix)
		for i, f := range files {
			number, isState := stateNumber(name)
			switch {
			case !ours || i > 0: // of each name there is one
				f.Close()
			case isState:
				states = append(states, name)
				if state != nil && number < s.states {
					f.Close()
					continue
				}
				state.Close()
				state, s.states = f, number
			default:
				k.Files[rest] = f
				s.names = append(s.names, name)
			}
		}
	}
	s.names = append(s.names, states...) // last: they are removed first
	if state == nil {
		k.Close()
		return s, nil, nil
	}
	data := make([]byte, maxMessage)
	m, err := state.ReadAt(data, 0)
	line, rest, ok := strings.Cut(string(data[:m]), "\n")
	if !ok {
		k.Close()
		return s, nil, fmt.Errorf("the state in systemd's descriptor store: %w", err)
	}
	if k.Restarts, err = strconv.Atoi(line); err != nil {
		k.Close()
		return s, nil, fmt.Errorf("the state in systemd's descriptor store: %w", err)
	}
	k.State = []byte(rest)
	k.Restarts++
	return s, k, nil
}

// Keep puts what a successor needs in the store, in place of what is there. A
// nil error promises that systemd was told; it does not answer.
func (s *Store) Keep(k Kept) error {
	if n := len(k.Files) + 1; n > s.most {
		return fmt.Errorf("systemd's descriptor store takes %d descriptors, the session has %d: the unit needs FileDescriptorStoreMax=%d or more", s.most, n, n)
	}
	state, err := stateFile(k)
	if err != nil {
		return err
	}
	defer state.Close()
	if err := s.remove(); err != nil {
		return err
	}
	for name, f := range k.Files {
		if err := s.add(storePrefix+name, f); err != nil {
			return err
		}
	}
	return s.add(stateName, state) // last: what is there with it is whole
}

// stateNumber returns the number in the name of a state, 0 if it has none.
func stateNumber(name string) (n int, ok bool) {
	rest, ok := strings.CutPrefix(name, stateName)
	if !ok || rest == "" {
		return 0, ok
	}
	n, err := strconv.Atoi(strings.TrimPrefix(rest, "-"))
	return n, err == nil && n > 0
}

// Update is Keep for who changes what is kept while it is served, and gives
// a name to one descriptor only, for ever: what is there already is not sent
// again, and at each moment what a successor would be given is whole, as it was
// before or as it is now.
func (s *Store) Update(k Kept) error {
	if n := len(k.Files) + 2; n > s.most {
		return fmt.Errorf("systemd's descriptor store takes %d descriptors, there would be %d: the unit needs FileDescriptorStoreMax=%d or more", s.most, n, n)
	}
	state, err := stateFile(k)
	if err != nil {
		return err
	}
	defer state.Close()
	before := s.names
	wanted := map[string]bool{}
	for name, f := range k.Files {
		name = storePrefix + name
		wanted[name] = true
		if !slices.Contains(before, name) {
			if err := s.add(name, f); err != nil {
				return err
			}
		}
	}
	s.states++
	if err := s.add(fmt.Sprintf("%s-%d", stateName, s.states), state); err != nil {
		return err
	}
	for _, name := range slices.Backward(before) {
		if wanted[name] {
			continue
		}
		if err := s.notify("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
			return err
		}
		s.names = slices.DeleteFunc(s.names, func(n string) bool { return n == name })
	}
	return nil
}

func stateFile(k Kept) (*os.File, error) {
	fd, err := unix.MemfdCreate("cfs-fuse-state", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("memfd_create: %w", err)
	}
	state := os.NewFile(uintptr(fd), "state")
	if _, err := fmt.Fprintf(state, "%d\n%s", k.Restarts, k.State); err != nil {
		state.Close()
		return nil, err
	}
	return state, nil
}

func (s *Store) add(name string, f *os.File) error {
	fd, err := duplicate(f)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := s.notify("FDSTORE=1\nFDNAME="+name, fd); err != nil {
		return err
	}
	s.names = append(s.names, name)
	return nil
}

func (s *Store) remove() error {
	for len(s.names) > 0 {
		name := s.names[len(s.names)-1]
		if err := s.notify("FDSTOREREMOVE=1\nFDNAME=" + name); err != nil {
			return err
		}
		s.names = s.names[:len(s.names)-1]
	}
	return nil
}

// Over takes everything out of the store.
func (s *Store) Over() error { return s.remove() }

// Ready tells systemd that the service is up.
func (s *Store) Ready() error { return s.notify("READY=1") }

// Alive tells systemd's watchdog that the service is well (WatchdogSec=).
func (s *Store) Alive() error { return s.notify("WATCHDOG=1") }

// notify sends a message as sd_pid_notify_with_fds(3) does, which the systemd
// library for Go has without descriptors only.
func (s *Store) notify(text string, fds ...int) error {
	c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	defer unix.Close(c)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(c, []byte(text), oob, &unix.SockaddrUnix{Name: s.socket}, unix.MSG_NOSIGNAL); err != nil {
		return fmt.Errorf("tell systemd: %w", err)
	}
	return nil
}
