package cache

import "sync/atomic"

// A bitmap is a set of small numbers that may be read while it is changed.
type bitmap []atomic.Uint64

func newBitmap(n int) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) has(i int) bool { return b[i>>6].Load()&(1<<(i&63)) != 0 }

// set adds i and reports whether it was not there.
func (b bitmap) set(i int) bool { return b[i>>6].Or(1<<(i&63))&(1<<(i&63)) == 0 }

// clear takes i away and reports whether it was there.
func (b bitmap) clear(i int) bool { return b[i>>6].And(^uint64(1<<(i&63)))&(1<<(i&63)) != 0 }
