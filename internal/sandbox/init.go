package sandbox

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// graceTime is how long a program has to end after SIGTERM.
const graceTime = 10 * time.Second

// reportFD is where Init says why the program does not run; it is closed when
// it does.
const reportFD = 3

// Init does what Run has started this process for, and does not return then. A
// main function calls it first.
func Init() {
	text, ok := os.LookupEnv(initEnv)
	if !ok || os.Getpid() != 1 {
		return
	}
	unix.CloseOnExec(reportFD)
	report := os.NewFile(reportFD, "report")
	var c Command
	err := json.Unmarshal([]byte(text), &c)
	if err == nil {
		err = enter(c)
	}
	if err != nil {
		io.WriteString(report, err.Error())
		os.Exit(1)
	}
	os.Exit(start(c, report))
}

// devices of the machine that a program may want.
var devices = []string{"null", "zero", "full", "random", "urandom", "tty"}

// enter makes the tree and goes into it.
func enter(c Command) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// What comes from outside is taken hold of before it is out of sight.
	clones := map[string]int{}
	for _, name := range devices {
		if fd, err := unix.OpenTree(unix.AT_FDCWD, "/dev/"+name, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC); err == nil {
			clones["/dev/"+name] = fd
		}
	}
	if fd, err := unix.OpenTree(unix.AT_FDCWD, "/sys", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC); err == nil {
		clones["/sys"] = fd
	}
	files := map[string][]byte{}
	for _, name := range []string{"/etc/resolv.conf", "/etc/hosts"} {
		if b, err := os.ReadFile(name); err == nil {
			files[name] = b
		}
	}

	if err := unix.Mount("tmpfs", c.Temp, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	upper, work, root := filepath.Join(c.Temp, "upper"), filepath.Join(c.Temp, "work"), filepath.Join(c.Temp, "root")
	for _, dir := range []string{upper, work, root} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	options := "lowerdir=" + escape(c.Root) + ",upperdir=" + escape(upper) + ",workdir=" + escape(work)
	if err := unix.Mount("overlay", root, "overlay", 0, options); err != nil {
		return fmt.Errorf("mount an overlayfs over the image: %w", err)
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	// The old root then lies over the new one, and is taken off
	// (pivot_root(2), "pivot_root(".", ".")").
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	// From here on every path is one of the image's.
	for _, m := range []struct {
		path, fstype, data string
		flags              uintptr
	}{
		{"/proc", "proc", "", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC},
		{"/dev", "tmpfs", "mode=755", unix.MS_NOSUID},
		{"/tmp", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"/run", "tmpfs", "mode=755", unix.MS_NOSUID | unix.MS_NODEV},
		{"/dev/shm", "tmpfs", "mode=1777", unix.MS_NOSUID | unix.MS_NODEV},
		{"/dev/pts", "devpts", "newinstance,ptmxmode=0666,mode=0620", unix.MS_NOSUID | unix.MS_NOEXEC},
	} {
		err := os.MkdirAll(m.path, 0o755)
		if err == nil {
			err = unix.Mount(m.fstype, m.path, m.fstype, m.flags, m.data)
		}
		if err != nil {
			return fmt.Errorf("mount %s: %w", m.path, err)
		}
	}
	for path, fd := range clones {
		if err := place(path, fd); err != nil {
			return fmt.Errorf("mount %s: %w", path, err)
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil {
			return err
		}
	}
	for path, b := range files {
		os.MkdirAll(filepath.Dir(path), 0o755)
		os.Remove(path) // it may be a link
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// place mounts what fd has cloned at path.
func place(path string, fd int) error {
	defer unix.Close(fd)
	if path == "/sys" {
		if err := os.MkdirAll(path, 0o755); err != nil {
			return err
		}
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return err
		}
	} else if err := os.WriteFile(path, nil, 0o666); err != nil {
		return err
	}
	return unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// escape writes a path for an option of overlayfs.
func escape(path string) string {
	return strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(path)
}

// start starts the program, and waits for it and for what else ends here.
func start(c Command, report *os.File) int {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGWINCH)
	pid, err := fork(c)
	if err != nil {
		report.Close()
		fmt.Fprintf(os.Stderr, "cfs-fuse: run %s: %v\n", c.Args[0], err)
		if errors.Is(err, os.ErrNotExist) {
			return StatusNotFound
		}
		return StatusCannotRun
	}
	report.Close()
	go func() {
		for s := range signals {
			n := s.(syscall.Signal)
			unix.Kill(pid, n)
			if n == unix.SIGTERM {
				time.AfterFunc(graceTime, func() { unix.Kill(pid, unix.SIGKILL) })
			}
		}
	}()
	for {
		var ws unix.WaitStatus
		ended, err := unix.Wait4(-1, &ws, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return 1
		case ended == pid && ws.Signaled():
			return killed + int(ws.Signal())
		case ended == pid && ws.Exited():
			return ws.ExitStatus()
		}
	}
}

func fork(c Command) (pid int, err error) {
	dir := c.Dir
	if dir == "" {
		dir = "/"
	}
	if err := os.MkdirAll(dir, 0o755); err != nil { // as container runtimes do
		return 0, err
	}
	u, err := lookUpUser(c.User, "/etc/passwd", "/etc/group")
	if err != nil {
		return 0, err
	}
	env := c.Env
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	if p, ok := value(env, "PATH"); ok {
		path = p
	} else {
		env = append(env, "PATH="+path)
	}
	if _, ok := value(env, "HOME"); !ok {
		env = append(env, "HOME="+u.home)
	}
	file, err := find(c.Args[0], path, dir)
	if err != nil {
		return 0, err
	}
	return syscall.ForkExec(file, c.Args, &syscall.ProcAttr{
		Dir: dir, Env: env, Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.uid, Gid: u.gid, Groups: u.groups}},
	})
}

func value(env []string, name string) (string, bool) {
	for i := len(env) - 1; i >= 0; i-- {
		if v, ok := strings.CutPrefix(env[i], name+"="); ok {
			return v, true
		}
	}
	return "", false
}

// find looks a program up as execvp(3) does.
func find(name, path, dir string) (string, error) {
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(dir, name)
		}
		return name, executable(name)
	}
	var refused error
	for _, d := range filepath.SplitList(path) {
		file := filepath.Join(dir, d, name)
		if filepath.IsAbs(d) {
			file = filepath.Join(d, name)
		}
		err := executable(file)
		if err == nil {
			return file, nil
		}
		if errors.Is(err, os.ErrPermission) {
			refused = err
		}
	}
	if refused != nil {
		return "", refused
	}
	return "", fmt.Errorf("not in the image's PATH (%s): %w", path, os.ErrNotExist)
}

