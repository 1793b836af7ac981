// Package version knows what program this is. Its two variables are set when
// the program is linked (Makefile); without that it is what the go command has
// noted.
package version

import (
	"runtime"
	"runtime/debug"
)

// Set by -ldflags "-X …".
var (
	version  string
	revision string
)

// An Info says what program this is. What is not known is "unknown".
type Info struct {
	Version  string `json:"version"`  // without a "v" in front
	Revision string `json:"revision"` // of the source
	Go       string `json:"go"`       // version of the compiler
	Platform string `json:"platform"` // os/arch
}

// Get returns what is known of the program that runs.
func Get() Info {
	i := Info{version, revision, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
	if build, ok := debug.ReadBuildInfo(); ok {
		if i.Version == "" {
			i.Version = build.Main.Version
		}
		for _, s := range build.Settings {
			if s.Key == "vcs.revision" && i.Revision == "" {
				i.Revision = s.Value
			}
		}
	}
	if i.Version == "" {
		i.Version = "unknown"
	}
	if i.Revision == "" {
		i.Revision = "unknown"
	}
	return i
}
