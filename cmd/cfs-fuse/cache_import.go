package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/cache"
)

func newCacheImport(f *cacheFlags) *cobra.Command {
	var from string
	cmd := &cobra.Command{
		Use:   "import --from DIR",
		Short: "Take files into the store that are on this machine already",
		Long: `Take the content of files into the store, so that images that have them need not
fetch them. DIR is a composefs object store (mkcomposefs --digest-store), a
composefs-rs or ostree repository (its folder objects is taken; compressed objects
are not), or any unpacked tree. Blocks are shared with the source where the
filesystem can, and copied elsewhere; an object whose bytes are not what it is
called is left out, and the exit code is 1.

Until an image that needs them is mounted, 'cfs-fuse cache gc' removes them.`,
		Example: "  cfs-fuse cache import --from /var/lib/composefs/objects\n  cfs-fuse cache import --from /ostree/repo",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if from == "" {
				return usageError{errors.New("--from is missing")}
			}
			if fi, err := os.Stat(from); err != nil || !fi.IsDir() {
				return errors.Join(err, usageError{fmt.Errorf("--from %s: not a folder", from)})
			}
			log, err := f.g.logger()
			if err != nil {
				return err
			}
			s, err := cache.Open(f.root, cache.Options{Logger: log})
			if err != nil {
				return err
			}
			defer s.Close()
			var mu sync.Mutex
			left := 0
			res, err := s.Import(cmd.Context(), from, func(path string, err error) {
				mu.Lock()
				defer mu.Unlock()
				left++
				fmt.Fprintf(cmd.ErrOrStderr(), "cfs-fuse: left out: %s: %s\n", path, oneLine(err.Error()))
			})
			if err != nil {
				return err
			}
			err = f.print(cmd.OutOrStdout(), res, func(w io.Writer) error {
				_, err := fmt.Fprintf(w, "%d files, %d of them new: %s, %s by sharing blocks\n", res.Files, res.Added, size(res.Bytes), size(res.Cloned))
				return err
			})
			if err == nil && left > 0 {
				err = fmt.Errorf("import: %d files were left out", left)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&from, "from", "", "`folder` to take files from")
	return cmd
}
