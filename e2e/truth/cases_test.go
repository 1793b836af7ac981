package truth

import (
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/internal/imagetest"
	"github.com/cfs-fuse/cfs-fuse/internal/treediff"
)

const (
	noTimes = "the times of folders without an entry: umoci gives them that of the unpacking"
	whTimes = "the time of a folder that its own layer hides afterwards: umoci makes it that of the unpacking"
	acrossL = "overlayfs cannot link into a lower layer without copying the file up"
)

// name255 is as long as a name may be.
var name255 = strings.Repeat("n", 255)

// cases are all the images. A case is an image in as few words as show it.
var cases = []testCase{
	// Whiteouts.
	{name: "a file, hidden", guest: true, layers: layers(L(file("a", "1"), file("b", "2")), L(whiteout("a")))},
	{name: "a file, hidden and made again two layers up", layers: layers(L(file("a", "1")), L(whiteout("a")), L(file("a", "22", mode(0o600))))},
	{name: "a file, made again and hidden in one layer, in that order", layers: layers(L(file("a", "1")), L(file("a", "22"), whiteout("a")))},
	{name: "a file, hidden and made again in one layer, in that order", layers: layers(L(file("a", "1")), L(whiteout("a"), file("a", "22")))},
	{name: "a folder, hidden", layers: layers(L(dir("d"), file("d/a", "1"), dir("d/e"), file("d/e/b", "2"), file("k", "")), L(whiteout("d")))},
	{name: "a folder, hidden and made again in one layer", guest: true, layers: layers(L(dir("d"), file("d/a", "1"), file("k", "x")), L(whiteout("d"), dir("d", mode(0o700)), file("d/b", "2")))},
	{name: "a folder, made again and hidden in one layer", layers: layers(L(dir("d"), file("d/a", "1"), file("k", "x")), L(dir("d", mode(0o700)), file("d/b", "2"), whiteout("d"))),
		loose: map[string]treediff.Attr{"d": treediff.Mtime}, looseWhy: whTimes},
	{name: "a folder, hidden and made again as a file", layers: layers(L(dir("d"), file("d/a", "1")), L(whiteout("d"), file("d", "now a file")))},
	{name: "a whiteout of what is not there", layers: layers(L(file("a", "1")), L(whiteout("never"), whiteout("a/b"), file("c", "2")))},
	{name: "a whiteout of what only its own layer has", layers: layers(L(file("a", "1")), L(whiteout("new"), file("new", "2")))},
	{name: "a whiteout in the lowest layer", layers: layers(L(file("a", "1"), whiteout("a"), whiteout("b")))},
	{name: "a whiteout in a folder without an entry", layers: layers(L(dir("d", mode(0o711), owner(3, 4)), dir("d/e", mode(0o700)), file("d/e/a", "1"), file("d/e/b", "2")), L(whiteout("d/e/a")))},
	{name: "whiteouts of all there is", layers: layers(L(dir("d"), file("d/a", "1"), file("b", "2")), L(whiteout("d"), whiteout("b")))},
	{name: "a whiteout of a symlink, a device and a pipe", layers: layers(L(symlink("s", "t"), char("c", 1, 3), fifo("p"), file("k", "x")), L(whiteout("s"), whiteout("c"), whiteout("p")))},
	{name: "a whiteout beneath a folder that is hidden too", layers: layers(L(dir("d"), dir("d/e"), file("d/e/a", "1"), file("k", "x")), L(whiteout("d/e/a"), whiteout("d")))},
	{name: "a whiteout of a folder two layers down, and siblings in between", layers: layers(L(dir("d"), file("d/a", "1")), L(dir("d"), file("d/b", "2")), L(whiteout("d/a"), dir("d"), file("d/c", "3")))},

	// Opaque folders.
	{name: "opaque, first in its layer", guest: true, layers: layers(L(dir("d"), file("d/a", "1"), file("d/b", "2")), L(dir("d"), opaque("d"), file("d/c", "3")))},
	{name: "opaque, last in its layer", layers: layers(L(dir("d"), file("d/a", "1"), file("d/b", "2")), L(dir("d"), file("d/c", "3"), opaque("d")))},
	{name: "opaque, before its folder's entry", layers: layers(L(dir("d"), file("d/a", "1")), L(opaque("d"), dir("d", mode(0o750)), file("d/c", "3")))},
	{name: "opaque, in a folder without an entry", layers: layers(L(dir("d", mode(0o711), owner(3, 4)), file("d/a", "1")), L(opaque("d"), file("d/c", "3")))},
	{name: "opaque, and the same name again", layers: layers(L(dir("d"), file("d/a", "1"), file("d/b", "2")), L(dir("d"), file("d/a", "33"), opaque("d")))},
	{name: "opaque, with a folder beneath it", layers: layers(L(dir("d"), dir("d/e"), file("d/e/a", "1")), L(dir("d"), opaque("d"), dir("d/e"), file("d/e/b", "2")))},
	{name: "opaque beneath, not above", layers: layers(L(dir("d"), file("d/a", "1"), dir("d/e"), file("d/e/b", "2")), L(dir("d"), dir("d/e"), opaque("d/e"), file("d/e/c", "3")))},
	{name: "opaque, where nothing is below", layers: layers(L(file("k", "x")), L(dir("d"), opaque("d"), file("d/a", "1")))},
	{name: "opaque and whiteouts in one folder", layers: layers(L(dir("d"), file("d/a", "1"), file("d/b", "2")), L(dir("d"), whiteout("d/a"), opaque("d"), whiteout("d/b"), file("d/b", "22")))},
	{name: "opaque, twice, and filled again", layers: layers(L(dir("d"), file("d/a", "1")), L(dir("d"), opaque("d"), file("d/b", "2")), L(dir("d"), opaque("d"), file("d/c", "3")), L(dir("d"), file("d/e", "4")))},
	{name: "opaque, over a file", layers: layers(L(file("d", "a file")), L(dir("d"), opaque("d"), file("d/a", "1")))},
	{name: "opaque and empty", layers: layers(L(dir("d"), file("d/a", "1"), file("k", "x")), L(dir("d"), opaque("d")))},
	{name: "the root, opaque, first", guest: true, layers: layers(L(dir("d"), file("d/a", "1"), file("b", "2")), L(opaque(""), file("c", "3"), dir("d")))},
	{name: "the root, opaque, last", layers: layers(L(dir("d"), file("d/a", "1"), file("b", "2")), L(file("c", "3"), opaque("")))},
	{name: "the root, opaque, and nothing else", layers: layers(L(dir("d"), file("d/a", "1")), L(opaque("")), L(file("k", "x")))},

	// Hard links.
	{name: "three names of a file", guest: true, layers: layers(L(dir("d"), file("d/a", "1"), link("b", "d/a"), link("d/c", "d/a")))},
	{name: "a link to a lower layer's file", layers: layers(L(file("a", "1"), file("k", "x")), L(link("b", "a")))},
	{name: "a link to a lower layer's file with two names", noStack: acrossL, layers: layers(L(file("a", "1"), link("b", "a")), L(link("c", "a")))},
	{name: "a linked file, one name hidden", guest: true, noStack: "overlayfs counts hidden names, as the lower filesystem does", layers: layers(L(file("a", "1"), link("b", "a"), link("c", "a")), L(whiteout("a")))},
	{name: "a linked file, all names but one hidden", noStack: "overlayfs counts hidden names, as the lower filesystem does", layers: layers(L(file("a", "1"), link("b", "a")), L(whiteout("b")))},
	{name: "a linked file, one name replaced", noStack: "overlayfs counts replaced names, as the lower filesystem does", layers: layers(L(file("a", "1"), link("b", "a")), L(file("a", "new")))},
	{name: "a link to a file that its layer hides", noStack: acrossL, layers: layers(L(file("a", "1"), file("k", "x")), L(link("b", "a"), whiteout("a")))},
	{name: "a link to a file that its layer replaces before", layers: layers(L(file("a", "old")), L(file("a", "new"), link("b", "a")))},
	{name: "a link to a link", layers: layers(L(file("a", "1"), link("b", "a"), link("c", "b")))},
	{name: "links to a symlink, a device and a pipe", layers: layers(L(symlink("s", "t"), link("s2", "s"), char("c", 5, 1), link("c2", "c"), fifo("p"), link("p2", "p")))},
	{name: "a name of a link, and the same content twice", layers: layers(L(file("a", "same"), file("b", "same"), link("c", "a")))},
	{name: "a link over a folder", layers: layers(L(dir("d"), file("d/x", "1"), file("a", "2")), L(whiteout("d"), file("a", "3"), link("d", "a")))},

	// Types replaced.
	{name: "a file by a folder, and back", layers: layers(L(file("a", "1"), dir("d"), file("d/x", "2")), L(dir("a"), file("a/y", "3"), file("d", "4")))},
	{name: "a folder by a symlink, a symlink by a folder", guest: true, layers: layers(L(dir("d"), file("d/x", "1"), symlink("s", "d")), L(symlink("d", "e"), dir("s"), file("s/y", "2")))},
	{name: "each by the next", layers: layers(
		L(file("1", "f"), dir("2"), symlink("3", "x"), char("4", 1, 3), block("5", 8, 1), fifo("6")),
		L(dir("1"), symlink("2", "y"), char("3", 1, 5), block("4", 8, 2), fifo("5"), file("6", "f")),
		L(symlink("1", "z"), char("2", 1, 7), block("3", 8, 3), fifo("4"), file("5", "g"), dir("6")))},
	{name: "a folder's mode, owner and xattrs by a higher layer's", layers: layers(L(dir("d", mode(0o700), owner(1, 2), xattr("user.a", "1")), file("d/x", "1")), L(dir("d", mode(0o1777), owner(5, 6), xattr("user.b", "2"))))},
	{name: "an entry twice in one layer", layers: layers(L(file("a", "first"), file("b", "x"), file("a", "second", mode(0o600))))},
	{name: "a folder of three layers", layers: layers(L(dir("d"), file("d/1", "1"), file("d/same", "low")), L(file("d/2", "2"), file("d/same", "middle")), L(dir("d", mode(0o750)), file("d/3", "3"), file("d/same", "high")))},

	// Parents without entries.
	{name: "folders without entries", guest: true, layers: layers(L(file("a/b/c/d", "1"), file("a/x", "2"))),
		loose: map[string]treediff.Attr{".": treediff.Mtime, "a": treediff.Mtime, "a/b": treediff.Mtime, "a/b/c": treediff.Mtime}, looseWhy: noTimes},
	{name: "folders without entries, over ones with", layers: layers(L(dir("a", mode(0o700), owner(7, 8), xattr("user.k", "v")), dir("a/b", mode(0o711))), L(file("a/b/c", "1")))},
	{name: "a root without an entry", bareRoot: true, layers: layers(L(file("a", "1"))),
		loose: map[string]treediff.Attr{".": treediff.Mtime}, looseWhy: noTimes},
	{name: "a root with mode, owner, time and xattrs", bareRoot: true, layers: layers(L(dir(".", mode(0o1751), owner(11, 12), mtime(time.Unix(1e9, 0)), xattr("user.r", "root")), file("a", "1")))},
	{name: "no file at all", layers: layers(L())},

	// Names.
	{name: "odd names", guest: true, layers: layers(L(each(len(oddNames), func(i int) imagetest.Item { return file(oddNames[i], fmt.Sprint("content of ", i)) })...))},
	{name: "odd names of folders, hidden", layers: layers(L(append(each(len(oddNames), func(i int) imagetest.Item { return dir("x" + oddNames[i]) }), file("k", "x"))...),
		L(each(len(oddNames)/2, func(i int) imagetest.Item { return whiteout("x" + oddNames[2*i]) })...))},
	{name: "names of composefs's own folders", layers: layers(L(file("00", "file"), dir("ab"), file("ab/cdef", "1"), symlink("ff", "00"), char("7f", 1, 3)), L(whiteout("00")))},
	{name: "names of 255 bytes", layers: layers(L(dir(name255), file(name255+"/"+name255[:254]+"x", "1"), symlink(name255[:254]+"y", name255), file(name255[:252]+"\u65e5", "2")))},
	{name: "a path of 3,300 bytes", layers: layers(L(deep(15, name255[:220])...))},
	{name: "names that begin like a whiteout", layers: layers(L(file("wh.a", "1"), file(".w", "2"), file(".whx", "3"), file("a.wh.b", "4"), file(".wh", "5")))},
	{name: "names that sort oddly", layers: layers(L(file("!", "1"), file("+", "2"), file("-", "3"), file("a", "4"), file("a!", "5"), dir("a."), file("a./x", "6"), file("A", "7"), file("~", "8")))},

	// Symlinks.
	{name: "symlinks, of 4,095 bytes too", guest: true, layers: layers(L(symlink("long", strings.Repeat("x/", 2047)+"y"), symlink("to.itself", "to.itself"), symlink("up", "../../../.."), symlink("abs", "/etc/passwd"), symlink("odd", " \\ \n %s"), file("k", "x")))},
	{name: "symlinks with owners, times and xattrs", layers: layers(L(symlink("s", "t", owner(70000, 80000), mtime(time.Unix(5, 0)), xattr("trusted.a", "1"), xattr("security.b", "2")), file("k", "x")))},

	// Xattrs, ACLs, capabilities.
	{name: "xattrs of each kind", layers: layers(L(file("f", "1", xattr("user.a", "v"), xattr("trusted.t", "\x00\xff\n"), xattr("security.s", "x")), dir("d", xattr("user.a", "v"), xattr("trusted.z", "y"))))},
	{name: "an empty xattr", layers: layers(L(file("f", "1", xattr("user.empty", "")))),
		fix: func(root string) error { return unix.Lsetxattr(root+"/f", "user.empty", nil, 0) }, fixWhy: "umoci drops empty xattrs; the test adds it to what umoci unpacked"},
	{name: "ACLs", guest: true, layers: layers(L(file("f", "1", mode(0o670), xattr("system.posix_acl_access", acl(1000, 2000))), dir("d", mode(0o775), xattr("system.posix_acl_default", acl(0, 70000)))))},
	{name: "capabilities", guest: true, layers: layers(L(file("ping", "1", mode(0o755), xattr("security.capability", capability(1<<13))), link("ping2", "ping"), file("other", "2", xattr("security.capability", capability(1<<38|1)))))},
	{name: "400 xattrs on a file", layers: layers(L(file("f", "1", each(400, func(i int) imagetest.Attr {
		return xattr(fmt.Sprintf("user.number-%03d", i), strings.Repeat("v", 1+i%50))
	})...)))},
	{name: "xattrs that files share", layers: layers(L(each(50, func(i int) imagetest.Item {
		return file(fmt.Sprint("f", i), fmt.Sprint(i), xattr("user.same", strings.Repeat("s", 300)), xattr("user.own", fmt.Sprint(i)))
	})...))},
	{name: "xattr values of 64 KiB less a byte", guest: true, layers: layers(L(file("f", "1", xattr("user.large", strings.Repeat("L", 65535)), xattr("trusted.large", strings.Repeat("M", 65535))), file("g", "2", xattr("user.large", strings.Repeat("L", 65535))), dir("d", xattr("user.half", strings.Repeat("h", 40000)))))},
	{name: "xattrs of a file replaced, not merged", layers: layers(L(file("f", "1", xattr("user.a", "1"), xattr("user.b", "2"))), L(file("f", "2", xattr("user.b", "3"))))},
	{name: "xattr names of 255 bytes", layers: layers(L(file("f", "1", xattr("user."+strings.Repeat("x", 250), "v"))))},

	// Sizes.
	{name: "empty files", layers: layers(L(file("a", ""), dir("d"), file("d/b", "", mode(0)), link("c", "a")))},
	{name: "files about a block, a chunk and a span in size", layers: layers(L(each(len(sizes), func(i int) imagetest.Item { return random(fmt.Sprint(sizes[i]), sizes[i], uint64(i)) })...))},
	{name: "files about a block in size, in one chunk each", layers: layers(L(each(7, func(i int) imagetest.Item { return random(fmt.Sprint(sizes[i]), sizes[i], uint64(i)) })...))},
	{name: "sparse files", layers: layers(L(sparse("all zeros", 3<<20, ""), sparse("data at its end", 5<<20, "end"), file("begins and ends", "x"+strings.Repeat("\x00", 1<<20)+"y")))},
	{name: "sparse files, as Podman writes them", form: containers, layers: layers(L(sparse("all zeros", 3<<20, ""), sparse("data at its end", 5<<20, "end"), file("begins and ends", "x"+strings.Repeat("\x00", 1<<20)+"y")))},
	{name: "a file of more than 4 GiB", large: true, noStack: "nothing is stacked: one layer", layers: layers(L(sparse("huge", 4<<30+12345, "the end")))},

	// Times.
	{name: "times before 1970, of 1684, 2038 and 2106", layers: layers(L(each(len(instants), func(i int) imagetest.Item { return file(fmt.Sprint("t", i), "", mtime(time.Unix(instants[i], 0))) })...), L(file("k", "x")))},
	{name: "nanoseconds", guest: true, form: containers, layers: layers(L(file("one", "1", mtime(time.Unix(1e9, 1))), file("most", "2", mtime(time.Unix(1e9, 999_999_999))), dir("d", mtime(time.Unix(5, 500))), symlink("s", "t", mtime(time.Unix(6, 7))), file("before", "3", mtime(time.Unix(-2, 250_000_000)))))},

	// Modes and devices.
	{name: "setuid, setgid, sticky, and none", guest: true, layers: layers(L(file("su", "1", mode(0o4755)), file("sg", "2", mode(0o2755)), dir("tmp", mode(0o1777)), dir("all", mode(0o7777)), file("none", "3", mode(0)), dir("closed", mode(0)), file("closed/x", "4")))},
	{name: "owners of more than 16 bits", layers: layers(L(file("a", "1", owner(70000, 80000)), file("b", "2", owner(1<<31, 1<<32-2)), dir("d", owner(65534, 65535))))},
	{name: "devices and pipes", guest: true, layers: layers(L(char("null", 1, 3, mode(0o666)), block("disk", 8, 1, owner(0, 6)), char("large", 4095, 1<<20-1), char("minor", 0, 300), fifo("p", mode(0o600))))},

	// Many.
	{name: "120 layers", layers: each(120, func(i int) []imagetest.Item {
		items := L(dir("d"), file(fmt.Sprintf("d/%03d", i), fmt.Sprint(i)), file("d/last", fmt.Sprint(i)))
		if i%3 == 2 {
			items = append(items, whiteout(fmt.Sprintf("d/%03d", i-2)))
		}
		if i == 60 {
			items = append(items, dir("e"), opaque("e"))
		}
		return append(items, dir("e"), file(fmt.Sprintf("e/%03d", i), fmt.Sprint(i)))
	})},
	{name: "500 layers", noStack: "overlayfs stacks at most 500 lowers, and the test's own are among them", layers: each(500, func(i int) []imagetest.Item {
		return L(file(fmt.Sprintf("f%03d", i), fmt.Sprint(i)), file("last", fmt.Sprint(i)))
	})},
	{name: "300,000 entries in a folder", large: true, noStack: "nothing is stacked: one layer", layers: layers(append(L(dir("d")), each(300_000, func(i int) imagetest.Item { return file(fmt.Sprintf("d/%06d", i), "") })...))},

	// The other forms of layers.
	{name: "a bit of all, by stargz-snapshotter's zstd:chunked", form: zstdStargz, noStack: acrossL, layers: bitOfAll()},
	{name: "a bit of all, by Podman's zstd:chunked", form: containers, guest: true, noStack: acrossL, layers: bitOfAll()},
	{name: "a bit of all, as ordinary gzip", form: ordinary, noStack: acrossL, layers: bitOfAll()},
	{name: "a bit of all, as eStargz", guest: true, noStack: acrossL, layers: bitOfAll()},
}

