package main

import (
	"github.com/spf13/cobra"

	"github.com/cfs-fuse/cfs-fuse/cache"
)

// addBudget gives a command the flags of the store's budget.
func addBudget(cmd *cobra.Command, b *cache.Budget) {
	fl := cmd.Flags()
	fl.Var((*bytesFlag)(&b.Size), "store-size", "keep the store at most so large, as 20GiB (`bytes`), by evicting images that are not in use; 0: any size")
	fl.Var((*bytesFlag)(&b.Free), "store-free", "keep so much of the store's filesystem free (`bytes`)")
}
