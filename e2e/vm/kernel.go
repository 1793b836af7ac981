package vm

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// Packages are the Debian packages that have the programs used here.
var Packages = []string{"apt", "cpio", "debian-archive-keyring", "dpkg", "e2fsprogs", "qemu-system-x86", "xz-utils"}

const (
	suite       = "trixie"
	metaPackage = "linux-image-cloud-amd64"
	cacheName   = "vm-1"
)

// wanted are the modules that are loaded, those they need before them. What
// the kernel has built in is left out.
var wanted = []string{"virtio_blk", "ext4", "loop", "erofs", "overlay", "fuse"}

// A Kernel is one that EnsureKernel has fetched.
type Kernel struct {
	Image   string   // path of vmlinuz
	Release string   // as uname -r says it
	Modules []string // paths, in the order to load them in
}

// EnsureKernel returns the kernel in the cache folder, after fetching it from
// the mirror that this machine's own packages come from if it is not there. apt
// checks its signature and digest. A nil error promises that all files are
// there; an interrupted fetch leaves a temporary folder that the next removes.
func EnsureKernel(ctx context.Context, cache string, progress io.Writer) (*Kernel, error) {
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, fmt.Errorf("make cache folder: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(cache, "vm.lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lock cache folder: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return nil, fmt.Errorf("lock cache folder %s: %w", cache, err)
	}
	dir := filepath.Join(cache, cacheName)
	if k, err := openKernel(dir); err == nil || !errors.Is(err, os.ErrNotExist) {
		return k, err
	}
	fmt.Fprintf(progress, "vm: fetching %s of Debian %s (apt)\n", metaPackage, suite)
	tmp := dir + ".building"
	if err := os.RemoveAll(tmp); err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	out := filepath.Join(tmp, "out")
	if err := os.MkdirAll(filepath.Join(out, "modules"), 0o755); err != nil {
		return nil, err
	}
	unpacked, err := fetch(ctx, tmp)
	if err != nil {
		return nil, fmt.Errorf("fetch the kernel: %w", err)
	}
	if err := arrange(ctx, unpacked, out); err != nil {
		return nil, fmt.Errorf("unpack the kernel: %w", err)
	}
	if err := os.Rename(out, dir); err != nil {
		return nil, err
	}
	return openKernel(dir)
}

func openKernel(dir string) (*Kernel, error) {
	release, err := os.ReadFile(filepath.Join(dir, "release"))
	if err != nil {
		return nil, err
	}
	k := &Kernel{Image: filepath.Join(dir, "vmlinuz"), Release: string(release)}
	k.Modules, err = filepath.Glob(filepath.Join(dir, "modules", "*.ko"))
	slices.Sort(k.Modules)
	return k, err
}

// fetch gets the kernel's package with an apt of its own below dir, which
// knows nothing but the suite on the machine's mirror, and unpacks it.
func fetch(ctx context.Context, dir string) (string, error) {
	source, err := images.MachineSource("/etc")
	if err != nil {
		return "", err
	}
	list := filepath.Join(dir, "sources.list")
	// The machine's source may name the key of its own release only.
	const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
	line := fmt.Sprintf("deb [arch=amd64 signed-by=%s] %s %s main\n", keyring, source.URI, suite)
	if err := os.WriteFile(list, []byte(line), 0o644); err != nil {
		return "", err
	}
	var options []string
	for _, o := range []string{
		"Dir::State=" + filepath.Join(dir, "state"), "Dir::Cache=" + filepath.Join(dir, "cache"),
		"Dir::State::status=/dev/null", "Dir::Etc::sourcelist=" + list, "Dir::Etc::sourceparts=/dev/null",
		"Dir::Etc::preferences=/dev/null", "Dir::Etc::preferencesparts=/dev/null",
		"APT::Architecture=amd64", "APT::Architectures=amd64", "Acquire::Languages=none",
		"Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false", "APT::Sandbox::User=root",
		"APT::Get::AllowUnauthenticated=false",
	} {
		options = append(options, "-o", o)
	}
	for _, d := range []string{"state/lists/partial", "cache/archives/partial"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return "", err
		}
	}
	if _, err := run(ctx, dir, "apt-get", append(options, "-q", "update", "--error-on=any")...); err != nil {
		return "", err
	}
	deps, err := run(ctx, dir, "apt-cache", append(options, "depends", "--no-recommends", "--no-suggests", metaPackage)...)
	if err != nil {
		return "", err
	}
	name := ""
	for word := range strings.FieldsSeq(string(deps)) {
		if strings.HasPrefix(word, "linux-image-") && word != metaPackage {
			name = word
		}
	}
	if name == "" {
		return "", fmt.Errorf("%s depends on no kernel: %s", metaPackage, deps)
	}
	if _, err := run(ctx, dir, "apt-get", append(options, "-q", "download", name)...); err != nil {
		return "", err
	}
	debs, err := filepath.Glob(filepath.Join(dir, "linux-image-*.deb"))
	if err != nil || len(debs) != 1 {
		return "", fmt.Errorf("apt-get download %s left %q (%v)", name, debs, err)
	}
	unpacked := filepath.Join(dir, "unpacked")
	_, err = run(ctx, dir, "dpkg-deb", "--extract", debs[0], unpacked)
	return unpacked, err
}

