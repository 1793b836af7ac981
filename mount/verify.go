package mount

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/cfs-fuse/cfs-fuse/cache"
	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/image/toc"
	"github.com/cfs-fuse/cfs-fuse/internal/hint"
	"github.com/cfs-fuse/cfs-fuse/internal/kmount"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// A Finding is what was found out about a link of the chain of digests.
type Finding string

// The findings.
const (
	Proven   Finding = "proven"   // computed from the bytes, now
	Unproven Finding = "unproven" // not looked at, and why
	Wrong    Finding = "wrong"    // computed, and not what it must be
)

// A Link is one link of the chain, from the reference of an image to the bytes
// that programs read, with the links that rest on it.
type Link struct {
	What    string  `json:"what"`
	Finding Finding `json:"finding"`
	Why     string  `json:"why"` // what the finding rests on
	Links   []*Link `json:"links,omitempty"`
}

func (l *Link) add(what string, f Finding, format string, args ...any) *Link {
	n := &Link{What: what, Finding: f, Why: fmt.Sprintf(format, args...)}
	l.Links = append(l.Links, n)
	return n
}

// check adds a link that is proven if err is nil, and wrong else.
func (l *Link) check(what string, err error, format string, args ...any) *Link {
	if err != nil {
		return l.add(what, Wrong, "%v", err)
	}
	return l.add(what, Proven, format, args...)
}

// Count returns how many links of the chain have a finding.
func (l *Link) Count(f Finding) int {
	n := 0
	if l.Finding == f {
		n++
	}
	for _, c := range l.Links {
		n += c.Count(f)
	}
	return n
}

// VerifyOptions say what Verify looks at.
type VerifyOptions struct {
	Options
	// Mountpoint, if not empty, is where the image is mounted; that mount is
	// looked at too.
	Mountpoint string
	// Blobs reads whole layers also from a registry; those of local sources
	// are always read.
	Blobs bool
}

// Verify computes what can be computed of the chain of digests of an image
// that the store knows, by its source or by "sha256:" and its manifest's
// digest: from the manifest to the tables of contents and the tree, to every
// byte of every file, to the sealed image and the mount. Nothing is changed. The
// error says that the image could not be looked at; what is wrong with it is in
// the Link.
func Verify(ctx context.Context, imageName string, o VerifyOptions) (*Link, error) {
	if _, err := os.Stat(filepath.Join(o.Root, "images")); err != nil {
		return nil, hint.Wrap(fmt.Errorf("no store: %w", err), "name the store's folder with --root")
	}
	o.Logger = slog.New(slog.DiscardHandler)
	o.Source.Logger, o.InsecureTOC = o.Logger, true
	store, err := cache.Open(o.Root, cache.Options{Logger: o.Logger})
	if err != nil {
		return nil, err
	}
	defer store.Close()
	v := &verifier{o: o, m: &Mount{opts: o.Options, log: o.Logger, store: store}}
	digest, err := toc.ParseDigest(imageName)
	if err != nil { // a source
		if v.m.source, err = absoluteSource(imageName); err != nil {
			return nil, err
		}
		if v.m.src, err = fetcher.OpenSource(v.m.source, o.Source); err != nil {
			return nil, err
		}
		defer v.m.src.Close()
		known := false
		if digest, known = v.m.known(); !known {
			return nil, hint.Wrap(fmt.Errorf("the store has no image of %s", v.m.source), "mount it first, or name the store's folder with --root")
		}
	}
	p, err := v.m.load(digest)
	if errors.Is(err, os.ErrNotExist) {
		return nil, hint.Wrap(fmt.Errorf("the store has no image %s", digest), "mount it first, or name the store's folder with --root")
	}
	if err != nil {
		return nil, err
	}
	defer p.close()
	v.m.image = p
	return v.run(ctx)
}

type verifier struct {
	o VerifyOptions
	m *Mount // a store, an image, and perhaps a source; never mounted

	manifest *fetcher.Manifest
	layers   []image.Layer // as their TOCs are now; nil if not all could be read
	digests  map[image.Digest]digestSet
}

func (v *verifier) run(ctx context.Context) (*Link, error) {
	m := v.m
	raw, err := os.ReadFile(m.image.path(manifestName))
	if err != nil {
		return nil, err
	}
	if v.manifest, err = fetcher.ParseManifest(raw); err != nil {
		return nil, err
	}
	top := v.reference(ctx)
	// load has compared the digest.
	manifest := top.add("manifest "+m.image.digest.String(), Proven, "SHA-256 of its %d bytes in the store", len(raw))
	if err := v.tables(ctx, manifest); err != nil {
		return nil, err
	}
	tree := v.tree(manifest)
	verityOf, err := v.contents(ctx, tree)
	if err != nil {
		return nil, err
	}
	sealed, err := v.sealed(ctx, tree, verityOf)
	if err != nil {
		return nil, err
	}
	if v.o.Mountpoint != "" {
		v.mounted(sealed)
	}
	return top, ctx.Err()
}

