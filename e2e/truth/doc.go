// Package truth compares what cfs-fuse shows of an image with what others make
// of it, attribute by attribute, for images that are made to be difficult
// (cases_test.go). All code is in the tests.
//
// The same layers are
//
//	umoci      unpacked by umoci, whiteouts and all: the reference
//	overlayfs  unpacked by umoci each by itself, and stacked by the kernel
//	fuse       mounted by cfs-fuse, served by its FUSE, each byte fetched when it is read
//	hybrid     the same with the kernel's mount over FUSE's objects, if this cfs-fuse has it
//	kernel     the mount that the swap puts in place of either
//	listing    what 'cfs-fuse erofs dump' says of the sealed image, without a mount
//
// and compared by type, mode, owner, size, link count, device number, mtime to
// the nanosecond, xattrs (ACLs and capabilities are xattrs), symlink target,
// content, the completeness of listings, and which names share an inode; and
// inode numbers before the swap with those after.
//
// docs/truth.md is the table of it. 'make truth' writes it, and the test fails
// when it is not what was found. The cases that are marked for it run in the
// machine of e2e/vm too, with fs-verity enforced.
//
// Root and umoci are needed.
package truth
