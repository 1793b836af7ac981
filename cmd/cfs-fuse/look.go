package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/look"
	"github.com/cfs-fuse/cfs-fuse/mount"
)

// sourceHelp ends the help of each command that looks into an image.
const sourceHelp = `

SOURCE is one of
  docker://HOST/NAME[:TAG][@DIGEST]   an image in a registry; docker:// may be left out
  oci:DIR[:TAG], oci-archive:FILE[:TAG], layer:FILE
  composefs:IMAGE                     with --objects DIR
  sha256:DIGEST                       an image in the store, by its manifest
  MOUNTPOINT                          what is mounted there; begins with / or .

A path in the image begins with a slash and follows SOURCE after a colon: it begins
at the first ":/" behind the kind of source, so docker://HOST:5000/NAME:TAG:/etc is
the folder /etc of the image docker://HOST:5000/NAME:TAG.

Nothing is mounted. Only what is asked for is fetched, checked, and kept in the
store for mounts to come; what the store has is not fetched again.`

// lookFlags are the flags of the commands that look into an image.
type lookFlags struct {
	g        *global
	opts     mount.Options
	pull     string
	json     bool
	human    bool
	exact    bool
	color    string
	terminal bool // standard output is one
}

// define gives a command the flags that say where the image is.
func (f *lookFlags) define(cmd *cobra.Command, g *global) {
	f.g = g
	fl := cmd.Flags()
	fl.StringVar(&f.opts.Root, "root", defaultRoot(), "`folder` of the store")
	fl.StringVar(&f.opts.Source.Platform, "platform", "", "`os/arch` to take of a multi-platform image (default this machine's)")
	fl.BoolVar(&f.opts.Source.PlainHTTP, "plain-http", false, "speak HTTP, not HTTPS, to registries")
	fl.StringVar(&f.opts.Source.HostsDir, "hosts-dir", "/etc/containerd/certs.d", "`folder` of containerd's hosts.toml files")
	fl.StringVar(&f.pull, "pull", "missing", "ask what a tag stands for if the store does not know it (missing) or always: `policy`")
	fl.BoolVar(&f.opts.InsecureTOC, "insecure-toc", false, "take layers whose table of contents the manifest does not vouch for")
	fl.StringArrayVar(&f.opts.Objects, "objects", nil, "`folder` of objects of a composefs: source (may be repeated)")
}

// defineOutput gives a command the flags that say how its output looks.
func (f *lookFlags) defineOutput(cmd *cobra.Command, sizes, colors bool) {
	fl := cmd.Flags()
	fl.BoolVar(&f.json, "json", false, "print JSON, with exact sizes in bytes")
	if sizes {
		fl.Bool("help", false, "help for "+cmd.Name()) // so that -h is what it is to ls and du
		fl.BoolVarP(&f.human, "human-readable", "h", false, "print sizes as 1.2K, 34M (default on a terminal)")
		fl.BoolVar(&f.exact, "bytes", false, "print sizes in bytes (default elsewhere)")
	}
	if colors {
		fl.StringVar(&f.color, "color", "auto", "`when` to colour names: auto (on a terminal, unless NO_COLOR is set), always or never")
	}
}

// check is called before anything else.
func (f *lookFlags) check(cmd *cobra.Command) error {
	err := oneOf("pull", f.pull, "missing", "always")
	if f.color != "" {
		err = errors.Join(err, oneOf("color", f.color, "auto", "always", "never"))
	}
	if err != nil {
		return usageError{err}
	}
	f.terminal = isTerminal(cmd.OutOrStdout())
	f.human = !f.exact && (f.human || f.terminal)
	f.opts.Refresh, f.opts.Runtime = f.pull == "always", f.g.runtimeDir
	if !cmd.Flags().Changed("log-level") {
		f.g.logLevel = "warn" // what a look finds is its output
	}
	f.opts.Logger, err = f.g.logger()
	return err
}

// isTerminal reports whether something is written to a terminal.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// splitSource splits SOURCE:/PATH. The path is "" if there is none.
func splitSource(arg string) (source, path string) {
	skip := 0
	for _, kind := range []string{"docker://", "oci:", "oci-archive:", "layer:", "composefs:"} {
		if strings.HasPrefix(arg, kind) {
			skip = len(kind)
		}
	}
	if i := strings.Index(arg[skip:], ":/"); i > 0 {
		return arg[:skip+i], arg[skip+i+1:]
	}
	return arg, ""
}

