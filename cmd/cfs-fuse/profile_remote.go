package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/repository"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const noProfileHint = "make one with 'cfs-fuse record SOURCE -- COMMAND', or mount the image and run its program"

// readProfileFile reads a profile from a file, or from in if it is "-".
func readProfileFile(path string, in io.Reader) (*image.Profile, error) {
	if path != "-" || in == nil {
		f, err := os.Open(path)
		if err != nil {
			return nil, hint.Wrap(fmt.Errorf("access profile: %w", err), noProfileHint)
		}
		defer f.Close()
		in = f
	}
	raw, err := io.ReadAll(io.LimitReader(in, image.MaxProfileSize+1))
	if err != nil {
		return nil, fmt.Errorf("read access profile %s: %w", path, err)
	}
	p, err := image.ParseProfile(raw)
	if err != nil {
		return nil, hint.Wrap(fmt.Errorf("%s: %w", path, err), "take what 'cfs-fuse record' or 'cfs-fuse profile' wrote")
	}
	return p, nil
}

// findProfile looks for the access profile of an image in the store, then
// among what is attached to it where it comes from; nil if there is none.
func findProfile(ctx context.Context, root, source string, manifest digest.Digest, o fetcher.Options) (*image.Profile, error) {
	sum, err := toc.ParseDigest(manifest.String())
	if err != nil {
		return nil, err
	}
	repositoryName, err := mount.Repository(source)
	if err != nil {
		return nil, err
	}
	stored, err := mount.StoredProfile(root, sum, repositoryName)
	if err != nil || stored != nil && stored.Image == sum {
		return stored, err
	}
	attached, err := pullProfile(ctx, source, manifest, o)
	if attached == nil && (err == nil || stored != nil) {
		return stored, nil // of another image of the repository, or none
	}
	return attached, err
}

// pullProfile gets the profile that is attached to an image; nil if none is,
// or none can be, as in an archive.
func pullProfile(ctx context.Context, source string, manifest digest.Digest, o fetcher.Options) (*image.Profile, error) {
	name, err := fetcher.ParseName(source)
	if err != nil {
		return nil, err
	}
	if name.Kind != "docker" && name.Kind != "oci" {
		return nil, nil
	}
	r, err := repository.Open(source, false, o)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return mount.PullProfile(ctx, r, manifest)
}

// resolved asks what a source stands for on a platform.
func resolved(ctx context.Context, source string, o fetcher.Options) (ocispec.Descriptor, error) {
	src, err := fetcher.OpenSource(source, o)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	defer src.Close()
	m, err := src.Resolve(ctx)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return ocispec.Descriptor{MediaType: m.MediaType(), Digest: digest.Digest(m.Digest.String()), Size: int64(len(m.Raw))}, nil
}

type profileRemote struct {
	root   string
	source fetcher.Options
}

func (f *profileRemote) define(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVar(&f.source.Platform, "platform", "", "`os/arch` of a multi-platform image (default this machine's)")
	addRegistryFlags(cmd, &f.source)
}

func newProfilePush(g *global) *cobra.Command {
	var f profileRemote
	cmd := &cobra.Command{
		Use:   "push [flags] SOURCE [FILE]",
		Short: "Attach an access profile to an image in its registry",
		Long: `Attach the access profile in FILE ('-' for standard input), or the one that the
store has for SOURCE, to the image SOURCE, where it is: in its registry (docker://HOST/NAME:TAG), by
the referrers API or the tag that stands in for it, or in an OCI image layout (oci:DIR:TAG).
'cfs-fuse mount --profile auto' and 'cfs-fuse convert --profile auto' find it there.`,
		Example: `  cfs-fuse record docker://registry.example.com/app:1 -- app --version
  cfs-fuse profile push docker://registry.example.com/app:1`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("SOURCE is missing")}
			}
			return cobra.MaximumNArgs(2)(nil, args)
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			ctx := cmd.Context()
			if f.source.Logger, err = g.logger(); err != nil {
				return err
			}
			subject, err := resolved(ctx, args[0], f.source)
			if err != nil {
				return err
			}
			var p *image.Profile
			if len(args) == 2 {
				p, err = readProfileFile(args[1], cmd.InOrStdin())
			} else {
				p, err = f.stored(args[0], subject.Digest)
			}
			if err != nil {
				return err
			}
			r, err := repository.Open(args[0], true, f.source)
			if err != nil {
				return err
			}
			defer r.Close()
			d, err := mount.PushProfile(ctx, r, subject, p)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d accesses attached to %s as %s\n", len(p.Accesses), subject.Digest, d.Digest)
			return err
		},
	}
	f.define(cmd)
	return cmd
}

// stored is the profile that the store has for an image, or for its repository.
func (f *profileRemote) stored(source string, manifest digest.Digest) (*image.Profile, error) {
	sum, err := toc.ParseDigest(manifest.String())
	if err != nil {
		return nil, err
	}
	name, err := mount.Repository(source)
	if err != nil {
		return nil, err
	}
	root, err := filepath.Abs(f.root)
	if err != nil {
		return nil, err
	}
	p, err := mount.StoredProfile(root, sum, name)
	if err == nil && p == nil {
		err = hint.Wrap(fmt.Errorf("no access profile of %s in %s", source, root), noProfileHint)
	}
	return p, err
}

