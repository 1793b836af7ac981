package erofs

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// sortFew is how many entries are sorted by comparing their names alone.
const sortFew = 64

// sortByName sorts entries by name, bytewise. Names of a large directory are
// all over the memory and much alike, so that comparing them is slow: what
// most comparisons need, the first eight bytes after what all names begin
// with, is put side by side first.
func sortByName(entries []*Node) {
	if len(entries) < sortFew {
		slices.SortFunc(entries, func(x, y *Node) int { return cmp.Compare(x.Name, y.Name) })
		return
	}
	common := len(entries[0].Name)
	for _, n := range entries[1:] {
		common = min(common, len(n.Name))
		for common > 0 && n.Name[:common] != entries[0].Name[:common] {
			common--
		}
	}
	type keyed struct {
		key uint64
		n   *Node
	}
	keys := make([]keyed, len(entries))
	for i, n := range entries {
		var first [8]byte
		copy(first[:], n.Name[common:])
		keys[i] = keyed{binary.BigEndian.Uint64(first[:]), n}
	}
	slices.SortFunc(keys, func(x, y keyed) int {
		if x.key != y.key {
			return cmp.Compare(x.key, y.key)
		}
		return cmp.Compare(x.n.Name, y.n.Name) // names hold no NUL, but may end here
	})
	for i, k := range keys {
		entries[i] = k.n
	}
}
