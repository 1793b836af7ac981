//go:build docs

package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/metrics"
)

// With the build tag docs the program can write its own documentation; the one
// that is installed cannot.
func init() {
	extra = append(extra, func() *cobra.Command {
		docs := &cobra.Command{Use: "docs", Hidden: true}
		docs.AddCommand(
			&cobra.Command{Use: "metrics FILE", Args: exactArgs("FILE"), RunE: func(_ *cobra.Command, args []string) error {
				return os.WriteFile(args[0], []byte(metrics.Markdown()), 0o644)
			}},
			&cobra.Command{Use: "man DIR", Args: exactArgs("DIR"), RunE: func(_ *cobra.Command, args []string) error {
				return writeMan(args[0])
			}},
		)
		return docs
	})
}
