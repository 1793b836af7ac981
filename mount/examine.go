package mount

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fusefs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/finding"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// lowSpace is how many free bytes a store's filesystem should have: a few
// images.
const lowSpace = 5 << 30

// Examine finds out what this kernel, the filesystem of the store in the folder
// root and the runtime folder can do, by doing it, in folders that are removed
// again. It makes the store if it is not there.
func Examine(ctx context.Context, root, runtimeDir string) []finding.Finding {
	l := &finding.List{Group: "store"}
	dir, err := examinedStore(root)
	if err != nil {
		l.Missing("folder", fmt.Sprintf("%s: %s", root, oneLine(err.Error())), "nothing can be mounted", "name another folder with --root")
		return l.All
	}
	defer os.RemoveAll(dir)
	x := &examination{list: l, dir: dir, root: os.Geteuid() == 0}
	l.Group = "kernel"
	x.fuse()
	x.backend()
	x.swap()
	x.propagation(root)
	l.Group = "store " + root
	x.space()
	x.verity()
	x.reflink()
	x.leases()
	l.Group = "runtime " + runtimeDir
	x.runtime(runtimeDir)
	return l.All
}

// examinedStore opens the store and makes a folder in it to try things in.
func examinedStore(root string) (string, error) {
	s, err := cache.Open(root, cache.Options{})
	if err != nil {
		return "", err
	}
	defer s.Close()
	return os.MkdirTemp(s.Images(), ".try-*")
}

type examination struct {
	list *finding.List
	dir  string
	root bool // this is root
}

const noRoot = "this is not root"

// trial are two files as the trial of the hybrid backend has them.
var trial = trialObjects{names: []string{image.Digest{0xaa}.Path()}, data: "by fuse"}

// fuse serves a file by FUSE, and reads it.
func (x *examination) fuse() {
	const cost = "nothing can be mounted before it is local"
	if !x.root {
		path, err := exec.LookPath("fusermount3")
		dev, derr := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
		if derr != nil {
			x.list.Missing("fuse", derr.Error(), cost, "load the fuse module, or give this container /dev/fuse")
			return
		}
		dev.Close()
		if err != nil {
			x.list.Missing("fuse", "no fusermount3", "without root nothing can be mounted", "install the package fuse3")
			return
		}
		x.list.Good("fuse", "/dev/fuse can be opened, and "+path+" is there for mounts without root")
		return
	}
	srv, m, err := fusefs.ServeObjects(trial, fusefs.Options{})
	if err != nil {
		x.list.Missing("fuse", oneLine(err.Error()), cost, "load the fuse module (modprobe fuse), or give this container /dev/fuse and CAP_SYS_ADMIN")
		return
	}
	journal := srv.Session().Params().Journal
	err = readExactly(m, trial.names[0], trial.data)
	m.Close()
	<-srv.Done()
	if err != nil {
		x.list.Missing("fuse", oneLine(err.Error()), cost, "look into the kernel's log")
		return
	}
	x.list.Good("fuse", "a file was served and read")
	if journal {
		x.list.Degraded("fuse resend", "the kernel cannot repeat requests (Linux 6.9 can)",
			"each request is noted in memory until it is answered, for the case that the server dies", "nothing, or a newer kernel")
	} else {
		x.list.Good("fuse resend", "the kernel repeats what a server that died has not answered")
	}
}

// backend tries the mount that the kernel serves from the first second.
func (x *examination) backend() {
	err := errors.New(noRoot)
	if x.root {
		err = tryHybrid(x.dir)
	}
	if err != nil {
		x.list.Degraded("hybrid backend", oneLine(err.Error()), "until the swap every open file and folder is FUSE's: slower, and a process in the way",
			"root, Linux 6.7 or later, and a store on a filesystem that overlayfs takes (ext4, xfs, btrfs)")
		return
	}
	x.list.Good("hybrid backend", "the kernel serves the tree from the first second, and finds files as they come")
}

// sealedTrial writes a composefs image of one file, and its object.
func (x *examination) sealedTrial() (path, objects string, digest hexDigest, err error) {
	const data = "by the kernel"
	objects, path = filepath.Join(x.dir, "objects"), filepath.Join(x.dir, "sealed.erofs")
	h := verity.New(verity.SHA256)
	h.Write([]byte(data))
	sum := image.Digest(h.Sum())
	object := filepath.Join(objects, sum.Path())
	if err := os.MkdirAll(filepath.Dir(object), 0o700); err != nil {
		return "", "", digest, err
	}
	if err := os.WriteFile(object, []byte(data), 0o400); err != nil && !errors.Is(err, os.ErrExist) && !errors.Is(err, os.ErrPermission) {
		return "", "", digest, err
	}
	root := &erofs.Node{Mode: unix.S_IFDIR | 0o755, Nlink: 2, Children: []*erofs.Node{{
		Name: "file", Mode: unix.S_IFREG | 0o444, Nlink: 1, Size: uint64(len(data)), Target: sum.Path(), Digest: sum[:],
	}}}
	if err := erofs.WriteFile(path, root, imageFormat); err != nil {
		return "", "", digest, err
	}
	digest, err = measure(path)
	return path, objects, digest, err
}

