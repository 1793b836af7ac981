package store

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

type listed struct {
	Digest    string   `json:"manifest_digest"`
	State     string   `json:"state"`
	InUse     bool     `json:"in_use"`
	Pinned    bool     `json:"pinned"`
	Sources   []string `json:"sources"`
	Exclusive int64    `json:"exclusive_bytes"`
	Local     int64    `json:"bytes_local"`
}

type collected struct {
	Freed   int64    `json:"freed_bytes"`
	Evicted []string `json:"evicted"`
	Removed []string `json:"removed"`
	Over    int64    `json:"over_bytes"`
}

// The story of a store on the command line: images are listed, evicted in their
// order, kept while they are mounted in whichever way, pinned, removed.
func TestCacheCommands(t *testing.T) {
	b, r := newBench(t), serve(t)
	base := files("usr", 1, 40, 50_000)
	one := push(t, r, "one", 0, base, files("opt", 2, 40, 50_000))
	two := push(t, r, "two", 0, base, files("opt", 3, 40, 50_000))
	p1 := b.mount(one.name)
	b.waitFor("swapped", p1)
	p2 := b.mount(two.name)
	b.waitFor("swapped", p2)
	eventually(t, 5*time.Second, "processes have left", func() bool { return len(b.processes()) == 0 })

	var all []listed
	b.cache(&all, "ls")
	if len(all) != 2 || all[0].Sources[0] != one.name || all[0].State != "sealed" || !all[0].InUse || all[0].Exclusive < 40*50_000 || all[0].Local < 80*50_000 {
		t.Fatalf("ls: %+v", all)
	}
	// Nothing goes while the kernel has both mounted, though no process of ours
	// is left.
	out, err := b.run("cache", "gc", "--root", b.root, "--store-size", "1M", "--json")
	var c collected
	if jerr := json.Unmarshal([]byte(out), &c); jerr != nil || err == nil || !strings.Contains(err.Error(), "over its budget") || c.Freed != 0 || c.Over < 4<<20 {
		t.Fatalf("gc of mounted images: %s, %v", out, err)
	}
	if err := readAll(p1, one); err != nil {
		t.Fatal(err)
	}
	if _, err := b.run("cache", "rm", "--root", b.root, one.name); err == nil || !strings.Contains(err.Error(), "in use") || !strings.Contains(err.Error(), "hint") {
		t.Errorf("rm of a mounted image: %v", err)
	}
	b.must("umount", p1)
	b.must("umount", p2)
	b.must("cache", "pin", "--root", b.root, all[1].Digest[7:19])
	b.cache(&c, "gc", "--store-size", "5M", "--dry-run")
	if len(c.Evicted) != 1 || c.Evicted[0] != all[0].Digest {
		t.Errorf("dry run: %+v", c)
	}
	b.cache(&c, "gc", "--store-size", "5M")
	if len(c.Evicted) != 1 || c.Evicted[0] != all[0].Digest || len(c.Removed) != 0 || c.Freed < 40*50_000 {
		t.Errorf("gc: %+v", c)
	}
	b.cache(&all, "ls")
	if all[0].State != "lazy" || all[1].State != "sealed" || !all[1].Pinned || all[0].Local > 41*50_010 {
		t.Errorf("ls after gc: %+v", all)
	}
	// What was evicted is lazy, needs its manifest no more, and fetches what is gone only.
	before := r.Counts().Bytes
	b.must(b.mountArgs(one.name, p1)...)
	if err := readAll(p1, one); err != nil {
		t.Fatal(err)
	}
	b.waitFor("swapped", p1)
	if got := r.Counts().Bytes - before; got < 40*50_000 || got > 40*50_000*12/10 {
		t.Errorf("%d bytes were fetched again", got)
	}
	b.must("umount", p1)
	if _, err := b.run("cache", "rm", "--root", b.root, two.name); err == nil || !strings.Contains(err.Error(), "pinned") {
		t.Errorf("rm of a pinned image: %v", err)
	}
	b.must("cache", "unpin", "--root", b.root, two.name)
	b.cache(&c, "rm", one.name, two.name)
	if len(c.Removed) != 2 {
		t.Errorf("rm: %+v", c)
	}
	var u struct {
		Total    int64 `json:"total_bytes"`
		Contents int   `json:"contents"`
	}
	if b.cache(&u, "du"); u.Total != 0 || u.Contents != 0 {
		t.Errorf("left: %+v", u)
	}
	if out := b.must("cache", "check", "--root", b.root, "--read"); !strings.Contains(out, ": 0 problems") {
		t.Errorf("check: %s", out)
	}
	for _, args := range [][]string{{"cache", "ls"}, {"cache", "du"}, {"cache", "gc"}} { // for people
		if out := b.must(append(args, "--root", b.root)...); len(out) < 15 {
			t.Errorf("%v: %q", args, out)
		}
	}
}

