package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A content is a file in a few words: its chunks, each a letter and how often
// it occurs, "0" for a chunk of zeros that is not in the blob:
// "a*4096 b*4096 0*100000 c*7".
type content struct {
	data   []byte
	chunks []toc.Chunk
	digest image.Digest // what the table of contents says
}

func cut(words string) content {
	var c content
	for word := range strings.FieldsSeq(words) {
		letter, count, ok := strings.Cut(word, "*")
		n, err := strconv.Atoi(count)
		if !ok || err != nil || len(letter) != 1 {
			panic("bad chunk " + word)
		}
		ch := toc.Chunk{FileOffset: int64(len(c.data)), Size: int64(n), Zero: letter == "0"}
		data := bytes.Repeat([]byte{letter[0]}, n)
		if ch.Zero {
			clear(data)
		} else {
			ch.Digest = sha256.Sum256(data)
		}
		c.data = append(c.data, data...)
		c.chunks = append(c.chunks, ch)
	}
	c.digest = sha256.Sum256(c.data)
	return c
}

// lying returns c with a content digest that is not its bytes'.
func (c content) lying() content {
	c.digest[0] ^= 1
	return c
}

// fsVerity returns the fs-verity digest of c's bytes.
func (c content) fsVerity() image.Digest {
	sum, err := verity.Digest(bytes.NewReader(c.data), verity.SHA256)
	if err != nil {
		panic(err)
	}
	return image.Digest(sum)
}

// An img is an image's index and the contents that it lists.
type img struct {
	*image.Index
	raw []byte // of the index
	by  map[image.Digest]content
}

// imageOf makes an image of one layer that holds the contents.
func imageOf(t testing.TB, contents ...content) img {
	t.Helper()
	root := &image.Node{Mode: syscall.S_IFDIR | 0o755, Nlink: 2}
	x := img{by: make(map[image.Digest]content)}
	var blob int64
	for i, c := range contents {
		n := &image.Node{
			Name: fmt.Sprintf("f%06d", i), Mode: syscall.S_IFREG | 0o644, Nlink: 1,
			Size: int64(len(c.data)), Content: c.digest,
		}
		for _, ch := range c.chunks {
			if !ch.Zero {
				ch.BlobOffset, ch.BlobEnd = blob, blob+ch.Size
				blob += ch.Size
			}
			n.Chunks = append(n.Chunks, ch)
		}
		root.Children = append(root.Children, n)
		x.by[c.digest] = c
	}
	var b bytes.Buffer
	layers := []image.Layer{{Digest: image.Digest{1}, Size: blob + 1, TOC: &toc.TOC{Compression: toc.None}}}
	if err := image.WriteIndex(&b, &image.Tree{Root: root, Names: len(contents) + 1, Dirs: 1, Files: len(contents)}, layers); err != nil {
		t.Fatal(err)
	}
	var err error
	x.raw = b.Bytes()
	if x.Index, err = image.OpenIndex(x.raw); err != nil {
		t.Fatal(err)
	}
	return x
}

// data returns the bytes of chunk j as Put wants them.
func (x img) data(j int) []byte {
	ch := x.Chunk(j)
	if ch.Zero {
		return nil
	}
	return x.by[x.Content(ch.Content).Digest].data[ch.FileOffset : ch.FileOffset+ch.Size]
}

// find returns the number of content c and the number of its k-th chunk.
func (x img) find(t testing.TB, c content, k int) (i, j int) {
	t.Helper()
	i, ok := x.Find(c.digest)
	if !ok {
		t.Fatalf("content %s is not in the index", c.digest)
	}
	return i, x.ContentChunk(i, k)
}

