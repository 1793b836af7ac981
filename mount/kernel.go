package mount

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// kernelMount builds the kernel's mount of a composefs image over a folder of
// objects, visible nowhere yet. With a digest the kernel must vouch that the
// image has that fs-verity digest, and overlayfs checks the one of each object
// that is opened. A nil error promises that a file of the image was opened and
// read through the mount, or with an upper folder through one without it.
func kernelMount(imagePath, objects string, digest []byte, view shownView) (*os.File, error) {
	// All that follows uses this descriptor, so that the image that is measured
	// is the one that is mounted.
	image, err := os.Open(imagePath)
	if err != nil {
		return nil, fmt.Errorf("mount the sealed image: %w", err)
	}
	defer image.Close()
	if digest != nil {
		if err := checkImage(image, digest); err != nil {
			return nil, err
		}
	}
	r, err := erofs.OpenFile(kmount.Path(image))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", imagePath, err)
	}
	defer r.Close()
	build := func(view shownView) (*os.File, error) {
		lower, err := view.erofs(kmount.Path(image), !r.Header().HasACL)
		if err != nil {
			return nil, err
		}
		defer lower.Close()
		// Mount tables show the image, or as much of its path as they can.
		o := overlay{source: imagePath[max(0, len(imagePath)-kmount.MaxString):], lower: lower, objects: []string{objects}, enforce: digest != nil}
		view.apply(&o)
		return o.mount()
	}
	// What is tried must not be hidden by what is in the upper folder.
	tried := view
	tried.Upper, tried.Work = "", ""
	m, err := build(tried)
	if err != nil {
		return nil, view.withContext(err)
	}
	if err := probe(m, r); err != nil {
		m.Close()
		return nil, fmt.Errorf("try the kernel mount of %s: %w", imagePath, err)
	}
	if view.Upper == "" {
		return m, nil
	}
	m.Close()
	return build(view)
}

// erofsMount mounts the image from its file, or from a loop device where the
// kernel cannot (ENOTBLK before Linux 6.12).
func erofsMount(imagePath string, noACL bool) (*os.File, error) {
	params := []kmount.Param{kmount.Flag("ro")}
	if noACL {
		params = append(params, kmount.Flag("noacl"))
	}
	m, err := kmount.New("erofs", unix.MOUNT_ATTR_RDONLY, append(params, kmount.String("source", imagePath))...)
	if !errors.Is(err, unix.ENOTBLK) {
		return m, err
	}
	dev, err := loopDevice(imagePath)
	if err != nil {
		return nil, err
	}
	defer dev.Close() // autoclear: the mount alone keeps it
	return kmount.New("erofs", unix.MOUNT_ATTR_RDONLY, append(params, kmount.String("source", dev.Name()))...)
}

func escapeLower(path string) string {
	var b []byte
	for i := range len(path) {
		if path[i] == ':' || path[i] == '\\' {
			b = append(b, '\\')
		}
		b = append(b, path[i])
	}
	return string(b)
}

// probe reads one byte of the first file of the image that has an object.
// Mounting succeeds also where every open would fail (overlayfs with verity on
// a kernel without fs-verity, a missing folder of objects).
func probe(m *os.File, r *erofs.Reader) error {
	path, err := firstExternal(r)
	if err != nil || path == "" {
		return err
	}
	return readByte(m, path)
}

// errFound ends a walk.
var errFound = errors.New("found")

// firstExternal returns the path, without a leading slash, of some regular
// file whose bytes lie in an object, or "".
func firstExternal(r *erofs.Reader) (string, error) {
	found := ""
	err := r.Walk(func(path string, ino erofs.Inode) error {
		if !ino.External() {
			return nil
		}
		found = strings.TrimPrefix(path, "/")
		return errFound
	})
	if err == errFound {
		err = nil
	}
	return found, err
}