// splitSources reads SOURCE[:/PATH] [/PATH...]: further paths are of the same
// image.
func splitSources(args []string) (source string, paths []string, err error) {
	source, path := splitSource(args[0])
	if path != "" {
		paths = append(paths, path)
	}
	for _, a := range args[1:] {
		if !strings.HasPrefix(a, "/") {
			return "", nil, usageError{fmt.Errorf("%q: want a further path of %s, which begins with a slash", a, source)}
		}
		paths = append(paths, a)
	}
	return source, paths, nil
}

// An opened is an image that a command looks into.
type opened struct {
	*mount.Image
	tree *look.Tree
}

// open opens the tree of an image.
func (f *lookFlags) open(ctx context.Context, source string) (*opened, error) {
	img, err := mount.OpenImage(ctx, source, f.opts)
	if err != nil {
		return nil, err
	}
	r, err := img.Tree(ctx)
	if err != nil {
		img.Close()
		return nil, err
	}
	return &opened{img, look.New(r, img)}, nil
}

// A fileInfo is what --json prints of a file.
type fileInfo struct {
	Path      string `json:"path"`
	PathBytes []byte `json:"path_bytes,omitempty"` // if it is no UTF-8
	Type      string `json:"type"`
	Mode      string `json:"mode"` // permissions in octal
	UID       uint32 `json:"uid"`
	GID       uint32 `json:"gid"`
	Links     uint32 `json:"links"`
	Inode     uint64 `json:"inode"`
	Size      int64  `json:"bytes"`
	Mtime     string `json:"mtime"`
	Target    string `json:"target,omitempty"`
	Device    string `json:"device,omitempty"` // MAJOR:MINOR
	Digest    string `json:"digest,omitempty"` // of the content
	// Local is how many of the bytes are in the store, if they are not in the
	// image's metadata.
	Local  *int64            `json:"bytes_local,omitempty"`
	Xattrs map[string]string `json:"xattrs,omitempty"` // values in base64
}

func (o *opened) info(f look.File) (fileInfo, error) {
	i := fileInfo{
		Path: f.Path, Type: typeName(f), Mode: fmt.Sprintf("%04o", f.Mode&0o7777), UID: f.UID, GID: f.GID,
		Links: f.Nlink, Inode: f.NID, Size: f.Size, Mtime: mtime(f).UTC().Format(time.RFC3339Nano),
	}
	if !utf8.ValidString(f.Path) {
		i.PathBytes = []byte(f.Path)
	}
	if isDevice(f) {
		i.Device = fmt.Sprintf("%d:%d", unix.Major(uint64(f.Rdev)), unix.Minor(uint64(f.Rdev)))
	}
	var err error
	if i.Target, err = o.tree.Target(f); err != nil {
		return i, err
	}
	object, err := o.tree.Object(f)
	if err != nil {
		return i, err
	}
	if n, digest, ok := o.Local(object); ok {
		i.Local, i.Digest = &n, digest.String()
	}
	xattrs, err := o.tree.Xattrs(f)
	for _, x := range xattrs {
		if i.Xattrs == nil {
			i.Xattrs = map[string]string{}
		}
		i.Xattrs[x.Name] = base64.StdEncoding.EncodeToString(x.Value)
	}
	return i, err
}

func mtime(f look.File) time.Time { return time.Unix(f.MtimeSec, int64(f.MtimeNsec)) }

func isDevice(f look.File) bool {
	k := f.Mode & unix.S_IFMT
	return k == unix.S_IFCHR || k == unix.S_IFBLK
}

// fileTypes are the words and the letters for types, as stat(1) and ls(1) have
// them.
var fileTypes = map[uint32]struct {
	name   string
	letter byte
}{
	unix.S_IFREG: {"regular file", '-'}, unix.S_IFDIR: {"directory", 'd'}, unix.S_IFLNK: {"symbolic link", 'l'},
	unix.S_IFCHR: {"character special file", 'c'}, unix.S_IFBLK: {"block special file", 'b'},
	unix.S_IFIFO: {"fifo", 'p'}, unix.S_IFSOCK: {"socket", 's'},
}

