package cache

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// crashDir, in the environment, makes the test binary a process that fills
// the store there until it is killed.
const crashDir = "CFS_FUSE_TEST_CRASH_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(crashDir); dir != "" {
		fillUntilKilled(dir)
	}
	os.Exit(m.Run())
}

func crashImage(t testing.TB) img {
	var contents []content
	for i := range 60 {
		contents = append(contents,
			cut(fmt.Sprintf("a*%d", 1+i*997)),
			cut(fmt.Sprintf("b*%d c*70000 0*5000 d*%d e*1", 1+i, 5000+i)),
			cut(fmt.Sprintf("0*%d", 100+i)))
	}
	return imageOf(t, contents...)
}

// fillUntilKilled writes the number of each chunk that Put took, and "open"
// before the first.
func fillUntilKilled(dir string) {
	var t testing.B // fails by panic
	x := crashImage(&t)
	s, err := Open(dir, Options{})
	if err != nil {
		panic(err)
	}
	c, err := s.Contents(x.Index)
	if err != nil {
		panic(err)
	}
	fmt.Println("open")
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() {
			for _, j := range rand.Perm(x.Chunks()) {
				if c.Missing(j) {
					if err := c.Put(j, x.data(j)); err != nil {
						panic(err)
					}
					os.Stdout.WriteString(strconv.Itoa(j) + "\n")
				}
			}
		})
	}
	wg.Wait()
	time.Sleep(time.Hour)
}

// TestCrash kills processes that fill a store, one or two at a time, at a
// random instant. What they said they had put must be there, nothing may have a
// wrong name, and the store must go on where it was.
func TestCrash(t *testing.T) {
	x := crashImage(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	kills, fills := 0, 0
	for round := range 30 {
		var wg sync.WaitGroup
		said := make([][]int, 1+round%2)
		for n := range said {
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), crashDir+"="+dir)
			cmd.Stderr = os.Stderr
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			wg.Go(func() {
				r := bufio.NewReader(out)
				if line, err := r.ReadString('\n'); line != "open\n" {
					t.Errorf("child: %q, %v", line, err)
				}
				go func() {
					time.Sleep(time.Duration(rand.IntN(30000)) * time.Microsecond)
					cmd.Process.Kill()
				}()
				for {
					line, err := r.ReadString('\n')
					if err != nil { // io.EOF, perhaps after half a line
						if err != io.EOF {
							t.Error(err)
						}
						break
					}
					j, err := strconv.Atoi(strings.TrimSuffix(line, "\n"))
					if err != nil {
						t.Error(err)
						break
					}
					said[n] = append(said[n], j)
				}
				if err := cmd.Wait(); cmd.ProcessState.ExitCode() != -1 {
					t.Errorf("child ended by itself: %v", err)
				}
			})
		}
		wg.Wait()
		kills += len(said)

		s := open(t, dir, Options{})
		check(t, s)
		c := contentsOf(t, s, x)
		if len(said) == 1 { // what a second process had in a file of its own is gone
			for _, j := range said[0] {
				if c.Missing(j) {
					t.Errorf("round %d: chunk %d was put and is missing", round, j)
				}
			}
		}
		for j := range x.Chunks() {
			if c.Missing(j) {
				continue
			}
			ch := x.Chunk(j)
			want := x.by[x.Content(ch.Content).Digest].data[ch.FileOffset:][:ch.Size]
			got := make([]byte, ch.Size)
			if n, err := c.ReadAt(ch.Content, got, ch.FileOffset); err != nil || string(got[:n]) != string(want) {
				t.Errorf("round %d: chunk %d: %d bytes, %v", round, j, n, err)
			}
		}
		if t.Failed() {
			return
		}
		if p := c.Progress(); p.BytesLocal > p.Bytes*9/10 {
			putAll(t, c, x)
			wantWhole(t, s, c, x)
			if n := staged(t, s); len(n) != 0 {
				contentsOf(t, s, x) // removes what crashes left of whole contents
				if n = staged(t, s); len(n) != 0 {
					t.Fatalf("left in staging: %q", n)
				}
			}
			fills++
			dir = t.TempDir()
		}
		s.Close()
	}
	t.Logf("%d processes killed, %d stores filled", kills, fills)
}
