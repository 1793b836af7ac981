package mount

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// An Explanation says why a mount is as it is, and where the time of its start
// went. Times are in seconds since the command was given.
type Explanation struct {
	Status Status `json:"status"`
	// Story is nil when nothing was fetched for the image, as far as is known.
	Story *Story `json:"story"`
	// Paths are names of the contents in Story, by digest: the first in the
	// tree.
	Paths map[string]string `json:"paths"`
	Start StartTimes        `json:"start"`
	// Next is what the next state is waiting for, "" if there is none.
	Next string `json:"next"`
	// Risk says who would suffer if the serving process died, and Users which
	// processes use the mount.
	Risk  string `json:"risk"`
	Users []User `json:"users"`
}

// StartTimes account for the time from the command to Until.
type StartTimes struct {
	Until float64 `json:"until_seconds"` // the end of the last read that waited, unless asked for another
	Mount float64 `json:"mount_seconds"` // until the mount was there
	// Waiting is how long at least one read waited after that, Idle how long
	// none did: programs ran, with what was there.
	Waiting float64 `json:"waiting_seconds"`
	Idle    float64 `json:"idle_seconds"`
	// Of Waiting, by what the reads that waited waited for: several at once
	// have their parts.
	Queue   float64 `json:"queue_seconds"`
	Network float64 `json:"network_seconds"`
	Inflate float64 `json:"inflate_seconds"`
	Store   float64 `json:"store_seconds"`
	Reads   int     `json:"reads_waited"`
	// Compressed is how many bytes these reads waited for.
	Compressed int64 `json:"compressed_bytes"`
	// PrefetchSaves estimates what a complete access profile would have saved
	// of Waiting: all but the time in which the link brings these bytes, as
	// far as that is not before the first read.
	PrefetchSaves float64 `json:"prefetch_saves_seconds"`
}

// Path returns a path of a content, or its digest if none is known.
func (e *Explanation) Path(content string) string {
	if p := e.Paths[content]; p != "" {
		return p
	}
	return content
}

// A User is a process that uses a mount.
type User struct {
	PID     int    `json:"pid"`
	Command string `json:"command"`
	How     string `json:"how"` // "root", "cwd", "exe" or "files"
}

// Explain explains the mount at mountpoint. until, if not 0, ends the start that
// is accounted for, in seconds since the command.
func Explain(ctx context.Context, runtimeDir, mountpoint string, until float64) (*Explanation, error) {
	s, err := Query(ctx, runtimeDir, mountpoint)
	if err != nil {
		return nil, err
	}
	e := &Explanation{Status: s, Paths: map[string]string{}}
	if e.Story, err = askStory(ctx, runtimeDir, s); err != nil {
		return nil, err
	}
	if e.Story != nil {
		e.Start = e.Story.Times(until)
		if err := e.namePaths(); err != nil {
			return nil, err
		}
	}
	e.Next = next(s, e.Story)
	if e.Users, err = users(s.Mountpoint); err != nil {
		return nil, err
	}
	e.Risk = risk(s, len(e.Users))
	return e, nil
}

// askStory asks the process that serves a mount, or the store.
func askStory(ctx context.Context, runtimeDir string, s Status) (*Story, error) {
	if s.PID != 0 {
		res, err := FilesOf(runtimeDir, s.Mountpoint).ask(ctx, http.MethodGet, "/start")
		if err == nil {
			defer res.Body.Close()
			data, err := io.ReadAll(io.LimitReader(res.Body, maxStory))
			switch {
			case err != nil:
				return nil, fmt.Errorf("%s: ask the process that serves the mount: %w", s.Mountpoint, err)
			case res.StatusCode == http.StatusNotFound:
				return nil, nil
			case res.StatusCode != http.StatusOK:
				return nil, fmt.Errorf("%s: ask the process that serves the mount: %s", s.Mountpoint, oneLine(string(data)))
			}
			return parseStory(data)
		}
	}
	if s.ManifestDigest == "" {
		return nil, nil
	}
	story, err := storyOf(s.Root, s.ManifestDigest)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, hint.Wrap(err, "remove the file; it is of no use to mounts")
	}
	return story, nil
}

// An interval is a time in which something went on.
type interval struct{ from, to float64 }

// union returns how long at least one of the intervals goes on.
func union(all []interval) (sum float64) {
	slices.SortFunc(all, func(a, b interval) int { return cmp.Compare(a.from, b.from) })
	end := math.Inf(-1)
	for _, i := range all {
		if i.to > end {
			sum += i.to - max(i.from, end)
			end = i.to
		}
	}
	return sum
}

