package fusefs

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// fusermount has the setuid helper mount a new session at mountpoint and
// returns its /dev/fuse: the helper sends the descriptor over the socket that
// _FUSE_COMMFD names (fusermount3(1) and libfuse's lib/mount.c). go-fuse would
// do this itself and not give the descriptor away.
func fusermount(mountpoint string, o *fuse.MountOptions) (*os.File, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	theirs, ours := os.NewFile(uintptr(pair[0]), "fusermount3"), os.NewFile(uintptr(pair[1]), "fusermount3")
	defer theirs.Close()
	escape := strings.NewReplacer(`\`, `\\`, `,`, `\,`)
	options := append([]string{}, o.Options...)
	options = append(options, "fsname="+escape.Replace(o.FsName), "subtype="+escape.Replace(o.Name), fmt.Sprintf("max_read=%d", o.MaxWrite))
	if o.AllowOther {
		options = append(options, "allow_other")
	}
	cmd := exec.Command("fusermount3", "-o", strings.Join(options, ","), "--", mountpoint)
	cmd.Env = append(os.Environ(), "_FUSE_COMMFD=3")
	cmd.ExtraFiles = []*os.File{theirs}
	out, err := cmd.CombinedOutput()
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("fusermount3: %w: %s", err, strings.TrimSpace(string(out)))
	}
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.(*net.UnixConn).ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, fmt.Errorf("fusermount3 sent no descriptor: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return nil, fmt.Errorf("fusermount3 sent no descriptor: %d messages, %w", len(messages), err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return nil, fmt.Errorf("fusermount3 sent %d descriptors: %w", len(fds), err)
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "/dev/fuse"), nil
}

// fusermountUndo unmounts what fusermount has mounted.
func fusermountUndo(ctx context.Context, mountpoint string) error {
	out, err := exec.CommandContext(ctx, "fusermount3", "-u", "--", mountpoint).CombinedOutput()
	if err != nil {
		return errors.New("fusermount3 -u: " + err.Error() + ": " + strings.TrimSpace(string(out)))
	}
	return nil
}
