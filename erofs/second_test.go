package erofs

import (
	"bytes"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"

	goerofs "github.com/erofs/go-erofs"
)

// go-erofs is a second opinion: somebody else's reader must see in our images
// what ours sees. Paths that io/fs does not allow (invalid UTF-8) are left
// out, with what is below them.
func TestSecondOpinion(t *testing.T) {
	names, skipped := 0, 0
	check := func(t *testing.T, img []byte) {
		r := openImage(t, img)
		other, err := goerofs.Open(bytes.NewReader(img))
		if err != nil {
			t.Fatal(err)
		}
		err = r.Walk(func(p string, ino Inode) error {
			rel := "."
			if p != "/" {
				rel = p[1:]
			}
			if !fs.ValidPath(rel) {
				skipped++
				if ino.IsDir() {
					return fs.SkipDir
				}
				return nil
			}
			names++
			var fi fs.FileInfo
			if rel == "." {
				fi, err = fs.Stat(other, ".")
			} else {
				fi, err = lstat(other, rel)
			}
			if err != nil {
				return fmt.Errorf("%s: go-erofs: %w", p, err)
			}
			st, ok := fi.Sys().(*goerofs.Stat)
			if !ok {
				return fmt.Errorf("%s: go-erofs gives a %T", p, fi.Sys())
			}
			ours := fmt.Sprintf("size %d uid %d gid %d nlink %d rdev %d mtime %d.%d", ino.Size, ino.UID, ino.GID, ino.Nlink, ino.Rdev, ino.MtimeSec, ino.MtimeNsec)
			theirs := fmt.Sprintf("size %d uid %d gid %d nlink %d rdev %d mtime %d.%d", st.Size, st.UID, st.GID, st.Nlink, st.Rdev, int64(st.Mtime), st.MtimeNs)
			if ours != theirs {
				t.Errorf("%s: %s; go-erofs: %s", p, ours, theirs)
			}
			all, err := r.Xattrs(ino)
			if err != nil {
				return err
			}
			xattrs := map[string]string{}
			for _, x := range all {
				xattrs[x.Name] = string(x.Value)
			}
			theirXattrs := map[string]string{}
			for name, value := range st.Xattrs {
				// go-erofs 0.3.1 puts a dot behind the two ACL prefixes, which
				// the kernel's table does not have (fs/erofs/xattr.c).
				name = strings.Replace(name, "system.posix_acl_access.", "system.posix_acl_access", 1)
				name = strings.Replace(name, "system.posix_acl_default.", "system.posix_acl_default", 1)
				theirXattrs[name] = value
			}
			if !maps.Equal(xattrs, theirXattrs) {
				t.Errorf("%s: xattrs %q; go-erofs: %q", p, slices.Sorted(maps.Keys(xattrs)), slices.Sorted(maps.Keys(theirXattrs)))
			}
			if ino.IsSymlink() {
				want, err := r.Readlink(ino)
				if err != nil {
					return err
				}
				if got, err := fs.ReadLink(other, rel); err != nil || got != want {
					t.Errorf("%s: target %q; go-erofs: %q, %v", p, want, got, err)
				}
			}
			if ino.IsRegular() && !ino.External() && ino.Size > 0 {
				want := make([]byte, ino.Size)
				if _, err := r.ReadAt(ino, want, 0); err != nil {
					return err
				}
				if got, err := fs.ReadFile(other, rel); err != nil || !bytes.Equal(got, want) {
					t.Errorf("%s: %d bytes; go-erofs: %d, %v", p, len(want), len(got), err)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Run("sample", func(t *testing.T) { check(t, image(t, sample(), Options{MaxVersion: 1})) })
	for _, c := range goldens(t) {
		if c.reject {
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			root, err := ParseDump(bytes.NewReader(c.dump(t)))
			if err != nil {
				t.Fatal(err)
			}
			check(t, image(t, root, Options{MinVersion: c.min, MaxVersion: c.max}))
		})
	}
	t.Logf("%d names compared, %d left out", names, skipped)
	if names < 1000 {
		t.Errorf("only %d names compared", names)
	}
}

// lstat finds a name in its folder, so that a symbolic link is not followed.
func lstat(fsys fs.FS, name string) (fs.FileInfo, error) {
	if l, ok := fsys.(fs.ReadLinkFS); ok {
		return l.Lstat(name)
	}
	entries, err := fs.ReadDir(fsys, path.Dir(name))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.Name() == path.Base(name) {
			return e.Info()
		}
	}
	return nil, fs.ErrNotExist
}