// swap tries what is left of a mount after the swap, and the swap.
func (x *examination) swap() {
	const cost = "FUSE serves for as long as it is mounted (state sealed, not swapped)"
	if !x.root {
		x.list.Degraded("swap", noRoot, cost, "mount as root")
		return
	}
	path, objects, _, err := x.sealedTrial()
	if err == nil {
		var m *os.File
		if m, err = kernelMount(path, objects, nil, shownView{}); err == nil {
			m.Close()
		}
	}
	if err != nil {
		x.list.Degraded("erofs + overlayfs", oneLine(err.Error()), cost, "load the erofs and overlay modules; data-only lowers want Linux 6.5")
	} else {
		x.list.Good("erofs + overlayfs", "a sealed image was mounted by the kernel alone, and a file of it read")
	}
	if err := tryBeneath(x.dir); err != nil {
		x.list.Degraded("swap", oneLine(err.Error()), cost, "Linux 6.5 or later, and mount points that are not the root of a namespace")
		return
	}
	x.list.Good("swap", "one mount was put beneath another, and took its place")
}

// tryBeneath puts one mount beneath another, where nobody else sees them.
func tryBeneath(dir string) error {
	point := filepath.Join(dir, "point")
	if err := os.Mkdir(point, 0o700); err != nil {
		return err
	}
	return kmount.InPrivate(func() error {
		for i, attach := range []func(*os.File, string) error{kmount.Attach, kmount.AttachBeneath} {
			m, err := kmount.New("tmpfs", 0, kmount.String("mode", "0700"), kmount.String("size", fmt.Sprint(4096*(i+1))))
			if err != nil {
				return err
			}
			err = attach(m, point)
			m.Close()
			if err != nil {
				return err
			}
		}
		return errors.Join(kmount.Detach(point), kmount.Detach(point))
	})
}

// propagation looks whether the machine's first process sees what is mounted
// here.
func (x *examination) propagation(root string) {
	if !x.root {
		return
	}
	mine, err := os.Readlink("/proc/self/ns/mnt")
	first, ferr := os.Readlink("/proc/1/ns/mnt")
	switch {
	case err != nil || ferr != nil:
		x.list.Degraded("propagation", oneLine(errors.Join(err, ferr).Error()), "it is not known who sees what is mounted here", "give this container the machine's /proc")
		return
	case mine == first:
		x.list.Good("propagation", "this is the mount namespace of process 1")
		return
	}
	point := filepath.Join(x.dir, "seen")
	err = os.Mkdir(point, 0o700)
	var m *os.File
	if err == nil {
		if m, err = kmount.New("tmpfs", 0, kmount.String("source", "cfs-fuse-doctor-"+filepath.Base(x.dir))); err == nil {
			err = kmount.Attach(m, point)
			m.Close()
		}
	}
	if err != nil {
		x.list.Missing("propagation", oneLine(err.Error()), "nothing can be mounted here", "CAP_SYS_ADMIN")
		return
	}
	defer kmount.Detach(point)
	all, err := kmount.MountsOf(1)
	seen := slices.ContainsFunc(all, func(i kmount.Info) bool { return strings.HasSuffix(i.Source, filepath.Base(x.dir)) })
	switch {
	case err != nil:
		x.list.Degraded("propagation", oneLine(err.Error()), "it is not known who sees what is mounted here", "give this container the machine's /proc")
	case !seen:
		x.list.Degraded("propagation", "what is mounted below "+root+" is not seen by process 1, in another mount namespace",
			"containers that others start do not see these mounts", "in a pod, mountPropagation: Bidirectional; with unshare, --propagation shared")
	default:
		x.list.Good("propagation", "process 1, in another mount namespace, sees what is mounted here")
	}
}

