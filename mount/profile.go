package mount

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/internal/durable"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
)

// Where access profiles are: in the image's folder, and in the folder profiles
// of the store, by SHA-256 of the repository's name, that of its newest image,
// and by manifest digest, those that were imported.
const (
	profileName = "profile.json"
	profilesDir = cache.ProfilesName
)

// A recorder notes the first read of each chunk of an image, in their order.
type recorder struct {
	index *image.Index
	seen  []atomic.Uint64             // bit j: chunk j has been noted
	used  []atomic.Uint64             // bit j: chunk j has been read of this mount
	full  atomic.Bool                 // no more is noted
	use   func(chunk int, size int64) // hears of the first read of each chunk; may be nil

	mu       sync.Mutex
	accesses []image.Access
	saved    int // how many of accesses are on disk
}

// newRecorder makes a recorder that has noted the accesses already.
func newRecorder(x *image.Index, accesses []image.Access) *recorder {
	words := (x.Chunks() + 63) / 64
	r := &recorder{index: x, seen: make([]atomic.Uint64, words), used: make([]atomic.Uint64, words)}
	for _, a := range accesses {
		if i, ok := x.Find(a.Content); ok {
			r.note(i, a.Off, a.N)
		}
	}
	clear(r.used)
	r.saved = len(r.accesses)
	return r
}

// note notes a read of n bytes at off of a content. It is on the way of every
// read: one that brings nothing new takes no lock.
func (r *recorder) note(content int, off, n int64) {
	if r == nil || r.full.Load() {
		return
	}
	c := r.index.Content(content)
	for k := firstChunk(r.index, content, c.Chunks, off); k < c.Chunks; k++ {
		j := r.index.ContentChunk(content, k)
		word, bit := &r.used[j/64], uint64(1)<<(j%64)
		if word.Load()&bit != 0 && k+1 == c.Chunks {
			return
		}
		ch := r.index.Chunk(j)
		if ch.FileOffset-off >= n {
			return
		}
		if word.Or(bit)&bit != 0 || ch.Zero {
			continue
		}
		if r.use != nil {
			r.use(j, ch.Size)
		}
		if r.seen[j/64].Or(bit)&bit == 0 {
			r.add(image.Access{Content: c.Digest, Off: ch.FileOffset, N: ch.Size})
		}
	}
}

// firstChunk returns which of a content's chunks holds the byte at off.
func firstChunk(x *image.Index, content, chunks int, off int64) int {
	lo, hi := 0, chunks-1
	for lo < hi {
		mid := (lo + hi + 1) / 2
		if x.Chunk(x.ContentChunk(content, mid)).FileOffset <= off {
			lo = mid
		} else {
			hi = mid - 1
		}
	}
	return lo
}

func (r *recorder) add(a image.Access) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if n := len(r.accesses); n > r.saved {
		if last := &r.accesses[n-1]; last.Content == a.Content && last.Off+last.N == a.Off {
			last.N += a.N
			return
		}
	}
	if r.accesses = append(r.accesses, a); len(r.accesses) == image.MaxAccesses {
		r.full.Store(true)
	}
}

// noted returns what has been noted so far.
func (r *recorder) noted() []image.Access {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]image.Access(nil), r.accesses...)
}

// startProfile finds what is known of the image's start, begins to record
// this one, and returns what the fetcher should bring first.
func (m *Mount) startProfile() []fetcher.Part {
	if m.opts.Record {
		m.record = newRecorder(m.image.index, nil)
		return nil
	}
	own, related := m.findProfile()
	m.record = newRecorder(m.image.index, own)
	m.record.use = m.story.used
	known := own
	if len(known) == 0 {
		known, m.inherited = related, related
	}
	if given := m.givenProfile(len(own) > 0); given != nil {
		known = given.Accesses
		if len(own) == 0 {
			m.inherited = known
		}
	}
	var parts []fetcher.Part
	for _, a := range known {
		if i, ok := m.image.index.Find(a.Content); ok {
			parts = append(parts, fetcher.Part{Content: i, Off: a.Off, N: a.N})
		}
	}
	m.story.prefetch(len(parts))
	m.log.Debug("access profile", "accesses", len(known), "in_this_image", len(parts), "of_this_image", len(own) > 0)
	return parts
}

// profilePatience is how long a start waits for Options.Profile, from when it was
// asked: as long as a registry that is near takes, and no longer than what a profile gains.
const profilePatience = 2 * time.Second

// A profileQuery is a question to Options.Profile that is under way.
type profileQuery struct {
	done    chan struct{} // closed when there is an answer
	profile *image.Profile
}

