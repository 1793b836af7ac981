package mount

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/cfs-fuse/cfs-fuse/erofs"
)

// An index is checked once, and again when it has changed or the machine was
// started anew.
func TestIndexIsCheckedOnce(t *testing.T) {
	source := twoLayers(t)
	root := filepath.Join(t.TempDir(), "root")
	m, mnt := start(t, source, Options{Root: root, Swap: Never, NoFill: true})
	note := m.image.path(checkedName)
	first, err := os.ReadFile(note)
	if err != nil {
		t.Fatal(err)
	}
	end(t, m, mnt)
	m, mnt = start(t, source, Options{Root: root, Swap: Never, NoFill: true})
	checkFiles(t, mnt)
	if again, err := os.ReadFile(note); err != nil || string(again) != string(first) {
		t.Errorf("the note is %q, %v; was %q", again, err, first)
	}
	end(t, m, mnt)
	now := time.Now()
	if err := os.Chtimes(m.image.path(chunksName), now, now); err != nil { // a new ctime
		t.Fatal(err)
	}
	_, mnt = start(t, source, Options{Root: root, Swap: Never, NoFill: true})
	checkFiles(t, mnt)
	if again, err := os.ReadFile(note); err != nil || string(again) == string(first) {
		t.Errorf("the note is %q, %v, as before the file was touched", again, err)
	}
}

func TestTrim(t *testing.T) {
	m, mnt := start(t, twoLayers(t), Options{Swap: Never, Backend: FUSE})
	before := residentFiles()
	if before <= 0 {
		t.Errorf("%d bytes of files in memory", before)
	}
	if err := m.reader.Trim(); err != nil {
		t.Error(err)
	}
	trimMap(m.image.mapped)
	checkFiles(t, mnt)
	if err := (&erofs.Reader{}).Trim(); err != nil { // one that maps nothing
		t.Error(err)
	}
}
