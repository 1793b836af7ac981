package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/progress"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// A checkReport is what 'cache check --json' prints.
type checkReport struct {
	*cache.Checked
	Found   []cache.Problem `json:"found"`
	Fetched []string        `json:"fetched"` // digests of contents that were fetched again
	Lost    []string        `json:"lost"`    // of contents that were moved aside and not fetched again
}

func newCacheCheck(f *cacheFlags) *cobra.Command {
	var o cache.CheckOptions
	var repair, quiet bool
	var opts mount.Options
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Check the store, and repair it",
		Long: `Check that the store holds what its names say: its layout, the two names of each
file, the maps of files of which a part is there, and each image's trees. With
--read every file is read and compared with its digest too.

What is damaged is moved to the store's folder quarantine, so that mounts see it
as absent and fetch it when it is read; with --repair it is fetched at once, from
the sources that the images were mounted from. Live mounts go on meanwhile.

The exit code is 1 if a problem was found that is not repaired.`,
		Example: "  cfs-fuse cache check\n  cfs-fuse cache check --read --repair",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := f.open()
			if err != nil {
				return err
			}
			defer s.Close()
			o.Image = mount.CheckImage
			rep := checkReport{Found: []cache.Problem{}, Fetched: []string{}, Lost: []string{}}
			o.Report = func(p cache.Problem) { rep.Found = append(rep.Found, p) }
			bar := newBar(quiet)
			if o.Read && !quiet {
				if err := showRead(cmd.Context(), s, bar, &o); err != nil {
					return err
				}
			}
			rep.Checked, err = s.Check(cmd.Context(), o)
			bar.Done()
			if err != nil {
				return err
			}
			lost := rep.Checked.Lost
			if repair && len(lost) > 0 {
				if opts.Logger, err = f.g.logger(); err != nil {
					return err
				}
				var fetched []image.Digest
				fetched, lost, err = repairAll(cmd.Context(), s, lost, opts)
				for _, d := range fetched {
					rep.Fetched = append(rep.Fetched, d.String())
				}
			}
			for _, d := range lost {
				rep.Lost = append(rep.Lost, d.String())
			}
			if perr := f.print(cmd.OutOrStdout(), rep, rep.write); perr != nil {
				return perr
			}
			return errors.Join(err, rep.verdict(repair))
		},
	}
	fl := cmd.Flags()
	fl.BoolVar(&o.Read, "read", false, "read every file and compare its digest")
	fl.BoolVar(&repair, "repair", false, "fetch again what is damaged")
	fl.BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	fl.BoolVar(&opts.Source.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to registries")
	fl.StringVar(&opts.Source.HostsDir, "hosts-dir", "/etc/containerd/certs.d", "`folder` of containerd's hosts.toml files")
	return cmd
}

// showRead has a bar show how much of the store's bytes was read.
func showRead(ctx context.Context, s *cache.Store, bar *progress.Bar, o *cache.CheckOptions) error {
	u, err := s.Usage(ctx)
	if err != nil {
		return err
	}
	total, done := u.ContentBytes+u.StagedBytes, int64(0)
	o.Progress = func(n int64) {
		bar.Set("reading the store", progress.Bytes, done, max(done, total))
		done += n
	}
	return nil
}

func (r *checkReport) write(w io.Writer) error {
	for _, p := range r.Found {
		done := ""
		if p.Done != "" {
			done = ": " + p.Done
		}
		fmt.Fprintf(w, "%s: %s%s\n", p.Path, oneLine(p.What), done)
	}
	for _, d := range r.Fetched {
		fmt.Fprintf(w, "fetched again: %s\n", d)
	}
	_, err := fmt.Fprintf(w, "%d files, %d objects, %d parts of files, %d images, %s read: %d problems\n",
		r.Contents, r.Objects, r.Staged, r.Images, size(r.BytesRead), r.Problems)
	return err
}

// verdict is an error if something is not as it should be still.
func (r *checkReport) verdict(repair bool) error {
	left := 0
	for _, p := range r.Found {
		if p.Done == "" {
			left++
		}
	}
	switch {
	case len(r.Lost) > 0 && !repair:
		return hint.Wrap(fmt.Errorf("check: %d damaged files were moved aside", len(r.Lost)),
			"mounts fetch them when they are read; 'cfs-fuse cache check --repair' fetches what is damaged at once")
	case len(r.Lost) > 0:
		return hint.Wrap(fmt.Errorf("check: %d damaged files were moved aside and not fetched again", len(r.Lost)),
			"no image in the store needs them, or its source is not known: mount the image again")
	case left > 0:
		return fmt.Errorf("check: %d problems are left", left)
	case len(r.LostImages) > 0:
		return hint.Wrap(fmt.Errorf("check: %d damaged images were moved aside", len(r.LostImages)), "mount them again")
	case r.Problems > 0 && !repair:
		return fmt.Errorf("check: %d problems were put right", r.Problems)
	}
	return nil
}

// repairAll fetches what is lost for each image that needs some of it, from
// the first of its sources that gives it.
func repairAll(ctx context.Context, s *cache.Store, lost []image.Digest, o mount.Options) (fetched, left []image.Digest, err error) {
	sources, err := s.Sources()
	if err != nil {
		return nil, lost, err
	}
	images, err := s.ImageDigests()
	if err != nil {
		return nil, lost, err
	}
	done := map[image.Digest]bool{}
	var errs []error
	for _, d := range images {
		var last error
		for _, source := range sources[d] {
			source, platform, _ := strings.Cut(source, "\n")
			o.Source.Platform = platform
			var got []image.Digest
			got, last = mount.Repair(ctx, s, d, source, lost, o)
			for _, c := range got {
				done[c] = true
			}
			fetched = append(fetched, got...)
			if last == nil {
				break
			}
		}
		errs = append(errs, last)
	}
	for _, d := range lost {
		if !done[d] {
			left = append(left, d)
		}
	}
	return fetched, left, errors.Join(errs...)
}
