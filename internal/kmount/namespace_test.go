package kmount

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// A clone goes where another namespace has something, with what is mounted on
// it; no thread of ours stays there.
func TestInNamespace(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	dir := tmpfs(t)
	if err := os.Mkdir(filepath.Join(dir, "sub"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	if err := unix.Mount(dir, filepath.Join(dir, "sub"), "", unix.MS_BIND, ""); err != nil { // here only
		t.Fatal(err)
	}
	defer Detach(filepath.Join(dir, "sub"))
	root, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	all, err := Clone(root, "", true)
	if err != nil {
		t.Fatal(err)
	}
	defer all.Close()
	one, err := Clone(root, "/sub", false)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	if err := SetShared(one, true); err != nil {
		t.Error(err)
	}
	at := func(mounts []Info, path string) (n int, last Info) {
		for _, m := range mounts {
			if m.Mountpoint == path {
				n, last = n+1, m
			}
		}
		return n, last
	}
	err = InNamespace(ns, func(mounts []Info) error {
		if n, _ := at(mounts, filepath.Join(dir, "sub")); n != 0 {
			t.Errorf("%d mounts in sub at first", n)
		}
		if err := AttachBeneath(all, dir); err != nil {
			return err
		}
		return AttachAt(one, all, "/sub")
	})
	if err != nil {
		t.Fatal(err)
	}
	err = InNamespace(ns, func(mounts []Info) error {
		if err := Detach(dir); err != nil {
			t.Error(err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	there, err := MountsOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if n, info := at(there, filepath.Join(dir, "sub")); n != 2 || !info.Shared {
		t.Errorf("%d mounts in sub, %+v; want that of the clone and one over it that is shared", n, info)
	}
	now, err := Mounts()
	if err != nil {
		t.Fatal(err)
	}
	if n, info := at(now, dir); n != 1 || info.Root != "/" || info.Restrictions()&unix.MOUNT_ATTR_RDONLY != 0 {
		t.Errorf("here: %d mounts, %+v", n, info)
	}
	if after, err := os.Readlink("/proc/self/ns/mnt"); err != nil || after != before {
		t.Errorf("mount namespace %s, %v; was %s", after, err, before)
	}
	self, err := os.Open("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	if err := InNamespace(self, func([]Info) error { return nil }); err == nil {
		t.Error("a file that is no namespace was joined")
	}
	if got := (Info{Attributes: "ro,nosuid,noexec,relatime"}).Restrictions(); got != unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC {
		t.Errorf("Restrictions = %#x", got)
	}
}