// askProfile begins to ask for a profile, unless that has been done.
func (m *Mount) askProfile(manifest image.Digest, own bool) {
	if m.opts.Profile == nil || m.asked != nil {
		return
	}
	q := &profileQuery{done: make(chan struct{})}
	m.asked = q
	ctx, cancel := context.WithTimeout(context.Background(), profilePatience)
	m.run.Go(func() {
		defer cancel()
		defer close(q.done)
		var err error
		if q.profile, err = m.opts.Profile(ctx, manifest, own); err != nil {
			m.log.Warn("no access profile was got; the image starts without", "error", err)
		}
	})
}

// givenProfile returns what Options.Profile has for the image, or nil.
func (m *Mount) givenProfile(own bool) *image.Profile {
	if m.resumed {
		return nil // the start is over
	}
	m.askProfile(m.image.digest, own)
	if m.asked == nil {
		return nil
	}
	select {
	case <-m.asked.done:
		return m.asked.profile
	case <-time.After(profilePatience):
		return nil
	}
}

// StoredProfile returns the access profile that the store in root has for an
// image, its own or else one of its repository (Repository); nil if none.
func StoredProfile(root string, manifest image.Digest, repository string) (*image.Profile, error) {
	digest := hex.EncodeToString(manifest[:])
	for _, path := range []string{
		filepath.Join(root, "images", digest, profileName),
		filepath.Join(root, profilesDir, digest+".json"),
		filepath.Join(root, profilesDir, repositoryKey(repository)+".json"),
	} {
		p, err := readProfile(path)
		if err == nil {
			return p, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil, nil
}

// Repository returns the name of a source without tag and digest, in full.
func Repository(source string) (string, error) {
	source, err := absoluteSource(source)
	if err != nil {
		return "", err
	}
	src, err := fetcher.OpenSource(source, fetcher.Options{})
	if err != nil {
		return "", err
	}
	defer src.Close()
	return repository(src.String()), nil
}

// findProfile returns the accesses that were recorded with this image, and
// those of another image of its repository.
func (m *Mount) findProfile() (own, related []image.Access) {
	dir := filepath.Join(m.opts.Root, profilesDir)
	for _, path := range []string{
		m.image.path(profileName),
		filepath.Join(dir, hex.EncodeToString(m.image.digest[:])+".json"),
		filepath.Join(dir, repositoryKey(repository(m.src.String()))+".json"),
	} {
		p, err := readProfile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			m.log.Warn("an access profile cannot be used", "path", path, "error", err)
			continue
		}
		if p.Image == m.image.digest {
			return p.Accesses, nil
		}
		related = p.Accesses
	}
	return nil, related
}

func readProfile(path string) (*image.Profile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, image.MaxProfileSize+1))
	if err != nil {
		return nil, err
	}
	return image.ParseProfile(raw)
}

// repository returns the name of a source without tag and digest.
func repository(source string) string {
	source, _, _ = strings.Cut(source, "@sha256:")
	if i := strings.LastIndexByte(source, ':'); i > strings.LastIndexByte(source, '/') && strings.Contains(source, "/") {
		source = source[:i]
	}
	return source
}

func repositoryKey(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:])
}

// settled is when a start is over: until then the profile of a related image
// stands for what has not been read yet.
const settled = time.Minute

// profile returns the profile as it is now, and how much of it was read from
// this mount, or from this image before. The rest is a related image's: what of
// that is here too, until this start is over. Of a hybrid it stays, as nobody
// learns of reads of what was prefetched: the kernel has the whole files.
func (m *Mount) profile() (p *image.Profile, noted int) {
	p = &image.Profile{Image: m.image.digest, Repository: repository(m.src.String()), Accesses: m.record.noted()}
	noted = len(p.Accesses)
	if m.firstBackend != Hybrid && time.Since(m.started) >= settled {
		return p, noted
	}
	have := map[image.Digest]bool{}
	for _, a := range p.Accesses {
		have[a.Content] = true
	}
	for _, a := range m.inherited {
		if _, here := m.image.index.Find(a.Content); here && !have[a.Content] {
			p.Accesses = append(p.Accesses, a)
		}
	}
	return p, noted
}

// Profile returns the access profile as it is now, nil if none is recorded.
func (m *Mount) Profile() *image.Profile {
	if m.record == nil {
		return nil
	}
	p, _ := m.profile()
	return p
}

// saveProfile writes the profile, if something was read that it does not have.
func (m *Mount) saveProfile() error {
	p, noted := m.profile()
	m.record.mu.Lock()
	saved := m.record.saved
	m.record.mu.Unlock()
	if noted <= saved {
		return nil
	}
	if err := writeProfile(m.opts.Root, p, m.image.path(profileName), repositoryKey(p.Repository)); err != nil {
		return err
	}
	m.record.mu.Lock()
	m.record.saved = noted
	m.record.mu.Unlock()
	return nil
}

