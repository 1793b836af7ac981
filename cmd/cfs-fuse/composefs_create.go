package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/internal/composefs"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

const createHelp = `Write a composefs image of SOURCE: a folder, or with --from-file a
composefs-dump(5) text. "-" is standard input or output.

The image has all metadata, the files of 1 to 64 bytes, and the fs-verity
digests of the others, which are named by them: the file with the digest abcdef…
is ab/cdef… in the folder of objects. --digest-store fills such a folder. It shares
blocks with SOURCE where the filesystem can, leaves alone what is there, enables
fs-verity where the filesystem can, and is synced before IMAGE gets its name.

The bytes of the image depend on the tree and the format version only, and are
those that every implementation of the format writes: version 1 if the tree has
whiteouts, else 0, unless the flags say otherwise. If only one of --min-version
and --max-version is given the other is 0.`

const createExample = `  # an image of a folder, its files as objects
  %[1]s --digest-store=/srv/objects rootfs image.cfs

  # only the digest
  %[1]s --print-digest-only rootfs

  # from a dump to an image, as a filter
  composefs-info dump old.cfs | %[1]s --from-file - - > new.cfs`

// createFlags are those of mkcomposefs (format document, section 5).
type createFlags struct {
	store                   string
	useEpoch, skipDevices   bool
	skipXattrs, userXattrs  bool
	hardlinks               bool
	algorithm               string
	printDigest, digestOnly bool
	fromFile                bool
	minVersion, maxVersion  int
	threads                 int

	source, image string
	out           io.Writer
	warn          func(path, what string)
}

// newCreate returns mkcomposefs under the given name.
func newCreate(name string) *cobra.Command {
	var f createFlags
	cmd := &cobra.Command{
		Use:   name + " [flags] SOURCE IMAGE",
		Short: "Write a composefs image",
		Long:  createHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			if cmd.Flags().Changed("min-version") && !cmd.Flags().Changed("max-version") {
				f.maxVersion = 0 // section 2.3; the writer raises it to the other
			}
			f.out = cmd.OutOrStdout()
			f.warn = func(path, what string) {
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: warning: %.200q: %s\n", cmd.Name(), path, what)
			}
			if err := f.check(args); err != nil {
				return usageError{err}
			}
			return f.run(cmd.Context())
		},
	}
	called := name
	fl := cmd.Flags()
	f.algorithm = "sha256"
	if name == "create" {
		called = "cfs-fuse erofs create"
		fl.StringVar(&f.algorithm, "algorithm", f.algorithm, "hash `algorithm` of the digests, of the files and of the image: sha256 or sha512")
	}
	cmd.Example = fmt.Sprintf(createExample, called)
	fl.StringVar(&f.store, "digest-store", "", "put the files that are not inline into this `folder` of objects")
	fl.BoolVar(&f.useEpoch, "use-epoch", false, "make every mtime 0")
	fl.BoolVar(&f.skipDevices, "skip-devices", false, "leave out device nodes")
	fl.BoolVar(&f.skipXattrs, "skip-xattrs", false, "leave out extended attributes")
	fl.BoolVar(&f.userXattrs, "user-xattrs", false, "take user.* extended attributes only")
	fl.BoolVar(&f.hardlinks, "hardlinks", false, "keep hard links: names of one file become names of one inode")
	fl.BoolVar(&f.printDigest, "print-digest", false, "print the image's fs-verity digest")
	fl.BoolVar(&f.digestOnly, "print-digest-only", false, "print the image's fs-verity digest and write no image")
	fl.BoolVar(&f.fromFile, "from-file", false, "SOURCE is a dump, not a folder")
	fl.IntVar(&f.minVersion, "min-version", 0, "lowest format `version` to write")
	fl.IntVar(&f.maxVersion, "max-version", 1, "highest format `version` to write if the tree needs it")
	fl.IntVar(&f.threads, "threads", runtime.NumCPU(), "read `N` files at once")
	return cmd
}

// check completes the flags and refuses what cannot be meant.
func (f *createFlags) check(args []string) error {
	switch {
	case len(args) == 0 || args[0] == "":
		return errors.New("SOURCE is missing")
	case len(args) > 2:
		return fmt.Errorf("unexpected argument %q", args[2])
	case len(args) == 2 && f.digestOnly:
		return fmt.Errorf("--print-digest-only writes no image, but IMAGE is %q", args[1])
	case len(args) == 1 && !f.digestOnly:
		return errors.New("IMAGE is missing")
	case f.algorithm != "sha256" && f.algorithm != "sha512":
		return fmt.Errorf("--algorithm %s: want sha256 or sha512", f.algorithm)
	case f.threads <= 0:
		return fmt.Errorf("--threads %d: want a positive number", f.threads)
	}
	f.source = args[0]
	if len(args) == 2 {
		f.image = args[1]
	}
	for _, v := range []int{f.minVersion, f.maxVersion} {
		if v < 0 || v > erofs.MaxVersion {
			return fmt.Errorf("format version %d: want 0 to %d", v, erofs.MaxVersion)
		}
	}
	if _, err := unix.IoctlGetTermios(unix.Stdout, unix.TCGETS); f.image == "-" && err == nil {
		return errors.New("standard output is a terminal, which an image is not written to")
	}
	return nil
}

