// Package vm boots a machine that has what this one may lack: a Debian kernel
// with fs-verity (and file-backed EROFS, FUSE passthrough, overlayfs that
// enforces verity), under qemu without KVM, on an ext4 disk made with
// -O verity. It has no root filesystem: an initramfs holds the init program
// (e2e/vm/init), the kernel's modules, and the files a test asks for. It knows
// nothing of cfs-fuse.
//
//	k, err := vm.EnsureKernel(ctx, cache, os.Stderr)         // fetched by apt, once
//	err = k.WriteInitrd(ctx, initrd, []vm.File{{"/t", testBinary}})
//	err = vm.MakeDisk(ctx, disk, 512<<20)
//	m, err := vm.Start(ctx, vm.Config{Kernel: k, Initrd: initrd, Disk: disk, Args: []string{"/t", "-test.v"}})
//	code, err := m.Wait()
//
// The program's output comes over a serial line of its own; the kernel's
// messages go to another, which is kept for when something fails. The init
// program mounts the disk at /disk, runs the program, and ends its output with
// a line that has the exit code: a machine that ends without it has crashed.
//
// For power cuts: Await returns when the program has printed a line, Kill ends
// qemu by SIGKILL, and the next Start with the same disk boots what was left
// on it. The disk is opened with cache=none, so that it holds what the kernel
// in the machine had written to it, and nothing of what that kernel still had
// in its memory.
//
// The kernel is kept in the cache folder:
//
//	<cache>/vm.lock            flock(2) held while fetching
//	<cache>/vm-1/vmlinuz
//	<cache>/vm-1/release       what uname -r will say
//	<cache>/vm-1/modules/NN-NAME.ko  in the order in which they are loaded
package vm
