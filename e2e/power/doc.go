// Package power cuts the power of a machine that fills a store, over and over,
// and has the machine check after each cut what the last one left (cache's
// TestPower). It is a test only, and built only with the tag soakpower, since
// it takes some minutes: 'make soak-power'.
package power
