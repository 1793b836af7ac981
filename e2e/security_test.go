package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// What --options asks for holds on each backend and after the swap.
func TestMountOptions(t *testing.T) {
	b := newBench(t)
	source := "oci:" + set.Layout(images.EStargz) + ":" + images.Debian
	check := func(point string) {
		t.Helper()
		for _, word := range []string{"ro", "nosuid", "nodev", "noexec"} {
			if all := mountOn(t, point); len(all) != 1 || !strings.Contains(","+all[0].options+",", ","+word+",") {
				t.Errorf("%s: mounted %+v, want %s", b.backend, all, word)
			}
		}
		if err := exec.Command(filepath.Join(point, "bin/true")).Run(); !errors.Is(err, unix.EACCES) {
			t.Errorf("%s: run a program: %v, want EACCES", b.backend, err)
		}
	}
	for _, b.backend = range []string{fuseBackend, hybridBackend} {
		b.root = filepath.Join(b.dir, "root-"+b.backend)
		point := b.mount(source, "-o", "nosuid,nodev", "--options", "noexec", "--fill=false")
		b.isServed(point)
		check(point)
		b.must("umount", point)
	}
	point := b.mount(source, "-o", "nosuid,nodev,noexec")
	b.waitFor("swapped", point)
	check(point)
	b.must("umount", point)
	b.refused(2, []string{"--options", "loud"}, "mount", "-o", "loud", source, point)
}

// The process that serves has few capabilities and cannot gain any.
func TestServerPrivileges(t *testing.T) {
	b := newBench(t)
	point := b.mount("oci:"+set.Layout(images.EStargz)+":"+images.Small, "--swap", "never")
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", b.status(point).PID))
	if err != nil {
		t.Fatal(err)
	}
	field := func(name string) string {
		m := regexp.MustCompile(`(?m)^` + name + `:\t(\w+)`).FindSubmatch(text)
		if m == nil {
			t.Fatalf("no %s in %s", name, text)
		}
		return string(m[1])
	}
	if field("NoNewPrivs") != "1" {
		t.Error("programs that the process starts may gain privileges")
	}
	for _, name := range []string{"CapPrm", "CapEff", "CapBnd"} {
		caps, err := strconv.ParseUint(field(name), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []int{unix.CAP_SYS_MODULE, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SETUID, unix.CAP_SYS_RAWIO, unix.CAP_SYS_BOOT, unix.CAP_MKNOD, unix.CAP_BPF} {
			if caps&(1<<c) != 0 {
				t.Errorf("%s has capability %d", name, c)
			}
		}
		if caps&(1<<unix.CAP_SYS_ADMIN) == 0 {
			t.Errorf("%s lacks CAP_SYS_ADMIN, which the swap needs", name)
		}
	}
}
