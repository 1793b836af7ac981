package registrytest

import (
	"encoding/pem"
	"net"
	"sync"
	"time"
)

// A Link is what lies between the registry and its clients. The zero value is
// the loopback device itself.
type Link struct {
	// Latency is the round trip. Each request waits for it once, and so does
	// each new connection.
	Latency time.Duration

	// BytesPerSecond is what all answers together may take; 0: no limit.
	// Connections share it fairly, a packet each in turn.
	BytesPerSecond int64
}

const (
	packetTime = time.Millisecond // what a packet takes, within these bounds in bytes:
	minPacket  = 1460
	maxPacket  = 32 << 10
	// idle is how long nobody must have sent anything for the link to have
	// been idle, and credit how far a busy link may catch up: timers and
	// schedulers are late, which is no fault of the link.
	idle   = 4 * time.Millisecond
	credit = 50 * time.Millisecond
	// sendBuffer bounds what lies in the socket when a client does not read,
	// in bytes (the kernel doubles it): the buffer of a router, so to say.
	sendBuffer = 64 << 10
)

// A bottleneck gives each packet a time to be sent.
type bottleneck struct {
	mu      sync.Mutex
	link    Link
	next    time.Time // when what was promised so far has been sent
	senders int       // connections that are sending
	left    time.Time // when the last of them stopped
}

func newBottleneck(l Link) *bottleneck { return &bottleneck{link: l} }

func (b *bottleneck) set(l Link) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.link = l
}

func (b *bottleneck) latency() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.link.Latency
}

// sending counts a connection that begins (1) or ends (-1) to send.
func (b *bottleneck) sending(by int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := time.Now()
	if b.senders == 0 && now.Sub(b.left) > idle && b.next.Before(now) {
		b.next = now
	}
	b.senders += by
	b.left = now
}

// reserve takes up to n bytes of the link, and says when they have been sent.
func (b *bottleneck) reserve(n int) (int, time.Time) {
	b.mu.Lock()
	defer b.mu.Unlock()
	rate := b.link.BytesPerSecond
	if rate <= 0 {
		return n, time.Time{}
	}
	packet := min(maxPacket, max(minPacket, int(float64(rate)*packetTime.Seconds())))
	n = min(n, packet)
	if floor := time.Now().Add(-credit); b.next.Before(floor) {
		b.next = floor
	}
	b.next = b.next.Add(time.Duration(float64(n) / float64(rate) * float64(time.Second)))
	return n, b.next
}

// A listener's connections go through the registry's link.
type listener struct {
	net.Listener
	r *Registry
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	l.r.conns.Add(1)
	if t, ok := c.(*net.TCPConn); ok {
		t.SetWriteBuffer(sendBuffer)
	}
	return &conn{Conn: c, r: l.r, turn: true, fresh: true}, nil
}

// A conn delays what it reads once after each answer, and paces what it writes.
type conn struct {
	net.Conn
	r *Registry

	mu    sync.Mutex
	turn  bool // the next bytes to be read begin a request
	fresh bool // and the first one
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.mu.Lock()
	turn, fresh := c.turn && n > 0, c.fresh
	if n > 0 {
		c.turn, c.fresh = false, false
	}
	c.mu.Unlock()
	if turn {
		d := c.r.link.latency()
		if fresh {
			d *= 2
		}
		time.Sleep(d)
	}
	return n, err
}

func (c *conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	c.turn = true
	c.mu.Unlock()
	c.r.link.sending(1)
	defer c.r.link.sending(-1)
	done := 0
	for done < len(p) {
		n, at := c.r.link.reserve(len(p) - done)
		if !at.IsZero() {
			time.Sleep(time.Until(at))
		}
		m, err := c.Conn.Write(p[done : done+n])
		done += m
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

func pemOf(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}