func (f *createFlags) run(ctx context.Context) error {
	root, line, err := f.tree(ctx)
	if err != nil {
		return err
	}
	o := erofs.Options{MinVersion: uint32(f.minVersion), MaxVersion: uint32(f.maxVersion), Warn: f.warn}
	digest := verity.New(f.hash())
	if f.printDigest || f.digestOnly {
		o.Tee = digest
	}
	switch {
	case f.digestOnly:
		err = erofs.Write(whileWanted{ctx, io.Discard}, root, o)
	case f.image == "-":
		err = erofs.Write(whileWanted{ctx, f.out}, root, o)
	default:
		tee := io.Writer(io.Discard)
		if o.Tee != nil {
			tee = o.Tee
		}
		o.Tee = whileWanted{ctx, tee}
		err = composefs.WriteImage(f.image, root, o)
	}
	if fault, ok := errors.AsType[*erofs.NodeError](err); ok && line != nil {
		err = &erofs.DumpError{Line: line(fault.Node), Err: err}
	}
	if err == nil && (f.printDigest || f.digestOnly) {
		_, err = fmt.Fprintf(f.out, "%x\n", digest.Sum())
	}
	return err
}

// hash returns the algorithm of all digests.
func (f *createFlags) hash() verity.Algorithm {
	if f.algorithm == "sha512" {
		return verity.SHA512
	}
	return verity.SHA256
}

// tree reads SOURCE, and fills the store. line is that of a node in a dump, and
// nil if SOURCE is none.
func (f *createFlags) tree(ctx context.Context) (root *erofs.Node, line func(*erofs.Node) int, err error) {
	if f.fromFile {
		dump, err := f.dump(ctx)
		if err != nil {
			return nil, nil, err
		}
		return dump.Root, dump.Line, nil
	}
	root, err = f.scan(ctx)
	return root, nil, err
}

// scan reads the folder SOURCE, and fills the store.
func (f *createFlags) scan(ctx context.Context) (*erofs.Node, error) {
	o := composefs.ScanOptions{UseEpoch: f.useEpoch, SkipDevices: f.skipDevices, Hardlinks: f.hardlinks,
		Algorithm: f.hash(), Threads: f.threads}
	switch {
	case f.skipXattrs:
		o.Xattrs = composefs.NoXattrs
	case f.userXattrs:
		o.Xattrs = composefs.UserXattrs
	}
	if f.store != "" {
		var err error
		if o.Store, err = composefs.OpenStore(f.store, f.hash()); err != nil {
			return nil, err
		}
	}
	root, err := composefs.Scan(ctx, f.source, o)
	if errors.Is(err, unix.ENOTDIR) {
		err = hint.Wrap(err, "add --from-file if it is a dump")
	}
	if err == nil && o.Store != nil {
		err = o.Store.Sync()
	}
	return root, err
}

// dump reads the dump SOURCE. What blocks on standard input cannot be
// interrupted, so it is left behind when ctx ends, and the process with it.
func (f *createFlags) dump(ctx context.Context) (*erofs.Dump, error) {
	// The tree is nearly all there is on the heap, and none of it becomes
	// garbage: letting the heap double before it is looked through buys little
	// time (1.9 s against 2.2 s for a million entries) for up to twice the memory.
	debug.SetGCPercent(20)
	in := os.Stdin
	if f.source != "-" {
		var err error
		if in, err = os.Open(f.source); err != nil {
			return nil, fmt.Errorf("dump: %w", err)
		}
		defer in.Close()
	}
	_, strict := os.LookupEnv("CFS_PARSE_STRICT")
	var dump *erofs.Dump
	done := make(chan error, 1)
	go func() {
		var err error
		dump, err = erofs.ReadDump(in, strict)
		done <- err
	}()
	select {
	case err := <-done:
		return dump, err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// whileWanted is a writer that fails when its context has ended, so that an
// image that nobody waits for is removed.
type whileWanted struct {
	ctx context.Context
	w   io.Writer
}

func (w whileWanted) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}