// space looks at the room that the filesystem has.
func (x *examination) space() {
	var st unix.Statfs_t
	if err := unix.Statfs(x.dir, &st); err != nil {
		x.list.Missing("space", err.Error(), "nothing can be stored", "name another folder with --root")
		return
	}
	free := int64(st.Bavail) * st.Bsize
	detail := fmt.Sprintf("%.1f GiB free, %d inodes", float64(free)/(1<<30), st.Ffree)
	switch {
	case free < lowSpace:
		x.list.Degraded("space", detail, "images that do not fit stay lazy: what is read again is fetched again", "make room, 'cfs-fuse cache gc', or --root elsewhere")
	case st.Files > 0 && st.Ffree < 100_000:
		x.list.Degraded("space", detail, "an image of many small files may not fit", "make a filesystem with more inodes for the store")
	default:
		x.list.Good("space", detail)
	}
}

// verity enables fs-verity, and has the kernel refuse without it.
func (x *examination) verity() {
	const cost = "files are checked when they are stored, and not at each read: --verity require cannot be met"
	path, objects, digest, err := x.sealedTrial()
	if err == nil {
		var object string
		err = filepath.WalkDir(objects, func(p string, d os.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				object = p
			}
			return err
		})
		if err == nil {
			err = enableVerity(object)
		}
		if err == nil {
			err = enableVerity(path)
		}
	}
	if err != nil {
		x.list.Degraded("fs-verity", oneLine(err.Error()), cost, "for ext4: tune2fs -O verity DEVICE; btrfs has it; the kernel needs CONFIG_FS_VERITY")
		return
	}
	if !x.root {
		x.list.Good("fs-verity", "was enabled on a file; enforcing it is root's")
		return
	}
	m, err := kernelMount(path, objects, digest[:], shownView{})
	if err != nil {
		x.list.Degraded("fs-verity", "can be enabled, but not enforced: "+oneLine(err.Error()), cost, "Linux 6.6 or later (overlayfs verity=require)")
		return
	}
	m.Close()
	x.list.Good("fs-verity", "an image was mounted that the kernel checks at each read")
}

// reflink shares the blocks of two files.
func (x *examination) reflink() {
	err := func() error {
		a, err := os.Create(filepath.Join(x.dir, "a"))
		if err != nil {
			return err
		}
		defer a.Close()
		b, err := os.Create(filepath.Join(x.dir, "b"))
		if err != nil {
			return err
		}
		defer b.Close()
		if _, err := a.Write(make([]byte, 64<<10)); err != nil {
			return err
		}
		return unix.IoctlFileClone(int(b.Fd()), int(a.Fd()))
	}()
	if err != nil {
		x.list.Degraded("reflink", "blocks cannot be shared: "+err.Error(), "chunks that a new image has in common with parts of other files are copied; whole files are shared all the same",
			"nothing, or btrfs or xfs for the store")
		return
	}
	x.list.Good("reflink", "files can share blocks")
}

// leases asks the kernel who has a file open, as eviction does.
func (x *examination) leases() {
	f, err := os.OpenFile(filepath.Join(x.dir, "leased"), os.O_CREATE|os.O_RDONLY, 0o600)
	if err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
		f.Close()
	}
	if err != nil {
		x.list.Degraded("eviction", "the kernel does not say who has a file open: "+err.Error(), "images are never evicted: --store-size cannot be kept",
			"put the store on a local filesystem")
		return
	}
	x.list.Good("eviction", "the kernel says whether an image is in use")
}

// runtime listens on a socket of the runtime folder, as each mount does.
func (x *examination) runtime(dir string) {
	const cost = "nothing can be mounted: each mount answers other commands there"
	if err := os.MkdirAll(dir, 0o700); err != nil {
		x.list.Missing("folder", err.Error(), cost, "name another folder with --runtime-dir")
		return
	}
	f := FilesOf(dir, x.dir)
	l, err := net.Listen("unix", f.Socket)
	if err != nil {
		x.list.Missing("sockets", oneLine(err.Error()), cost, "name another folder, with a shorter name, with --runtime-dir")
		return
	}
	l.Close()
	os.Remove(f.Socket)
	x.list.Good("sockets", "a socket can be made")
	if all, err := records(dir); err == nil {
		dead := 0
		for _, one := range all {
			s, err := one.load()
			if err != nil {
				continue
			}
			if s, err = fromKernel(s); err == nil && s.State < Swapped && one.abandoned() {
				dead++
			}
		}
		if dead > 0 {
			x.list.Missing("mounts", fmt.Sprintf("%d of %d have lost their process", dead, len(all)), "programs that use them get errors", "'cfs-fuse status' lists them: mount them again")
		} else {
			x.list.Good("mounts", fmt.Sprintf("%d, all served", len(all)))
		}
	}
}
