package mount

import (
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/image"
)

// imageFormat is the composefs version of images made from OCI images, the
// "erofs.v1" of the composefs sealing specification; with more xattrs on a file
// than the C library takes where a layer has them.
var imageFormat = erofs.Options{MinVersion: 1, MaxVersion: 1, LargeXattrs: true}

// lazyTree turns a merged tree into the one that lazy.erofs is written from.
//
// A file refers to its content digest, in the redirect and in place of its
// fs-verity digest. Both have the size that the sealed image's values will
// have, and equal contents have equal values in both, so that each inode of
// the sealed image lies where it lies here: nids survive the swap. (A digest
// of zeros would not do: it would be one xattr shared by all files, where the
// sealed image has one of its own in each.)
func lazyTree(t *image.Tree) *erofs.Node {
	made := map[*image.Node]*erofs.Node{} // those that hard links refer to
	linked := map[*image.Node]bool{}
	walkImage(t.Root, func(n *image.Node) {
		if n.Link != nil {
			linked[n.Link] = true
		}
	})
	var links []*erofs.Node
	var targets []*image.Node
	var convert func(n *image.Node) *erofs.Node
	convert = func(n *image.Node) *erofs.Node {
		if n.Link != nil {
			e := &erofs.Node{Name: n.Name}
			links, targets = append(links, e), append(targets, n.Link)
			return e
		}
		e := &erofs.Node{
			Name: n.Name, Mode: n.Mode, UID: n.UID, GID: n.GID, Nlink: n.Nlink, Rdev: n.Rdev,
			Size: uint64(n.Size), MtimeSec: n.MtimeSec, MtimeNsec: n.MtimeNsec, Target: n.Target,
		}
		if len(n.Xattrs) > 0 {
			e.Xattrs = make([]erofs.Xattr, len(n.Xattrs))
			for i, x := range n.Xattrs {
				e.Xattrs[i] = erofs.Xattr{Name: x.Name, Value: x.Value}
			}
		}
		if !n.Content.IsZero() {
			e.Target = n.Content.Path()
			e.Digest = n.Content[:]
		}
		if len(n.Children) > 0 {
			e.Children = make([]*erofs.Node, len(n.Children))
			for i, c := range n.Children {
				e.Children[i] = convert(c)
			}
		}
		if linked[n] {
			made[n] = e
		}
		return e
	}
	root := convert(t.Root)
	for i, e := range links {
		e.Link = made[targets[i]]
	}
	return root
}

func walkImage(n *image.Node, f func(*image.Node)) {
	f(n)
	for _, c := range n.Children {
		walkImage(c, f)
	}
}
