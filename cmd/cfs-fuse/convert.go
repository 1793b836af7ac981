package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/convert"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/progress"
	"github.com/cfs-fuse/cfs-fuse/internal/repository"
)

const convertHelp = `Make the layers of the image SOURCE eStargz or zstd:chunked, and write the
image to DEST. Of an index, all platforms are converted. SOURCE stays as it is, and
the same SOURCE and flags always give the same bytes.

SOURCE is docker://HOST/NAME[:TAG][@DIGEST] (docker:// may be left out),
oci:DIR[:TAG|@DIGEST] or oci-archive:FILE[:TAG|@DIGEST].
DEST is docker://HOST/NAME[:TAG] or oci:DIR[:TAG]. It has its tag when all else is there.

With a profile, the files that a start reads come first in each layer. With
--seal the manifest has the fs-verity digest that the image will have once it is sealed,
and 'mount' compares it.

Layers are unpacked into temporary files, in the folder that TMPDIR names.`

const convertExample = `  cfs-fuse convert debian:13 docker://registry.example.com/debian:13-lazy

  # for Podman too, with what the start of the program reads first, and sealed
  cfs-fuse convert --format zstd:chunked --profile app.json --seal \
      oci:build:latest docker://registry.example.com/app:1`

type convertFlags struct {
	source  fetcher.Options
	root    string
	format  string
	profile string
	seal    bool
	quiet   bool
}

func newConvert(g *global) *cobra.Command {
	var f convertFlags
	cmd := &cobra.Command{
		Use:     "convert [flags] SOURCE DEST",
		Short:   "Make an image lazy: eStargz or zstd:chunked",
		Long:    convertHelp,
		Example: convertExample,
		Args:    exactArgs("SOURCE", "DEST"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, g, args[0], args[1])
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&f.format, "format", "estargz", "`form` of the layers: estargz or zstd:chunked")
	fl.StringVar(&f.profile, "profile", "", "access profile: `FILE`, or auto for the one in the store or attached to SOURCE")
	fl.BoolVar(&f.seal, "seal", false, "note the sealed image's fs-verity digest in the manifest")
	fl.StringVar(&f.root, "root", defaultRoot(), "`folder` of the store, for --profile auto")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "print only the digest of the result")
	addRegistryFlags(cmd, &f.source)
	return cmd
}

// addRegistryFlags gives a command the flags for speaking to registries.
func addRegistryFlags(cmd *cobra.Command, o *fetcher.Options) {
	cmd.Flags().BoolVar(&o.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to registries")
	cmd.Flags().StringVar(&o.HostsDir, "hosts-dir", "/etc/containerd/certs.d", "`folder` of containerd's hosts.toml files")
}

func (f *convertFlags) run(cmd *cobra.Command, g *global, source, dest string) error {
	ctx := cmd.Context()
	if err := oneOf("format", f.format, string(convert.EStargz), string(convert.ZstdChunked)); err != nil {
		return err
	}
	var err error
	if f.source.Logger, err = g.logger(); err != nil {
		return err
	}
	o := convert.Options{Format: convert.Format(f.format), Seal: f.seal}
	if o.Profile, err = f.profiles(source); err != nil {
		return err
	}
	src, err := fetcher.OpenSource(source, f.source)
	if err != nil {
		return err
	}
	defer src.Close()
	to, err := repository.Open(dest, true, f.source)
	if err != nil {
		return err
	}
	defer to.Close()
	name := to.Name()
	if name.Digest != "" {
		return usageError{fmt.Errorf("%s: a digest cannot be given to what does not exist yet; give a tag", dest)}
	}
	out := &convertOutput{w: cmd.ErrOrStderr(), bar: newBar(f.quiet), started: time.Now()}
	if f.quiet {
		out.w = io.Discard
	}
	o.Progress = out.event
	d, err := convert.Convert(ctx, src, to, name.Tag, o)
	out.bar.Done()
	if err != nil {
		return err
	}
	name.Digest = d.Digest
	_, err = fmt.Fprintln(cmd.OutOrStdout(), name)
	return err
}

// profiles makes of --profile what convert asks for each image.
func (f *convertFlags) profiles(source string) (func(context.Context, digest.Digest) (*image.Profile, error), error) {
	switch f.profile {
	case "":
		return nil, nil
	case "auto":
		root, err := filepath.Abs(f.root)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context, manifest digest.Digest) (*image.Profile, error) {
			return findProfile(ctx, root, source, manifest, f.source)
		}, nil
	}
	p, err := readProfileFile(f.profile, nil)
	if err != nil {
		return nil, err
	}
	return func(context.Context, digest.Digest) (*image.Profile, error) { return p, nil }, nil
}

// convertOutput prints what convert tells: a bar where it is seen, and a line
// for each layer and image.
type convertOutput struct {
	w           io.Writer
	bar         *progress.Bar
	read, total int64
	started     time.Time
}

func (o *convertOutput) event(e convert.Event) {
	switch {
	case e.Found > 0:
		o.total += e.Found
	case e.Read > 0:
		o.read += e.Read
		o.bar.Set("reading layers", progress.Bytes, o.read, o.total)
	case e.Layer != nil:
		l := e.Layer
		first := ""
		if l.Prioritized > 0 {
			first = fmt.Sprintf(", %d files first", l.Prioritized)
		}
		o.line("layer %s: %s -> %s %s%s", shortDigest(l.Source.Digest), size(l.Source.Size), size(l.Result.Size), shortDigest(l.Result.Digest), first)
	case e.Image != nil:
		i := e.Image
		o.line("image %s: %d layers, %s -> %s, %s, %.1f s", i.Platform, i.Layers, size(i.Read), size(i.Written), i.Result.Digest, time.Since(o.started).Seconds())
		if i.Composefs != "" {
			o.line("image %s: composefs digest %s", i.Platform, i.Composefs)
		}
	case e.Left != nil:
		o.line("left out %s: %s", shortDigest(e.Left.Desc.Digest), e.Left.Why)
	}
}

func (o *convertOutput) line(format string, args ...any) {
	o.bar.Done()
	fmt.Fprintf(o.w, format+"\n", args...)
}

// shortDigest is the beginning of a digest, as people know them.
func shortDigest(d digest.Digest) string {
	if err := d.Validate(); err != nil {
		return d.String()
	}
	return d.Encoded()[:12]
}
