package keeper

import (
	"os"

	"golang.org/x/sys/unix"
)

// urgent is the nice value of a holder, and of a successor until it serves:
// programs wait for it, and others may keep every processor busy meanwhile.
const urgent = -10

// hurry gives this process, and what it starts in its session, that nice
// value where it may have it. It works on the process group, since to Linux
// nice belongs to a thread; and on the session's task group, within which
// alone nice counts where sched_autogroup_enabled is on (sched(7)).
func hurry() {
	unix.Setpriority(unix.PRIO_PGRP, 0, urgent)
	os.WriteFile("/proc/self/autogroup", []byte("-10"), 0)
}

// relax takes a successor out of the holder's session, and undoes hurry.
func relax() {
	if _, err := unix.Setsid(); err == nil {
		unix.Setpriority(unix.PRIO_PGRP, 0, 0)
		unix.Setpriority(unix.PRIO_PGRP, 0, 0) // threads that began meanwhile
	}
}
