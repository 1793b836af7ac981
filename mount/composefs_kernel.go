package mount

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// ComposefsOptions say how the kernel mounts a composefs image, as the options
// of mount.composefs do.
type ComposefsOptions struct {
	// Basedirs are the folders of objects, in the order in which an object is
	// looked for. At least one.
	Basedirs []string
	// Digest, if not nil, is the fs-verity digest (32 bytes of SHA-256 or 64 of
	// SHA-512) that the image must have, and the kernel must vouch for; it
	// implies Verity Require.
	Digest []byte
	// Verity is Require: every file needs a digest in the image that its object
	// has, enforced by the kernel at each open; Try: the same if the kernel and
	// the objects' filesystem know fs-verity, else nothing is enforced; or Off
	// (also when empty).
	Verity Policy
	// Upper and Work, both or none, make the mount writable: overlayfs's
	// upperdir and workdir.
	Upper, Work string
	// ReadOnly makes the mount read-only even with Upper.
	ReadOnly bool
	// IDMap, if not empty, maps the image's user and group IDs, as View.IDMap
	// does.
	IDMap string
}

// Composefs has the kernel mount the composefs image at imagePath over the
// folder mountpoint. With an error nothing is mounted. A nil error promises the
// tree, not its objects, which may come later; where fs-verity is enforced, one
// that is there was opened and read.
func Composefs(imagePath, mountpoint string, o ComposefsOptions) error {
	m, err := composefsMount(imagePath, o)
	if err != nil {
		return err
	}
	defer m.Close()
	return kmount.Attach(m, mountpoint)
}

// composefsMount builds the mount, visible nowhere yet.
func composefsMount(imagePath string, o ComposefsOptions) (*os.File, error) {
	// All that follows uses this descriptor, so that the image that is checked
	// is the one that is mounted.
	image, err := os.Open(imagePath)
	if err != nil {
		return nil, fmt.Errorf("composefs image: %w", err)
	}
	defer image.Close()
	if o.Digest != nil {
		o.Verity = Require
		if err := checkImage(image, o.Digest); err != nil {
			return nil, err
		}
	}
	r, err := erofs.OpenFile(kmount.Path(image))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", imagePath, err)
	}
	defer r.Close()
	if !r.Header().Composefs {
		return nil, fmt.Errorf("%s: not a composefs image", imagePath)
	}
	lower, err := erofsMount(kmount.Path(image), !r.Header().HasACL)
	if err != nil {
		return nil, err
	}
	defer lower.Close()
	if o.IDMap != "" {
		userns, err := openUserns(o.IDMap)
		if err != nil {
			return nil, err
		}
		defer userns.Close()
		if err := idmap(lower, userns); err != nil {
			return nil, err
		}
	}
	over := overlay{source: "composefs", lower: lower, readOnly: o.ReadOnly || o.Upper == ""}
	if over.upper, err = absolute(o.Upper); err != nil {
		return nil, err
	}
	if over.work, err = absolute(o.Work); err != nil {
		return nil, err
	}
	for _, dir := range o.Basedirs {
		abs, err := absolute(dir)
		if err != nil {
			return nil, err
		}
		over.objects = append(over.objects, abs)
	}
	if o.Verity != Require && o.Verity != Try {
		return over.mount()
	}
	over.enforce = true
	m, err := over.mountEnforced(r)
	if _, unsupported := errors.AsType[*unenforceableError](err); unsupported && o.Verity == Try {
		over.enforce = false
		return over.mount()
	}
	return m, err
}

// absolute returns a path that means something to readers of mount tables, ""
// for none.
func absolute(path string) (string, error) {
	if path == "" {
		return "", nil
	}
	return filepath.Abs(path)
}

// checkImage has the kernel tell the image's fs-verity digest. A digest that
// was computed here would say nothing of what the image holds a moment later.
// Scripts look for "Image has no fs-verity" and "Image has wrong fs-verity",
// the words of the composefs project's tool.
func checkImage(image *os.File, want []byte) error {
	alg, got, err := verity.Measure(image)
	if err == nil {
		if alg.Size() != len(want) {
			return fmt.Errorf("%s: Image has wrong fs-verity: its digest is a %v one of %d bytes, want %d bytes", image.Name(), alg, alg.Size(), len(want))
		}
		if err := verity.Compare(image.Name(), alg, want, got); err != nil {
			return fmt.Errorf("%s: Image has wrong fs-verity: %w", image.Name(), err)
		}
		return nil
	}
	none := fmt.Errorf("%s: Image has no fs-verity: %w", image.Name(), err)
	alg = verity.SHA256
	if len(want) == verity.SHA512.Size() {
		alg = verity.SHA512
	}
	computed, cerr := verity.Digest(image, alg)
	if cerr != nil {
		return errors.Join(none, cerr)
	}
	if cerr := verity.Compare(image.Name(), alg, want, computed); cerr != nil {
		return errors.Join(none, cerr)
	}
	return hint.Wrap(fmt.Errorf("%w; it has the digest, but nothing keeps it so", none),
		"enable fs-verity on the image (fsverity enable)")
}

// An overlay is an overlayfs over the EROFS mount of a composefs image.
type overlay struct {
	source      string
	lower       *os.File // the EROFS mount
	objects     []string // data-only lowers
	data        *os.File // a detached mount, as the last of them; may be nil
	upper, work string   // both or none
	context     string   // of SELinux
	readOnly    bool
	enforce     bool // verity=require
}

