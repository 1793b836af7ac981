package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// kept are the capabilities that a serving process of root needs.
var kept = map[int]bool{
	unix.CAP_SYS_ADMIN:        true, // mounts, trusted xattrs
	unix.CAP_DAC_OVERRIDE:     true, // a store, a layout or credentials of another user
	unix.CAP_DAC_READ_SEARCH:  true, // linkat(2) of unnamed files
	unix.CAP_FOWNER:           true, // modes of the store's files
	unix.CAP_CHOWN:            true,
	unix.CAP_LEASE:            true, // fcntl(2), F_SETLEASE: whether an image of another user's store is open
	unix.CAP_SYS_PTRACE:       true, // readers' signals where /proc has hidepid= (proc(5))
	unix.CAP_NET_BIND_SERVICE: true, // --metrics
	unix.CAP_SYS_NICE:         true, // a successor starts before others
	unix.CAP_SYS_CHROOT:       true, // setns(2), to swap in other mount namespaces
}

// forMapping are those that it needs to map IDs (user_namespaces(7)), forWriting
// those that it needs besides so that programs can do on a writable mount what
// they may: overlayfs does it in the name of who has mounted.
var (
	forMapping = []int{unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_SETFCAP}
	forWriting = []int{
		unix.CAP_SETFCAP,         // files with capabilities
		unix.CAP_FSETID,          // setgid bits
		unix.CAP_MKNOD,           // devices
		unix.CAP_LINUX_IMMUTABLE, // chattr(1)
	}
)

// startRestricted starts a command that can never have other capabilities
// than those and the given ones, nor can any program that it starts gain privileges
// (PR_SET_NO_NEW_PRIVS). Both are a thread's own, and the new process takes
// them from the one that makes it: no thread of ours keeps them. Without root
// it only starts the command, as it may need the setuid fusermount3.
func startRestricted(cmd *exec.Cmd, more []int) error {
	if os.Geteuid() != 0 {
		return cmd.Start()
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this function
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			started <- fmt.Errorf("set no_new_privs: %w", err)
			return
		}
		for c := range unix.CAP_LAST_CAP + 1 {
			// EINVAL: this kernel has no such capability. EPERM: we may not
			// drop any, in a container that has few as it is.
			if !kept[c] && !slices.Contains(more, c) && unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0) == unix.EPERM {
				break
			}
		}
		started <- cmd.Start()
	}()
	return <-started
}
