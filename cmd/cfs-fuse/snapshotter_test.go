package main

import (
	"testing"

	"github.com/spf13/cobra"
)

// The flags that the snapshotter shares with mount, and does not show, have
// values that are allowed.
func TestSnapshotterFlags(t *testing.T) {
	g := &global{runtimeDir: t.TempDir(), logLevel: "info", logFormat: "text"}
	var f snapshotterFlags
	f.define(&cobra.Command{})
	if err := f.check(g); err != nil {
		t.Error(err)
	}
}
