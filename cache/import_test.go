package cache

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/verity"
)

// write writes a file, and the folders above it.
func write(t testing.TB, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func objectName(t testing.TB, data []byte, alg verity.Algorithm) string {
	t.Helper()
	sum, err := verity.Digest(bytes.NewReader(data), alg)
	if err != nil {
		t.Fatal(err)
	}
	h := hex.EncodeToString(sum)
	return h[:2] + "/" + h[2:]
}

// Every shape of folder is taken, and nothing but bytes; what is not what it is
// called is told of and left out.
func TestImport(t *testing.T) {
	contents := []content{cut("a*5000"), cut("b*100000"), cut("c*1"), cut("d*70000 e*1")}
	x := imageOf(t, contents...)
	for name, c := range map[string]struct {
		path func(ct content) string
		more func(t *testing.T, dir string)
		res  Imported
		left int
	}{
		"composefs": {
			func(ct content) string { return objectName(t, ct.data, verity.SHA256) },
			func(t *testing.T, dir string) {
				write(t, filepath.Join(dir, "ab", strings.Repeat("0", 62)), []byte("not this"))
			}, Imported{Files: 5, Added: 4, Wrong: 1}, 1,
		},
		"composefs-rs": {
			func(ct content) string { return "objects/" + objectName(t, ct.data, verity.SHA512) },
			func(t *testing.T, dir string) {
				write(t, filepath.Join(dir, "meta.json"), []byte("{}"))
				write(t, filepath.Join(dir, "streams/x"), []byte("not a file's content"))
				write(t, filepath.Join(dir, "objects/ab", strings.Repeat("0", 126)), []byte("not this"))
			}, Imported{Files: 5, Added: 4, Wrong: 1}, 1,
		},
		"ostree": {
			func(ct content) string { return "objects/" + ct.digest.Path() + ".file" },
			func(t *testing.T, dir string) {
				write(t, filepath.Join(dir, "objects/00/11.filez"), []byte("compressed"))
				write(t, filepath.Join(dir, "objects/00/12.dirtree"), []byte("a folder"))
			}, Imported{Files: 4, Added: 4, Skipped: 2}, 0,
		},
		"a tree": {
			func(ct content) string { return fmt.Sprintf("usr/bin/%x", ct.digest[:4]) },
			func(t *testing.T, dir string) {
				write(t, filepath.Join(dir, "etc/empty"), nil)
				write(t, filepath.Join(dir, "etc/twice"), contents[0].data)
				for _, err := range []error{
					os.Symlink("/etc/passwd", filepath.Join(dir, "link")), unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666),
					unix.Mknod(filepath.Join(dir, "dev"), unix.S_IFCHR|0o666, 1<<8|3), os.Chmod(filepath.Join(dir, "etc/twice"), 0o4755),
				} {
					if err != nil {
						t.Fatal(err)
					}
				}
			}, Imported{Files: 5, Added: 4}, 0,
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for _, ct := range contents {
				write(t, filepath.Join(dir, c.path(ct)), ct.data)
			}
			c.more(t, dir)
			s := open(t, t.TempDir(), Options{})
			var mu sync.Mutex
			var left []string
			res, err := s.Import(t.Context(), dir, func(path string, err error) {
				mu.Lock()
				defer mu.Unlock()
				left = append(left, path+": "+err.Error())
			})
			if err != nil {
				t.Fatal(err)
			}
			got := *res
			got.Cloned = 0
			c.res.Bytes = 5000 + 100000 + 1 + 70001
			if added := got.Added; name == "a tree" && added == 5 {
				got.Added, got.Bytes = 4, got.Bytes-5000 // two at once found the same content absent
			}
			if got != c.res || len(left) != c.left {
				t.Errorf("%+v, want %+v; left out: %q", got, c.res, left)
			}
			cs := contentsOf(t, s, x)
			if n := putAll(t, cs, x); n != 0 {
				t.Errorf("%d chunks were missing", n)
			}
			wantWhole(t, s, cs, x)
			check(t, s)
			again, err := s.Import(t.Context(), dir, nil)
			if err != nil || again.Added != 0 || again.Files != c.res.Files {
				t.Errorf("again: %+v, %v", again, err)
			}
		})
	}
	s := open(t, t.TempDir(), Options{})
	if _, err := s.Import(t.Context(), filepath.Join(t.TempDir(), "absent"), nil); err == nil {
		t.Error("a folder that is not there was taken")
	}
}

// Where the filesystem shares blocks, importing takes next to no room.
func TestImportClones(t *testing.T) {
	for _, name := range []string{"xfs", "btrfs"} {
		t.Run(name, func(t *testing.T) {
			mnt := newFilesystem(t, name, 300)
			tree := filepath.Join(mnt, "tree")
			var files []content
			for i := range 8 {
				files = append(files, cut(fmt.Sprintf("%c*%d", 'a'+i, 8<<20+i)))
				write(t, filepath.Join(tree, fmt.Sprint(i)), files[i].data)
			}
			s := open(t, filepath.Join(mnt, "store"), Options{})
			free := func() int64 {
				if err := unix.Syncfs(s.rootDir.fd); err != nil {
					t.Fatal(err)
				}
				return s.meter.free()
			}
			before := free()
			res, err := s.Import(t.Context(), tree, nil)
			if err != nil || res.Added != 8 || res.Cloned != res.Bytes {
				t.Fatalf("%+v, %v", res, err)
			}
			if took := before - free(); took > 8<<20 {
				t.Errorf("%d bytes of files took %d", res.Bytes, took)
			}
			x := imageOf(t, slices.Clone(files)...)
			wantWhole(t, s, contentsOf(t, s, x), x)
			s.Close()
		})
	}
}