// A kernel mount that no process of ours and no mount table of this namespace
// shows holds the image as well: in a namespace of its own, and detached with
// a working folder in it.
func TestHiddenMountsHold(t *testing.T) {
	b, r := newBench(t), serve(t)
	img := push(t, r, "hidden", 0, files("usr", 5, 20, 100_000))
	p := b.mount(img.name)
	b.waitFor("swapped", p)
	for name, hold := range map[string]func() *exec.Cmd{
		"detached": func() *exec.Cmd {
			cmd := exec.Command("sleep", "60")
			cmd.Dir = filepath.Join(p, "usr")
			return cmd
		},
		"namespace": func() *exec.Cmd {
			return exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", "echo in; exec sleep 60")
		},
	} {
		t.Run(name, func(t *testing.T) {
			if len(mountsBelow(p+"/..")) == 0 && len(mountsBelow(b.dir)) == 0 {
				b.must(b.mountArgs(img.name, p)...)
			}
			cmd := hold()
			pipe, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			end := func() {
				cmd.Process.Kill()
				cmd.Wait()
			}
			defer end()
			if name == "namespace" {
				if _, err := pipe.Read(make([]byte, 3)); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := exec.Command("umount", "-l", p).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if len(mountsBelow(b.dir)) != 0 {
				t.Fatal("it must not be seen here any more")
			}
			if _, err := b.run("cache", "gc", "--root", b.root, "--store-size", "1"); err == nil {
				t.Error("gc kept to the budget")
			}
			inside := filepath.Join("/proc", jsonInt(cmd.Process.Pid), "cwd")
			if name == "detached" {
				for _, f := range img.files {
					if got, err := os.ReadFile(filepath.Join(inside, filepath.Base(f.name))); err != nil || len(got) != f.size {
						t.Fatalf("%s: %d bytes, %v", f.name, len(got), err)
					}
				}
			}
			end()
			eventually(t, 5*time.Second, "the image can go", func() bool {
				out, err := b.run("cache", "gc", "--root", b.root, "--store-size", "1")
				return err == nil && strings.Contains(out, "removed sha256:")
			})
		})
	}
}

func jsonInt(n int) string {
	b, _ := json.Marshal(n)
	return string(b)
}

// Damage of every kind is found and repaired beside a live mount.
func TestCheckRepair(t *testing.T) {
	b, r := newBench(t), serve(t)
	img := push(t, r, "checked", 0, files("usr", 7, 30, 60_000))
	p := b.mount(img.name, "--swap", "never")
	b.waitFor("sealed", p)
	if out := b.must("cache", "check", "--root", b.root, "--read"); !strings.Contains(out, ": 0 problems") {
		t.Fatalf("check: %s", out)
	}
	var broken []string
	err := filepath.WalkDir(filepath.Join(b.root, "contents"), func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && len(broken) < 3 {
			broken = append(broken, path)
		}
		return err
	})
	if err != nil || len(broken) != 3 {
		t.Fatal(broken, err)
	}
	for _, path := range broken {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("rot"), 12_345); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	out, err := b.run("cache", "check", "--root", b.root)
	if err != nil {
		t.Errorf("without reading: %s, %v", out, err)
	}
	out, err = b.run("cache", "check", "--root", b.root, "--read", "--repair", "--plain-http")
	if err != nil || strings.Count(out, "moved aside") != 3 || strings.Count(out, "fetched again") != 3 {
		t.Fatalf("repair: %s, %v", out, err)
	}
	if err := readAll(p, img); err != nil {
		t.Error(err)
	}
	if out := b.must("cache", "check", "--root", b.root, "--read"); !strings.Contains(out, ": 0 problems") {
		t.Errorf("check after repair: %s", out)
	}
	if aside, err := os.ReadDir(filepath.Join(b.root, "quarantine")); err != nil || len(aside) != 3 {
		t.Errorf("moved aside: %v, %v", aside, err)
	}
	b.must("umount", p)
	// The tree of an image that is not mounted.
	var all []listed
	b.cache(&all, "ls")
	lazy := filepath.Join(b.root, "images", all[0].Digest[7:], "lazy.erofs")
	if err := os.Truncate(lazy, 2000); err != nil {
		t.Fatal(err)
	}
	if out, err := b.run("cache", "check", "--root", b.root); err == nil || !strings.Contains(out, "moved aside") {
		t.Errorf("a damaged image: %s, %v", out, err)
	}
	b.must(b.mountArgs(img.name, p)...)
	if err := readAll(p, img); err != nil {
		t.Error(err)
	}
	b.must("umount", p)
}