// writeProfile writes a profile to a path, if not empty, and below the names
// in the store's folder profiles.
func writeProfile(root string, p *image.Profile, path string, names ...string) error {
	raw, err := p.Encode()
	if err != nil {
		return err
	}
	dir := filepath.Join(root, profilesDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("access profile: %w", err)
	}
	var paths []string
	if path != "" {
		paths = append(paths, path)
	}
	for _, name := range names {
		paths = append(paths, filepath.Join(dir, name+".json"))
	}
	for _, path := range paths {
		if err := durable.WriteFile(path, raw, 0o600); err != nil {
			return fmt.Errorf("access profile: %w", err)
		}
	}
	return nil
}

// Between the times at which the profile is saved, the first and the last.
const (
	firstSave = time.Second
	lastSave  = time.Minute
)

// keepProfile saves the profile from time to time, and when ctx ends.
func (m *Mount) keepProfile(ctx context.Context) {
	for pause := firstSave; ; pause = min(4*pause, lastSave) {
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		if err := m.saveProfile(); err != nil {
			m.log.Warn("the access profile was not saved", "error", err)
		}
		if err := m.saveStory(); err != nil {
			m.log.Warn("not saved", "error", err)
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// profile answers with the profile as it is now.
func (c *Control) profile(w http.ResponseWriter, _ *http.Request) {
	if c.mount.record == nil {
		http.Error(w, "this mount records no access profile", http.StatusNotFound)
		return
	}
	p, _ := c.mount.profile()
	raw, err := p.Encode()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Write(raw)
}

const noProfileHint = "mount the image and run the program once; what it reads first is the profile"

// ExportProfile returns the access profile of the image that is mounted at the
// mount point name, as of now, or that the store knows as the source name, as
// JSON (image.Profile). Of the options, Root, Runtime and Source count.
func ExportProfile(ctx context.Context, name string, o Options) ([]byte, error) {
	if raw, ok, err := exportMounted(ctx, o.Runtime, name); ok || err != nil {
		return raw, err
	}
	source, err := absoluteSource(name)
	if err != nil {
		return nil, err
	}
	src, err := fetcher.OpenSource(source, o.Source)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	m, root := &Mount{opts: o, src: src}, o.Root
	var paths []string
	if digest, ok := m.known(); ok {
		paths = append(paths, filepath.Join(root, "images", hex.EncodeToString(digest[:]), profileName))
	}
	paths = append(paths, filepath.Join(root, profilesDir, repositoryKey(repository(src.String()))+".json"))
	for _, path := range paths {
		p, err := readProfile(path)
		if err == nil {
			return p.Encode()
		}
		if !errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return nil, hint.Wrap(fmt.Errorf("no access profile of %s in %s", src, root), noProfileHint)
}

// exportMounted asks the process that serves a mount point for its profile, or
// reads it from the store when none serves. ok is false if name is no mount
// point of ours.
func exportMounted(ctx context.Context, runtime, name string) (raw []byte, ok bool, err error) {
	if fi, err := os.Stat(name); err != nil || !fi.IsDir() {
		return nil, false, nil
	}
	s, err := Query(ctx, runtime, name)
	if err != nil {
		return nil, false, err
	}
	res, err := FilesOf(runtime, s.Mountpoint).ask(ctx, http.MethodGet, "/profile")
	if err == nil {
		defer res.Body.Close()
		raw, err := io.ReadAll(io.LimitReader(res.Body, image.MaxProfileSize))
		if err == nil && res.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", name, strings.TrimSpace(string(raw)))
		}
		return raw, true, err
	}
	digest := strings.TrimPrefix(s.ManifestDigest, "sha256:")
	p, err := readProfile(filepath.Join(s.Root, "images", digest, profileName))
	if err != nil {
		return nil, true, hint.Wrap(fmt.Errorf("access profile of %s: %w", name, err), noProfileHint)
	}
	raw, err = p.Encode()
	return raw, true, err
}

// ImportProfile puts a profile, as ExportProfile gave it, perhaps elsewhere,
// into the store in root: for the image that it names and for its repository.
func ImportProfile(root string, raw []byte) (*image.Profile, error) {
	p, err := image.ParseProfile(raw)
	if err != nil {
		return nil, hint.Wrap(err, "take what 'cfs-fuse profile export' wrote")
	}
	store, err := cache.Open(root, cache.Options{})
	if err != nil {
		return nil, err
	}
	defer store.Close()
	digest := hex.EncodeToString(p.Image[:])
	own := filepath.Join(store.Images(), digest)
	path := ""
	if fi, err := os.Stat(own); err == nil && fi.IsDir() {
		path = filepath.Join(own, profileName)
	}
	return p, writeProfile(root, p, path, digest, repositoryKey(p.Repository))
}