func executable(file string) error {
	fi, err := os.Stat(file)
	if err == nil && (fi.IsDir() || fi.Mode()&0o111 == 0) {
		err = &os.PathError{Op: "execute", Path: file, Err: os.ErrPermission}
	}
	return err
}

// An account is who the program runs as.
type account struct {
	uid, gid uint32
	groups   []uint32
	home     string
}

// lookUpUser reads user[:group] by the image's passwd(5) and group(5)
// (OCI image-spec, config.md, "User").
func lookUpUser(s, passwd, groups string) (account, error) {
	a := account{home: "/root"}
	if s == "" {
		return a, nil
	}
	user, group, hasGroup := strings.Cut(s, ":")
	id, idErr := strconv.ParseUint(user, 10, 31)
	a.uid, a.home = uint32(id), "/"
	found := false
	err := lines(passwd, 7, func(f []string) bool {
		if f[0] != user && (idErr != nil || f[2] != user) {
			return true
		}
		uid, err1 := strconv.ParseUint(f[2], 10, 32)
		gid, err2 := strconv.ParseUint(f[3], 10, 32)
		if err1 != nil || err2 != nil {
			return true
		}
		user = f[0]
		a.uid, a.gid, a.home, found = uint32(uid), uint32(gid), f[5], true
		return false
	})
	if err != nil {
		return a, err
	}
	if !found && idErr != nil {
		return a, fmt.Errorf("user %q: not in the image's /etc/passwd", user)
	}
	gid, gidErr := strconv.ParseUint(group, 10, 31)
	groupFound := false
	err = lines(groups, 4, func(f []string) bool {
		n, err := strconv.ParseUint(f[2], 10, 32)
		if err != nil {
			return true
		}
		if hasGroup && !groupFound && (f[0] == group || gidErr == nil && n == gid) {
			a.gid, groupFound = uint32(n), true
		}
		for member := range strings.SplitSeq(f[3], ",") {
			if found && !hasGroup && member == user {
				a.groups = append(a.groups, uint32(n))
			}
		}
		return len(a.groups) < 1024
	})
	switch {
	case err != nil:
		return a, err
	case hasGroup && !groupFound && gidErr == nil:
		a.gid = uint32(gid)
	case hasGroup && !groupFound:
		return a, fmt.Errorf("group %q: not in the image's /etc/group", group)
	}
	return a, nil
}

// lines calls f with the fields of each line that has as many as n, until it
// returns false. A file that is not there has no lines.
func lines(path string, n int, f func([]string) bool) error {
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	s := bufio.NewScanner(io.LimitReader(file, 16<<20))
	for s.Scan() {
		if fields := strings.Split(s.Text(), ":"); len(fields) == n && !f(fields) {
			break
		}
	}
	return s.Err()
}
