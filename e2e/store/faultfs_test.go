package store

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// A faultFS is a filesystem that passes everything on to a folder, and fails
// on request: what dm-error and dm-flakey do, on kernels without device
// mapper.
type faultFS struct {
	server *fuse.Server
	write  atomic.Uint32 // errno of every write and every new file; 0: none
	read   atomic.Bool   // every read of a whole file fails with EIO
}

type faultNode struct {
	*fs.LoopbackNode
	faults *faultFS
}

var (
	_ fs.NodeReader  = (*faultNode)(nil)
	_ fs.NodeWriter  = (*faultNode)(nil)
	_ fs.NodeCreater = (*faultNode)(nil)
)

func (n *faultNode) Read(ctx context.Context, f fs.FileHandle, dest []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	// A file has two names, and the node has either.
	if path := n.Path(nil); n.faults.read.Load() && (strings.Contains(path, "/contents/") || strings.Contains(path, "/objects/")) {
		return nil, syscall.EIO
	}
	return f.(fs.FileReader).Read(ctx, dest, off)
}

// WrapChild puts the faults in front of each file and folder below.
func (n *faultNode) WrapChild(_ context.Context, ops fs.InodeEmbedder) fs.InodeEmbedder {
	return &faultNode{ops.(*fs.LoopbackNode), n.faults}
}

func (n *faultNode) Write(ctx context.Context, f fs.FileHandle, data []byte, off int64) (uint32, syscall.Errno) {
	if e := n.faults.write.Load(); e != 0 {
		return 0, syscall.Errno(e)
	}
	return f.(fs.FileWriter).Write(ctx, data, off)
}

func (n *faultNode) Create(ctx context.Context, name string, flags uint32, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	if e := n.faults.write.Load(); e != 0 {
		return nil, nil, 0, syscall.Errno(e)
	}
	return n.LoopbackNode.Create(ctx, name, flags, mode, out)
}

// onFaultFS puts the bench's store on a faultFS.
func (b *bench) onFaultFS() *faultFS {
	b.t.Helper()
	under, point := filepath.Join(b.dir, "under"), filepath.Join(b.dir, "faults")
	for _, dir := range []string{under, point} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			b.t.Fatal(err)
		}
	}
	f := &faultFS{}
	var st unix.Stat_t
	if err := unix.Stat(under, &st); err != nil {
		b.t.Fatal(err)
	}
	root := &fs.LoopbackRoot{Path: under, Dev: uint64(st.Dev)}
	node := &faultNode{&fs.LoopbackNode{RootData: root}, f}
	root.RootNode = node
	server, err := fs.Mount(point, node, &fs.Options{MountOptions: fuse.MountOptions{AllowOther: true, FsName: "faults", DisabledCapabilities: fuse.CAP_PASSTHROUGH}})
	if err != nil {
		b.t.Fatal(err)
	}
	f.server = server
	b.after = append(b.after, func() {
		if err := server.Unmount(); err != nil {
			b.t.Errorf("unmount the faults: %v", err)
			unix.Unmount(point, unix.MNT_DETACH)
		}
	})
	b.root = filepath.Join(point, "root")
	return f
}

// A disk that fails every write fails no read: what is there is read, what is
// not comes from the registry by way of memory. When it works again the image
// becomes whole.
func TestDiskFailsWrites(t *testing.T) {
	if f, err := os.Open("/dev/mapper/control"); err != nil {
		t.Logf("this kernel has no device mapper (%v), so no dm-error: a FUSE filesystem of our own injects the errors", err)
	} else {
		f.Close()
		t.Log("this kernel may have dm-error; a FUSE filesystem of our own injects the errors all the same")
	}
	for name, errno := range map[string]syscall.Errno{"EIO": unix.EIO, "ENOSPC": unix.ENOSPC, "EDQUOT": unix.EDQUOT} {
		t.Run(name, func(t *testing.T) {
			b, r := newBench(t), serve(t)
			faults := b.onFaultFS()
			img := push(t, r, "writes", 256<<10, append(files("usr", 70, 40, 100_000), file{name: "usr/large", size: 3 << 20, seed: 71}))
			p := b.mount(img.name, "--fill=false", "--swap", "never")
			for _, f := range img.files[:10] {
				if err := f.compare(p); err != nil {
					t.Fatal(err)
				}
			}
			faults.write.Store(uint32(errno))
			for range 2 {
				if err := readAll(p, img); err != nil {
					t.Fatal(err)
				}
				forget(t, p, img)
			}
			s := b.status(p)
			if !strings.Contains(s.StoreNote, errno.Error()) || s.FilesLocal >= s.Files {
				t.Errorf("status: %+v", s)
			}
			faults.write.Store(0)
			if err := readAll(p, img); err != nil {
				t.Fatal(err)
			}
			if err := b.unmount(p); err != nil {
				t.Fatal(err)
			}
			p = b.mount(img.name, "--swap", "never")
			b.waitFor("sealed", p)
			if err := readAll(p, img); err != nil {
				t.Fatal(err)
			}
			if out := b.must("cache", "check", "--root", b.root, "--read"); !strings.Contains(out, ": 0 problems") {
				t.Errorf("check: %s", out)
			}
			if err := b.unmount(p); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// A disk that cannot read what was stored: a whole file that gives EIO is
// moved aside and fetched again, and the program that reads it notices nothing.
// That is FUSE's doing: of a hybrid the kernel itself reads what is whole.
func TestDiskFailsReads(t *testing.T) {
	b, r := newBench(t), serve(t)
	faults := b.onFaultFS()
	img := push(t, r, "reads", 0, files("usr", 72, 20, 100_000))
	p := b.mount(img.name, "--backend", "fuse", "--swap", "never")
	b.waitFor("sealed", p)
	if err := b.unmount(p); err != nil {
		t.Fatal(err)
	}
	p = b.mount(img.name, "--backend", "fuse", "--swap", "never")
	faults.read.Store(true)
	before := r.Counts().Bytes
	err := filepath.WalkDir(filepath.Join(b.root, "contents"), func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) // or the disk is not asked
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- img.files[0].compare(p) }()
	select {
	case err := <-done: // what was fetched again may be in the page cache still
		if err != nil && !errors.Is(err, unix.EIO) {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("a read does not end")
	}
	faults.read.Store(false)
	if err := readAll(p, img); err != nil {
		t.Fatal(err)
	}
	if got := r.Counts().Bytes - before; got < 100_000 {
		t.Errorf("%d bytes were fetched", got)
	}
	if aside, err := os.ReadDir(filepath.Join(b.root, "quarantine")); err != nil || len(aside) == 0 {
		t.Errorf("moved aside: %v, %v", aside, err)
	}
	if out := b.must("cache", "check", "--root", b.root, "--read"); !strings.Contains(out, ": 0 problems") {
		t.Errorf("check: %s", out)
	}
	if err := b.unmount(p); err != nil {
		t.Fatal(err)
	}
}
