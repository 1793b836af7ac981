// Package importgraph holds the table of which of our packages may import
// which (ARCHITECTURE.md draws it); its test compares the sources with it. It
// has no code that the program uses.
package importgraph

// Allowed gives, for each of our packages, by its path below the module, the
// packages of ours that it may import besides internal/…. A package that is
// not listed may import none, and "*" stands for any.
var Allowed = map[string][]string{
	"image/toc":         {},
	"image/zstdchunked": {},
	"image/tarindex":    {"image/toc"},
	"image":             {"image/toc"},
	"erofs":             {},
	"verity":            {},
	"metrics":           {},
	"fetcher":           {"image", "image/toc", "metrics"},
	"cache":             {"image", "verity", "metrics"},
	"fusefs":            {"erofs", "metrics"},
	"mount":             {"image/toc", "image/tarindex", "image", "erofs", "verity", "metrics", "fetcher", "cache", "fusefs"},
	"convert":           {"image", "image/toc", "image/zstdchunked", "verity", "fetcher", "mount"},
	"snapshotter":       {"mount", "metrics"},
	"cmd/cfs-fuse":      {"*"},
	"e2e":               {"*"},
}
