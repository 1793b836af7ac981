package fetcher

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"
)

// The breaker of a host opens after failures in a row, and then lets one
// request through after each pause.
const (
	breakAfter   = 5
	minPause     = 500 * time.Millisecond
	maxPause     = 8 * time.Second
	maxRetryWait = time.Minute // of a Retry-After that we heed
	minBackoff   = 100 * time.Millisecond
	maxBackoff   = 3 * time.Second
	pollPause    = 50 * time.Millisecond // while another request tries the host
)

// A breaker keeps requests from a host that fails. The zero value is closed.
type breaker struct {
	lock     sync.Mutex
	failures int       // in a row, those of requests already out when it opened not counted
	until    time.Time // the host is to be left alone
	probing  bool      // a request is out to see whether it answers again
	last     error     // of the last failure
	good     time.Time // when it last gave what was asked for
}

// allow reports whether the host may be asked now, else how long not.
func (b *breaker) allow(now time.Time) (wait time.Duration) {
	b.lock.Lock()
	defer b.lock.Unlock()
	if d := b.until.Sub(now); d > 0 {
		return d
	}
	if b.failures >= breakAfter {
		if b.probing {
			return pollPause
		}
		b.probing = true
	}
	return 0
}

// failedSince reports whether the host has done nothing but fail since t.
func (b *breaker) failedSince(t time.Time) bool {
	b.lock.Lock()
	defer b.lock.Unlock()
	return b.failures > 0 && b.good.Before(t)
}

// failed tells the breaker how a request that it allowed has ended. cost is
// how many failures err counts for at first, 0: the host has answered, and
// refused. The host is left alone for maxPause at most, or for retryAfter.
func (b *breaker) failed(now time.Time, err error, cost int, retryAfter, maxPause time.Duration) {
	b.lock.Lock()
	defer b.lock.Unlock()
	b.probing = false
	switch {
	case cost == 0:
		b.failures = 0
	case !b.until.After(now):
		if b.failures = max(cost, b.failures+1); b.failures >= breakAfter {
			b.until = now.Add(jitter(min(maxPause, minPause<<min(b.failures-breakAfter, 10))))
		}
	}
	if cost > 0 {
		b.last = err
	}
	if t := now.Add(retryAfter); t.After(b.until) {
		b.until = t
	}
}

// answered says that an allowed request has an answer, of which no byte has
// come yet: others may try, but one more failure is enough.
func (b *breaker) answered() {
	b.lock.Lock()
	defer b.lock.Unlock()
	b.probing = false
	b.failures = min(b.failures, breakAfter-1)
}

// worked says that the host gives what it is asked for.
func (b *breaker) worked(now time.Time) {
	b.lock.Lock()
	defer b.lock.Unlock()
	b.probing, b.failures, b.good = false, 0, now
}

// lastError returns the last failure that was reported.
func (b *breaker) lastError() error {
	b.lock.Lock()
	defer b.lock.Unlock()
	return b.last
}

// release takes back an allowed request that ended without an outcome.
func (b *breaker) release() {
	b.lock.Lock()
	defer b.lock.Unlock()
	b.probing = false
}

// jitter gives between half of d and d.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d/2+1) }

// deadline returns when what has been tried since t fails for good; zero: never.
func (r *registry) deadline(t time.Time) time.Time {
	if r.opts.ReadTimeout < 0 {
		return time.Time{}
	}
	return t.Add(r.opts.ReadTimeout)
}

// maxPause bounds for how long a host that fails is left alone, so that within
// ReadTimeout it is asked several times.
func (r *registry) maxPause() time.Duration {
	if r.opts.ReadTimeout > 0 {
		return min(maxPause, r.opts.ReadTimeout/5)
	}
	return maxPause
}

// heeded bounds a Retry-After, so that within ReadTimeout a host is asked again.
func (r *registry) heeded(d time.Duration) time.Duration {
	if d = min(d, maxRetryWait); r.opts.ReadTimeout > 0 {
		d = min(d, r.opts.ReadTimeout/2)
	}
	return d
}