// reference looks at how the source led to the manifest.
func (v *verifier) reference(ctx context.Context) *Link {
	m := v.m
	if m.src == nil {
		return &Link{What: "image " + m.image.digest.String(), Finding: Proven, Why: "the digest was given"}
	}
	top := &Link{What: "reference " + m.src.String()}
	if strings.HasSuffix(m.src.String(), "@"+m.image.digest.String()) {
		top.Finding, top.Why = Proven, "it names the manifest's digest"
		return top
	}
	now, err := m.src.Resolve(ctx)
	switch {
	case err != nil:
		top.Finding, top.Why = Unproven, "the store remembers what it stood for; the source does not say: "+oneLine(err.Error())
	case now.Digest != m.image.digest:
		top.Finding, top.Why = Unproven, "the store remembers what it stood for; now it stands for "+now.Digest.String()
	default:
		top.Finding, top.Why = Proven, "the source says that it stands for this manifest"
	}
	return top
}

// tree compares lazy.erofs and the index of chunks with what the tables of
// contents make.
func (v *verifier) tree(parent *Link) *Link {
	const what = "tree of all layers (" + lazyName + ", " + chunksName + ")"
	if v.layers == nil {
		return parent.add(what, Unproven, "needs the tables of contents of all layers")
	}
	return parent.check(what, v.compareTree(), "made again from the tables of contents, bit for bit")
}

func (v *verifier) compareTree() error {
	t, err := image.Merge(v.layers)
	if err != nil {
		return err
	}
	h := sha256.New()
	if err := erofs.Write(h, lazyTree(t), imageFormat); err != nil {
		return err
	}
	if err := sameFile(v.m.image.path(lazyName), h.Sum(nil)); err != nil {
		return err
	}
	h.Reset()
	if err := image.WriteIndex(h, t, v.layers); err != nil {
		return err
	}
	return sameFile(v.m.image.path(chunksName), h.Sum(nil))
}

// sameFile compares a file's SHA-256.
func sameFile(path string, want []byte) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := h.Sum(nil); !bytes.Equal(got, want) {
		return fmt.Errorf("%s: SHA-256 is %x, want %x", filepath.Base(path), got, want)
	}
	return nil
}

// shown bounds how many bad files are named one by one.
const shown = 10

// contents reads every whole content once, for its SHA-256 and its fs-verity
// digest, and looks at the object of it. The map has the fs-verity digests.
func (v *verifier) contents(ctx context.Context, parent *Link) (map[image.Digest]image.Digest, error) {
	x := v.m.image.index
	verityOf := make(map[image.Digest]image.Digest, x.Contents())
	more := v.neededHashings()
	v.digests = make(map[image.Digest]digestSet, x.Contents())
	var size int64
	absent, enabled, bad := 0, 0, 0
	files := parent.add("", Proven, "")
	for i := range x.Contents() {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		ct := x.Content(i)
		f, err := os.Open(filepath.Join(v.m.store.ContentsDir(), ct.Digest.Path()))
		if errors.Is(err, os.ErrNotExist) {
			absent++
			continue
		}
		var sum image.Digest
		var sums digestSet
		if err == nil {
			sums, err = checkContent(f, ct, more)
			f.Close()
		}
		if err == nil {
			sum = image.Digest(sums[sealedHashing])
			v.digests[ct.Digest] = sums
		}
		on := false
		if err == nil {
			on, err = v.object(sum)
		}
		if err != nil {
			if bad++; bad <= shown {
				files.add("content "+ct.Digest.String(), Wrong, "%v", err)
			}
			continue
		}
		if on {
			enabled++
		}
		size += ct.Size
		verityOf[ct.Digest] = sum
	}
	files.What = fmt.Sprintf("%d of %d contents", len(verityOf), x.Contents())
	files.Why = fmt.Sprintf("SHA-256 of %d bytes, each content's the one in the tree; their objects have their fs-verity digests as names", size)
	if bad > 0 {
		files.Finding, files.Why = Wrong, fmt.Sprintf("%d do not have their digest; of the others: %s", bad, files.Why)
	}
	if absent > 0 {
		files.add(fmt.Sprintf("%d contents", absent), Unproven, "not in the store; each chunk is checked when it is fetched")
	}
	switch {
	case enabled == len(verityOf) && enabled > 0:
		files.add("fs-verity of the objects", Proven, "the kernel measures each as its name says, and checks what is read of it")
	case len(verityOf) > 0:
		files.add("fs-verity of the objects", Unproven, "enabled on %d of %d: of the others nothing keeps the bytes as they are", enabled, len(verityOf))
	}
	return verityOf, nil
}

// checkContent reads a content and compares its SHA-256 with its digest. It
// returns its fs-verity digests, the usual one and more.
func checkContent(f *os.File, ct image.Content, more []hashing) (digestSet, error) {
	h := sha256.New()
	to := []io.Writer{h}
	trees := map[hashing]*verity.Hash{}
	for _, how := range append([]hashing{sealedHashing}, more...) {
		trees[how] = how.hash()
		to = append(to, trees[how])
	}
	n, err := io.Copy(io.MultiWriter(to...), f)
	if err == nil && n != ct.Size {
		err = fmt.Errorf("%d bytes, want %d", n, ct.Size)
	}
	if got := image.Digest(h.Sum(nil)); err == nil && got != ct.Digest {
		err = fmt.Errorf("its SHA-256 is %s", got)
	}
	sums := digestSet{}
	for how, tree := range trees {
		sums[how] = tree.Sum()
	}
	return sums, err
}

