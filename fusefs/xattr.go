package fusefs

import (
	"errors"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

// trusted is the prefix of attributes that need CAP_SYS_ADMIN (xattr(7)).
const trusted = "trusted."

func (f *fileSystem) GetXAttr(_ <-chan struct{}, h *fuse.InHeader, name string, dest []byte) (uint32, fuse.Status) {
	f.count(opGetXAttr)
	ino, st := f.inode(h.NodeId)
	if !st.Ok() {
		return 0, st
	}
	value, err := f.image.Xattr(ino, erofs.StoredXattr(name))
	switch {
	case errors.Is(err, erofs.ErrNoXattr):
		return 0, fuse.ENOATTR
	case err != nil:
		return 0, f.fail(ino.NID, "", err)
	}
	return answer(value, dest)
}

func (f *fileSystem) ListXAttr(_ <-chan struct{}, h *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	f.count(opListXAttr)
	ino, st := f.inode(h.NodeId)
	if !st.Ok() {
		return 0, st
	}
	all, err := f.image.Xattrs(ino)
	if err != nil {
		return 0, f.fail(ino.NID, "", err)
	}
	var list []byte
	for _, x := range all {
		// xattr(7): trusted attributes are invisible without CAP_SYS_ADMIN.
		// The request carries no capabilities; the user stands in for them.
		if name, ok := erofs.VisibleXattr(x.Name); ok && (h.Uid == 0 || !strings.HasPrefix(name, trusted)) {
			list = append(append(list, name...), 0)
		}
	}
	return answer(list, dest)
}

// answer copies value into dest. An empty dest asks for the size alone, a
// short one gets ERANGE (getxattr(2)).
func answer(value, dest []byte) (uint32, fuse.Status) {
	if len(dest) > 0 && len(dest) < len(value) {
		return uint32(len(value)), fuse.Status(unix.ERANGE)
	}
	copy(dest, value)
	return uint32(len(value)), fuse.OK
}
