// Package fusefs serves a composefs EROFS image as a read-only FUSE
// filesystem: names, attributes and extended attributes come from the image,
// the bytes of files from a Contents. It knows nothing of registries, stores
// or layers, keeps nothing per file on the heap, and never writes.
//
// The node ID of a file is its nid in the image, except that the root is node
// 1 (FUSE_ROOT_ID). There is no state behind a node or a file handle, so any
// process that has the image and the contents can answer any request:
//
//	kernel ── LOOKUP 36 "bin" ──► Reader.Lookup(nid 36, "bin")  ─► nid 57
//	kernel ── READ 57, 4096 B ──► redirect of nid 57 = "ab/cdef…"
//	                              Contents.ReadAt("ab/cdef…", …)  ─► bytes
//
// What the kernel asks once it keeps: entries and attributes have long
// timeouts, absent names are remembered, page caches are kept, and files and
// folders are opened without asking us (we answer the first OPEN and OPENDIR
// with ENOSYS, which linux/fuse.h documents as "no open").
//
// The tree is shown as overlayfs would show it with the image as its lowest
// layer: trusted.overlay.* is hidden, trusted.overlay.overlay.* loses one
// "overlay.", and character devices 0:0 (whiteouts) are not there.
package fusefs

import (
	"context"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/fusesession"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// Contents gives the bytes of the files that an image only refers to.
type Contents interface {
	// ReadAt reads len(p) bytes at offset off of the object that an inode's
	// trusted.overlay.redirect names, without its leading slash
	// ("ab/cdef…"). It returns fewer only at the object's end. Fetched says
	// that at least one byte was not local when the call came. The context
	// ends when the reader has been killed or the filesystem is unmounted.
	ReadAt(ctx context.Context, object string, p []byte, off int64) (n int, fetched bool, err error)
}

// Options say how an image is served. The zero value is right for most.
type Options struct {
	// Source is what mount tables show as the mount's source.
	Source string
	// Attributes are MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV and MOUNT_ATTR_NOEXEC,
	// or'ed (mount_setattr(2)). Without root the kernel's helper adds the first
	// two.
	Attributes int
	// AllowOther lets other users in. As root everybody is let in, as on any
	// filesystem; without root /etc/fuse.conf must have user_allow_other.
	AllowOther bool
	// Context, if not empty, is the SELinux context of all files; as root only.
	Context string
	// Unasked says that this process asks nothing of the mount itself, not even
	// to learn that it serves. A request of its own that is under way when it is
	// killed would keep it from ending, and so its successor from beginning: the
	// kernel waits for the answer to what a server has read, whoever has died
	// (request_wait_answer in its fs/fuse/dev.c). It must then open no file of the
	// mount through Go's poller (refusePoll).
	Unasked bool
	// Metrics and Logger may be nil.
	Metrics *metrics.Metrics
	Logger  *slog.Logger
	// OnError is called, if set, for each failed read, with the inode's nid (0
	// in a session of ServeObjects), the object and the error, before the reader
	// gets its errno.
	OnError func(nid uint64, object string, err error)
	// OnFirstRead is called, if set, when the first read was answered.
	OnFirstRead func()
	// OnRequests is called, if set, after every 1,024 requests of the kernel,
	// before the last of them is answered.
	OnRequests func()
}

// FSType is the type that mount tables show for a mount of this package.
const FSType = "fuse.cfs-fuse"

// A Server serves one image or set of objects.
type Server struct {
	fuse    *fusesession.Server
	conn    *fusesession.Session
	session *session
	done    chan struct{}
	once    sync.Once
	id      int // of the mount by which it is seen, as mountinfo has it
}

// Mount attaches the image at the folder mountpoint and serves it from its
// own goroutines until it is unmounted. A nil error promises that the mount is
// visible and answers. As root the kernel's mount API is used, otherwise the
// fusermount3 helper.
//
// Setuid bits and device nodes work as root, as in any mount of a root
// filesystem; without root the kernel's helper forbids both.
func Mount(mountpoint string, image *erofs.Reader, contents Contents, o Options) (*Server, error) {
	fsys := newFileSystem(image, contents, o.filled())
	srv, err := mountImage(mountpoint, fsys)
	if err != nil {
		return nil, hint.Wrap(fmt.Errorf("mount FUSE at %s: %w", mountpoint, err),
			"check that /dev/fuse exists and, without root, that fusermount3 is installed")
	}
	if err := srv.SeenAt(mountpoint); err != nil {
		return nil, errors.Join(err, srv.Close(context.Background(), mountpoint))
	}
	return srv, nil
}

func mountImage(mountpoint string, fsys *fileSystem) (*Server, error) {
	opts := fsys.opts.mountOptions(fsys.image.Header().HasACL)
	if os.Geteuid() != 0 {
		dev, err := fusermount(mountpoint, opts)
		if err != nil {
			return nil, err
		}
		srv, err := newServer(fsys, fsys.session, fusesession.New(dev), opts)
		if err != nil {
			return nil, errors.Join(err, fusermountUndo(context.Background(), mountpoint))
		}
		go srv.serve()
		return srv, nil
	}
	srv, m, err := serveDetached(fsys, fsys.session, opts)
	if err != nil {
		return nil, err
	}
	defer m.Close()
	if err := kmount.Attach(m, mountpoint); err != nil {
		return nil, srv.abandon(m, err)
	}
	return srv, nil
}

// ServeObjects serves objects as files of a FUSE filesystem that is mounted
// nowhere: the caller gets the mount and builds an overlayfs over it. The
// server ends by itself when the last reference to the mount is gone, the
// file returned among them. Needs root.
func ServeObjects(objects Objects, o Options) (*Server, *os.File, error) {
	fsys := newObjectSystem(objects, o.filled())
	srv, m, err := serveDetached(fsys, fsys.session, fsys.opts.mountOptions(false))
	if err != nil {
		return nil, nil, hint.Wrap(fmt.Errorf("serve objects: %w", err), "check that /dev/fuse exists")
	}
	return srv, m, nil
}

func (o Options) filled() Options {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	if o.Source == "" {
		o.Source = "cfs-fuse"
	}
	o.Source = o.Source[:min(len(o.Source), kmount.MaxString)]
	return o
}

func (o Options) mountOptions(acl bool) *fuse.MountOptions {
	words := []string{"ro", "default_permissions"}
	for attr, word := range map[int]string{
		unix.MOUNT_ATTR_NOSUID: "nosuid", unix.MOUNT_ATTR_NODEV: "nodev", unix.MOUNT_ATTR_NOEXEC: "noexec",
	} {
		if o.Attributes&attr != 0 {
			words = append(words, word)
		}
	}
	return &fuse.MountOptions{
		AllowOther:               o.AllowOther || os.Geteuid() == 0,
		Options:                  words, // for the helper
		FsName:                   o.Source,
		Name:                     strings.TrimPrefix(FSType, "fuse."),
		MaxWrite:                 maxRead,
		MaxBackground:            maxBackground,
		EnableSymlinkCaching:     true,
		ExplicitDataCacheControl: true,
		EnableAcl:                acl,
		DisabledCapabilities:     fuse.CAP_PASSTHROUGH,
		Logger:                   log.New(logWriter{o.Logger}, "", 0),
	}
}

// serveDetached builds a mount that is visible nowhere yet, and returns once
// the server has answered its INIT.
func serveDetached(fsys fuse.RawFileSystem, s *session, o *fuse.MountOptions) (*Server, *os.File, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open /dev/fuse: %w", err)
	}
	dev := os.NewFile(uintptr(fd), "/dev/fuse")
	params := []kmount.Param{
		kmount.Flag("ro"),
		kmount.String("source", o.FsName), kmount.String("subtype", o.Name),
		kmount.String("fd", strconv.Itoa(fd)),
		kmount.String("rootmode", strconv.FormatUint(unix.S_IFDIR, 8)),
		kmount.String("user_id", "0"), kmount.String("group_id", "0"),
		kmount.Flag("default_permissions"), kmount.Flag("allow_other"),
		kmount.String("max_read", strconv.Itoa(o.MaxWrite)),
	}
	if s.opts.Context != "" {
		params = append(params, kmount.String("context", s.opts.Context))
	}
	m, err := kmount.New("fuse", unix.MOUNT_ATTR_RDONLY|s.opts.Attributes, params...)
	if err != nil {
		dev.Close()
		return nil, nil, err
	}
	srv, err := newServer(fsys, s, fusesession.New(dev), o)
	if err != nil {
		m.Close()
		return nil, nil, err
	}
	go srv.serve()
	if s.opts.Unasked {
		return srv, m, nil
	}
	if err := refusePoll(m); err != nil {
		return nil, nil, srv.abandon(m, err)
	}
	return srv, m, nil
}

