package main

import (
	"fmt"
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
)

// A bytesFlag is a flag's size in bytes: a number and a unit. KiB, MiB, GiB and
// TiB, or K, M, G and T, are powers of 1024; kB, MB, GB and TB of 1000.
type bytesFlag int64

func (b *bytesFlag) String() string {
	n := int64(*b)
	for _, u := range []string{"TiB", "GiB", "MiB", "KiB"} {
		if scale := byteUnits[strings.ToLower(u)]; n > 0 && n%scale == 0 {
			return fmt.Sprint(n/scale, u)
		}
	}
	return strconv.FormatInt(n, 10)
}

// Type is what help shows for the value where the usage names nothing else.
func (b *bytesFlag) Type() string { return "size" }

var byteUnits = map[string]int64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "m": 1 << 20, "mib": 1 << 20, "g": 1 << 30, "gib": 1 << 30, "t": 1 << 40, "tib": 1 << 40,
	"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
}

func (b *bytesFlag) Set(s string) error {
	s = strings.TrimSpace(s)
	end := strings.LastIndexAny(s, "0123456789.") + 1
	n, err := strconv.ParseFloat(s[:end], 64)
	scale, ok := byteUnits[strings.ToLower(strings.TrimSpace(s[end:]))]
	if err != nil || !ok || n < 0 || n*float64(scale) >= math.MaxInt64 {
		return fmt.Errorf("%q is no size: want a number and a unit, as in 256MiB, 10MB or 1.5G", s)
	}
	*b = bytesFlag(n * float64(scale))
	return nil
}

// heapSlack is what the process may use besides the memory for fetching.
const heapSlack = 32 << 20

// limitHeap has the collector work harder when the heap grows beyond what is
// being fetched, or kept for readers, and some for the rest, unless GOMEMLIMIT says otherwise.
func limitHeap(fetch int64) {
	if os.Getenv("GOMEMLIMIT") == "" && fetch < math.MaxInt64-heapSlack {
		debug.SetMemoryLimit(fetch + heapSlack)
	}
}
