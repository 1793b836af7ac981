package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/look"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// An inspection is what 'inspect --json' prints.
type inspection struct {
	Source   string          `json:"source"`
	Digest   string          `json:"manifest_digest,omitempty"`
	Manifest json.RawMessage `json:"manifest,omitempty"`
	Config   json.RawMessage `json:"config,omitempty"`
	// ConfigError says why there is no config.
	ConfigError string `json:"config_error,omitempty"`

	Layers     []layerInfo `json:"layers"`
	Compressed int64       `json:"compressed_bytes"`
	// Known says that the store has the image's tree. The rest is of that.
	Known      bool  `json:"in_store"`
	Files      int   `json:"files"` // distinct contents
	FilesLocal int   `json:"files_local"`
	Bytes      int64 `json:"bytes"`
	BytesLocal int64 `json:"bytes_local"`
}

// A layerInfo is what is known of a layer without reading its table of
// contents.
type layerInfo struct {
	Index     int    `json:"index"` // 0 is the lowest
	Digest    string `json:"digest"`
	MediaType string `json:"media_type"`
	Size      int64  `json:"compressed_bytes"`
	Format    string `json:"format"`
	TOCDigest string `json:"toc_digest,omitempty"`
	// Of the files that are seen in the tree, if the store has that.
	Bytes      *int64 `json:"bytes,omitempty"`
	BytesLocal *int64 `json:"bytes_local,omitempty"`
	CreatedBy  string `json:"created_by,omitempty"`
}

func newInspect(g *global) *cobra.Command {
	var f lookFlags
	cmd := &cobra.Command{
		Use:   "inspect [flags] SOURCE",
		Short: "Show an image's manifest, config and layers, and what is local",
		Long: `Show an image's manifest, config and layers, with their formats and the digests
of their tables of contents, and what of it is in the store. The manifest and the
config are all that is fetched.` + sourceHelp,
		Example: "  cfs-fuse inspect registry.example.com/debian:12\n  cfs-fuse inspect --json /mnt",
		Args:    exactArgs("SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := f.check(cmd); err != nil {
				return err
			}
			source, path := splitSource(args[0])
			if path != "" {
				return usageError{fmt.Errorf("%s: a path in the image; 'cfs-fuse stat' shows it", args[0])}
			}
			img, err := mount.OpenImage(cmd.Context(), source, f.opts)
			if err != nil {
				return err
			}
			defer img.Close()
			i, err := inspect(cmd, img)
			if err != nil {
				return err
			}
			out := bufio.NewWriter(cmd.OutOrStdout())
			defer out.Flush()
			if f.json {
				return printJSON(out, i)
			}
			return f.printInspection(out, i)
		},
	}
	f.define(cmd, g)
	f.defineOutput(cmd, true, false)
	return cmd
}

func inspect(cmd *cobra.Command, img *mount.Image) (*inspection, error) {
	ctx := cmd.Context()
	i := &inspection{Source: img.Source(), Layers: []layerInfo{}}
	manifest, err := img.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	if manifest == nil {
		r, err := img.Tree(ctx)
		if err == nil {
			i.Known = true
			i.Files = int(r.Header().Inodes)
		}
		return i, err
	}
	i.Digest = manifest.Digest.String()
	if json.Valid(manifest.Raw) {
		i.Manifest = manifest.Raw
	}
	var config ocispec.Image
	raw, err := img.Config(ctx)
	if err == nil && raw != nil {
		if err = json.Unmarshal(raw, &config); err == nil {
			i.Config = raw
		}
	}
	if err != nil {
		i.ConfigError = oneLine(err.Error())
	}
	history := slices.DeleteFunc(config.History, func(h ocispec.History) bool { return h.EmptyLayer })
	for n, d := range manifest.Layers {
		l := layerInfo{Index: n, Digest: d.Digest.String(), MediaType: d.MediaType, Size: d.Size}
		l.Format, l.TOCDigest = layerFormat(d)
		if len(history) == len(manifest.Layers) {
			l.CreatedBy = history[n].CreatedBy
		}
		i.Compressed += d.Size
		i.Layers = append(i.Layers, l)
	}
	all, layers, ok := img.Progress(ctx)
	if i.Known = ok; ok {
		i.Files, i.FilesLocal, i.Bytes, i.BytesLocal = all.Files, all.FilesLocal, all.Bytes, all.BytesLocal
		for n := range min(len(layers), len(i.Layers)) {
			i.Layers[n].Bytes, i.Layers[n].BytesLocal = &layers[n].Bytes, &layers[n].BytesLocal
		}
	}
	return i, nil
}

