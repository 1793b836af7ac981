package main

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// A layerSum is what 'layers --json' prints of a layer.
type layerSum struct {
	layerInfo
	Entries   int `json:"entries"`
	Files     int `json:"files"` // regular files
	Whiteouts int `json:"whiteouts"`
	// Of the layer's regular files: all bytes, and those that no layer above
	// hides.
	Content int64 `json:"content_bytes"`
	Seen    int64 `json:"seen_bytes"`
}

// A layerEntry is what one layer has of a path.
type layerEntry struct {
	Layer int    `json:"layer"`
	Path  string `json:"path"`
	// State is "shown", "hidden" (by a layer above), "whiteout" (it hides what
	// is below), "opaque" (the same, of all in a folder), or "merged", of a folder
	// below the one whose attributes are shown.
	State string `json:"state"`
	By    int    `json:"hidden_by"` // the layer that hides it, -1 if none does
	Type  string `json:"type"`
	Size  int64  `json:"bytes"`
}

func newLayers(g *global) *cobra.Command {
	var f lookFlags
	var recursive bool
	cmd := &cobra.Command{
		Use:   "layers [flags] SOURCE[:/PATH]",
		Short: "Show which layer a path comes from, and what it hides",
		Long: `Without PATH, show an image's layers: what is in each, and how much of it is seen
in the end. With PATH, show what each layer has of it, the topmost first: which
entry is shown, which are hidden and by which layer, and what removes it. With -r,
also of everything below PATH. Only tables of contents are fetched.` + sourceHelp,
		Example: `  cfs-fuse layers registry.example.com/app:1
  cfs-fuse layers -r registry.example.com/app:1:/etc`,
		Args: exactArgs("SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			source, at := splitSource(args[0])
			img, err := mount.OpenImage(cmd.Context(), source, f.opts)
			if err != nil {
				return err
			}
			defer img.Close()
			layers, err := img.Layers(cmd.Context())
			if err != nil {
				return err
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			if at != "" {
				return f.layersOf(out, layers, cleanEntry(at), recursive)
			}
			i, err := inspect(cmd, img)
			if err != nil {
				return err
			}
			sums := sumLayers(layers, i.Layers)
			if f.json {
				return printJSON(out, sums)
			}
			rows := [][]string{{"LAYER", "SIZE", "FILES", "CONTENT", "SEEN", "REMOVES", "CREATED BY"}}
			for _, s := range sums {
				rows = append(rows, []string{fmt.Sprint(s.Index), f.size(s.Size), fmt.Sprint(s.Files), f.size(s.Content), f.size(s.Seen),
					fmt.Sprint(s.Whiteouts), f.safe(short(s.CreatedBy, 80))})
			}
			writeColumns(out, rows)
			return nil
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, true, false)
	cmd.Flags().BoolVarP(&recursive, "recursive", "r", false, "also of everything below PATH")
	return cmd
}

func short(s string, n int) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return s
}

// cleanEntry makes a path, or a TOC's name, one without a slash at its ends; ""
// is the root.
func cleanEntry(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

// How a whiteout's last component begins, and that of an opaque folder's marker
// (OCI image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

// A stack finds out, from the topmost layer down, what hides what.
type stack struct {
	hides  map[string]int // by path: the topmost layer that has something there which hides what is below
	opaque map[string]int // by folder: the topmost layer that hides what is in it
}

// hider returns which layer hides what a lower one has at a path, -1 if none
// does.
func (s *stack) hider(name string) int {
	if by, ok := s.hides[name]; ok {
		return by
	}
	for dir := name; dir != ""; {
		dir = strings.TrimPrefix(path.Dir("/"+dir), "/")
		if by, ok := s.opaque[dir]; ok {
			return by
		}
		if by, ok := s.hides[dir]; ok {
			return by
		}
	}
	return -1
}

// each calls fn for each entry of all layers, from the topmost layer down; below
// says that a folder is shown with the attributes of one above.
func each(layers []image.Layer, fn func(layer int, e *toc.Entry, name string, by int, below bool)) {
	s := stack{map[string]int{}, map[string]int{}}
	dirs := map[string]bool{}
	for n := len(layers) - 1; n >= 0; n-- {
		last := map[string]int{} // within a layer the last entry of a path counts
		all := layers[n].TOC.Entries
		for i := range all {
			last[cleanEntry(all[i].Name)] = i
		}
		here := stack{map[string]int{}, map[string]int{}}
		for i := range all {
			name := cleanEntry(all[i].Name)
			if last[name] != i {
				continue
			}
			dir, base := path.Split(name)
			dir = strings.TrimSuffix(dir, "/")
			by, below := s.hider(name), false
			switch {
			case base == opaqueMarker:
				here.opaque[dir] = n
			case strings.HasPrefix(base, whiteoutPrefix):
				here.hides[path.Join(dir, strings.TrimPrefix(base, whiteoutPrefix))] = n
			case all[i].Type == toc.Dir:
				below = dirs[name] && by < 0
			default:
				here.hides[name] = n
			}
			fn(n, &all[i], name, by, below)
		}
		for name, i := range last {
			if all[i].Type == toc.Dir && s.hider(name) < 0 {
				dirs[name] = true
			}
		}
		// Whiteouts hide nothing of their own layer.
		for name := range here.hides {
			if _, ok := s.hides[name]; !ok {
				s.hides[name] = n
			}
		}
		for dir := range here.opaque {
			if _, ok := s.opaque[dir]; !ok {
				s.opaque[dir] = n
			}
		}
	}
}

func sumLayers(layers []image.Layer, infos []layerInfo) []layerSum {
	sums := make([]layerSum, len(layers))
	for n := range layers {
		if n < len(infos) {
			sums[n].layerInfo = infos[n]
		}
	}
	each(layers, func(n int, e *toc.Entry, name string, by int, _ bool) {
		s := &sums[n]
		s.Entries++
		switch {
		case strings.HasPrefix(path.Base(name), whiteoutPrefix):
			s.Whiteouts++
		case e.Type == toc.Reg:
			s.Files++
			s.Content += e.Size
			if by < 0 {
				s.Seen += e.Size
			}
		}
	})
	return sums
}

func (f *lookFlags) layersOf(w io.Writer, layers []image.Layer, at string, recursive bool) error {
	found := []layerEntry{}
	each(layers, func(n int, e *toc.Entry, name string, by int, below bool) {
		l := layerEntry{Layer: n, State: "shown", By: by, Type: e.Type.String(), Size: e.Size}
		dir, base := path.Split(name)
		switch {
		case base == opaqueMarker:
			l.State, l.Type, name = "opaque", "", strings.TrimSuffix(dir, "/")
		case strings.HasPrefix(base, whiteoutPrefix):
			l.State, l.Type, name = "whiteout", "", dir+strings.TrimPrefix(base, whiteoutPrefix)
		case by >= 0:
			l.State = "hidden"
		case below:
			l.State = "merged"
		}
		if name == at || recursive && (at == "" || strings.HasPrefix(name, at+"/")) {
			l.Path = "/" + name
			found = append(found, l)
		}
	})
	slices.SortStableFunc(found, func(a, b layerEntry) int { return strings.Compare(a.Path, b.Path) })
	if f.json {
		return printJSON(w, found)
	}
	if len(found) == 0 {
		return fmt.Errorf("/%s: no layer has an entry of this path", at)
	}
	rows := [][]string{{"LAYER", "SIZE", "TYPE", "STATE", "PATH"}}
	for _, l := range found {
		state := l.State
		if l.By >= 0 {
			state += fmt.Sprintf(" by %d", l.By)
		}
		rows = append(rows, []string{fmt.Sprint(l.Layer), f.size(l.Size), l.Type, state, f.quoted(l.Path, nil)})
	}
	writeColumns(w, rows)
	return nil
}