func newProfilePull(g *global) *cobra.Command {
	var f profileRemote
	var store bool
	cmd := &cobra.Command{
		Use:   "pull [flags] SOURCE",
		Short: "Print the access profile that is attached to an image",
		Long: `Print, as JSON, the newest access profile that is attached to the image SOURCE in
its registry or layout, or with --import put it into the store.`,
		Example: "  cfs-fuse profile pull docker://registry.example.com/app:1 > app.json",
		Args:    exactArgs("SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			ctx := cmd.Context()
			if f.source.Logger, err = g.logger(); err != nil {
				return err
			}
			subject, err := resolved(ctx, args[0], f.source)
			if err != nil {
				return err
			}
			p, err := pullProfile(ctx, args[0], subject.Digest, f.source)
			if err != nil {
				return err
			}
			if p == nil {
				return hint.Wrap(fmt.Errorf("no access profile is attached to %s (%s)", args[0], subject.Digest), "attach one with 'cfs-fuse profile push'")
			}
			raw, err := p.Encode()
			if err != nil {
				return err
			}
			if !store {
				_, err = cmd.OutOrStdout().Write(raw)
				return err
			}
			root, err := filepath.Abs(f.root)
			if err != nil {
				return err
			}
			if _, err = mount.ImportProfile(root, raw); err == nil {
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "%d accesses of %s (%s)\n", len(p.Accesses), p.Image, p.Repository)
			}
			return err
		},
	}
	f.define(cmd)
	cmd.Flags().BoolVar(&store, "import", false, "put it into the store and print nothing of it")
	return cmd
}

func newProfileMerge() *cobra.Command {
	return &cobra.Command{
		Use:   "merge FILE...",
		Short: "Make one access profile of several",
		Long: `Print one access profile, as JSON, of those in the FILEs: of several runs of an
image, say. Every part that any of them has is in it, in the order of how early it came in its run.`,
		Example: "  cfs-fuse profile merge start.json serve.json > app.json",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageError{errors.New("FILE is missing")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			var all []*image.Profile
			for _, path := range args {
				p, err := readProfileFile(path, cmd.InOrStdin())
				if err != nil {
					return err
				}
				all = append(all, p)
			}
			raw, err := image.MergeProfiles(all...).Encode()
			if err == nil {
				_, err = cmd.OutOrStdout().Write(raw)
			}
			return err
		},
	}
}

func newProfileShow(g *global) *cobra.Command {
	var o mount.Options
	cmd := &cobra.Command{
		Use:   "show [flags] FILE|MOUNTPOINT|SOURCE",
		Short: "Print an access profile for people",
		Long: `Print what an access profile has, a line for each part that was read, in the order
of the first reads: offset, length and name. The profile is in FILE, of what is
mounted at MOUNTPOINT, or the store's for SOURCE. Names are known of images that the store
has; of others, the digest of the content is shown.`,
		Args: exactArgs("FILE, MOUNTPOINT or SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Runtime = g.runtimeDir
			var err error
			if o.Root, err = filepath.Abs(o.Root); err != nil {
				return err
			}
			var p *image.Profile
			if fi, serr := os.Stat(args[0]); serr == nil && fi.Mode().IsRegular() || args[0] == "-" {
				p, err = readProfileFile(args[0], cmd.InOrStdin())
			} else {
				var raw []byte
				if raw, err = mount.ExportProfile(cmd.Context(), args[0], o); err == nil {
					p, err = image.ParseProfile(raw)
				}
			}
			if err != nil {
				return err
			}
			names, err := mount.ContentNames(o.Root, p.Image)
			if err != nil {
				return err
			}
			return printProfile(cmd.OutOrStdout(), p, names)
		},
	}
	cmd.Flags().StringVar(&o.Root, "root", defaultRoot(), "`folder` of the store")
	cmd.Flags().StringVar(&o.Source.Platform, "platform", "", "`os/arch` that SOURCE was mounted with")
	return cmd
}

func printProfile(w io.Writer, p *image.Profile, names map[image.Digest]string) error {
	var b bytes.Buffer
	contents, sum := map[image.Digest]bool{}, int64(0)
	for _, a := range p.Accesses {
		contents[a.Content] = true
		sum += a.N
	}
	fmt.Fprintf(&b, "image       %s\nrepository  %s\n%d accesses, %s of %d files\n\n", p.Image, p.Repository, len(p.Accesses), size(sum), len(contents))
	for _, a := range p.Accesses {
		name, ok := names[a.Content]
		if !ok {
			name = a.Content.String()
		}
		fmt.Fprintf(&b, "%12d %10s  %s\n", a.Off, size(a.N), name)
	}
	_, err := w.Write(b.Bytes())
	return err
}