// mount builds the mount, visible nowhere yet. A kernel that takes no detached
// mount as a lower is given it attached, out of everybody's sight.
func (o *overlay) mount() (*os.File, error) {
	m, err := o.build()
	if refused(err, "create") {
		mounts := []*os.File{o.lower}
		if o.data != nil {
			mounts = append(mounts, o.data)
		}
		perr := kmount.InPrivate(func() (err error) { m, err = o.build(); return err }, mounts...)
		if perr == nil {
			return m, nil
		}
		err = fmt.Errorf("%w; with its lowers attached: %w", err, perr)
	}
	return m, err
}

// build is mount in the mount namespace of this thread. Kernels before 6.7
// have no lowerdir+ and datadir+; they take all lowers as one string.
func (o *overlay) build() (*os.File, error) {
	attrs := 0
	params := []kmount.Param{
		kmount.String("source", o.source),
		kmount.String("metacopy", "on"),
		kmount.String("redirect_dir", "on"),
	}
	if o.readOnly {
		attrs = unix.MOUNT_ATTR_RDONLY
		params = append(params, kmount.Flag("ro"))
	}
	if o.enforce {
		params = append(params, kmount.String("verity", "require"))
	}
	if o.context != "" {
		params = append(params, kmount.String("context", o.context))
	}
	dirs := append([]string{o.upper, o.work}, o.objects...)
	if o.data != nil {
		dirs = append(dirs, kmount.Path(o.data))
	}
	for i, dir := range dirs {
		// A longer path is taken by way of a descriptor; a short one is not,
		// as this is what mount tables show.
		if len(dir) > kmount.MaxString {
			f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
			if err != nil {
				return nil, fmt.Errorf("mount overlay: %w", err)
			}
			defer f.Close()
			dirs[i] = kmount.Path(f)
		}
	}
	upper, work, objects := dirs[0], dirs[1], dirs[2:]
	if upper != "" {
		params = append(params, kmount.String("upperdir", upper), kmount.String("workdir", work))
	}
	each := append(params[:len(params):len(params)], kmount.String("lowerdir+", kmount.Path(o.lower)))
	joined := kmount.Path(o.lower)
	for _, dir := range objects {
		each = append(each, kmount.String("datadir+", dir))
		joined += "::" + escapeLower(dir)
	}
	m, err := kmount.New("overlay", attrs, each...)
	if refused(err, "set lowerdir+") {
		m, err = kmount.New("overlay", attrs, append(params, kmount.String("lowerdir", joined))...)
	}
	return m, err
}

// refused reports whether the kernel refused a step of making a mount as
// invalid.
func refused(err error, step string) bool {
	k, ok := errors.AsType[*kmount.Error](err)
	return ok && k.Step == step && errors.Is(err, unix.EINVAL)
}

// An unenforceableError says that fs-verity cannot be enforced here, whatever
// the objects are.
type unenforceableError struct{ err error }

func (e *unenforceableError) Error() string { return e.err.Error() }
func (e *unenforceableError) Unwrap() error { return e.err }

// mountEnforced builds a mount that enforces fs-verity, and tries whether it
// does more than fail: a kernel without fs-verity mounts happily and gives EIO
// at every open (format document 2.15, defect 13). It tries with the first
// object it finds; a mount without objects is as good as one that was tried.
func (o *overlay) mountEnforced(r *erofs.Reader) (*os.File, error) {
	path, object, want, err := o.firstObject(r)
	if err != nil {
		return nil, err
	}
	if path != "" {
		if err := checkObject(object, want); err != nil {
			return nil, err
		}
	}
	m, err := o.mount()
	if k, ok := errors.AsType[*kmount.Error](err); ok && k.Step == "set verity" {
		return nil, &unenforceableError{err}
	}
	if err != nil || path == "" {
		return m, err
	}
	if err := readByte(m, path); err != nil {
		m.Close()
		return nil, &unenforceableError{fmt.Errorf("try the mount with fs-verity: %w", err)}
	}
	return m, nil
}

// firstObject returns some file of the image that has its object in one of the
// folders, without a leading slash, "" if none has; and that object and its
// digest.
func (o *overlay) firstObject(r *erofs.Reader) (path, object string, digest []byte, err error) {
	err = r.Walk(func(p string, ino erofs.Inode) error {
		if !ino.External() {
			return nil
		}
		payload, sum, err := r.Payload(ino)
		if err != nil || payload == "" {
			return err
		}
		for _, dir := range o.objects {
			name := filepath.Join(dir, filepath.Clean("/"+payload))
			if _, err := os.Stat(name); err == nil {
				path, object, digest = strings.TrimPrefix(p, "/"), name, bytes.Clone(sum)
				return errFound
			}
		}
		return nil
	})
	if err == errFound {
		err = nil
	}
	return path, object, digest, err
}

// checkObject asks the kernel whether an object can be vouched for.
func checkObject(path string, want []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("object: %w", err)
	}
	defer f.Close()
	alg, got, err := verity.Measure(f)
	if _, unsupported := errors.AsType[*verity.NotSupportedError](err); unsupported {
		return &unenforceableError{fmt.Errorf("require fs-verity: %w", err)}
	}
	if err != nil {
		return hint.Wrap(fmt.Errorf("require fs-verity: %w", err), "enable it on every object")
	}
	return verity.Compare(path, alg, want, got)
}

// readByte reads one byte of a file below a mount that is visible nowhere.
func readByte(m *os.File, path string) error {
	fd, err := unix.Openat(int(m.Fd()), path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	if _, err := f.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
