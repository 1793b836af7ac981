package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

const verifyHelp = `Compute the chain of digests that leads from an image's reference to the bytes
that programs read, and print it as a tree: what was proven now, what was not and
why, and what is wrong. IMAGE is a source that was mounted before, or "sha256:"
and the digest of a manifest in the store. Nothing is changed.

Whole layers, which a DiffID (the digest of the uncompressed layer) needs, are
read from local sources, and with --blobs from registries too. Without, the DiffID
of an ordinary layer, and of one that Podman's tools wrote as zstd:chunked, is proven by
putting the layer together from the files in the store.

The exit code is 1 if something is wrong.`

func newVerify(g *global) *cobra.Command {
	var o mount.VerifyOptions
	var digest string
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "verify [flags] MOUNTPOINT|IMAGE",
		Short:   "Prove an image from its manifest to its bytes",
		Long:    verifyHelp,
		Example: "  cfs-fuse verify /mnt\n  cfs-fuse verify --blobs registry.example.com/debian:12",
		Args:    exactArgs("MOUNTPOINT or IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if digest != "" {
				var err error
				if o.Digest, err = toc.ParseDigest("sha256:" + strings.TrimPrefix(digest, "sha256:")); err != nil {
					return usageError{fmt.Errorf("--digest: %w", err)}
				}
			}
			name := args[0]
			s, err := mount.Query(cmd.Context(), g.runtimeDir, name)
			switch {
			case err == nil && s.ManifestDigest == "":
				return fmt.Errorf("%s: mounted from %s, which has no manifest to begin with", name, s.Source)
			case err == nil:
				o.Mountpoint, name = s.Mountpoint, s.Source
				if !cmd.Flags().Changed("root") {
					o.Root = s.Root
				}
			case strings.HasPrefix(name, "/") || strings.HasPrefix(name, "."):
				return err // no source begins like that
			}
			top, err := mount.Verify(cmd.Context(), name, o)
			if err != nil {
				return err
			}
			out := cmd.OutOrStdout()
			if asJSON {
				enc := json.NewEncoder(out)
				enc.SetIndent("", "  ")
				err = enc.Encode(top)
			} else {
				err = printChain(out, top)
			}
			if n := top.Count(mount.Wrong); err == nil && n > 0 {
				err = fmt.Errorf("%s: %d links of the chain are wrong", args[0], n)
			}
			return err
		},
	}
	fl := cmd.Flags()
	fl.StringVar(&o.Root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVar(&o.Source.Platform, "platform", "", "`os/arch` of a multi-platform image (default this machine's)")
	fl.BoolVar(&o.Source.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to registries")
	fl.StringVar(&o.Source.HostsDir, "hosts-dir", "/etc/containerd/certs.d", "`folder` of containerd's hosts.toml files")
	fl.StringVar(&digest, "digest", "", "fs-verity `SHA256` digest that the sealed image must have")
	fl.BoolVar(&o.Blobs, "blobs", false, "read whole layers from registries too, for their digests and DiffIDs")
	fl.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// printChain prints a link and what rests on it as a tree.
func printChain(w io.Writer, top *mount.Link) error {
	var b strings.Builder
	var line func(l *mount.Link, first, rest string)
	line = func(l *mount.Link, first, rest string) {
		fmt.Fprintf(&b, "%s%-8s  %s: %s\n", first, l.Finding, l.What, oneLine(l.Why))
		for i, c := range l.Links {
			if i == len(l.Links)-1 {
				line(c, rest+"└─ ", rest+"   ")
			} else {
				line(c, rest+"├─ ", rest+"│  ")
			}
		}
	}
	line(top, "", "")
	fmt.Fprintf(&b, "%d proven, %d unproven, %d wrong\n", top.Count(mount.Proven), top.Count(mount.Unproven), top.Count(mount.Wrong))
	_, err := io.WriteString(w, b.String())
	return err
}
