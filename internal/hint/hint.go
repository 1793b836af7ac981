// Package hint lets an error carry one sentence of advice to the person who
// meets it, apart from its text: the command prints both on one line, code in
// between sees an ordinary error. It formats nothing else.
package hint

import "errors"

type hinted struct {
	err  error
	hint string
}

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

// Wrap returns err with the advice hint: a clause in the imperative, without
// a final stop ("run 'cfs-fuse doctor'"). A nil err stays nil.
func Wrap(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hinted{err, hint}
}

// Of returns the outermost advice that err carries, or "".
func Of(err error) string {
	if h, ok := errors.AsType[*hinted](err); ok {
		return h.hint
	}
	return ""
}
