package main

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

const cacheHelp = `Show, check and clean the store.

The store keeps the files of all images by digest, each once. What is mounted,
by a process or by the kernel in any mount namespace, is never touched by these
commands, which may run at any time. An IMAGE is the digest of a manifest (any
unique beginning of it will do) or a source that was mounted.`

// cacheFlags are the flags of the commands below 'cache'.
type cacheFlags struct {
	g      *global
	root   string
	asJSON bool
}

// newCache returns the command 'cache' with its own commands.
func newCache(g *global) *cobra.Command {
	f := &cacheFlags{g: g}
	cmd := &cobra.Command{
		Use:   "cache",
		Short: "Show, check and clean the store",
		Long:  cacheHelp,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return usageError{fmt.Errorf("unknown command %q", args[0])}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.PersistentFlags().StringVar(&f.root, "root", defaultRoot(), "`folder` of the store")
	cmd.PersistentFlags().BoolVar(&f.asJSON, "json", false, "print JSON; sizes are bytes")
	cmd.AddCommand(newCacheLs(f), newCacheDu(f), newCacheGc(f), newCacheRm(f), newCachePin(f), newCacheUnpin(f), newCacheCheck(f), newCacheImport(f))
	return cmd
}

// open opens the store, which must be there.
func (f *cacheFlags) open() (*cache.Store, error) {
	if _, err := os.Stat(f.root); err != nil {
		return nil, hint.Wrap(fmt.Errorf("store: %w", err), "name the store's folder with --root")
	}
	log, err := f.g.logger()
	if err != nil {
		return nil, err
	}
	return cache.Open(f.root, cache.Options{Logger: log})
}

// print prints v as JSON, or as text has it.
func (f *cacheFlags) print(out io.Writer, v any, text func(w io.Writer) error) error {
	if !f.asJSON {
		return text(out)
	}
	enc := json.NewEncoder(out)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// find returns the images that arguments name.
func find(s *cache.Store, args []string) ([]image.Digest, error) {
	sources, err := s.Sources()
	if err != nil {
		return nil, err
	}
	all, err := s.ImageDigests()
	if err != nil {
		return nil, err
	}
	var found []image.Digest
	for _, arg := range args {
		var matches []image.Digest
		start := strings.TrimPrefix(arg, "sha256:")
		for _, d := range all {
			named := slices.ContainsFunc(sources[d], func(src string) bool {
				src, _, _ = strings.Cut(src, "\n")
				return src == arg || strings.TrimPrefix(src, "docker://") == arg
			})
			if named || len(start) >= 4 && strings.HasPrefix(hex.EncodeToString(d[:]), start) {
				matches = append(matches, d)
			}
		}
		switch len(matches) {
		case 0:
			return nil, hint.Wrap(fmt.Errorf("image %s: not in the store", arg), "'cfs-fuse cache ls' lists what is")
		case 1:
			found = append(found, matches[0])
		default:
			return nil, hint.Wrap(fmt.Errorf("image %s: %d images are called so", arg, len(matches)), "give more of the digest")
		}
	}
	return found, nil
}

// A listedImage is an image as 'cache ls' shows it.
type listedImage struct {
	cache.ImageUsage
	State   string   `json:"state"`
	Sources []string `json:"sources"`
}

func stateOf(u cache.ImageUsage) string {
	switch {
	case u.Damaged != "":
		return "damaged"
	case u.Sealed && u.Local == u.Files:
		return "sealed"
	case u.Local == u.Files:
		return "complete"
	}
	return "lazy"
}

func newCacheLs(f *cacheFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "ls",
		Short: "List the images, the least recently used first",
		Long: `List the images of the store in the order in which they would be evicted: their
state, how much of them is local, what evicting each would free (other images may
need the rest), when they were last used, and whether they are in use or pinned.`,
		Example: "  cfs-fuse cache ls\n  cfs-fuse cache ls --json | jq -r '.[] | select(.in_use | not) | .manifest_digest'",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.open()
			if err != nil {
				return err
			}
			defer s.Close()
			u, err := s.Usage(cmd.Context())
			if err != nil {
				return err
			}
			sources, err := s.Sources()
			if err != nil {
				return err
			}
			all := []listedImage{}
			for _, i := range u.Images {
				l := listedImage{i, stateOf(i), []string{}}
				for d, names := range sources {
					if d.String() == i.Digest {
						l.Sources = names
					}
				}
				all = append(all, l)
			}
			return f.print(cmd.OutOrStdout(), all, func(w io.Writer) error { return printImages(w, all) })
		},
	}
}

