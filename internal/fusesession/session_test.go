package fusesession

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
)

// The test binary runs itself again as a server, with /dev/fuse as descriptor
// 3 and parameters on standard input; it prints its own once it serves.
const serverEnv = "CFS_FUSE_TEST_SERVER"

func TestMain(m *testing.M) {
	var err error
	switch mode := os.Getenv(serverEnv); mode {
	case "":
		os.Exit(m.Run())
	case "reader":
		err = read(os.Args[1], os.Args[2])
	default:
		err = serve(mode)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve(mode string) error {
	var p *Params
	if err := json.NewDecoder(os.Stdin).Decode(&p); err != nil {
		return err
	}
	dev, s := os.NewFile(3, "/dev/fuse"), (*Session)(nil)
	var err error
	if p == nil {
		s = New(dev)
		s.params.Journal = strings.HasSuffix(mode, "old")
	} else if s, err = Resume(dev, os.NewFile(4, "requests"), *p); err != nil {
		return err
	}
	fs := &numbers{RawFileSystem: fuse.NewDefaultRawFileSystem(), slow: strings.HasPrefix(mode, "slow")}
	o := &fuse.MountOptions{MaxWrite: 1 << 20, EnableSymlinkCaching: true, ExplicitDataCacheControl: true}
	if mode == "other" {
		o.DisabledCapabilities = fuse.CAP_READDIRPLUS
	}
	srv, err := s.NewServer(fs, o)
	if err != nil {
		return err
	}
	if p != nil {
		if err := s.Takeover(); err != nil {
			return err
		}
	} else if s.Requests() != nil { // for the test to keep
		if err := unix.Dup3(int(s.Requests().Fd()), 4, 0); err != nil {
			return err
		}
	}
	if err := json.NewEncoder(os.Stdout).Encode(s.Params()); err != nil {
		return err
	}
	srv.Serve(func() {})
	return nil
}

// numbers is a filesystem without state: the folder has the files "0" to
// "19", each of 200,000 bytes that are made of its number.
type numbers struct {
	fuse.RawFileSystem
	slow bool // each READ takes 300 ms, or until it is interrupted
}

const (
	files    = 20
	fileSize = 200_000
)

func content(i int) []byte {
	b := make([]byte, fileSize)
	for off := 0; off+4 <= len(b); off += 4 {
		binary.LittleEndian.PutUint32(b[off:], uint32(i<<20|off))
	}
	return b
}

func (n *numbers) attr(node uint64, out *fuse.Attr) {
	out.Ino, out.Mode, out.Nlink = node, unix.S_IFREG|0o444, 1
	if node == 1 {
		out.Mode = unix.S_IFDIR | 0o555
		return
	}
	out.Size = fileSize
}

func (n *numbers) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n.attr(in.NodeId, &out.Attr)
	return fuse.OK
}

func (n *numbers) Lookup(_ <-chan struct{}, h *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	i, err := strconv.Atoi(name)
	if err != nil || i < 0 || i >= files {
		return fuse.ENOENT
	}
	out.NodeId = uint64(i + 2)
	n.attr(out.NodeId, &out.Attr)
	return fuse.OK
}

func (n *numbers) Open(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status { return fuse.ENOSYS }
func (n *numbers) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.ENOSYS
}

func (n *numbers) Read(cancel <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	if n.slow {
		select {
		case <-cancel:
			return nil, fuse.EINTR
		case <-time.After(300 * time.Millisecond):
		}
	} else if rand.N(4) == 0 {
		time.Sleep(rand.N(2 * time.Millisecond))
	}
	c := content(int(in.NodeId - 2))
	off := min(in.Offset, fileSize)
	return fuse.ReadResultData(buf[:copy(buf, c[off:min(off+uint64(in.Size), fileSize)])]), fuse.OK
}

func (n *numbers) ReadDir(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for i := in.Offset; i < files; i++ {
		if !out.AddDirEntry(fuse.DirEntry{Name: strconv.Itoa(int(i)), Mode: unix.S_IFREG, Ino: i + 2, Off: i + 1}) {
			break
		}
	}
	return fuse.OK
}

func (n *numbers) ReadDirPlus(_ <-chan struct{}, in *fuse.ReadIn, out *fuse.DirEntryList) fuse.Status {
	for i := in.Offset; i < files; i++ {
		e := out.AddDirLookupEntry(fuse.DirEntry{Name: strconv.Itoa(int(i)), Mode: unix.S_IFREG, Ino: i + 2, Off: i + 1})
		if e == nil {
			break
		}
		e.NodeId = i + 2
		n.attr(e.NodeId, &e.Attr)
	}
	return fuse.OK
}

func (n *numbers) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	out.NameLen = 255
	return fuse.OK
}

// A bench is a mounted session whose servers come and go.
type bench struct {
	t   testing.TB
	dev *os.File
	// What successors get as requests: of an "old" server its journal.
	requests *os.File
	mnt      string
	params   *Params
	server   *exec.Cmd
	errs     bytes.Buffer
}