// Times accounts for the time until the last read that waited, or until that
// many seconds after the command if it is not 0.
func (s *Story) Times(until float64) StartTimes {
	t := StartTimes{Until: until, Mount: s.Mounted}
	if until == 0 {
		t.Until = s.Mounted
		for _, w := range s.Waits {
			t.Until = max(t.Until, w.At+w.Seconds)
		}
	}
	t.Mount = min(t.Mount, t.Until)
	var waits []interval
	first := t.Until
	var queue, network, inflate, store float64
	for _, w := range s.Waits {
		i := interval{max(w.At, t.Mount), min(w.At+w.Seconds, t.Until)}
		if i.to <= i.from {
			continue
		}
		t.Reads++
		t.Compressed += w.Bytes
		first = min(first, i.from)
		waits = append(waits, i)
		queue, network, inflate, store = queue+w.Queue, network+w.Network, inflate+w.Inflate(), store+w.Store
	}
	t.Waiting = union(waits)
	t.Idle = t.Until - t.Mount - t.Waiting
	if all := queue + network + inflate + store; all > 0 {
		part := t.Waiting / all
		t.Queue, t.Network, t.Inflate, t.Store = queue*part, network*part, inflate*part, store*part
	}
	if t.Reads > 0 && s.BytesPerSecond > 0 {
		// A prefetch begins when the mount is there, and programs go on as soon
		// as what they read has come.
		link := s.LatencySeconds + float64(t.Compressed)/s.BytesPerSecond
		t.PrefetchSaves = max(0, t.Waiting-max(0, link-t.Idle))
	}
	return t
}

// Slowest returns the n reads that waited longest, the longest first.
func (s *Story) Slowest(n int) []ReadWait {
	all := slices.Clone(s.Waits)
	slices.SortStableFunc(all, func(a, b ReadWait) int { return cmp.Compare(b.Seconds, a.Seconds) })
	return all[:min(n, len(all))]
}

// imageFolder is where an image of a store is.
func imageFolder(root, manifestDigest string) string {
	return filepath.Join(root, "images", strings.TrimPrefix(manifestDigest, "sha256:"))
}

// namePaths finds a path for each content of the story.
func (e *Explanation) namePaths() error {
	dir := imageFolder(e.Status.Root, e.Story.Image)
	want := map[string]bool{}
	for _, w := range e.Story.Waits {
		want[w.Content] = true
	}
	if x, done, err := openIndexFile(dir); err == nil {
		for _, u := range e.Story.Uses {
			if u.Chunk < x.Chunks() {
				want[x.Content(x.Chunk(u.Chunk).Content).Digest.String()] = true
			}
		}
		done()
	}
	if len(want) == 0 {
		return nil
	}
	r, err := erofs.OpenFile(filepath.Join(dir, lazyName))
	if errors.Is(err, os.ErrNotExist) {
		return nil // evicted meanwhile: digests must do
	}
	if err != nil {
		return err
	}
	defer r.Close()
	return r.Walk(func(path string, ino erofs.Inode) error {
		if !ino.External() {
			return nil
		}
		object, _, err := r.Payload(ino)
		if err != nil {
			return err
		}
		digest, err := parseObject(object)
		if err != nil {
			return nil // of no content
		}
		if d := digest.String(); want[d] && e.Paths[d] == "" {
			e.Paths[d] = path
		}
		return nil
	})
}

// openIndexFile maps the index of an image's folder; done ends its use.
func openIndexFile(dir string) (x *image.Index, done func(), err error) {
	b, err := mapFile(filepath.Join(dir, chunksName))
	if err != nil {
		return nil, nil, err
	}
	p := &preparedImage{mapped: b}
	if x, err = image.OpenIndex(b); err != nil {
		p.close()
		return nil, nil, err
	}
	return x, p.close, nil
}

// next says what the next state waits for.
func next(s Status, story *Story) string {
	note := ""
	if s.Note != "" {
		note = "; " + s.Note
	}
	switch {
	case s.StoreNote != "":
		return s.StoreNote + note
	case s.State == Swapped:
		return ""
	case s.PID == 0:
		return strings.TrimPrefix(note, "; ")
	case s.State == Lazy:
		text := fmt.Sprintf("%d of %d files and %d of %d bytes are not local yet", s.Files-s.FilesLocal, s.Files, s.Bytes-s.BytesLocal, s.Bytes)
		if story != nil && story.BytesPerSecond > 0 && note == "" {
			text += fmt.Sprintf("; the link brings some %.1f MB/s of compressed bytes", story.BytesPerSecond/1e6)
		}
		return text + note
	case s.State == Complete:
		return "the image is being sealed" + note
	}
	if note == "" {
		note = "; the swap is being made"
	}
	return strings.TrimPrefix(note, "; ")
}

// risk says what the death of the serving process would do.
func risk(s Status, users int) string {
	switch {
	case s.State == Swapped || s.Backend == "kernel":
		return "nobody: the kernel serves it, no process of cfs-fuse is needed"
	case s.PID == 0:
		return "the process has died: " + s.Note
	case s.Keeper != "":
		return fmt.Sprintf("nobody: %s keeps the session, and starts another process; %d processes would wait for it some milliseconds", s.Keeper, users)
	case s.Backend == string(Hybrid):
		return fmt.Sprintf("%d processes that use the mount: files that are not whole could not be read until it is mounted again", users)
	}
	return fmt.Sprintf("%d processes that use the mount: all their accesses would fail until it is mounted again", users)
}
