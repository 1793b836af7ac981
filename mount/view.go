package mount

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// A View says in which ways a mount differs from the image's own tree. The zero
// View is that tree, read-only. All but the zero one need root, and all but
// Context overlayfs: a hybrid mount, or the kernel's.
type View struct {
	// IDMap maps the image's user and group IDs: the path of a user namespace
	// (/proc/PID/ns/user), or UIDS:GIDS, each a list of IMAGE-HOST-COUNT with
	// commas between (parseIDMap). Of a namespace only what it maps now counts,
	// not the process.
	IDMap string
	// Upper and Work, both or none, make the mount writable: overlayfs's
	// upperdir and workdir.
	Upper, Work string
	// ReadOnly makes the mount read-only even with Upper.
	ReadOnly bool
	// Context is the SELinux context that all files shall have.
	Context string
}

// A shownView is a View that was checked, with what it needs open.
type shownView struct {
	View            // Upper and Work absolute
	userns *os.File // of IDMap; nil if that is empty
}

// check fails if the View makes no sense with the other options.
func (v View) check(o Options, source string) error {
	if v == (View{ReadOnly: v.ReadOnly}) {
		return nil
	}
	_, composefs := composefsSource(source)
	overlayOnly := v.IDMap != "" || v.Upper != ""
	switch {
	case (v.Upper == "") != (v.Work == ""):
		return errors.New("of --upperdir and --workdir only one is given")
	case composefs && overlayOnly:
		return hint.Wrap(errors.New("a composefs: source is mounted by FUSE, without --idmap and --upperdir"),
			"have the kernel mount it: mount.composefs -o basedir=DIR,idmap=…,upperdir=…,workdir=…")
	case o.Backend == FUSE && overlayOnly:
		return hint.Wrap(errors.New("--backend fuse cannot do --idmap and --upperdir"), "use --backend hybrid, or auto")
	case len(v.Context) > kmount.MaxString:
		return hint.Wrap(fmt.Errorf("--context: %d bytes, and the kernel takes %d", len(v.Context), kmount.MaxString), "name fewer categories")
	case os.Geteuid() != 0:
		return hint.Wrap(errors.New("--idmap, --upperdir and --context need root"), "leave them out, or run as root")
	}
	return nil
}

// open checks the View and opens what it names. The userns is one that was
// kept by another process, or nil.
func (v View) open(userns *os.File) (s shownView, err error) {
	s = shownView{View: v, userns: userns}
	if s.Upper, err = absolute(v.Upper); err != nil {
		return s, err
	}
	if s.Work, err = absolute(v.Work); err != nil {
		return s, err
	}
	if v.IDMap != "" && userns == nil {
		s.userns, err = openUserns(v.IDMap)
	}
	return s, err
}

func (s *shownView) close() {
	s.userns.Close() // of none it is an error that nobody needs
}

// checkUpper fails unless the upper folders are folders that no other mount
// uses: overlayfs itself takes them, and calls the result undefined.
func (s *shownView) checkUpper() error {
	if s.Upper == "" {
		return nil
	}
	for flag, dir := range map[string]string{"--upperdir": s.Upper, "--workdir": s.Work} {
		fi, err := os.Stat(dir)
		if err == nil && !fi.IsDir() {
			err = errors.New("not a folder")
		}
		if err != nil {
			return hint.Wrap(fmt.Errorf("%s %s: %w", flag, dir, err), "name an existing folder (mkdir -p "+dir+")")
		}
	}
	all, err := kmount.Mounts()
	if err != nil {
		return err
	}
	for _, i := range all {
		if i.FSType != "overlay" {
			continue
		}
		for option := range strings.SplitSeq(i.Options, ",") {
			key, dir, _ := strings.Cut(option, "=")
			if (key == "upperdir" || key == "workdir") && (dir == s.Upper || dir == s.Work) {
				return hint.Wrap(fmt.Errorf("%s %s: the mount at %s uses it", key, dir, i.Mountpoint), "unmount that one, or name other folders")
			}
		}
	}
	return nil
}

// overlayOnly reports whether only overlayfs can show the tree so.
func (s *shownView) overlayOnly() bool { return s.userns != nil || s.Upper != "" }

// erofs mounts the image from its file, with its IDs mapped.
func (s *shownView) erofs(imagePath string, noACL bool) (*os.File, error) {
	m, err := erofsMount(imagePath, noACL)
	if err != nil || s.userns == nil {
		return m, err
	}
	if err := idmap(m, s.userns); err != nil {
		m.Close()
		return nil, hint.Wrap(err, "--idmap needs a user namespace of its own, and Linux 5.19")
	}
	return m, nil
}

// apply makes an overlay show the View.
func (s *shownView) apply(o *overlay) {
	o.upper, o.work, o.context = s.Upper, s.Work, s.Context
	o.readOnly = s.Upper == "" || s.ReadOnly
}

// withContext says what can be done about a kernel that refuses --context.
func (s *shownView) withContext(err error) error {
	if k, ok := errors.AsType[*kmount.Error](err); ok && k.Step == "set context" {
		return hint.Wrap(err, "--context needs a kernel with SELinux on")
	}
	return err
}

// withoutDigest returns a file below the upper folder of which overlayfs has
// copied the metadata alone, and no digest of its bytes, as it does while
// fs-verity is not enforced; "" if there is none. Under verity=require such a
// file cannot be opened.
func (s *shownView) withoutDigest() (string, error) {
	found := ""
	err := filepath.WalkDir(s.Upper, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		// Its first byte is the version, its fourth the algorithm; without a
		// digest it is empty, or has none (struct ovl_metacopy).
		n, err := unix.Lgetxattr(path, "trusted.overlay.metacopy", make([]byte, 128))
		if err == nil && n <= 4 {
			found = path
			return errFound
		}
		return nil
	})
	if err == errFound {
		err = nil
	}
	if err != nil {
		return "", fmt.Errorf("--upperdir: %w", err)
	}
	return found, nil
}

// stays says why the mount is not swapped when it is sealed, "" if it is.
func (m *Mount) stays() string {
	switch {
	case m.view.Upper != "":
		return "a writable mount stays hybrid, since two overlayfs must not share an upperdir: " +
			"what is whole is read from the disk, without FUSE; mounted again, it is the kernel's alone"
	case m.opts.Swap == Never:
		return "not wanted (--swap never)"
	}
	return ""
}

// checkStays fails if the options require what a mount that stays as it is
// will not have.
func (m *Mount) checkStays() error {
	if m.view.Upper == "" {
		return nil
	}
	const sealFirst = "mount it once without --upperdir, wait for sealed, and mount it again"
	switch {
	case m.opts.Swap == Require:
		return hint.Wrap(errors.New("--swap require: a writable mount of an image that is not sealed cannot be swapped"), sealFirst)
	case m.opts.Verity == Require:
		return hint.Wrap(errors.New("--verity require: a writable mount of an image that is not sealed is not swapped, so that nothing would be enforced"), sealFirst)
	}
	return nil
}