// newServer takes conn over, whether it succeeds or not.
func newServer(fsys fuse.RawFileSystem, s *session, conn *fusesession.Session, o *fuse.MountOptions) (*Server, error) {
	srv := &Server{conn: conn, session: s, done: make(chan struct{})}
	var err error
	if srv.fuse, err = conn.NewServer(fsys, o); err != nil {
		conn.Close()
		return nil, err
	}
	return srv, nil
}

// ResumeImage is Mount for a session that another process has mounted and
// served: of this image, with the same Options. The server does nothing until
// TakeOver. It takes conn over.
func ResumeImage(conn *fusesession.Session, image *erofs.Reader, contents Contents, o Options) (*Server, error) {
	fsys := newFileSystem(image, contents, o.filled())
	return newServer(fsys, fsys.session, conn, fsys.opts.mountOptions(image.Header().HasACL))
}

// ResumeObjects is ServeObjects for a session that another process has served,
// with the same objects under the same numbers. The server does nothing until
// TakeOver. It takes conn over.
func ResumeObjects(conn *fusesession.Session, objects Objects, o Options) (*Server, error) {
	fsys := newObjectSystem(objects, o.filled())
	return newServer(fsys, fsys.session, conn, fsys.opts.mountOptions(false))
}

// TakeOver makes a server of ResumeImage or ResumeObjects serve, once the
// process before it has ended, whose MountID it is given.
func (s *Server) TakeOver(mountID int) error {
	if err := s.conn.Takeover(); err != nil {
		return err
	}
	s.id = mountID
	go s.serve()
	return nil
}

