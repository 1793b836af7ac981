package keeper

import (
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// More descriptors than one packet takes arrive, each under its name.
func TestManyDescriptors(t *testing.T) {
	mine, other, err := newLink()
	if err != nil {
		t.Fatal(err)
	}
	defer mine.c.Close()
	theirs, err := linkOf(other)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.c.Close()
	const many = 3*maxPacket + 1
	files := Kept{Files: map[string]*os.File{}}
	defer files.Close()
	for i := range many {
		fd, err := unix.MemfdCreate("many", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "many")
		fmt.Fprint(f, i)
		files.Files[fmt.Sprint("file-", i)] = f
	}
	sent := make(chan error, 1)
	go func() { sent <- mine.send(message{Do: doKeep, State: []byte(`"state"`)}, files.Files) }()
	m, got, err := theirs.receive()
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if err != nil || m.Do != doKeep || string(m.State) != `"state"` || len(got) != many {
		t.Fatalf("got %+v with %d descriptors, %v", m, len(got), err)
	}
	k := Kept{Files: got}
	defer k.Close()
	for i := range many {
		buf := make([]byte, 10)
		n, _ := got[fmt.Sprint("file-", i)].ReadAt(buf, 0)
		if string(buf[:n]) != fmt.Sprint(i) {
			t.Fatalf("file-%d has %q", i, buf[:n])
		}
	}
	files.Files["file-0"].Close()
	if err := mine.send(message{Do: doKeep}, files.Files); err == nil {
		t.Error("a descriptor that is closed was sent")
	}
}

// At no moment has systemd's store a state without the descriptors that it is
// about.
func TestStoreUpdate(t *testing.T) {
	addr := filepath.Join(t.TempDir(), "notify")
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: addr, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	t.Setenv("NOTIFY_SOCKET", addr)
	t.Setenv("FDSTORE", "5")
	s, _, err := FromSystemd()
	if err != nil {
		t.Fatal(err)
	}
	stored := map[string]bool{}
	told := func(n int) (all []string) {
		t.Helper()
		for range n {
			data, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			k, oobn, _, _, err := c.ReadMsgUnix(data, oob)
			if err != nil {
				t.Fatal(err)
			}
			if messages, _ := unix.ParseSocketControlMessage(oob[:oobn]); len(messages) == 1 {
				fds, _ := unix.ParseUnixRights(&messages[0])
				for _, fd := range fds {
					unix.Close(fd)
				}
			}
			do, name, _ := strings.Cut(strings.TrimSpace(string(data[:k])), "=1\nFDNAME=cfs-fuse-")
			if do == "FDSTORE" {
				stored[name] = true
				all = append(all, "+"+name)
			} else {
				delete(stored, name)
				all = append(all, "-"+name)
			}
		}
		return all
	}
	files := map[string]*os.File{"a-1": os.Stdin}
	steps := []struct {
		change func()
		want   string
	}{
		{func() {}, "+a-1 +state-1"},
		{func() { files["b-2"] = os.Stdin }, "+b-2 +state-2 -state-1"},
		{func() { delete(files, "a-1") }, "+state-3 -state-2 -a-1"},
		{func() { files["c-3"] = os.Stdin; delete(files, "b-2") }, "+c-3 +state-4 -state-3 -b-2"},
	}
	for _, step := range steps {
		step.change()
		if err := s.Update(Kept{Files: files}); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(told(strings.Count(step.want, " ")+1), " "); got != step.want {
			t.Errorf("told %s, want %s", got, step.want)
		}
	}
	for _, name := range []string{"d-4", "e-5", "f-6"} {
		files[name] = os.Stdin
	}
	if err := s.Update(Kept{Files: files}); err == nil || !strings.Contains(err.Error(), "FileDescriptorStoreMax=6") {
		t.Errorf("more than the unit allows: %v", err)
	}
	if err := s.Over(); err != nil {
		t.Fatal(err)
	}
	told(2)
	if len(stored) != 0 {
		t.Errorf("stored at the end: %v", slices.Collect(maps.Keys(stored)))
	}
}

func TestStateNumber(t *testing.T) {
	for name, want := range map[string]int{"cfs-fuse-state": 0, "cfs-fuse-state-12": 12, "cfs-fuse-states": -1, "cfs-fuse-state-0": -1, "cfs-fuse-fuse-1": -1, "state": -1} {
		n, ok := stateNumber(name)
		if !ok {
			n = -1
		}
		if n != want {
			t.Errorf("%s: %d, want %d", name, n, want)
		}
	}
}
