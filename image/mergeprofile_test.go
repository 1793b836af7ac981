package image

import (
	"math/rand/v2"
	"slices"
	"testing"
)

func TestMergeProfiles(t *testing.T) {
	a, b, c := Digest{1}, Digest{2}, Digest{3}
	one := &Profile{Image: a, Repository: "r", Accesses: []Access{{a, 0, 10}, {b, 0, 100}}}
	two := &Profile{Image: b, Repository: "r", Accesses: []Access{{c, 0, 5}, {a, 5, 10}, {b, 50, 60}, {b, 0, 10}}}
	got := MergeProfiles(one, two)
	want := []Access{{a, 0, 10}, {c, 0, 5}, {a, 10, 5}, {b, 0, 100}, {b, 100, 10}}
	if got.Image != a || got.Repository != "r" || !slices.Equal(got.Accesses, want) {
		t.Errorf("%+v, want %+v", got, want)
	}
	two.Repository = "other"
	if got := MergeProfiles(one, two); got.Repository != "" {
		t.Errorf("repository %q", got.Repository)
	}
	if got := MergeProfiles(); len(got.Accesses) != 0 {
		t.Errorf("of nothing: %+v", got)
	}
}

// What comes out covers what went in, each byte once.
func TestMergeProfilesCovers(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 200 {
		var want [100]bool
		var all []*Profile
		for range 3 {
			p := &Profile{}
			for range r.IntN(20) {
				off := r.Int64N(99)
				n := 1 + r.Int64N(100-off)
				p.Accesses = append(p.Accesses, Access{Digest{1}, off, n})
				for i := off; i < off+n; i++ {
					want[i] = true
				}
			}
			all = append(all, p)
		}
		var got [100]bool
		for _, a := range MergeProfiles(all...).Accesses {
			for i := a.Off; i < a.Off+a.N; i++ {
				if got[i] {
					t.Fatalf("byte %d twice", i)
				}
				got[i] = true
			}
		}
		if got != want {
			t.Fatalf("covers %v, want %v", got, want)
		}
	}
}