func bitOfAll() [][]imagetest.Item {
	return layers(
		L(dir("d", mode(0o750), owner(1, 2)), file("d/a", "1", mode(0o4755), xattr("user.x", "y")), link("d/b", "d/a"), symlink("s", "d/a"), random("big", 300_000, 1), file("gone", "x"),
			dir("o"), file("o/hidden", "x"), char("c", 1, 3), fifo("p"), file("cap", "1", xattr("security.capability", capability(1<<10)))),
		L(whiteout("gone"), dir("o"), opaque("o"), file("o/seen", "2"), link("e", "d/b"), random("big2", 70_000, 2)))
}

var oddNames = []string{"with blank", " ", "new\nline", "tab\t", `back\slash`, `"quotes"`, "co:lon", "com,ma", "-dash", "--", "#", "%20", "*", "?", "[a]", "$HOME", "`x`", ";", "&", "|",
	"\x01\x1f\x7f", "é", "e\u0301", "日本語", "😀", "\u202eright to left", "\u00a0", "...", "..a", "a..", "~", "@", "=", "<>", "!"}

var sizes = []int{1, 31, 32, 2048, 2049, 4095, 4096, 4097, 65535, 65536, 131073, 4<<20 - 1, 4 << 20, 4<<20 + 1, 9_000_001}

var instants = []int64{0, 1, -1, -86400 * 365, -9_000_000_000, 1<<31 - 1, 1 << 31, 1<<32 - 1, 1 << 32}

// deep is a file beneath n folders of one name.
func deep(n int, name string) []imagetest.Item {
	var items []imagetest.Item
	path := ""
	for range n {
		path += name + "/"
		items = append(items, dir(path))
	}
	return append(items, file(path+"f", "far down"))
}
