package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A builder makes one Set in a temporary folder.
type builder struct {
	dir      string
	progress *log.Logger
	tools    *os.File // build.log
}

// A step is one part of making a Set.
type step struct {
	what string
	do   func(context.Context) error
}

// set returns what makes the Set of the end-to-end tests.
func (b *builder) set() []step {
	return []step{
		{"plain layout", b.newLayout},
		{"odd image", b.odd},
		{"small image", b.small},
		{"Debian image", b.debian},
		{"reference trees", b.references},
		{"eStargz", b.estargz},
		{"oci-archive", b.archive},
		{"zstd:chunked (skopeo)", b.zstdChunked},
		{"zstd:chunked (stargz)", b.zstdStargz},
		{"registry", b.fillRegistry},
	}
}

func (b *builder) build(ctx context.Context, steps []step) (err error) {
	if err := os.MkdirAll(filepath.Join(b.dir, "reference"), 0o755); err != nil {
		return err
	}
	b.tools, err = os.Create(filepath.Join(b.dir, "build.log"))
	if err != nil {
		return err
	}
	defer b.tools.Close()
	start := time.Now()
	for _, step := range steps {
		b.progress.Printf("%s", step.what)
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("build images: %s: %w", step.what, err)
		}
	}
	b.progress.Printf("built in %v", time.Since(start).Round(time.Second))
	return nil
}

func (b *builder) path(elem ...string) string {
	return filepath.Join(append([]string{b.dir}, elem...)...)
}

// run runs a tool with its words going to build.log; they are in the error
// when it fails.
func (b *builder) run(ctx context.Context, name string, args ...string) error {
	return b.runEnv(ctx, nil, name, args...)
}

