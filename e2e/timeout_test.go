package e2e

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

// A registry that hangs makes reads fail with EIO after --read-timeout, and not
// before; with 0 they wait until it is back.
func TestReadTimeout(t *testing.T) {
	for _, limit := range []string{"3s", "0"} {
		t.Run(limit, func(t *testing.T) {
			b, k := newBench(t), newLink(t, registry.Addr, lan)
			point := b.mount(source(k, images.Small, images.EStargz), "--fill=false", "--read-timeout", limit)
			k.stall()
			done, start := make(chan error, 1), time.Now()
			go func() {
				_, err := os.ReadFile(filepath.Join(point, "d00/f01"))
				done <- err
			}()
			if limit != "0" {
				err, took := <-done, time.Since(start)
				if !errors.Is(err, unix.EIO) || took < 2500*time.Millisecond || took > 10*time.Second {
					t.Errorf("%v after %v, want EIO after 3 s", err, took)
				}
				k.resume()
			} else {
				select {
				case err := <-done:
					t.Errorf("it did not wait: %v", err)
				case <-time.After(4 * time.Second):
				}
				k.resume()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
			eventually(t, 20*time.Second, "the file can be read again", func() bool {
				_, err := os.ReadFile(filepath.Join(point, "d00/f01"))
				return err == nil
			})
		})
	}
	b := newBench(t)
	b.refused(2, []string{"--read-timeout"}, "mount", "--read-timeout", "-1s", "x", b.point())
	b.refused(2, []string{"--fetch-memory"}, "mount", "--fetch-memory", "1MiB", "x", b.point())
	b.refused(2, []string{"limit-rate", "no size"}, "mount", "--limit-rate", "fast", "x", b.point())
}

// The profile of one machine makes a cold start on another fetch first what the
// program will want.
func TestProfileElsewhere(t *testing.T) {
	b, k := newBench(t), newLink(t, registry.Addr, lan)
	src := source(k, images.Debian, images.EStargz)
	point := b.mount(src, "--fill=false")
	if err := python.run(point); err != nil {
		t.Fatal(err)
	}
	exported := b.must("profile", "export", point)
	var p struct {
		Repository string `json:"repository"`
		Accesses   []struct {
			Content string `json:"content"`
			Length  int64  `json:"length"`
		} `json:"accesses"`
	}
	if err := json.Unmarshal([]byte(exported), &p); err != nil || len(p.Accesses) < 10 || !strings.HasSuffix(p.Repository, "/"+images.Debian) {
		t.Fatalf("%d accesses of %s, %v", len(p.Accesses), p.Repository, err)
	}
	b.must("umount", point)
	if again := b.must("profile", "export", "--root", b.root, src); again != exported {
		t.Errorf("%d bytes from the process, %d from the store", len(exported), len(again))
	}

	c := newBench(t)
	file := filepath.Join(c.dir, "profile.json")
	if err := os.WriteFile(file, []byte(exported), 0o644); err != nil {
		t.Fatal(err)
	}
	c.refused(1, []string{"no access profile"}, "profile", "export", "--root", c.root, src)
	c.must("profile", "import", "--root", c.root, file)
	point = c.mount(src, "--limit-rate", "20MB")
	if err := python.run(point); err != nil {
		t.Fatal(err)
	}
	s := c.status(point)
	if demand, prefetch := s.Fetched["demand"].Requests, s.Fetched["prefetch"].Requests; prefetch == 0 || demand > int64(len(p.Accesses))/2 {
		t.Errorf("%d requests on demand, %d by the profile of %d accesses", demand, prefetch, len(p.Accesses))
	}
}
