// Package erofs writes composefs EROFS images and reads EROFS images. It knows
// trees, inodes and bytes; of container images, registries, object stores and
// mounts it knows nothing, and it neither compresses nor computes digests.
//
// Write makes of a tree of Nodes the image that mkcomposefs makes of it, bit
// for bit; ParseDump reads such a tree from composefs-dump text, Load and
// WriteDump turn an image back. A Reader answers a filesystem's questions from
// an image that is mapped into memory. Section numbers in comments ("2.9") are
// those of the project's composefs format document; the on-disk structures are
// those of fs/erofs/erofs_fs.h in Linux.
//
// A composefs image, all numbers little endian, blocks of 4096 bytes:
//
//	     0  composefs header, 32 bytes: magic 0xd078629a, 1, flags (1: has ACLs), version
//	  1024  EROFS superblock, 128 bytes: magic 0xe0f5e1e2, features, root nid, times, …
//	  1152  inodes, each at a multiple of 32 bytes (nid = position / 32) and
//	        followed by its xattrs, then its tail: inline data, the last entries
//	        of a directory, or a chunk map
//	        shared xattrs: pairs of name and value that several inodes have
//	        zeros to a multiple of 4096
//	        data blocks: directories, what does not fit inline
//
//	inode, compact (32 bytes) or extended (64 bytes):
//	     0 u16 format: form, layout       0 u16 format        24 u32 uid
//	     2 u16 xattr count                2 u16 xattr count   28 u32 gid
//	     4 u16 mode                       4 u16 mode          32 u64 mtime
//	     6 u16 link count                 8 u64 size          40 u32 nanoseconds
//	     8 u32 size                      16 u32 block, chunk  44 u32 link count
//	    16 u32 block, chunk format,            format, device
//	           device                    20 u32 number
//	    20 u32 number
//	    24 u16 uid, u16 gid (mtime is the superblock's)
//
// An external file has no data in the image: its chunk map is one hole, and
// two xattrs tell overlayfs where its object is ("trusted.overlay.redirect")
// and which fs-verity digest it has ("trusted.overlay.metacopy"). A whiteout
// of the tree becomes an empty regular file with marker xattrs, xattrs of the
// tree that begin "trusted.overlay." are escaped, and real whiteouts "00" to
// "ff" in the root hide the folders of an object store beneath.
package erofs
