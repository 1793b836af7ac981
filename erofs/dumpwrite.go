package erofs

import (
	"bufio"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
)

// WriteDump writes the tree of a composefs image as composefs-dump(5) text, as
// composefs-info does (format document 3, "Writer conventions"): depth first,
// names in byte order, directory sizes as the image has them, xattrs in the
// image's order, every further name of an inode as a hard link to the first.
func WriteDump(w io.Writer, r *Reader) error {
	if !r.header.Composefs {
		return fmt.Errorf("dump image: not a composefs image")
	}
	first, err := r.linked()
	if err != nil {
		return fmt.Errorf("dump image: %w", err)
	}
	out := bufio.NewWriterSize(w, 64<<10)
	cache := xattrCache{}
	var line []byte
	for w := r.newWalker(); ; {
		ok, err := w.next(false)
		if err != nil {
			return fmt.Errorf("dump image: %w", err)
		}
		if !ok {
			break
		}
		n, ok, err := r.loadNode("", &w.ino, cache)
		if err != nil {
			return fmt.Errorf("dump image: %.200q: %w", w.path, err)
		}
		if !ok {
			continue
		}
		target, several := first[w.ino.NID]
		if several && target == "" {
			first[w.ino.NID] = string(w.path)
		}
		line = appendDumpLine(line[:0], w.path, &n, target)
		if _, err := out.Write(line); err != nil {
			return fmt.Errorf("write dump: %w", err)
		}
	}
	if err := out.Flush(); err != nil {
		return fmt.Errorf("write dump: %w", err)
	}
	return nil
}

// appendDumpLine appends the line of one entry; linkTo is the first name of
// the inode, "" if this is it.
func appendDumpLine(b []byte, path []byte, n *Node, linkTo string) []byte {
	b = appendEscaped(b, path, false)
	b = append(b, ' ')
	b = strconv.AppendUint(b, n.Size, 10)
	b = append(b, ' ')
	if linkTo != "" {
		b = append(b, '@')
	}
	b = strconv.AppendUint(b, uint64(n.Mode), 8)
	for _, v := range [...]uint32{n.Nlink, n.UID, n.GID, n.Rdev} {
		b = append(b, ' ')
		b = strconv.AppendUint(b, uint64(v), 10)
	}
	b = append(b, ' ')
	b = strconv.AppendInt(b, n.MtimeSec, 10)
	b = append(b, '.')
	b = strconv.AppendUint(b, uint64(n.MtimeNsec), 10)

	payload := n.Target
	if linkTo != "" {
		payload = linkTo
	}
	b = appendOptional(b, []byte(payload))
	b = appendOptional(b, n.Content)
	b = append(b, ' ')
	if n.Digest != nil {
		b = hex.AppendEncode(b, n.Digest)
	} else {
		b = append(b, '-')
	}
	for _, x := range n.Xattrs {
		b = append(b, ' ')
		b = appendEscaped(b, []byte(x.Name), true)
		b = append(b, '=')
		b = appendEscaped(b, x.Value, true)
	}
	return append(b, '\n')
}

// appendOptional appends a field in which "-" means that there is none.
func appendOptional(b, v []byte) []byte {
	switch {
	case len(v) == 0:
		return append(b, " -"...)
	case len(v) == 1 && v[0] == '-':
		return append(b, ` \x2d`...)
	}
	return appendEscaped(append(b, ' '), v, false)
}

func appendEscaped(b, v []byte, xattr bool) []byte {
	const digits = "0123456789abcdef"
	for _, c := range v {
		switch {
		case c == '\\':
			b = append(b, `\\`...)
		case c == '\n':
			b = append(b, `\n`...)
		case c == '\r':
			b = append(b, `\r`...)
		case c == '\t':
			b = append(b, `\t`...)
		case c < 0x21 || c > 0x7e || c == '=' && xattr:
			b = append(b, '\\', 'x', digits[c>>4], digits[c&15])
		default:
			b = append(b, c)
		}
	}
	return b
}