// layerFormat tells a layer's format by what its descriptor says, and the digest
// of its table of contents, "" if nothing vouches for one.
func layerFormat(d ocispec.Descriptor) (format, digest string) {
	t, dig, ok := toc.Promised(d.Annotations)
	switch {
	case ok:
		return t.String(), dig
	case strings.HasSuffix(d.MediaType, "gzip"):
		return "tar+gzip", ""
	case strings.HasSuffix(d.MediaType, "zstd"):
		return "tar+zstd", ""
	}
	return "tar", ""
}

func (f *lookFlags) printInspection(out io.Writer, i *inspection) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	row := func(name string, value string) {
		if value != "" {
			fmt.Fprintf(w, "%s\t%s\n", name, f.safe(value))
		}
	}
	row("source", i.Source)
	row("manifest", i.Digest)
	if i.Manifest == nil {
		row("tree", fmt.Sprintf("a composefs image of %d inodes", i.Files))
		return w.Flush()
	}
	var config ocispec.Image
	if i.Config != nil {
		if err := json.Unmarshal(i.Config, &config); err != nil {
			return err
		}
		row("platform", strings.Trim(config.OS+"/"+config.Architecture+"/"+config.Variant, "/"))
		if config.Created != nil {
			row("created", config.Created.UTC().Format(time.RFC3339))
		}
		c := config.Config
		row("entrypoint", words(c.Entrypoint))
		row("command", words(c.Cmd))
		row("working dir", c.WorkingDir)
		row("user", c.User)
		row("environment", words(c.Env))
		row("ports", strings.Join(slices.Sorted(maps.Keys(c.ExposedPorts)), " "))
		row("volumes", words(slices.Sorted(maps.Keys(c.Volumes))))
		row("stop signal", c.StopSignal)
		for _, k := range slices.Sorted(maps.Keys(c.Labels)) {
			row("label", look.Quote(k)+"="+look.Quote(c.Labels[k]))
		}
	}
	row("config", i.ConfigError)
	row("size", fmt.Sprintf("%s compressed, in %d layers", f.size(i.Compressed), len(i.Layers)))
	if i.Known {
		row("local", fmt.Sprintf("%d of %d files, %s of %s", i.FilesLocal, i.Files, f.size(i.BytesLocal), f.size(i.Bytes)))
	} else {
		row("local", "nothing: the store does not know the image's tree")
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(out)
	rows := [][]string{{"LAYER", "SIZE", "LOCAL", "FORMAT", "DIGEST / TOC DIGEST"}}
	for _, l := range i.Layers {
		local := "-"
		if l.Bytes != nil && *l.Bytes > 0 {
			local = fmt.Sprintf("%d%%", *l.BytesLocal*100 / *l.Bytes)
		}
		rows = append(rows, []string{fmt.Sprint(l.Index), f.size(l.Size), local, l.Format, l.Digest})
		if l.TOCDigest != "" {
			rows = append(rows, []string{"", "", "", "", l.TOCDigest})
		}
	}
	writeColumns(out, rows)
	return nil
}

// safe keeps what an image's author wrote from doing things to a terminal.
func (f *lookFlags) safe(s string) string {
	if !f.terminal {
		return oneLine(s)
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, s)
}

// words prints arguments as a shell takes them.
func words(args []string) string {
	var all []string
	for _, a := range args {
		all = append(all, look.Quote(a))
	}
	return strings.Join(all, " ")
}
