package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image/tarindex"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/progress"
	"github.com/cfs-fuse/cfs-fuse/internal/repository"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

func newIndex(g *global) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "index",
		Short: "Indexes of ordinary layers: what makes them lazy",
		Long: `A layer that is neither eStargz nor zstd:chunked is read as a whole when an image
is mounted for the first time, and an index of it is kept in the store. Attached
to the layer in its registry, the index lets other machines mount the same image,
which is not changed, without reading the layer first ('cfs-fuse mount --index auto').`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newIndexCreate(g), newIndexPush(g), newIndexPull(g))
	return cmd
}

type indexFlags struct {
	opts  mount.Options
	quiet bool
}

func (f *indexFlags) define(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.opts.Root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVar(&f.opts.Source.Platform, "platform", "", "`os/arch` of a multi-platform image (default this machine's)")
	fl.BoolVarP(&f.quiet, "quiet", "q", false, "show no progress")
	addRegistryFlags(cmd, &f.opts.Source)
	addBudget(cmd, &f.opts.Budget)
}

// each opens the image and calls do with the index of each ordinary layer.
func (f *indexFlags) each(ctx context.Context, g *global, source string, do func(mount.LayerIndex) error) error {
	var err error
	if f.opts.Logger, err = g.logger(); err != nil {
		return err
	}
	if f.opts.Root, err = filepath.Abs(f.opts.Root); err != nil {
		return err
	}
	f.opts.Runtime, f.opts.Refresh = g.runtimeDir, true
	bar := newBar(f.quiet)
	f.opts.Progress = func(what string, done, total int64) { bar.Set(what, progress.Bytes, done, total) }
	defer bar.Done()
	img, err := mount.OpenImage(ctx, source, f.opts)
	if err != nil {
		return err
	}
	defer img.Close()
	all, err := img.Indexes(ctx)
	bar.Done()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return hint.Wrap(fmt.Errorf("%s: no layer needs an index", source), "its layers are eStargz or zstd:chunked, and lazy by themselves")
	}
	for _, l := range all {
		if err := do(l); err != nil {
			return err
		}
	}
	return nil
}

func printIndex(w io.Writer, l mount.LayerIndex, what string) error {
	n := len(l.Index.Bytes())
	_, err := fmt.Fprintf(w, "layer %d  %s  %s, index %s (%.2f %%), %d spans  %s\n", l.Number, l.Layer.Digest, size(l.Layer.Size), size(int64(n)),
		100*float64(n)/float64(max(1, l.Layer.Size)), l.Index.Spans(), what)
	return err
}

func newIndexCreate(g *global) *cobra.Command {
	var f indexFlags
	cmd := &cobra.Command{
		Use:   "create [flags] SOURCE",
		Short: "Make the indexes of an image's ordinary layers",
		Long: `Read each ordinary layer of the image SOURCE once, store its files, and make its
index, as mounting the image would. Layers whose index the store has are not read.`,
		Example: "  cfs-fuse index create docker://registry.example.com/debian:12",
		Args:    exactArgs("SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.each(cmd.Context(), g, args[0], func(l mount.LayerIndex) error {
				return printIndex(cmd.OutOrStdout(), l, "in the store")
			})
		},
	}
	f.define(cmd)
	return cmd
}

func newIndexPush(g *global) *cobra.Command {
	var f indexFlags
	cmd := &cobra.Command{
		Use:   "push [flags] SOURCE",
		Short: "Attach the indexes to the layers in their registry",
		Long: `Attach the index of each ordinary layer of the image SOURCE to the layer, in its
registry by the referrers API or the tag that stands in for it, or in an OCI image layout. What the
store does not have is made first ('cfs-fuse index create'). The image is not changed.`,
		Example: "  cfs-fuse index push docker://registry.example.com/debian:12",
		Args:    exactArgs("SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			r, err := repository.Open(args[0], true, f.opts.Source)
			if err != nil {
				return err
			}
			defer r.Close()
			return f.each(ctx, g, args[0], func(l mount.LayerIndex) error {
				if !l.Proven {
					return hint.Wrap(fmt.Errorf("layer %d (%s): its index was made by another and is not proven", l.Number, l.Layer.Digest), "wait until the image is sealed")
				}
				d, err := mount.PushIndex(ctx, r, l)
				if err != nil {
					return err
				}
				return printIndex(cmd.OutOrStdout(), l, "attached as "+d.Digest.String())
			})
		},
	}
	f.define(cmd)
	return cmd
}

func newIndexPull(g *global) *cobra.Command {
	var f indexFlags
	var from []string
	cmd := &cobra.Command{
		Use:   "pull [flags] SOURCE",
		Short: "Get the indexes that are attached to an image's layers",
		Long: `Get the index that is attached to each ordinary layer of the image SOURCE, and make
the image known to the store by them, so that 'cfs-fuse mount --index auto' needs to
ask for nothing but what is read. It fails if a layer has none.`,
		Example: "  cfs-fuse index pull docker://registry.example.com/debian:12",
		Args:    exactArgs("SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			f.opts.Index = mount.Require
			attached, done := attachedIndexes(args[0], from, f.opts.Source)
			defer done()
			f.opts.AttachedIndex = attached
			return f.each(cmd.Context(), g, args[0], func(l mount.LayerIndex) error {
				what := "by another, to be proven"
				if l.Proven {
					what = "in the store"
				}
				return printIndex(cmd.OutOrStdout(), l, what)
			})
		},
	}
	f.define(cmd)
	defineIndexTrust(cmd, &from)
	return cmd
}

// ownRepository stands for the image's own repository in --index-trust.
const ownRepository = "repository"

func defineIndexTrust(cmd *cobra.Command, from *[]string) {
	cmd.Flags().StringSliceVar(from, "index-trust", []string{ownRepository},
		"whose indexes to take: those in the image's own repository, and in other `repositories`, docker://HOST/NAME")
}

// attachedIndexes returns what looks for an index among those attached to a layer
// in the repositories from, each of which is opened when it is first asked.
func attachedIndexes(source string, from []string, o fetcher.Options) (look func(context.Context, ocispec.Descriptor) (*tarindex.Index, error), done func()) {
	var mu sync.Mutex
	opened := map[string]*repository.Repository{}
	open := func(name string) (*repository.Repository, error) {
		mu.Lock()
		defer mu.Unlock()
		if r := opened[name]; r != nil {
			return r, nil
		}
		r, err := repository.Open(name, false, o)
		if err == nil {
			opened[name] = r
		}
		return r, err
	}
	look = func(ctx context.Context, layer ocispec.Descriptor) (*tarindex.Index, error) {
		var errs error
		for _, name := range from {
			if name == ownRepository {
				if strings.HasPrefix(source, "oci-archive:") || strings.HasPrefix(source, "layer:") {
					continue // nothing can be attached there
				}
				name = source
			}
			r, err := open(name)
			if err == nil {
				var x *tarindex.Index
				if x, err = mount.PullIndex(ctx, r, layer); x != nil {
					return x, nil
				}
			}
			errs = errors.Join(errs, err)
		}
		return nil, errs
	}
	return look, func() {
		mu.Lock()
		defer mu.Unlock()
		for _, r := range opened {
			r.Close()
		}
	}
}