// object compares what lies under an fs-verity digest's name with it. It
// reports whether the kernel vouches for it.
func (v *verifier) object(want image.Digest) (enabled bool, err error) {
	f, err := os.Open(filepath.Join(v.m.store.Objects(), want.Path()))
	if err != nil {
		return false, fmt.Errorf("object: %w", err)
	}
	defer f.Close()
	name := "object " + want.Path()
	if alg, got, err := verity.Measure(f); err == nil {
		return true, verity.Compare(name, alg, want[:], got)
	}
	got, err := verity.Digest(f, verity.SHA256)
	if err != nil {
		return false, err
	}
	return false, verity.Compare(name, verity.SHA256, want[:], got)
}

// sealed compares sealed.erofs with the one that the tree and the contents
// make, and its digest with all that name it.
func (v *verifier) sealed(ctx context.Context, parent *Link, verityOf map[image.Digest]image.Digest) (*Link, error) {
	m := v.m
	const what = "sealed image (" + sealedName + ")"
	data, err := os.ReadFile(m.image.path(recordName))
	if errors.Is(err, os.ErrNotExist) {
		return parent.add(what, Unproven, "the image is not sealed yet"), nil
	}
	var rec sealedRecord
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	var got hexDigest
	if err == nil {
		got, err = measure(m.image.path(sealedName))
	}
	if err != nil {
		return parent.add(what, Wrong, "%v", err), nil
	}
	if got != rec.Composefs {
		return parent.add(what, Wrong, "its fs-verity digest is %s, the record has %s", got, rec.Composefs), nil
	}
	if len(verityOf) < m.image.index.Contents() {
		parent = parent.add(what, Unproven, "it has the recorded digest %s; to make it again needs all contents", got)
	} else {
		h := verity.New(verity.SHA256)
		root, err := sealedTree(ctx, m.image, func(d image.Digest) (image.Digest, error) {
			sum, ok := verityOf[d]
			if !ok {
				return sum, errors.New("not among the contents")
			}
			return sum, nil
		})
		if err == nil {
			err = erofs.Write(h, root, imageFormat)
		}
		if err == nil {
			err = verity.Compare(sealedName, verity.SHA256, h.Sum(), got[:])
		}
		parent = parent.check(what, err, "made again from the tree and the contents, bit for bit; fs-verity digest %s", got)
	}
	if !m.opts.Digest.IsZero() {
		parent.check("--digest", m.checkDigest(rec), "it is the digest that was asked for")
	}
	all := v.digests
	if len(verityOf) < m.image.index.Contents() {
		all = nil
	}
	if err := v.claims(ctx, parent, got, all); err != nil {
		return nil, err
	}
	f, err := os.Open(m.image.path(sealedName))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := checkImage(f, got[:]); err != nil {
		parent.add("fs-verity of the sealed image", Unproven, "%s", oneLine(err.Error()))
	} else {
		parent.add("fs-verity of the sealed image", Proven, "measured by the kernel, which checks what is read of it")
	}
	return parent, nil
}

// mounted looks at what is mounted.
func (v *verifier) mounted(parent *Link) {
	info, err := kmount.At(v.o.Mountpoint)
	what := "mount " + v.o.Mountpoint
	switch {
	case err != nil:
		parent.add(what, Wrong, "%v", err)
	case !isSealedMount(info):
		parent.add(what, Unproven, "%s serves it: each chunk is checked when it is fetched, what is in the store is read as it is", info.FSType)
	case !strings.HasSuffix(v.m.image.path(sealedName), info.Source):
		parent.add(what, Wrong, "the kernel has mounted %s", info.Source)
	case !strings.Contains(","+info.Options+",", ",verity=require,"):
		parent.add(what, Unproven, "the kernel mounts the sealed image, and enforces no digest")
	default:
		parent.add(what, Proven, "the kernel mounts the sealed image with verity=require: it opens no object with another digest")
	}
}

// diffIDs reads what the image's config says the uncompressed layers are.
func (v *verifier) diffIDs(ctx context.Context) ([]string, error) {
	if v.manifest.LocalLayer || v.manifest.Config.Size == 0 {
		return nil, errors.New("a single layer has no config")
	}
	raw, err := fetcher.ReadConfig(ctx, v.m.src, v.manifest)
	if err != nil {
		return nil, err
	}
	var config ocispec.Image
	if err := json.Unmarshal(raw, &config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	if len(config.RootFS.DiffIDs) != len(v.manifest.Layers) {
		return nil, fmt.Errorf("the config has %d DiffIDs for %d layers", len(config.RootFS.DiffIDs), len(v.manifest.Layers))
	}
	var all []string
	for _, d := range config.RootFS.DiffIDs {
		all = append(all, d.String())
	}
	return all, nil
}