func newBench(t testing.TB, mode string) *bench {
	t.Helper()
	dev, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dev.Close() })
	fd := int(dev.Fd()) // and blocking, as servers want it
	m, err := kmount.New("fuse", unix.MOUNT_ATTR_RDONLY, kmount.Flag("ro"), kmount.String("source", "test"),
		kmount.String("fd", strconv.Itoa(fd)), kmount.String("rootmode", "40000"),
		kmount.String("user_id", "0"), kmount.String("group_id", "0"))
	if err != nil {
		t.Fatalf("this test mounts and needs root: %v", err)
	}
	defer m.Close()
	b := &bench{t: t, dev: dev, mnt: t.TempDir()}
	if err := b.start(mode); err != nil {
		t.Fatal(err)
	}
	if err := kmount.Attach(m, b.mnt); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := kmount.Detach(b.mnt); err != nil {
			t.Error(err)
		}
		b.server.Wait() // ends when the kernel lets go
		if !Over(dev) {
			t.Error("the session is not over after the unmount")
		}
	})
	return b
}

// start starts a server, and returns when it serves.
func (b *bench) start(mode string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), serverEnv+"="+mode)
	cmd.ExtraFiles = []*os.File{b.dev, b.requests}
	in, _ := json.Marshal(b.params)
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &b.errs
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if b.requests == nil {
		cmd.ExtraFiles = cmd.ExtraFiles[:1]
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	var p Params
	if err := json.NewDecoder(bufio.NewReader(out)).Decode(&p); err != nil {
		cmd.Wait()
		return fmt.Errorf("server: %w: %s", err, b.errs.String())
	}
	if b.params != nil && (!bytes.Equal(p.Request, b.params.Request) || !bytes.Equal(p.Reply, b.params.Reply)) {
		b.t.Error("the parameters have changed")
	}
	if b.params == nil && p.Journal {
		if b.requests, err = os.OpenFile(fmt.Sprintf("/proc/%d/fd/4", cmd.Process.Pid), os.O_RDWR, 0); err != nil {
			return err
		}
		b.t.Cleanup(func() { b.requests.Close() })
	}
	b.params, b.server = &p, cmd
	return nil
}

func (b *bench) kill() {
	b.server.Process.Kill()
	b.server.Wait()
}

// read is the main of a reader: a process of its own, since a page fault on the
// mount stops a Go program, and this one has servers to start. It does one
// operation of each kind over and over until its standard input ends, and
// prints how many.
func read(mnt, name string) error {
	var stop atomic.Bool
	go func() {
		io.Copy(io.Discard, os.Stdin)
		stop.Store(true)
	}()
	ops, err := use(&stop, mnt, name)
	fmt.Println(ops)
	return err
}

func use(stop *atomic.Bool, mnt, name string) (ops int, _ error) {
	held, err := os.Open(filepath.Join(mnt, name))
	if err != nil {
		return 0, err
	}
	defer held.Close()
	i, err := strconv.Atoi(name)
	if err != nil {
		return 0, err
	}
	want, got := content(i), make([]byte, fileSize)
	for !stop.Load() {
		// What is not in the page cache has to be asked for.
		unix.Fadvise(int(held.Fd()), 0, 0, unix.FADV_DONTNEED)
		if _, err := held.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			return ops, fmt.Errorf("held descriptor: wrong bytes, or %w", err)
		}
		unix.Fadvise(int(held.Fd()), 0, 0, unix.FADV_DONTNEED)
		mapped, err := unix.Mmap(int(held.Fd()), 0, fileSize, unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return ops, err
		}
		equal := bytes.Equal(mapped, want) // a failed read is SIGBUS
		unix.Munmap(mapped)
		if !equal {
			return ops, errors.New("mapping: wrong bytes")
		}
		j := rand.N(files)
		read, err := os.ReadFile(filepath.Join(mnt, strconv.Itoa(j)))
		if err != nil || !bytes.Equal(read, content(j)) {
			return ops, fmt.Errorf("open and read: wrong bytes, or %w", err)
		}
		names, err := os.ReadDir(mnt)
		if err != nil || len(names) != files {
			return ops, fmt.Errorf("%d names: %w", len(names), err)
		}
		if fi, err := os.Stat(filepath.Join(mnt, strconv.Itoa(j))); err != nil || fi.Size() != fileSize {
			return ops, fmt.Errorf("stat: wrong, or %w", err)
		}
		if err := unix.Statfs(mnt, new(unix.Statfs_t)); err != nil {
			return ops, err
		}
		ops += 6
	}
	return ops, nil
}

// A server that is killed under eight readers is a pause, not an error; also
// where the kernel cannot repeat requests.
func TestTakeover(t *testing.T)    { testTakeover(t, "fast") }
func TestTakeoverOld(t *testing.T) { testTakeover(t, "fastold") }