// Session returns what a successor of this process needs to go on serving. It
// must not be closed.
func (s *Server) Session() *fusesession.Session { return s.conn }

// abandon ends a server whose mount nobody has seen, because of err.
func (s *Server) abandon(m *os.File, err error) error {
	m.Close() // the last reference: serve ends by itself
	<-s.done
	return err
}

// refusePoll makes the kernel learn, from go-fuse's answer to a name of its
// own, that this filesystem has no POLL. Otherwise a Go program that opens a
// file of its own mount waits for that answer inside its poller, where it may
// hold the last processor that could give it (go-fuse does the same in
// WaitMount, but not for mounts that it did not make).
func refusePoll(m *os.File) error {
	fd, err := unix.Openat(int(m.Fd()), ".go-fuse-epoll-hack", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("first request: %w", err)
	}
	defer unix.Close(fd)
	unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
	return nil
}

func (s *Server) serve() {
	s.fuse.Serve(s.session.stop)
	s.conn.Close()
	close(s.done)
}

// Done is closed when the kernel has let go of the filesystem: it is
// unmounted everywhere and its last file is closed.
func (s *Server) Done() <-chan struct{} { return s.done }

// SeenAt notes that the topmost mount at mountpoint is the one by which this
// server is seen: its own, or the overlayfs over its objects.
func (s *Server) SeenAt(mountpoint string) error {
	info, err := kmount.At(mountpoint)
	s.id = info.ID
	return err
}

// IsTop reports whether the mount by which this server is seen is the topmost
// one at mountpoint.
func (s *Server) IsTop(mountpoint string) bool {
	info, err := kmount.At(mountpoint)
	return err == nil && info.ID == s.id
}

// MountID returns the number, as mountinfo has it, of the mount by which this
// server is seen.
func (s *Server) MountID() int { return s.id }

// Requests returns how often the kernel has asked and waited for an answer, by
// operation ("lookup", "read", …). Operations that it never asked for are
// absent.
func (s *Server) Requests() map[string]int64 { return s.session.requests() }

// Close detaches the mount from mountpoint, cancels reads that wait, and
// returns when the kernel has let go of the filesystem or ctx ends. What others
// have mounted over it stays, and keeps it.
func (s *Server) Close(ctx context.Context, mountpoint string) error {
	var err error
	s.once.Do(func() {
		select {
		case <-s.done:
			return
		default:
		}
		if s.id != 0 && !s.IsTop(mountpoint) {
			return
		}
		err = kmount.Detach(mountpoint)
		if err != nil && os.Geteuid() != 0 {
			err = fusermountUndo(ctx, mountpoint)
		}
	})
	if err != nil {
		return err
	}
	s.session.stop()
	select {
	case <-s.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("unmount %s: files are still open: %w", mountpoint, ctx.Err())
	}
}

// logWriter passes go-fuse's complaints to the program's log, all but those
// about a reader that has gone: its answer then has no taker.
type logWriter struct{ l *slog.Logger }

func (w logWriter) Write(p []byte) (int, error) {
	msg := strings.TrimSpace(string(p))
	if !strings.Contains(msg, "Write/Writev failed, err: 2=no such file or directory") {
		w.l.Warn("fuse", "message", msg)
	}
	return len(p), nil
}

var errStopped = errors.New("the filesystem is being unmounted")
