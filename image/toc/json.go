package toc

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// A scanner reads JSON (RFC 8259) front to back. Unlike encoding/json it keeps
// bytes that are not UTF-8 as they are, for file names are bytes, and it holds
// nothing but the text and one buffer.
type scanner struct {
	b       []byte
	i       int
	scratch []byte // the last string that had escapes
}

var errEnd = errors.New("it ends too early")

func (s *scanner) errorf(format string, args ...any) error {
	return fmt.Errorf("JSON at byte %d: %w", s.i, fmt.Errorf(format, args...))
}

// peek returns the next byte that is not white space, or 0 at the end.
func (s *scanner) peek() byte {
	for ; s.i < len(s.b); s.i++ {
		switch c := s.b[s.i]; c {
		case ' ', '\t', '\n', '\r':
		default:
			return c
		}
	}
	return 0
}

func (s *scanner) expect(c byte) error {
	if s.peek() != c || s.i >= len(s.b) {
		return s.errorf("want %q", c)
	}
	s.i++
	return nil
}

// list reads what is between open and end, calling item for every element.
func (s *scanner) list(open, end byte, item func() error) error {
	if err := s.expect(open); err != nil {
		return err
	}
	if s.peek() == end {
		s.i++
		return nil
	}
	for {
		if err := item(); err != nil {
			return err
		}
		switch s.peek() {
		case ',':
			s.i++
		case end:
			s.i++
			return nil
		default:
			return s.errorf("want ',' or %q", end)
		}
	}
}

// object calls field for every member with its key, which is valid until the
// next string is read. A member whose value is null is passed over, as
// encoding/json does.
func (s *scanner) object(field func(key []byte) error) error {
	return s.list('{', '}', func() error {
		key, err := s.str()
		if err != nil {
			return err
		}
		if err := s.expect(':'); err != nil {
			return err
		}
		if s.peek() == 'n' {
			return s.word("null")
		}
		return field(key)
	})
}

func (s *scanner) array(item func() error) error { return s.list('[', ']', item) }

func (s *scanner) word(w string) error {
	if !bytes.HasPrefix(s.b[s.i:], []byte(w)) {
		return s.errorf("want %s", w)
	}
	s.i += len(w)
	return nil
}

// digits passes over decimal digits and returns how many there were.
func (s *scanner) digits() int {
	start := s.i
	for s.i < len(s.b) && '0' <= s.b[s.i] && s.b[s.i] <= '9' {
		s.i++
	}
	return s.i - start
}

// has passes over the next byte if it is one of set.
func (s *scanner) has(set string) bool {
	if s.i < len(s.b) && strings.IndexByte(set, s.b[s.i]) >= 0 {
		s.i++
		return true
	}
	return false
}

// number passes over a number, and reports whether it is a whole one.
func (s *scanner) number() (whole bool, err error) {
	s.peek()
	s.has("-")
	whole = true
	if !s.has("0") && s.digits() == 0 {
		return false, s.errorf("want a number")
	}
	if s.has(".") {
		whole = false
		if s.digits() == 0 {
			return false, s.errorf("want a digit")
		}
	}
	if s.has("eE") {
		whole = false
		s.has("+-")
		if s.digits() == 0 {
			return false, s.errorf("want a digit")
		}
	}
	return whole, nil
}

// integer reads a whole number.
func (s *scanner) integer() (int64, error) {
	s.peek()
	start := s.i
	whole, err := s.number()
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(string(s.b[start:s.i]), 10, 64)
	if !whole || err != nil {
		return 0, s.errorf("want a whole number of 64 bits, found %.40q", s.b[start:s.i])
	}
	return n, nil
}

// str reads a string. The result is valid until the next call.
func (s *scanner) str() ([]byte, error) {
	if err := s.expect('"'); err != nil {
		return nil, err
	}
	start := s.i
	for ; s.i < len(s.b); s.i++ {
		switch c := s.b[s.i]; {
		case c == '"':
			s.i++
			return s.b[start : s.i-1], nil
		case c == '\\':
			s.scratch = append(s.scratch[:0], s.b[start:s.i]...)
			return s.escaped()
		case c < ' ':
			return nil, s.errorf("control character in a string")
		}
	}
	return nil, s.errorf("string: %w", errEnd)
}

// escaped goes on with str after the first backslash.
func (s *scanner) escaped() ([]byte, error) {
	for s.i < len(s.b) {
		c := s.b[s.i]
		s.i++
		switch {
		case c == '"':
			return s.scratch, nil
		case c < ' ':
			return nil, s.errorf("control character in a string")
		case c != '\\':
			s.scratch = append(s.scratch, c)
			continue
		}
		if s.i >= len(s.b) {
			break
		}
		c = s.b[s.i]
		s.i++
		switch c {
		case '"', '\\', '/':
			s.scratch = append(s.scratch, c)
		case 'b':
			s.scratch = append(s.scratch, '\b')
		case 'f':
			s.scratch = append(s.scratch, '\f')
		case 'n':
			s.scratch = append(s.scratch, '\n')
		case 'r':
			s.scratch = append(s.scratch, '\r')
		case 't':
			s.scratch = append(s.scratch, '\t')
		case 'u':
			r, err := s.hex4()
			if err != nil {
				return nil, err
			}
			if utf16.IsSurrogate(r) {
				r = s.lowSurrogate(r)
			}
			s.scratch = utf8.AppendRune(s.scratch, r)
		default:
			return nil, s.errorf("unknown escape \\%c", c)
		}
	}
	return nil, s.errorf("string: %w", errEnd)
}

// lowSurrogate completes a surrogate pair, or gives U+FFFD for half a one.
func (s *scanner) lowSurrogate(high rune) rune {
	at := s.i
	if bytes.HasPrefix(s.b[s.i:], []byte(`\u`)) {
		s.i += 2
		if low, err := s.hex4(); err == nil {
			if r := utf16.DecodeRune(high, low); r != utf8.RuneError {
				return r
			}
		}
		s.i = at
	}
	return utf8.RuneError
}

func (s *scanner) hex4() (rune, error) {
	if len(s.b)-s.i < 4 {
		return 0, s.errorf("escape: %w", errEnd)
	}
	var r rune
	for _, c := range s.b[s.i : s.i+4] {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, s.errorf("escape: want four hexadecimal digits")
		}
		r = r<<4 | rune(c)
	}
	s.i += 4
	return r, nil
}

// skip passes over a value of any kind, depth values deep already.
func (s *scanner) skip(depth int) error {
	if depth > maxDepth {
		return s.errorf("values more than %d deep", maxDepth)
	}
	switch c := s.peek(); {
	case c == '"':
		_, err := s.str()
		return err
	case c == '{':
		return s.object(func([]byte) error { return s.skip(depth + 1) })
	case c == '[':
		return s.array(func() error { return s.skip(depth + 1) })
	case c == 't':
		return s.word("true")
	case c == 'f':
		return s.word("false")
	case c == 'n':
		return s.word("null")
	case c == '-' || '0' <= c && c <= '9':
		_, err := s.number()
		return err
	}
	return s.errorf("want a value")
}
