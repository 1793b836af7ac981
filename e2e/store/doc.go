// Package store tests the store by the binary: eviction, kills, full and failing
// disks, repair, budgets.
package store