func (b *builder) runEnv(ctx context.Context, env []string, name string, args ...string) error {
	fmt.Fprintf(b.tools, "+ %s %s\n", name, strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	b.tools.Write(out)
	if err != nil {
		if len(out) > 2000 {
			out = out[len(out)-2000:]
		}
		return fmt.Errorf("%s %s: %w\n%s", name, args[0], err, bytes.TrimSpace(out))
	}
	return nil
}

func (b *builder) newLayout(ctx context.Context) error {
	return b.run(ctx, "umoci", "init", "--layout", b.path(Plain))
}

// debian makes the image of three layers.
func (b *builder) debian(ctx context.Context) error {
	return b.layers(ctx, Debian, []change{
		{"minbase", b.minbase},
		{"python3, numpy, perl, nginx", func(ctx context.Context, rootfs string) error {
			// nginx makes its folders below /var at its first start: a read-only root must have them.
			return b.packages(ctx, rootfs, "nginx -t", "python3", "python3-numpy", "perl", "nginx-light")
		}},
		{"changes", func(_ context.Context, rootfs string) error { return changes(rootfs) }},
	})
}

// A change of a root filesystem makes a layer.
type change struct {
	what string
	do   func(ctx context.Context, rootfs string) error
}

// layers makes an image with a layer for each change of the root filesystem,
// which umoci finds by comparing and packs with whiteouts.
func (b *builder) layers(ctx context.Context, name string, all []change) error {
	image, bundle := b.path(Plain)+":"+name, b.path("bundle")
	rootfs := filepath.Join(bundle, "rootfs")
	if err := b.run(ctx, "umoci", "new", "--image", image); err != nil {
		return err
	}
	if err := b.run(ctx, "umoci", "unpack", "--image", image, bundle); err != nil {
		return err
	}
	for _, change := range all {
		b.progress.Printf("  layer: %s", change.what)
		if err := change.do(ctx, rootfs); err != nil {
			return err
		}
		if err := wholeSeconds(rootfs); err != nil {
			return err
		}
		if err := b.run(ctx, "umoci", "repack", "--refresh-bundle", "--image", image, bundle); err != nil {
			return err
		}
	}
	return os.RemoveAll(bundle)
}

// minbase fills the empty folder rootfs by debootstrap, from the mirror and
// of the release of this machine.
func (b *builder) minbase(ctx context.Context, rootfs string) error {
	src, err := MachineSource("/etc")
	if err != nil {
		return err
	}
	return b.bootstrap(ctx, src.Suite, rootfs)
}

// bootstrap fills the empty folder rootfs with a release, from the mirror of
// this machine.
func (b *builder) bootstrap(ctx context.Context, suite, rootfs string, options ...string) error {
	src, err := MachineSource("/etc")
	if err != nil {
		return err
	}
	env, _, err := aptSettings(ctx)
	if err != nil {
		return err
	}
	// The namespaces end with the command, and with them every mount and
	// process it might leave.
	args := []string{"--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc",
		"debootstrap", "--variant=minbase", "--keyring=" + src.SignedBy}
	args = append(append(args, options...), suite, rootfs, src.URI)
	if err := b.runEnv(ctx, env, "unshare", args...); err != nil {
		return err
	}
	return cleanRootfs(rootfs)
}

// installScript runs in namespaces of its own with the root filesystem in $1
// and a command to run in it afterwards in $2; the rest are packages.
const installScript = `set -e
root=$1 after=$2; shift 2
mount -t proc proc "$root/proc"
chroot "$root" apt-get update
chroot "$root" apt-get install -y --no-install-recommends "$@"
chroot "$root" sh -c "$after"
chroot "$root" apt-get clean
umount "$root/proc"
`

// packages installs packages by apt inside the root filesystem, and then runs
// a shell command there.
func (b *builder) packages(ctx context.Context, rootfs, after string, names ...string) error {
	src, err := MachineSource("/etc")
	if err != nil {
		return err
	}
	env, settings, err := aptSettings(ctx)
	if err != nil {
		return err
	}
	key := "/etc/apt/build-key" + filepath.Ext(src.SignedBy)
	files := map[string]string{ // removed again below
		key:                              "",
		"/etc/apt/apt.conf.d/99build":    settings,
		"/etc/apt/sources.list":          fmt.Sprintf("deb [signed-by=%s] %s %s %s\n", key, src.URI, src.Suite, strings.Join(src.Components, " ")),
		"/etc/apt/sources.list.d/ignore": "",
		"/usr/sbin/policy-rc.d":          "#!/bin/sh\nexit 101\n", // start no service
		"/etc/resolv.conf":               "",
	}
	for name, from := range map[string]string{key: src.SignedBy, "/etc/resolv.conf": "/etc/resolv.conf", "/etc/ca-build.crt": "/etc/ssl/certs/ca-certificates.crt"} {
		text, err := os.ReadFile(from)
		if errors.Is(err, fs.ErrNotExist) && name != key {
			continue
		} else if err != nil {
			return err
		}
		files[name] = string(text)
	}
	if files["/etc/ca-build.crt"] != "" {
		files["/etc/apt/apt.conf.d/99build"] += "Acquire::https::CaInfo \"/etc/ca-build.crt\";\n"
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(rootfs, name), []byte(text), 0o755); err != nil {
			return err
		}
	}
	env = append(env, "DEBIAN_FRONTEND=noninteractive", "LC_ALL=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin")
	argv := []string{"--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "sh", "-c", installScript, "sh", rootfs, after}
	err = b.runEnv(ctx, env, "unshare", append(argv, names...)...)
	if err != nil {
		return err
	}
	for name := range files {
		if err := os.Remove(filepath.Join(rootfs, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return cleanRootfs(rootfs)
}

// aptSettings returns what this machine's apt is told about reaching its
// mirror: as environment (for debootstrap), and as apt.conf(5).
func aptSettings(ctx context.Context) (env []string, conf string, err error) {
	vars := map[string]string{
		"Acquire::http::Proxy": "http_proxy", "Acquire::https::Proxy": "https_proxy",
		"Acquire::Check-Valid-Until": "", "Acquire::Check-Date": "",
	}
	for name, variable := range vars {
		out, err := exec.CommandContext(ctx, "apt-config", "dump", "--no-empty", "--format", "%v%n", name).Output()
		if err != nil {
			return nil, "", fmt.Errorf("apt-config: %w", err)
		}
		value, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
		if value == "" {
			continue
		}
		conf += fmt.Sprintf("%s \"%s\";\n", name, value)
		if variable != "" {
			env = append(env, variable+"="+value)
		}
	}
	return env, conf, nil
}

// cleanRootfs removes what package tools leave that no image should carry.
func cleanRootfs(rootfs string) error {
	for _, pattern := range []string{"var/cache/apt/*", "var/lib/apt/lists/*", "var/log/*.log", "var/log/apt/*", "run/nginx.pid", "tmp/*"} {
		paths, err := filepath.Glob(filepath.Join(rootfs, pattern))
		if err != nil {
			return err
		}
		for _, p := range paths {
			if err := os.RemoveAll(p); err != nil {
				return err
			}
		}
	}
	return nil
}

// wholeSeconds cuts the mtime of everything below root to whole seconds, as
// the layers will hold it: umoci and eStargz's TOC both round.
func wholeSeconds(root string) error {
	return filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		if st.Mtim.Nsec == 0 {
			return nil
		}
		ts := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Sec: st.Mtim.Sec}}
		if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return &fs.PathError{Op: "utimensat", Path: path, Err: err}
		}
		return nil
	})
}

// references unpacks the trees that mounts are compared with.
func (b *builder) references(ctx context.Context) error {
	for _, name := range []string{Debian, Odd, Small} {
		bundle := b.path("bundle")
		if err := b.run(ctx, "umoci", "unpack", "--image", b.path(Plain)+":"+name, bundle); err != nil {
			return err
		}
		if err := os.Rename(filepath.Join(bundle, "rootfs"), b.path("reference", name)); err != nil {
			return err
		}
		if err := os.RemoveAll(bundle); err != nil {
			return err
		}
	}
	return nil
}
