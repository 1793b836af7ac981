package truth

import (
	"cmp"
	"fmt"
	"strings"
)

const tableHead = `# What is shown is what is in the image

This page is written by ` + "`make truth`" + ` and held by its test: the same layers by six ways, compared by type, mode, owner,
size, link count, device number, mtime to the nanosecond, xattrs (with ACLs and capabilities), symlink target, content, the
completeness of listings and of the names that share an inode. Package ` + "`e2e/truth`" + ` says how; the cases are in
` + "`cases_test.go`" + `, a few words each.

The reference is what umoci unpacks. ` + "`=`" + ` is no difference in any of that; – is not compared, for the reason below the table.

* *overlayfs*: the layers, each unpacked by umoci by itself, stacked by the kernel
* *fuse*, *hybrid*: mounted by cfs-fuse, each byte fetched when it is read
* *kernel*: the mount that the swap puts in their place
* *listing*: ` + "`cfs-fuse erofs dump`" + ` of the sealed image; from this text ` + "`cfs-fuse erofs create`" + ` makes the same image again, bit for bit
* *inode numbers*: each name's before the swap and after
* *machine*: the same on a Debian kernel, with fs-verity enforced (` + "`make test-vm`" + `)

`

// table is the text of docs/truth.md.
func table(b *bench, results map[string]result) string {
	columns := append([]string{stacked}, b.backends...)
	columns = append(columns, kernel, listing, inodes)
	var s strings.Builder
	s.WriteString(tableHead)
	fmt.Fprintf(&s, "| image | layers | %s | machine |\n|---|---|%s---|\n", strings.Join(columns, " | "), strings.Repeat("---|", len(columns)))
	notes := map[string]int{}
	var texts []string
	note := func(text string) string {
		if notes[text] == 0 {
			texts = append(texts, text)
			notes[text] = len(texts)
		}
		return fmt.Sprintf(" (%d)", notes[text])
	}
	for _, c := range cases {
		name := c.name
		if c.form != eStargz {
			name += ", " + c.form.String()
		}
		if len(c.loose) > 0 {
			name += note("not compared: " + c.looseWhy)
		}
		fmt.Fprintf(&s, "| %s | %d |", name, len(c.layers))
		for _, col := range columns {
			cell := results[c.name][col]
			switch {
			case cell == "":
				cell = "="
			case col == stacked && cell == notTested:
				cell += note(cmp.Or(c.noStack, c.fixWhy))
			}
			fmt.Fprintf(&s, " %s |", cell)
		}
		if c.guest {
			s.WriteString(" = |\n")
		} else {
			s.WriteString(" |\n")
		}
	}
	s.WriteString("\n")
	for i, text := range texts {
		fmt.Fprintf(&s, "%d. %s\n", i+1, text)
	}
	return s.String()
}
