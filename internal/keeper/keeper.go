// Package keeper keeps a server's descriptors, and a few words about them,
// while no server lives: when one dies, its successor gets them. It knows
// nothing of FUSE or images; what is kept is its callers' business.
//
// There are two keepers. One is systemd's descriptor store, for a service
// whose unit has FileDescriptorStoreMax= (systemd.go): systemd then restarts
// the service too. The other is a process of our own, the holder (holder.go),
// which starts the successors itself:
//
//	server ──keep: state, descriptors──► holder     a socket pair; the holder is
//	server ◄──kept──────────────────────            the server's child at first
//	   ╳ kill -9
//	           holder ──starts──► successor         the same command line, from
//	           holder ──resume: state, descriptors──► successor   /proc/self/exe
//	           holder ◄──serving── successor
//
// A holder that dies is replaced by the server, which keeps a copy of what it
// gave. Only when both die at once are the descriptors gone.
//
// To change the program, the holder starts the new one beside the old one:
//
//	old ──replace: path──► holder ──starts, resume──► new
//	                       holder ◄──ready──────────── new   it could serve
//	old ◄──leave────────── holder
//	   ends                holder ──go───────────────► new   it serves
//
// and the old server stays if the new one is not ready. A successor must not
// touch the descriptors before it may: Successor.Wait.
package keeper

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// A Kept is what a successor needs.
type Kept struct {
	// State is for the successor alone.
	State json.RawMessage
	// Files are descriptors by name.
	Files map[string]*os.File
	// Restarts counts the servers that have died, or were replaced.
	Restarts int
}

// Close closes the files.
func (k *Kept) Close() {
	for _, f := range k.Files {
		f.Close()
	}
}

// A message is what holders and servers say to each other: JSON, in one
// packet, with the descriptors that Names lists. Those of which there are more
// than fit in a packet come before it, in packets that say doPart.
type message struct {
	Do       string          `json:"do"`
	State    json.RawMessage `json:"state,omitempty"`
	Names    []string        `json:"names,omitempty"`
	Restarts int             `json:"restarts,omitempty"`
	Command  []string        `json:"command,omitempty"` // of a successor, without the program
	PID      int             `json:"pid,omitempty"`
	Path     string          `json:"path,omitempty"` // of a program
	Standby  bool            `json:"standby,omitempty"`
	Text     string          `json:"text,omitempty"` // of an error
}

// What is said.
const (
	doKeep    = "keep"    // server: State, Names, Restarts, Command, PID
	doKept    = "kept"    // holder: PID
	doOver    = "over"    // server: nothing is to be kept any more
	doReplace = "replace" // server: Path
	doRefused = "refused" // holder: Text
	doLeave   = "leave"   // holder: end without unmounting; another goes on
	doResume  = "resume"  // holder, first thing to a successor: as keep, and Standby
	doReady   = "ready"   // successor on standby: it could go on
	doGo      = "go"      // holder: it may
	doServing = "serving" // successor: it does
	doPart    = "part"    // both: Names, some of those of the message that follows
)

// Bounds of a message and of a packet.
const (
	maxMessage = 128 << 10
	maxFiles   = 1024
	maxPacket  = 128 // descriptors; the kernel takes 253 (SCM_MAX_FD, unix(7))
)

// A link is one end of a conversation.
type link struct{ c *net.UnixConn }

// newLink makes a pair: a link, and the other end for a child process.
func newLink() (*link, *os.File, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "keeper")
	l, err := linkOf(os.NewFile(uintptr(pair[0]), "keeper"))
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return l, theirs, nil
}

// linkOf takes f over.
func linkOf(f *os.File) (*link, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a socket of a keeper")
	}
	return &link{u}, nil
}

// send sends a message with files; m.Names is set from them.
func (l *link) send(m message, files map[string]*os.File) error {
	names := slices.Sorted(maps.Keys(files))
	if len(names) > maxFiles {
		return fmt.Errorf("%s: %d descriptors are too much for a keeper, which takes %d", m.Do, len(names), maxFiles)
	}
	for len(names) > maxPacket {
		if err := l.sendPacket(message{Do: doPart, Names: names[:maxPacket]}, files); err != nil {
			return err
		}
		names = names[maxPacket:]
	}
	m.Names = names
	return l.sendPacket(m, files)
}

