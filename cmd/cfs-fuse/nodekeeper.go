package main

import (
	"fmt"
	"log/slog"
	"net"
	"os"

	"github.com/cfs-fuse/cfs-fuse/internal/keeper"
	"github.com/cfs-fuse/cfs-fuse/snapshotter"
)

// socketFile is the name of containerd's socket among kept descriptors: who
// connects while no process serves it waits.
const socketFile = "socket"

// A nodeKeeper is what the snapshotter has to do with keepers of its sessions:
// systemd, or a holder process.
type nodeKeeper struct {
	log       *slog.Logger
	store     *keeper.Store
	holder    *keeper.Holder
	successor *keeper.Successor
	kept      *keeper.Kept // what a process before has left, nil if none has
	restarts  int
	listener  *net.UnixListener
}

var _ snapshotter.Keeper = (*nodeKeeper)(nil)

// findNodeKeeper finds out whether this process was started to go on for
// another one.
func findNodeKeeper(log *slog.Logger) (*nodeKeeper, error) {
	k := &nodeKeeper{log: log}
	var err error
	if k.successor, err = keeper.FromHolder(); err != nil {
		return nil, err
	}
	if k.successor != nil {
		k.kept = &k.successor.Kept
	} else if k.store, k.kept, err = keeper.FromSystemd(); err != nil {
		return nil, err
	}
	if k.kept != nil {
		k.restarts = k.kept.Restarts
	}
	return k, nil
}

func (k *nodeKeeper) resumes() bool { return k.kept != nil }

// listen returns containerd's socket: the one that was kept, or a new one.
func (k *nodeKeeper) listen(path string) (net.Listener, error) {
	if k.kept != nil && k.kept.Files[socketFile] != nil {
		f := k.kept.Files[socketFile]
		delete(k.kept.Files, socketFile)
		defer f.Close()
		l, err := net.FileListener(f)
		if err != nil {
			return nil, fmt.Errorf("continue the socket for containerd: %w", err)
		}
		if u, ok := l.(*net.UnixListener); ok && u.Addr().String() == path {
			u.SetUnlinkOnClose(false)
			k.listener = u
			return u, nil
		}
		l.Close() // the unit names another one now
	}
	var err error
	k.listener, err = listenForContainerd(path)
	return k.listener, err
}

// begin has a holder where systemd does not keep.
func (k *nodeKeeper) begin(address string) (err error) {
	command := []string{nodeHolderName, address}
	switch {
	case k.successor != nil:
		if k.holder, err = k.successor.Holder(command, k.log); err != nil {
			return err
		}
		if err = k.successor.Wait(); err == nil {
			k.holder.Serving(k.successor)
		}
		if err == nil && k.holder.Outdated() {
			err = k.holder.Renew()
		}
	case k.store == nil:
		k.holder, err = keeper.StartHolder(command, k.log)
	}
	return err
}

// sessions are those of the process before, nil if there was none.
func (k *nodeKeeper) sessions() *snapshotter.Sessions {
	if k.kept == nil {
		return nil
	}
	return &snapshotter.Sessions{State: k.kept.State, Files: k.kept.Files}
}

// Keep makes it a snapshotter.Keeper.
func (k *nodeKeeper) Keep(state []byte, files map[string]*os.File) error {
	socket, err := k.listener.File()
	if err != nil {
		return fmt.Errorf("keep the socket for containerd: %w", err)
	}
	defer socket.Close()
	all := map[string]*os.File{socketFile: socket}
	for name, f := range files {
		all[name] = f
	}
	kept := keeper.Kept{State: state, Files: all, Restarts: k.restarts}
	if k.store != nil {
		return k.store.Update(kept)
	}
	return k.holder.Keep(kept, os.Args[1:])
}

// failed says that this process could not begin. What one before it has left
// stays kept, for the next: containers read through it, and what is in the way,
// a full disk perhaps, may pass.
func (k *nodeKeeper) failed() {
	if !k.resumes() {
		k.over()
	}
}

// over ends keeping by a holder. What systemd keeps it gives to the service's
// next process, or drops.
func (k *nodeKeeper) over() {
	if k.holder != nil {
		k.holder.Over()
	}
}
