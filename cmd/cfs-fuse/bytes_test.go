package main

import "testing"

func TestBytesFlag(t *testing.T) {
	for in, want := range map[string]int64{
		"0": 0, "17": 17, "17B": 17, "256MiB": 256 << 20, "256M": 256 << 20, "256mib": 256 << 20, "1.5G": 3 << 29,
		"10MB": 10e6, "1kB": 1000, "2 KiB": 2048, "3TiB": 3 << 40,
		"": -1, "M": -1, "-1": -1, "1X": -1, "1MiBs": -1, "9999999TiB": -1, "1e300": -1, "NaN": -1, "0x10": -1,
	} {
		var b bytesFlag
		if err := b.Set(in); (err == nil) != (want >= 0) || err == nil && int64(b) != want {
			t.Errorf("%q: %d, %v; want %d", in, int64(b), err, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 256 << 20: "256MiB", 1 << 30: "1GiB", 1000: "1000", 3 << 10: "3KiB"} {
		b := bytesFlag(n)
		if b.String() != want {
			t.Errorf("%d prints as %s, want %s", n, &b, want)
		}
	}
}