// open opens the store in dir, to be closed with the test.
func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func contentsOf(t testing.TB, s *Store, x img) *Contents {
	t.Helper()
	c, err := s.Contents(x.Index)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func put(t testing.TB, c *Contents, x img, js ...int) {
	t.Helper()
	for _, j := range js {
		if err := c.Put(j, x.data(j)); err != nil {
			t.Fatal(err)
		}
	}
}

// putAll puts every chunk that is missing, as a fetcher would, and returns
// how many that were.
func putAll(t testing.TB, c *Contents, x img) (n int) {
	t.Helper()
	for again := true; again; {
		again = false
		for j := range x.Chunks() {
			if c.Missing(j) {
				put(t, c, x, j)
				again = true
				n++
			}
		}
	}
	return n
}

// wantRead reads content i and compares it.
func wantRead(t testing.TB, c *Contents, x img, i int) {
	t.Helper()
	ct := x.Content(i)
	got := make([]byte, ct.Size)
	n, err := c.ReadAt(i, got, 0)
	if err != nil || int64(n) != ct.Size || !bytes.Equal(got, x.by[ct.Digest].data) {
		t.Fatalf("read content %d (%d bytes): %d bytes, %v, equal %v", i, ct.Size, n, err, bytes.Equal(got, x.by[ct.Digest].data))
	}
}

// wantWhole checks that everything is local, in memory and on disk.
func wantWhole(t testing.TB, s *Store, c *Contents, x img) {
	t.Helper()
	p := c.Progress()
	if p.FilesLocal != p.Files || p.BytesLocal != p.Bytes || p.Files != x.Contents() {
		t.Fatalf("progress %+v", p)
	}
	for i := range x.Contents() {
		if !c.Whole(i) {
			t.Fatalf("content %d is not whole", i)
		}
		wantRead(t, c, x, i)
		ct := x.by[x.Content(i).Digest]
		d, err := c.Verity(i)
		if err != nil || d != ct.fsVerity() {
			t.Fatalf("Verity(%d) = %s, %v; want %s", i, d, err, ct.fsVerity())
		}
		if !s.noVerity.Load() { // the filesystem can, so every object must have it
			f, err := c.File(i)
			if err != nil {
				t.Fatal(err)
			}
			alg, sum, err := verity.Measure(f)
			f.Close()
			if err != nil || alg != verity.SHA256 || image.Digest(sum) != d {
				t.Fatalf("the kernel measures %s %x, %v; want %s", alg, sum, err, d)
			}
		}
		object, content := stat(t, s.Objects(), d.Path()), stat(t, s.ContentsDir(), ct.digest.Path())
		if object.Ino != content.Ino || object.Nlink != 2 || object.Mode != syscall.S_IFREG|objectMode {
			t.Fatalf("object %+v, content %+v", object, content)
		}
	}
}

func stat(t testing.TB, path ...string) (st syscall.Stat_t) {
	t.Helper()
	if err := syscall.Lstat(filepath.Join(path...), &st); err != nil {
		t.Fatalf("%s: %v", filepath.Join(path...), err)
	}
	return st
}

// list returns the names of the regular files below the store's folders of
// data, in order.
func list(t testing.TB, s *Store) (names []string) {
	t.Helper()
	for _, dir := range []string{"objects", "contents", "staging"} {
		err := filepath.WalkDir(filepath.Join(s.Root(), dir), func(path string, e fs.DirEntry, err error) error {
			if err == nil && !e.IsDir() {
				names = append(names, strings.TrimPrefix(path, s.Root()+"/"))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// check reads every file that has a digest's name and compares; it returns
// how many there were.
func check(t testing.TB, s *Store) (n int) {
	t.Helper()
	for _, name := range list(t, s) {
		dir, rest, _ := strings.Cut(name, "/")
		if dir == "staging" {
			continue
		}
		data, err := os.ReadFile(filepath.Join(s.Root(), name))
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		if dir == "objects" {
			got, err = verity.Digest(bytes.NewReader(data), verity.SHA256)
			if err != nil {
				t.Fatal(err)
			}
		} else {
			sum := sha256.Sum256(data)
			got = sum[:]
			rest = strings.TrimPrefix(rest, "sha256/")
		}
		if hex.EncodeToString(got) != strings.ReplaceAll(rest, "/", "") {
			t.Errorf("%s holds %d bytes with digest %x", name, len(data), got)
		}
		n++
	}
	return n
}

// staged returns the names in staging/.
func staged(t testing.TB, s *Store) (names []string) {
	t.Helper()
	for _, name := range list(t, s) {
		if n, ok := strings.CutPrefix(name, "staging/"); ok {
			names = append(names, n)
		}
	}
	return names
}
