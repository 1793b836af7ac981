package look

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Quote makes a name safe to print on a terminal, and to paste into a shell, as
// ls(1) of GNU does ("shell-escape"): plain names stay, others are quoted, and
// what is not printable is written as $'\033'.
func Quote(name string) string {
	plain, compat, single := name != "", true, false
	for i, r := range name {
		if r == utf8.RuneError {
			if _, n := utf8.DecodeRuneInString(name[i:]); n == 1 {
				plain, compat = false, false
				continue
			}
		}
		switch {
		case r == '\'':
			single, plain = true, false
		case r == '{' || r == '}':
			plain = plain && len(name) > 1
			compat = compat && len(name) == 1
		case r == '#' || r == '~':
			plain = plain && i > 0
			compat = compat && i == 0
		case r == ' ':
			plain = false
		case strings.ContainsRune("!\"$&()*;<=>[^`|?\\", r):
			plain, compat = false, false
		case r >= utf8.RuneSelf && unicode.IsPrint(r), r > ' ' && r < 0x7f:
		default:
			plain, compat = false, false
		}
	}
	switch {
	case plain:
		return name
	case single && compat:
		return `"` + name + `"`
	}
	var b strings.Builder
	b.WriteByte('\'')
	escaped := false // inside of $'…'
	literal := func() {
		if escaped {
			b.WriteString("''")
			escaped = false
		}
	}
	for i := 0; i < len(name); {
		r, n := utf8.DecodeRuneInString(name[i:])
		switch {
		case r == '\'':
			b.WriteString(`'\''`) // the first one ends $'…' too
			escaped = false
		case r != utf8.RuneError && unicode.IsPrint(r), r == utf8.RuneError && n > 1:
			literal()
			b.WriteString(name[i : i+n])
		default:
			if !escaped {
				b.WriteString("'$'")
				escaped = true
			}
			for _, c := range []byte(name[i : i+n]) {
				if e := strings.IndexByte("\a\b\t\n\v\f\r", c); e >= 0 {
					b.WriteString(`\` + "abtnvfr"[e:e+1])
				} else {
					fmt.Fprintf(&b, `\%03o`, c)
				}
			}
		}
		i += n
	}
	b.WriteByte('\'')
	return b.String()
}
