package image

import (
	"cmp"
	"slices"
)

// MergeProfiles makes one profile of several runs' of an image, or of images that
// share contents: every part that any of them read, by how early it came, as a share of
// its run, in the run in which it came first. Parts that overlap are given once. It is of the
// first profile's image, and of its repository if all are. It leaves out what is
// above MaxAccesses.
func MergeProfiles(profiles ...*Profile) *Profile {
	if len(profiles) == 0 {
		return &Profile{}
	}
	type place struct {
		Access
		rank float64 // 0: the first of its run; below 1
		run  int
	}
	var all []place
	merged := &Profile{Image: profiles[0].Image, Repository: profiles[0].Repository}
	for run, p := range profiles {
		if p.Repository != merged.Repository {
			merged.Repository = ""
		}
		for i, a := range p.Accesses {
			all = append(all, place{a, float64(i) / float64(len(p.Accesses)), run})
		}
	}
	slices.SortStableFunc(all, func(a, b place) int {
		return cmp.Or(cmp.Compare(a.rank, b.rank), cmp.Compare(a.run, b.run))
	})
	have := map[Digest][]Access{} // of each content: what is in the profile, by offset, disjoint
	for _, a := range all {
		for _, part := range without(a.Access, have[a.Content]) {
			if len(merged.Accesses) == MaxAccesses {
				return merged
			}
			merged.Accesses = append(merged.Accesses, part)
			have[a.Content] = insert(have[a.Content], part)
		}
	}
	return merged
}

// without returns the parts of a that are in none of have.
func without(a Access, have []Access) []Access {
	var parts []Access
	end := a.Off + a.N
	i, _ := slices.BinarySearchFunc(have, a.Off, func(h Access, off int64) int { return cmp.Compare(h.Off+h.N, off) })
	for ; i < len(have) && have[i].Off < end; i++ {
		if h := have[i]; h.Off > a.Off {
			parts = append(parts, Access{a.Content, a.Off, h.Off - a.Off})
		}
		a.Off = max(a.Off, min(end, have[i].Off+have[i].N))
	}
	if a.Off < end {
		parts = append(parts, Access{a.Content, a.Off, end - a.Off})
	}
	return parts
}

// insert adds a part, which overlaps none, at its place.
func insert(have []Access, a Access) []Access {
	i, _ := slices.BinarySearchFunc(have, a.Off, func(h Access, off int64) int { return cmp.Compare(h.Off, off) })
	return slices.Insert(have, i, a)
}
