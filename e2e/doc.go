// Package e2e runs the cfs-fuse binary against real registries, real images
// and the real kernel, and looks at what comes out from outside: mounts,
// processes, bytes on the wire, trees. It tests no package by itself; all code
// is in the tests and, for the images, in the package images.
//
// Root and the Debian packages that images.Packages names are needed. A test
// that cannot run fails. Whatever a run leaves behind (a mount, a loop device,
// a process of the binary) fails the run, is named and then cleaned.
//
//	CFS_FUSE_BIN        the binary to test (default: built from ./cmd/cfs-fuse)
//	CFS_FUSE_E2E_CACHE  where the images are kept (package images says more)
//
// With -short the loops under load are shorter; nothing is left out.
package e2e
