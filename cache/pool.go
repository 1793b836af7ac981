package cache

import (
	"os"
	"sync"
	"sync/atomic"
)

// A pool keeps values open that are costly to open, such as descriptors: one
// for each key, opened once however many callers ask at the same time, and
// closed when nobody uses it and more than limit are open, longest unused
// first. Opening happens outside of the pool's lock.
type pool[K comparable, V any] struct {
	limit   int
	dispose func(V)

	mu     sync.Mutex
	open   map[K]*handle[K, V]
	idle   handle[K, V] // ring of unused handles; idle.next is the latest
	closed bool
}

// A handle is one use of a value. Its val may be used until release.
type handle[K comparable, V any] struct {
	key  K
	val  V
	err  error
	once sync.Once
	set  atomic.Bool // val is

	// guarded by the pool's mu
	users      int
	dropped    bool // no longer in the pool: closed with its last user
	next, prev *handle[K, V]
}

func newPool[K comparable, V any](limit int, dispose func(V)) *pool[K, V] {
	p := &pool[K, V]{limit: limit, dispose: dispose, open: make(map[K]*handle[K, V])}
	p.idle.next, p.idle.prev = &p.idle, &p.idle
	return p
}

// lookup is acquire for a value that is open already; else it returns nil. It
// needs no memory.
func (p *pool[K, V]) lookup(key K) *handle[K, V] {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.open[key]
	if h == nil || !h.set.Load() {
		return nil
	}
	if h.users == 0 {
		h.unlink()
	}
	h.users++
	return h
}

// acquire returns the value of key, opening it with open if need be. After a
// nil error the caller must call release.
func (p *pool[K, V]) acquire(key K, open func(K) (V, error)) (*handle[K, V], error) {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil, os.ErrClosed
	}
	h := p.open[key]
	switch {
	case h == nil:
		h = &handle[K, V]{key: key, users: 1}
		p.open[key] = h
		p.evict()
	case h.users == 0:
		h.unlink()
		h.users = 1
	default:
		h.users++
	}
	p.mu.Unlock()
	h.once.Do(func() {
		h.val, h.err = open(key)
		h.set.Store(h.err == nil)
	})
	if h.err != nil {
		p.drop(h)
		p.release(h)
		return nil, h.err
	}
	return h, nil
}

// hold adds a use of h, which the caller must be using.
func (p *pool[K, V]) hold(h *handle[K, V]) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h.users++
}

// release ends a use of h.
func (p *pool[K, V]) release(h *handle[K, V]) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h.users--
	switch {
	case h.users > 0:
	case h.dropped:
		if h.err == nil {
			p.dispose(h.val)
		}
	default:
		h.next, h.prev = p.idle.next, &p.idle
		h.next.prev, h.prev.next = h, h
		p.evict()
	}
}

// drop makes the next acquire of h's key open it anew. Those who use h may go
// on; the caller must be one of them.
func (p *pool[K, V]) drop(h *handle[K, V]) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forget(h)
}

// discard makes the next acquire of key open it anew, and closes the value if
// nobody uses it.
func (p *pool[K, V]) discard(key K) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch h := p.open[key]; {
	case h == nil:
	case h.users == 0:
		p.closeIdle(h)
	default:
		p.forget(h)
	}
}

func (p *pool[K, V]) forget(h *handle[K, V]) {
	if !h.dropped {
		h.dropped = true
		delete(p.open, h.key)
	}
}

// evict closes idle values until no more than limit are open. It runs under
// the lock, so that a value is closed before its key can be opened anew.
func (p *pool[K, V]) evict() {
	for len(p.open) > p.limit && p.idle.prev != &p.idle {
		p.closeIdle(p.idle.prev)
	}
}

func (p *pool[K, V]) closeIdle(h *handle[K, V]) {
	h.unlink()
	p.forget(h)
	p.dispose(h.val)
}

// closeAll closes the pool and every idle value; values in use are closed
// when they are released.
func (p *pool[K, V]) closeAll() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, h := range p.open {
		if h.users == 0 {
			p.closeIdle(h)
		} else {
			p.forget(h)
		}
	}
}

func (h *handle[K, V]) unlink() {
	h.prev.next, h.next.prev = h.next, h.prev
}