// arrange puts what is needed of an unpacked package into the folder out.
func arrange(ctx context.Context, unpacked, out string) error {
	kernels, err := filepath.Glob(filepath.Join(unpacked, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return fmt.Errorf("kernels in the package: %q, %v", kernels, err)
	}
	release := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	tree := filepath.Join(unpacked, "usr/lib/modules", release)
	if _, err := os.Stat(tree); errors.Is(err, os.ErrNotExist) {
		tree = filepath.Join(unpacked, "lib/modules", release)
	}
	builtin, err := os.ReadFile(filepath.Join(tree, "modules.builtin"))
	if err != nil {
		return err
	}
	m := modules{ctx: ctx, out: filepath.Join(out, "modules"), paths: map[string]string{}, done: map[string]bool{}}
	for line := range strings.FieldsSeq(string(builtin)) {
		m.done[moduleName(line)] = true
	}
	err = filepath.WalkDir(filepath.Join(tree, "kernel"), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(d.Name(), ".ko") {
			m.paths[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, name := range wanted {
		if err := m.add(name); err != nil {
			return err
		}
	}
	if err := os.Rename(kernels[0], filepath.Join(out, "vmlinuz")); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(out, "release"), []byte(release), 0o644)
}

// moduleName is a module's name by its file: dashes are underscores.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// modules orders modules by what they need.
type modules struct {
	ctx   context.Context
	out   string
	paths map[string]string // by name
	done  map[string]bool
	n     int
}

// add writes a module, those that it needs first.
func (m *modules) add(name string) error {
	if m.done[name] {
		return nil
	}
	m.done[name] = true
	path, ok := m.paths[name]
	if !ok {
		return fmt.Errorf("the kernel has no module %s", name)
	}
	data, err := os.ReadFile(path)
	if strings.HasSuffix(path, ".xz") {
		data, err = run(m.ctx, m.out, "xz", "--decompress", "--stdout", path)
	}
	if err != nil {
		return err
	}
	needs, err := dependencies(data)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	for _, n := range needs {
		if err := m.add(n); err != nil {
			return err
		}
	}
	m.n++
	return os.WriteFile(filepath.Join(m.out, fmt.Sprintf("%02d-%s.ko", m.n, name)), data, 0o644)
}

// dependencies reads which modules a module says it needs: "depends=a,b"
// among the NUL-terminated strings of its section .modinfo.
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("no section .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for field := range strings.SplitSeq(string(info), "\x00") {
		if list, ok := strings.CutPrefix(field, "depends="); ok && list != "" {
			return strings.Split(strings.ReplaceAll(list, "-", "_"), ","), nil
		}
	}
	return nil, nil
}

// run runs a program in dir and returns its standard output; what it said on
// standard error is in the error.
func run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		text := errs.Bytes()
		return nil, fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(text[max(0, len(text)-2000):]))
	}
	return out.Bytes(), nil
}