func printImages(out io.Writer, all []listedImage) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tSTATE\tLOCAL\tOF\tFREES\tLAST USED\tKEPT\tSOURCE")
	for _, i := range all {
		var kept []string
		if i.InUse {
			kept = append(kept, "in use")
		}
		if i.Pinned {
			kept = append(kept, "pinned")
		}
		source := "-"
		if len(i.Sources) > 0 {
			source = oneLine(strings.Join(i.Sources, ", "))
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", strings.TrimPrefix(i.Digest, "sha256:")[:12], i.State, size(i.BytesLocal), size(i.Bytes),
			size(i.Exclusive), i.LastUsed.Format(time.DateTime), orDash(strings.Join(kept, ", ")), source)
	}
	return w.Flush()
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func newCacheDu(f *cacheFlags) *cobra.Command {
	return &cobra.Command{
		Use:     "du",
		Short:   "Show what the store takes on disk, and for what",
		Long:    "Count what the store takes on disk: whole files, parts of files, images' metadata,\nwhat was moved aside, and how much of it no image needs.",
		Example: "  cfs-fuse cache du",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.open()
			if err != nil {
				return err
			}
			defer s.Close()
			u, err := s.Usage(cmd.Context())
			if err != nil {
				return err
			}
			return f.print(cmd.OutOrStdout(), u, func(out io.Writer) error {
				w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
				fmt.Fprintf(w, "whole files\t%s\t%d files\n", size(u.ContentBytes), u.Contents)
				fmt.Fprintf(w, "parts of files\t%s\t\n", size(u.StagedBytes))
				fmt.Fprintf(w, "metadata\t%s\t%d images\n", size(u.ImageBytes), len(u.Images))
				fmt.Fprintf(w, "moved aside\t%s\t\n", size(u.AsideBytes))
				fmt.Fprintf(w, "other programs' objects\t%s\t\n", size(u.ForeignBytes))
				fmt.Fprintf(w, "together\t%s\t\n", size(u.Total))
				fmt.Fprintf(w, "needed by no image\t%s\t'cfs-fuse cache gc' removes it\n", size(u.UnneededBytes))
				fmt.Fprintf(w, "free on the filesystem\t%s\t\n", size(u.FreeBytes))
				return w.Flush()
			})
		},
	}
}

func newCacheGc(f *cacheFlags) *cobra.Command {
	var o cache.CollectOptions
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what no image needs, and bring the store within a budget",
		Long: `Remove files that no image in the store needs, and what was moved aside. With
--store-size or --store-free also evict images until the store is within that
budget: the least recently used give up their data first and are lazy again, then
their metadata go too. What is in use or pinned stays; the exit code is 1 if the
budget cannot be kept for it.`,
		Example: "  cfs-fuse cache gc\n  cfs-fuse cache gc --store-size 20G --store-free 5G\n  cfs-fuse cache gc --store-size 10G --dry-run",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Unneeded = true
			return f.collect(cmd, o)
		},
	}
	addBudget(cmd, &o.Budget)
	cmd.Flags().BoolVar(&o.DryRun, "dry-run", false, "remove nothing, say what would be")
	return cmd
}

func (f *cacheFlags) collect(cmd *cobra.Command, o cache.CollectOptions) error {
	s, err := f.open()
	if err != nil {
		return err
	}
	defer s.Close()
	return f.collectIn(cmd, s, o)
}

func (f *cacheFlags) collectIn(cmd *cobra.Command, s *cache.Store, o cache.CollectOptions) error {
	res, err := s.Collect(cmd.Context(), o)
	if err != nil {
		return err
	}
	err = f.print(cmd.OutOrStdout(), res, func(w io.Writer) error {
		would := ""
		if o.DryRun {
			would = "would have "
		}
		for _, d := range res.Evicted {
			fmt.Fprintf(w, "%smade lazy again %s\n", would, d)
		}
		for _, d := range res.Removed {
			fmt.Fprintf(w, "%sremoved %s\n", would, d)
		}
		_, err := fmt.Fprintf(w, "%sfreed %s of %s\n", would, size(res.Freed), size(res.Before))
		return err
	})
	if err == nil && res.Over > 0 {
		err = hint.Wrap(fmt.Errorf("the store is %s over its budget: the rest is in use or pinned", size(res.Over)),
			"unmount or unpin images ('cfs-fuse cache ls' says which)")
	}
	return err
}

func newCacheRm(f *cacheFlags) *cobra.Command {
	return &cobra.Command{
		Use:   "rm IMAGE...",
		Short: "Remove images, and what only they need",
		Long: `Remove images from the store with all that no other image needs. An image that is
in use or pinned is not removed, and then none of those named is.`,
		Example: "  cfs-fuse cache rm registry.example.com/debian:12\n  cfs-fuse cache rm 9f3c2a",
		Args:    someArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := f.open()
			if err != nil {
				return err
			}
			defer s.Close()
			images, err := find(s, args)
			if err != nil {
				return err
			}
			err = f.collectIn(cmd, s, cache.CollectOptions{Remove: images})
			switch {
			case errors.Is(err, cache.ErrInUse):
				err = hint.Wrap(err, "unmount it everywhere first")
			case errors.Is(err, cache.ErrPinned):
				err = hint.Wrap(err, "run 'cfs-fuse cache unpin' first")
			}
			return err
		},
	}
}

func newCachePin(f *cacheFlags) *cobra.Command {
	return f.eachImage("pin", "Keep images whatever happens", `Keep images, and all they need, from being evicted or removed until 'cfs-fuse
cache unpin'. What is not local yet comes when it is mounted.`, (*cache.Store).Pin)
}

func newCacheUnpin(f *cacheFlags) *cobra.Command {
	return f.eachImage("unpin", "Keep images no longer", "End what 'cfs-fuse cache pin' began.", (*cache.Store).Unpin)
}

func (f *cacheFlags) eachImage(name, short, long string, do func(*cache.Store, image.Digest) error) *cobra.Command {
	return &cobra.Command{
		Use:     name + " IMAGE...",
		Short:   short,
		Long:    long,
		Example: "  cfs-fuse cache " + name + " registry.example.com/debian:12",
		Args:    someArgs("IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := f.open()
			if err != nil {
				return err
			}
			defer s.Close()
			images, err := find(s, args)
			if err != nil {
				return err
			}
			done := []string{}
			for _, d := range images {
				if err := do(s, d); err != nil {
					return err
				}
				done = append(done, d.String())
			}
			return f.print(cmd.OutOrStdout(), done, func(io.Writer) error { return nil })
		},
	}
}
