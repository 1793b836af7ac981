package erofs

import (
	"cmp"
	"encoding/binary"
	"slices"
)

// sortFew is how many entries are sorted by comparing their names alone.
const sortFew = 64

// sortByName sorts entries by name, bytewise.
func sortByName(entries []*Node) {
	if len(entries) < sortFew {
		slices.SortFunc(entries, func(x, y *Node) int { return cmp.Compare(x.Name, y.Name) })
		return
	}
	sorted := make([]*Node, len(entries))
	for i, k := range nameOrder(entries) {
		sorted[i] = entries[k]
	}
	copy(entries, sorted)
}

// nameOrder returns the places that entries have in the order of their names.
// Names of a large directory are all over the memory and much alike, so that
// comparing them is slow: what most comparisons need, the first eight bytes
// after what all names begin with, is put side by side first.
func nameOrder(entries []*Node) []int32 {
	common := len(entries[0].Name)
	for _, n := range entries[1:] {
		common = min(common, len(n.Name))
		for common > 0 && n.Name[:common] != entries[0].Name[:common] {
			common--
		}
	}
	keys := make([]keyed, len(entries))
	for i, n := range entries {
		var first [8]byte
		copy(first[:], n.Name[common:])
		keys[i] = keyed{binary.BigEndian.Uint64(first[:]), int32(i)}
	}
	keys = radixSort(keys)
	for start := 0; start < len(keys); {
		end := start + 1
		for end < len(keys) && keys[end].key == keys[start].key {
			end++
		}
		// Names hold no NUL, but may end within the first eight bytes.
		slices.SortFunc(keys[start:end], func(x, y keyed) int { return cmp.Compare(entries[x.place].Name, entries[y.place].Name) })
		start = end
	}
	order := make([]int32, len(keys))
	for i, k := range keys {
		order[i] = k.place
	}
	return order
}

// keyed stands for the entry at a place.
type keyed struct {
	key   uint64
	place int32
}

// radixSort sorts by key, a byte at a time from the lowest on, and returns the
// sorted keys, in the memory of its argument or in another.
func radixSort(keys []keyed) []keyed {
	var counts [8][256]uint32
	for _, k := range keys {
		for b := range counts {
			counts[b][byte(k.key>>(8*b))]++
		}
	}
	other := make([]keyed, len(keys))
	for b := range counts {
		at := &counts[b]
		if len(keys) > 0 && at[byte(keys[0].key>>(8*b))] == uint32(len(keys)) {
			continue // all the same
		}
		sum := uint32(0)
		for i, n := range at {
			at[i], sum = sum, sum+n
		}
		for _, k := range keys {
			digit := byte(k.key >> (8 * b))
			other[at[digit]] = k
			at[digit]++
		}
		keys, other = other, keys
	}
	return keys
}

// settle sorts the entries of a directory by name in the memory too: the node
// at the place of the first entry becomes the first by name, and so on, and
// the names are put side by side. Whatever goes over the directory later
// would else wait for the memory at each entry. The places that the nodes came
// from are returned.
func settle(entries []*Node) (from []int32) {
	from = nameOrder(entries)
	size := 0
	for _, n := range entries {
		size += len(n.Name)
	}
	names := make([]byte, 0, size)
	for _, k := range from {
		names = append(names, entries[k].Name...)
	}
	done := make([]bool, len(entries))
	for i := range entries {
		if done[i] {
			continue
		}
		first := *entries[i]
		k := i
		for next := int(from[k]); next != i; next = int(from[k]) {
			*entries[k] = *entries[next]
			done[k] = true
			k = next
		}
		*entries[k] = first
		done[k] = true
	}
	all := string(names)
	for _, n := range entries {
		n.Name, all = all[:len(n.Name)], all[len(n.Name):]
	}
	return from
}
