package cache

import (
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"sync/atomic"
	"testing"
)

// A thing knows whether it is open.
type thing struct {
	key    int
	closed atomic.Bool
}

func TestPool(t *testing.T) {
	var opened, open atomic.Int64
	p := newPool[int](10, func(v *thing) {
		if v.closed.Swap(true) {
			t.Error("closed twice")
		}
		open.Add(-1)
	})
	broken := errors.New("broken")
	opener := func(k int) (*thing, error) {
		if k == 13 {
			return nil, broken
		}
		opened.Add(1)
		open.Add(1)
		return &thing{key: k}, nil
	}
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(g), 0))
			for range 3000 {
				k := r.IntN(30)
				h := p.lookup(k)
				if h == nil {
					var err error
					if h, err = p.acquire(k, opener); err != nil {
						if k != 13 || err != broken {
							t.Errorf("acquire(%d): %v", k, err)
						}
						continue
					}
				}
				if r.IntN(10) == 0 {
					p.drop(h)
				}
				if r.IntN(10) == 0 {
					p.hold(h)
					p.release(h)
				}
				if h.val.key != k || h.val.closed.Load() {
					t.Errorf("acquire(%d) gave %d, closed %v", k, h.val.key, h.val.closed.Load())
				}
				p.release(h)
			}
		})
	}
	wg.Wait()
	if n := open.Load(); n > 10 || int(n) != len(p.open) {
		t.Errorf("%d open, %d known", n, len(p.open))
	}
	h, err := p.acquire(1, opener)
	if err != nil {
		t.Fatal(err)
	}
	before := opened.Load()
	for k := 100; k < 200; k++ {
		o, err := p.acquire(k, opener)
		if err != nil {
			t.Fatal(err)
		}
		p.release(o)
	}
	if h.val.closed.Load() {
		t.Error("closed in use")
	}
	if n := opened.Load() - before; n != 100 {
		t.Errorf("%d opened, want 100", n)
	}
	p.closeAll()
	if h.val.closed.Load() || open.Load() != 1 {
		t.Errorf("%d open after closeAll", open.Load())
	}
	p.release(h)
	if open.Load() != 0 {
		t.Errorf("%d open at the end", open.Load())
	}
	if _, err := p.acquire(1, opener); !errors.Is(err, os.ErrClosed) {
		t.Errorf("acquire from a closed pool: %v", err)
	}
}

// TestPoolOpensOnce lets many callers ask for one value at the same time.
func TestPoolOpensOnce(t *testing.T) {
	var opened atomic.Int64
	p := newPool[string](1, func(*thing) {})
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			h, err := p.acquire("x", func(string) (*thing, error) {
				opened.Add(1)
				return new(thing), nil
			})
			if err != nil {
				t.Error(err)
				return
			}
			defer p.release(h)
		})
	}
	wg.Wait()
	if opened.Load() != 1 {
		t.Errorf("opened %d times", opened.Load())
	}
}