// ask tries the hosts that may answer q in order, beginning skip places further
// in the list, and with the one avoided (-1: none) when all others do not have
// it, until try succeeds, and then again after a pause, until q.rounds
// or q.deadline is over, or the fault is one that time does not heal. A query
// that comes after its deadline, having waited elsewhere, is refused by hosts
// that have failed all that time. The error is of every host that was asked.
func (r *registry) ask(ctx context.Context, q *query, skip, avoid int, try func(*host) error) error {
	errs := make([]error, len(r.hosts)) // the last of each host
	dead := make([]bool, len(r.hosts))  // that error is permanent
	begin := time.Now()
	for i, h := range r.hosts {
		dead[i] = !h.can.Has(q.need) || q.over(begin) && h.failedSince(q.deadline.Add(-r.opts.ReadTimeout))
	}
	if avoid >= 0 {
		dead[avoid] = true
	}
	for round := 0; ; round++ {
		wait := time.Duration(-1) // the shortest of the hosts that are alive
		tried := false
		for i := range r.hosts {
			i = (i + skip) % len(r.hosts)
			h := r.hosts[i]
			if dead[i] || errs[i] != nil && q.over(time.Now()) {
				continue
			}
			if d := h.allow(time.Now()); d > 0 {
				if wait < 0 || d < wait {
					wait = d
				}
				continue
			}
			tried = true
			err := try(h)
			if cause := context.Cause(ctx); cause != nil {
				h.release()
				return cause
			}
			if err == nil {
				return nil
			}
			errs[i] = err
			r.opts.Metrics.SourceError(errorKind(err), h.name)
			var retryAfter time.Duration
			cost := 1
			if status, ok := errors.AsType[*StatusError](err); ok {
				if dead[i] = status.gone() || q.rounds > 0 && status.permanent(); status.permanent() {
					cost = 0
				} else {
					retryAfter = r.heeded(status.RetryAfter)
				}
			} else if errors.Is(err, errStalled) {
				cost = breakAfter
			} else if dns, ok := errors.AsType[*net.DNSError](err); ok && dns.IsNotFound {
				dead[i] = q.rounds > 0
			}
			h.failed(time.Now(), err, cost, retryAfter, r.maxPause())
			if !dead[i] {
				r.opts.Logger.Debug("a request failed and is tried again", "error", err)
				if retryAfter > 0 && (wait < 0 || retryAfter < wait) {
					wait = retryAfter
				}
			}
		}
		alive := slices.Contains(dead, false)
		if !alive && avoid >= 0 {
			dead[avoid], avoid = false, -1
			continue
		}
		if !tried {
			round-- // all hosts are being left alone
		}
		now := time.Now()
		if !alive || q.rounds > 0 && round+1 >= q.rounds || q.over(now) {
			for i, h := range r.hosts {
				if errs[i] == nil && h.can.Has(q.need) {
					errs[i] = h.lastError() // it was left alone for that
				}
			}
			if err := joined(errs); err != nil {
				return err
			}
			return fmt.Errorf("get %s: %w", q.object, errNoHost)
		}
		pause := jitter(min(maxBackoff, minBackoff<<min(max(round, 0), 10)))
		if wait > pause || !tried {
			pause = wait
		}
		if !q.deadline.IsZero() {
			pause = min(pause, q.deadline.Sub(now))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(max(pause, time.Millisecond)):
		}
	}
}

// joined makes one error, on one line, of those of the hosts.
func joined(errs []error) error {
	var all error
	for _, err := range errs {
		switch {
		case err == nil:
		case all == nil:
			all = err
		default:
			all = fmt.Errorf("%w; %w", all, err)
		}
	}
	return all
}

// A registryBody is a range that goes on elsewhere when it breaks off.
type registryBody struct {
	b        *registryBlob
	ctx      context.Context
	cancel   func()
	skip     int
	avoid    int   // a host, or -1
	off, end int64 // what is left of the range
	cur      *answer
	host     *host     // who gave the last bytes, or will give the next
	failed   error     // final
	opened   time.Time // when cur was; what its reader took is not counted
	gained   time.Time // when it last got on; what its reader took is not counted
	idle     time.Time // when its reader was last given something; zero: never
	breaks   int       // since then
	bytes    int64     // since then
}

// gain is how many bytes a body must give to count as getting on: one that gives
// less in all of ReadTimeout is as good as none.
const gain = 64 << 10

// minPart is how many bytes an answer with less than the whole range must give
// not to count as a failure.
const minPart = 16 << 10

// reopen gets an answer that stands at b.off.
func (b *registryBody) reopen() error {
	r := b.b.r
	q := b.b.query(b.off, b.end)
	q.deadline = r.deadline(b.gained)
	err := r.ask(b.ctx, q, b.skip, b.avoid, func(h *host) error {
		a, err := b.b.open(b.ctx, h, q, b.off, b.end)
		if err == nil {
			h.answered()
			b.cur, b.host, b.opened = a, h, time.Now()
		}
		return err
	})
	if err != nil {
		if cause := context.Cause(b.ctx); cause != nil {
			return cause
		}
		return advise(err, r.ref.host)
	}
	if b.breaks == 0 && q.over(time.Now()) {
		b.gained = time.Now() // it had waited elsewhere, and begins now
	}
	return nil
}