// sendPacket sends a message with those of files that it names.
func (l *link) sendPacket(m message, files map[string]*os.File) error {
	var fds []int
	for _, name := range m.Names {
		// A copy, as the owner may close its own meanwhile.
		f, err := duplicate(files[name])
		if err != nil {
			return fmt.Errorf("keep %s: %w", name, err)
		}
		defer unix.Close(f)
		fds = append(fds, f)
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(data) > maxMessage {
		return fmt.Errorf("%s: %d bytes are too much for a keeper, which takes %d", m.Do, len(data), maxMessage)
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = l.c.WriteMsgUnix(data, oob, nil)
	return err
}

// maker returns the process that made the link, which may have ended: unlike
// the parent's number this one does not change then (SO_PEERCRED, unix(7)).
func (l *link) maker() (pid int, err error) {
	c, err := l.c.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if cerr := c.Control(func(n uintptr) { cred, err = unix.GetsockoptUcred(int(n), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return 0, cerr
	}
	if err != nil {
		return 0, fmt.Errorf("who made the link: %w", err)
	}
	return int(cred.Pid), nil
}

// duplicate returns a new descriptor of f; Fd would make f blocking.
func duplicate(f *os.File) (fd int, err error) {
	c, err := f.SyscallConn()
	if err != nil {
		return -1, err
	}
	if cerr := c.Control(func(n uintptr) { fd, err = unix.FcntlInt(n, unix.F_DUPFD_CLOEXEC, 0) }); cerr != nil {
		return -1, cerr
	}
	return fd, err
}

// copies returns files of the same names for the same things.
func copies(files map[string]*os.File) (map[string]*os.File, error) {
	k := Kept{Files: map[string]*os.File{}}
	for name, f := range files {
		fd, err := duplicate(f)
		if err != nil {
			k.Close()
			return nil, fmt.Errorf("keep %s: %w", name, err)
		}
		k.Files[name] = os.NewFile(uintptr(fd), name)
	}
	return k.Files, nil
}

// receive returns the next message and its files, which the caller owns.
func (l *link) receive() (message, map[string]*os.File, error) {
	files := map[string]*os.File{}
	for {
		m, err := l.receivePacket(files)
		if err == nil && m.Do == doPart {
			if len(files) <= maxFiles {
				continue
			}
			err = fmt.Errorf("more than %d descriptors", maxFiles)
		}
		if err != nil {
			(&Kept{Files: files}).Close()
			return m, nil, err
		}
		return m, files, nil
	}
}

// receivePacket adds the packet's files to files.
func (l *link) receivePacket(files map[string]*os.File) (message, error) {
	var m message
	data, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxPacket))
	n, oobn, flags, _, err := l.c.ReadMsgUnix(data, oob)
	if err == nil && n == 0 {
		err = net.ErrClosed
	}
	if err != nil {
		return m, err
	}
	var fds []int
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	for _, c := range messages {
		var some []int
		if some, err = unix.ParseUnixRights(&c); err != nil {
			break
		}
		fds = append(fds, some...)
	}
	if err == nil {
		err = json.Unmarshal(data[:n], &m)
	}
	if err == nil && (flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 || len(fds) != len(m.Names)) {
		err = fmt.Errorf("%s: %d descriptors for %d names", m.Do, len(fds), len(m.Names))
	}
	for i, fd := range fds {
		unix.CloseOnExec(fd)
		if err != nil || files[m.Names[i]] != nil {
			unix.Close(fd)
			continue
		}
		files[m.Names[i]] = os.NewFile(uintptr(fd), m.Names[i])
	}
	return m, err
}

// linkEnv names the descriptor of a child's end of a link.
const linkEnv = "CFS_FUSE_KEEPER_FD"

// inherited returns the link that the process was started with, nil if none.
func inherited() (*link, error) {
	fd, err := envDescriptor(linkEnv)
	if fd < 0 || err != nil {
		return nil, err
	}
	return linkOf(os.NewFile(uintptr(fd), "keeper"))
}
