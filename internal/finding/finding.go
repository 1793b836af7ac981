// Package finding has the words in which one part of the program says what it
// found out about the machine, a store or a registry, and another part prints
// it ('cfs-fuse doctor'). It finds nothing itself.
package finding

// A State is how good a finding is.
type State string

// The states.
const (
	OK       State = "ok"
	Degraded State = "degraded" // it works, at a cost
	Missing  State = "missing"  // something that is asked for will not work
)

// A Finding is one thing that was tried, and how that went.
type Finding struct {
	Group string `json:"group"` // what it is about: "kernel", "store …"
	Name  string `json:"name"`
	State State  `json:"state"`
	// Detail says what was seen, Cost what it costs, if it is not OK, and Advice
	// what can be done about it.
	Detail string `json:"detail"`
	Cost   string `json:"cost,omitempty"`
	Advice string `json:"advice,omitempty"`
}

// A List is what one examination found.
type List struct {
	Group string // of what comes next
	All   []Finding
}

// Good adds a finding that is OK.
func (l *List) Good(name, detail string) { l.add(OK, name, detail, "", "") }

// Degraded adds a finding of something that works, at a cost.
func (l *List) Degraded(name, detail, cost, advice string) {
	l.add(Degraded, name, detail, cost, advice)
}

// Missing adds a finding of something without which something will not work.
func (l *List) Missing(name, detail, cost, advice string) { l.add(Missing, name, detail, cost, advice) }

func (l *List) add(s State, name, detail, cost, advice string) {
	l.All = append(l.All, Finding{l.Group, name, s, detail, cost, advice})
}