func (b *registryBody) Read(p []byte) (n int, err error) {
	if !b.idle.IsZero() {
		idle := time.Since(b.idle)
		b.gained, b.opened = b.gained.Add(idle), b.opened.Add(idle)
	}
	defer func() { b.idle = time.Now() }()
	for b.failed == nil {
		if b.off == b.end {
			return 0, io.EOF
		}
		if b.cur == nil {
			if b.failed = b.reopen(); b.failed != nil {
				break
			}
		}
		n, err := b.readCurrent(p)
		if n > 0 {
			b.off += int64(n)
			b.gain(int64(n))
			return n, nil
		}
		if err == nil {
			continue
		}
		if cause := context.Cause(b.ctx); cause != nil {
			b.failed = cause
			break
		}
		if err == io.EOF && b.cur.off == b.cur.end && b.cur.got >= minPart {
			b.cur.close() // it sends so much at a time, and said so
			b.cur = nil
			continue
		}
		// The host counts as failed once more, and the next one is asked
		// for the rest, unless nothing has come for too long.
		h := b.cur.h
		err = fmt.Errorf("get blob %s from %s: %w", b.b.desc.Digest, h.name, noEOF(err))
		cost := 1
		if errors.Is(err, errStalled) || errors.Is(err, errTrickle) {
			cost = breakAfter
		}
		h.failed(time.Now(), err, cost, 0, b.b.r.maxPause())
		b.b.r.opts.Metrics.SourceError(errorKind(err), h.name)
		b.b.r.opts.Logger.Debug("a body broke off and is asked for again", "offset", b.off, "error", err)
		b.cur.ok = false
		b.cur.close()
		b.cur = nil
		b.skip = h.index + 1
		wait := jitter(min(maxBackoff, minBackoff<<min(b.breaks, 10)))
		if end := b.b.r.deadline(b.gained); !end.IsZero() {
			wait = min(wait, time.Until(end))
		}
		if wait <= 0 {
			b.failed = advise(err, b.b.r.ref.host)
		} else if !pause(b.ctx, wait) {
			b.failed = context.Cause(b.ctx)
		}
		b.breaks++
	}
	return 0, b.failed
}

// gain counts n bytes that have come.
func (b *registryBody) gain(n int64) {
	if b.bytes += n; b.bytes >= gain || b.off == b.end {
		b.gained, b.breaks, b.bytes = time.Now(), 0, 0
		b.host.worked(b.gained)
	}
}

// patience bounds the next read: by what is left until all has failed for too
// long, and after a third of that by an error, so that others have their turn.
func (b *registryBody) patience() error {
	r := b.b.r
	b.cur.deadline = r.deadline(b.gained)
	since := b.gained
	if b.opened.After(since) {
		since = b.opened
	}
	if r.opts.ReadTimeout > 0 && time.Since(since) > r.opts.ReadTimeout/3 {
		return errTrickle
	}
	return nil
}

// readCurrent reads from the answer at hand, past what a whole blob has in
// front of the range.
func (b *registryBody) readCurrent(p []byte) (int, error) {
	if err := b.patience(); err != nil {
		return 0, err
	}
	if skip := b.off - b.cur.off; skip > 0 {
		n, err := io.CopyN(io.Discard, b.cur, min(skip, 1<<20))
		b.gain(n)
		if n > 0 {
			return 0, nil
		}
		return 0, err
	}
	return b.cur.Read(p[:min(int64(len(p)), b.end-b.off)])
}

// From returns which of the registry's hosts gave the last bytes.
func (b *registryBody) From() int { return b.host.index }

// Whole turns the body into that of the whole blob, if that is what the server
// sends anyway; else it returns nil.
func (b *registryBody) Whole() io.Reader {
	if b.cur == nil || !b.cur.whole || b.cur.off != 0 {
		return nil
	}
	b.off, b.end = 0, b.b.desc.Size
	return b
}

func (b *registryBody) Close() error {
	if b.cur != nil {
		b.cur.close()
		b.cur = nil
	}
	b.cancel()
	if b.failed == nil {
		b.failed = ErrClosed
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
