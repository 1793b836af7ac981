package erofs

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"
)

func TestSortByName(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	for _, n := range []int{0, 1, sortFew - 1, sortFew, 5000} {
		for _, prefix := range []string{"", "file", "a/long/prefix/that/all/have"} {
			var nodes []*Node
			for range n {
				name := []byte(prefix)
				for range rng.IntN(20) {
					name = append(name, "\x01a\xffbz"[rng.IntN(5)])
				}
				nodes = append(nodes, &Node{Name: string(name)})
			}
			want := slices.Clone(nodes)
			slices.SortFunc(want, func(x, y *Node) int { return cmp.Compare(x.Name, y.Name) })
			sortByName(nodes)
			for i := range want {
				if nodes[i].Name != want[i].Name {
					t.Fatalf("%d names, prefix %q: %q at %d, want %q", n, prefix, nodes[i].Name, i, want[i].Name)
				}
			}
		}
	}
}