func testTakeover(t *testing.T, mode string) {
	b := newBench(t, mode)
	type reader struct {
		cmd      *exec.Cmd
		stdin    io.Closer
		out, err bytes.Buffer
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	readers := make([]reader, 8)
	for i := range readers {
		r := &readers[i]
		r.cmd = exec.Command(self, b.mnt, strconv.Itoa(i))
		r.cmd.Env = append(os.Environ(), serverEnv+"=reader", "GOMAXPROCS=1")
		r.cmd.Stdout, r.cmd.Stderr = &r.out, &r.err
		if r.stdin, err = r.cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		if err := r.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.cmd.Process.Kill() })
	}
	const cycles = 30
	var pauses []time.Duration
	for range cycles {
		time.Sleep(rand.N(60 * time.Millisecond))
		start := time.Now()
		b.kill()
		if err := b.start(mode); err != nil {
			t.Fatal(err)
		}
		if err := unix.Statfs(b.mnt, new(unix.Statfs_t)); err != nil {
			t.Error(err)
		}
		pauses = append(pauses, time.Since(start))
	}
	total := 0
	for i := range readers {
		r := &readers[i]
		r.stdin.Close()
		if err := r.cmd.Wait(); err != nil {
			t.Errorf("reader %d: %v: %s", i, err, &r.err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(r.out.String()))
		if err != nil || n == 0 {
			t.Errorf("reader %d: %d operations, %v", i, n, err)
		}
		total += n
	}
	slices.Sort(pauses)
	t.Logf("%d kills, %d operations; pause median %v, longest %v", cycles, total, pauses[cycles/2], pauses[cycles-1])
}

// A reader that is interrupted while nobody serves is answered by the
// successor: by its bytes for a signal that it handles, at once when it is
// being killed.
func TestInterruptWithoutServer(t *testing.T) {
	b := newBench(t, "slow")
	reader := exec.Command("cat", filepath.Join(b.mnt, "3"))
	out, err := reader.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := reader.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(100 * time.Millisecond) // its first READ is with the server
	b.kill()
	reader.Process.Signal(unix.SIGKILL)
	gone := make(chan error, 1)
	go func() {
		io.Copy(io.Discard, out)
		gone <- reader.Wait()
	}()
	select {
	case err := <-gone:
		t.Fatalf("the reader ended (%v) before its request was answered: is this no longer true?", err)
	case <-time.After(200 * time.Millisecond):
	}
	start := time.Now()
	if err := b.start("slow"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-gone:
		t.Logf("the killed reader was gone %v after the successor's start", time.Since(start))
	case <-time.After(5 * time.Second):
		t.Fatal("the killed reader is still there")
	}
	got, err := os.ReadFile(filepath.Join(b.mnt, "4"))
	if err != nil || !bytes.Equal(got, content(4)) {
		t.Errorf("after it: %d bytes, %v", len(got), err)
	}
}

// A build that would have agreed on something else is refused, and changes
// nothing.
func TestOtherCapabilities(t *testing.T) {
	b := newBench(t, "fast")
	b.kill()
	err := b.start("other")
	if err == nil || !strings.Contains(err.Error(), "cannot continue the session") || !strings.Contains(err.Error(), "flags") {
		t.Errorf("other capabilities: %v, want a refusal that names the flags", err)
	}
	if err := b.start("fast"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(filepath.Join(b.mnt, "4")); err != nil || !bytes.Equal(got, content(4)) {
		t.Errorf("after it: %d bytes, %v", len(got), err)
	}
}

func TestResumeRefuses(t *testing.T) {
	good := Params{Request: make([]byte, sizeInitIn), Reply: make([]byte, sizeOutHeader+sizeInitOut)}
	good.Request[4] = opInit
	if _, err := Resume(nil, nil, good); err != nil {
		t.Error(err)
	}
	short, other, failed, bare := good, good, good, good
	bare.Journal = true
	short.Request = good.Request[:30]
	other.Request = make([]byte, sizeInitIn)
	failed.Reply = bytes.Clone(good.Reply)
	failed.Reply[4] = 0xfb
	for what, p := range map[string]Params{"nothing": {}, "a short request": short, "another request": other, "an error": failed, "no journal": bare} {
		if _, err := Resume(nil, nil, p); err == nil {
			t.Errorf("Resume took %s", what)
		}
	}
}

// FuzzParams feeds what a successor is given: nothing but a whole INIT exchange
// is taken, and what is offered of it is never more than was agreed.
func FuzzParams(f *testing.F) {
	good := Params{Request: make([]byte, sizeInitIn), Reply: make([]byte, sizeOutHeader+sizeInitOut)}
	good.Request[4] = opInit
	f.Add(good.Request, good.Reply)
	f.Add(good.Request[:sizeOldInitIn], good.Reply)
	f.Add([]byte{}, []byte{0xff})
	f.Fuzz(func(t *testing.T, request, reply []byte) {
		p := Params{Request: request, Reply: reply}
		s, err := Resume(nil, nil, p)
		if err != nil {
			return
		}
		out, err := s.params.agreed()
		if err != nil {
			t.Fatal(err)
		}
		offered := offer(request, out.Flags64())
		if err := checkRequest(offered); err != nil {
			t.Fatal(err)
		}
		if more := binary.NativeEndian.Uint32(offered[offFlags:]) &^ out.Flags; more != 0 {
			t.Errorf("flags %#x were not agreed", more)
		}
		if n := answerSize(request); n < smallAnswer || n > largestPayload+smallAnswer {
			t.Errorf("an answer of %d bytes", n)
		}
	})
}
