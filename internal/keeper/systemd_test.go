package keeper

import (
	"net"
	"os"
	"path/filepath"
	"testing"
)

// What systemd was not told of, since it could not be, is sent the next time.
func TestUpdateIsTriedAgain(t *testing.T) {
	file, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s := &Store{socket: filepath.Join(t.TempDir(), "notify"), most: 8}
	k := Kept{State: []byte("{}"), Files: map[string]*os.File{"fuse-1": file}}
	if err := s.Update(k); err == nil {
		t.Fatal("nobody listens, and no error")
	}
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := s.Update(k); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1024)
	n, err := c.Read(b)
	if got, want := string(b[:n]), "FDSTORE=1\nFDNAME=cfs-fuse-fuse-1"; got != want || err != nil {
		t.Errorf("systemd is told %q, %v; want %q", got, err, want)
	}
}
