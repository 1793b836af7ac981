package main

import (
	"errors"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/internal/fusesession"
	"github.com/cfs-fuse/cfs-fuse/internal/keeper"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// A session is what this process has, or will have, to do with keepers of the
// mount's FUSE session.
type session struct {
	log       *slog.Logger
	holder    *keeper.Holder    // of a mount in the background
	store     *keeper.Store     // of a service of systemd
	kept      *keeper.Kept      // what another process left in it
	successor *keeper.Successor // this process was started by a holder
	alone     bool              // in the foreground, without systemd
}

// findSession finds out whether this process was started to go on with a
// mount.
func findSession(foreground bool, log *slog.Logger) (*session, error) {
	s := &session{log: log}
	var err error
	if s.successor, err = keeper.FromHolder(); err != nil || s.successor != nil || !foreground {
		return s, err
	}
	if s.store, s.kept, err = keeper.FromSystemd(); err != nil {
		return nil, err
	}
	s.alone = s.store == nil
	// A session that ended while nobody served it is mounted anew.
	if s.kept != nil {
		if dev := mount.FuseFile(s.kept.Files); dev == nil || fusesession.Over(dev) {
			s.kept.Close()
			s.kept = nil
			return s, s.store.Over()
		}
	}
	return s, nil
}

// resumes reports whether this process goes on with a mount.
func (s *session) resumes() bool { return s.successor != nil || s.kept != nil }

func (s *session) resume(source, mountpoint string, o mount.Options) (*mount.Mount, *mount.Control, error) {
	kept, wait := s.kept, func() error { return nil }
	if s.successor != nil {
		kept, wait = &s.successor.Kept, s.successor.Wait
		// Before its descriptors are closed by a mount that ends at once.
		var err error
		if s.holder, err = s.successor.Holder(holderCommand(mountpoint), s.log); err != nil {
			return nil, nil, err
		}
	}
	m, err := mount.Resume(source, mountpoint, o, kept.State, kept.Files, wait)
	if err != nil {
		return nil, nil, err
	}
	if s.successor != nil {
		s.holder.Serving(s.successor)
	}
	m.KeptBy(s, kept.Restarts) // before the first answer to anybody
	control, err := mount.ResumeControl(m, kept.Files)
	return m, control, err
}

// begin starts the holder of a mount that is about to be made: it comes up
// while the image is prepared. One that is given nothing ends with this process.
func (s *session) begin(mountpoint string) (err error) {
	if s.store == nil && !s.alone {
		s.holder, err = keeper.StartHolder(holderCommand(mountpoint), s.log)
	}
	return err
}

// keep gives the session of a mount to a keeper.
func (s *session) keep(m *mount.Mount, c *mount.Control) error {
	switch {
	case s.store != nil:
		restarts := 0
		if s.kept != nil {
			restarts = s.kept.Restarts
		}
		if m.Serves() {
			if err := m.KeepBy(s, c, restarts); err != nil {
				return err
			}
		}
		return s.store.Ready()
	case s.successor != nil:
		if s.holder.Outdated() {
			return s.holder.Renew()
		}
		return nil
	case s.holder == nil || !m.Serves():
		return nil
	}
	if err := m.KeepBy(s, c, 0); err != nil {
		return err
	}
	return c.Save()
}

// holderCommand are the arguments of a holder process; the mount point is for
// people who look for it.
func holderCommand(mountpoint string) []string { return []string{holderName, mountpoint} }

// leave is closed when another process is about to go on with the mount.
func (s *session) leave() <-chan struct{} {
	if s.holder == nil {
		return nil
	}
	return s.holder.Leave()
}

// over ends keeping.
func (s *session) over() {
	if s.holder != nil {
		s.holder.Over()
	}
	if s.store != nil {
		if err := s.store.Over(); err != nil {
			s.log.Warn("systemd's descriptor store", "error", err)
		}
	}
}

// Keep makes the session a mount.Keeper.
func (s *session) Keep(state []byte, files map[string]*os.File) error {
	k := keeper.Kept{State: state, Files: files}
	if s.store != nil {
		if s.kept != nil {
			k.Restarts = s.kept.Restarts
		}
		return s.store.Keep(k)
	}
	return s.holder.Keep(k, os.Args[1:])
}

// Name makes the session a mount.Keeper.
func (s *session) Name() (string, int) {
	if s.store != nil {
		return "systemd", 0
	}
	return "holder", s.holder.PID()
}

// Replace makes the session a mount.Keeper.
func (s *session) Replace(path string) error {
	if s.store != nil {
		return errors.New("systemd starts its servers: install the new program where the unit has it, and end the old one by 'systemctl kill -s KILL'")
	}
	return s.holder.Replace(path)
}

const holderName = "hold-session"

// newHolder is the command that a server starts for itself.
func newHolder(g *global) *cobra.Command {
	return &cobra.Command{
		Use:    holderName + " MOUNTPOINT",
		Hidden: true,
		Args:   exactArgs("MOUNTPOINT"),
		RunE: func(_ *cobra.Command, args []string) error {
			log, err := g.logger()
			if err != nil {
				return err
			}
			return keeper.Hold(log.With("mountpoint", args[0]), func(files map[string]*os.File) bool {
				dev := mount.FuseFile(files)
				return dev == nil || fusesession.Over(dev)
			})
		},
	}
}
