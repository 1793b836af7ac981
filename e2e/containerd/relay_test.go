package containerd

import (
	"io"
	"net"
	"sync"
	"testing"
)

// A relay stands before a registry, at an address that stays when the registry
// is gone and when it is back.
type relay struct {
	t       *testing.T
	addr    string
	backend string

	mu    sync.Mutex
	l     net.Listener
	conns map[net.Conn]bool
	run   sync.WaitGroup
}

func newRelay(t *testing.T, backend string) *relay {
	r := &relay{t: t, addr: "127.0.0.1:0", backend: backend, conns: map[net.Conn]bool{}}
	r.open()
	t.Cleanup(r.close)
	return r
}

// open lets connections through.
func (r *relay) open() {
	r.t.Helper()
	l, err := net.Listen("tcp", r.addr)
	if err != nil {
		r.t.Fatal(err)
	}
	r.mu.Lock()
	r.l, r.addr = l, l.Addr().String()
	r.mu.Unlock()
	r.run.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			r.run.Go(func() { r.relay(c) })
		}
	})
}

func (r *relay) relay(c net.Conn) {
	defer c.Close()
	b, err := net.Dial("tcp", r.backend)
	if err != nil {
		return
	}
	defer b.Close()
	r.mu.Lock()
	gone := r.l == nil
	r.conns[c], r.conns[b] = true, true
	r.mu.Unlock()
	defer func() {
		r.mu.Lock()
		delete(r.conns, c)
		delete(r.conns, b)
		r.mu.Unlock()
	}()
	if gone {
		return
	}
	r.run.Go(func() { io.Copy(b, c); b.Close() })
	io.Copy(c, b)
}

// close ends all connections, and refuses new ones.
func (r *relay) close() {
	r.mu.Lock()
	if r.l != nil {
		r.l.Close()
		r.l = nil
	}
	for c := range r.conns {
		c.Close()
	}
	r.mu.Unlock()
	r.run.Wait()
}