func typeName(f look.File) string { return fileTypes[f.Mode&unix.S_IFMT].name }

// modeString is the mode as ls -l shows it.
func modeString(f look.File) string {
	b := []byte("?rwxrwxrwx")
	b[0] = fileTypes[f.Mode&unix.S_IFMT].letter
	for i := range 9 {
		if f.Mode&(1<<(8-i)) == 0 {
			b[i+1] = '-'
		}
	}
	for _, s := range []struct {
		bit    uint32
		at     int
		letter byte
	}{{unix.S_ISUID, 3, 's'}, {unix.S_ISGID, 6, 's'}, {unix.S_ISVTX, 9, 't'}} {
		switch {
		case f.Mode&s.bit == 0:
		case b[s.at] == 'x':
			b[s.at] = s.letter
		default:
			b[s.at] = s.letter - 'a' + 'A'
		}
	}
	return string(b)
}

// size prints bytes: exactly, or short as ls -h and du -h do.
func (f *lookFlags) size(n int64) string {
	if !f.human {
		return strconv.FormatInt(n, 10)
	}
	return shortSize(n)
}

// shortSize prints bytes as GNU's -h does: rounded up, one digit behind the
// point below 10.
func shortSize(n int64) string {
	if n < 1024 {
		return strconv.FormatInt(n, 10)
	}
	const units = "KMGTPE"
	v, i := float64(n)/1024, 0
	for ceil(v, 1) >= 1024 && i < len(units)-1 {
		v /= 1024
		i++
	}
	if t := ceil(v, 10); t < 10 {
		return strconv.FormatFloat(t, 'f', 1, 64) + units[i:i+1]
	}
	return strconv.FormatFloat(ceil(v, 1), 'f', 0, 64) + units[i:i+1]
}

// ceil rounds up to 1/scale.
func ceil(v, scale float64) float64 {
	t := float64(int64(v * scale))
	if t < v*scale {
		t++
	}
	return t / scale
}

// name prints a path or name: as it is into a pipe, quoted on a terminal, and
// there in colour.
func (f *lookFlags) name(name string, file *look.File) string {
	if !f.terminal {
		return f.paint(name, file)
	}
	return f.quoted(name, file)
}

// quoted prints a path or name quoted, also into a pipe: where names are not
// all that is in a line.
func (f *lookFlags) quoted(name string, file *look.File) string {
	return f.paint(look.Quote(name), file)
}

func (f *lookFlags) paint(shown string, file *look.File) string {
	if file == nil || !f.colored() {
		return shown
	}
	if c := colorOf(*file); c != "" {
		return "\x1b[" + c + "m" + shown + "\x1b[0m"
	}
	return shown
}

func (f *lookFlags) colored() bool {
	return f.color == "always" || f.color == "auto" && f.terminal && os.Getenv("NO_COLOR") == ""
}

// colorOf is the colour that dircolors(1) has for a type by default.
func colorOf(f look.File) string {
	switch f.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "01;34"
	case unix.S_IFLNK:
		return "01;36"
	case unix.S_IFIFO:
		return "33"
	case unix.S_IFSOCK:
		return "01;35"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "01;33"
	}
	switch {
	case f.Mode&unix.S_ISUID != 0:
		return "37;41"
	case f.Mode&unix.S_ISGID != 0:
		return "30;43"
	case f.Mode&0o111 != 0:
		return "01;32"
	}
	return ""
}

// printJSON prints a value as every --json does.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// someErrors goes on after an error of one path, as coreutils do: it is said
// at once, and the exit code is 1 in the end.
type someErrors struct {
	w     io.Writer
	count int
}

func (s *someErrors) add(err error) {
	s.count++
	fmt.Fprintln(s.w, "cfs-fuse: "+oneLine(err.Error()))
}

// errPartial ends a command some of whose paths could not be shown, which was
// said already.
type errPartial struct{ n int }

func (e errPartial) Error() string { return fmt.Sprintf("%d paths failed", e.n) }

func (s *someErrors) err() error {
	if s.count > 0 {
		return errPartial{s.count}
	}
	return nil
}
