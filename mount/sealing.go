package mount

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/cfs-fuse/cfs-fuse/erofs"
	"github.com/cfs-fuse/cfs-fuse/fetcher"
	"github.com/cfs-fuse/cfs-fuse/image"
	"github.com/cfs-fuse/cfs-fuse/verity"
)

// sealingKey is the manifest's annotation for the image that all layers merge
// into, in the form that is sealed here (format document 4).
const sealingKey = "composefs.merged.erofs.v1.fsverity-sha256-12"

// sealingKeys are all that the composefs sealing specification has: what is
// sealed, the hash, and the size of a block of fs-verity as a power of two.
var sealingKeys = regexp.MustCompile(`^composefs\.(layer|merged|merged\.bootable)\.erofs\.v1\.fsverity-(sha256|sha512)-(12|16)(\.sig)?$`)

// A hashing is how fs-verity hashes, objects and image alike.
type hashing struct {
	alg   verity.Algorithm
	large bool // blocks of 65,536 bytes
}

// sealedHashing is the one of images that are sealed here.
var sealedHashing = hashing{alg: verity.SHA256}

func (h hashing) hash() *verity.Hash {
	if h.large {
		return verity.NewLarge(h.alg)
	}
	return verity.New(h.alg)
}

// A sealing is an annotation by which somebody says what an image made of
// layers is.
type sealing struct {
	key    string
	layer  int    // of the layer that has it; -1: the manifest
	scope  string // layer, merged or merged.bootable
	how    hashing
	digest []byte // nil if err is set
	sig    bool   // the signature of such an annotation
	err    error  // what is wrong with the annotation itself
}

// where says where the annotation is.
func (s sealing) where() string {
	if s.layer < 0 {
		return "annotation " + s.key
	}
	return fmt.Sprintf("annotation %s of layer %d", s.key, s.layer)
}

// sealings lists the sealing annotations of a manifest and its layers.
func sealings(m *fetcher.Manifest) ([]sealing, error) {
	var raw struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(m.Raw, &raw); err != nil {
		return nil, err
	}
	all := sealingsOf(raw.Annotations, -1)
	for i, l := range m.Layers {
		all = append(all, sealingsOf(l.Annotations, i)...)
	}
	return all, nil
}

func sealingsOf(annotations map[string]string, layer int) (all []sealing) {
	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		f := sealingKeys.FindStringSubmatch(key)
		if f == nil {
			continue
		}
		s := sealing{key: key, layer: layer, scope: f[1], how: hashing{verity.SHA256, f[3] == "16"}, sig: f[4] != ""}
		if f[2] == "sha512" {
			s.how.alg = verity.SHA512
		}
		if !s.sig {
			s.digest, s.err = sealingDigest(annotations[key], f[2], s.how.alg.Size())
			if s.err != nil {
				s.err = fmt.Errorf("%s: %w", s.where(), s.err)
			}
		}
		all = append(all, s)
	}
	return all
}

func sealingDigest(value, name string, size int) ([]byte, error) {
	text := strings.TrimPrefix(value, name+":")
	if b, err := hex.DecodeString(text); err == nil && len(b) == size && strings.ToLower(text) == text {
		return b, nil
	}
	return nil, fmt.Errorf("%.140q is no %s digest in hexadecimal", value, name)
}

// sealingAnnotation returns the fs-verity digest, in hexadecimal, that the
// manifest says the sealed image has, "" if it says none.
func sealingAnnotation(m *fetcher.Manifest) (string, error) {
	all, err := sealings(m)
	if err != nil {
		return "", err
	}
	for _, s := range all {
		if s.key == sealingKey && s.layer < 0 {
			return hex.EncodeToString(s.digest), s.err
		}
	}
	return "", nil
}

// A digestSet has the fs-verity digests of one content by how it was hashed.
type digestSet map[hashing][]byte

// otherForm computes the digest that the image would have if it were sealed with
// another hashing, or, with oci, as composefs-rs makes a tree of an OCI image.
func (p *preparedImage) otherForm(ctx context.Context, how hashing, oci bool, verityOf func(image.Digest) ([]byte, error), contents string) ([]byte, error) {
	inline := func(n *erofs.Node) (bool, error) { return false, nil }
	if oci {
		inline = func(n *erofs.Node) (bool, error) { return inlineSmall(n, contents) }
	}
	root, err := p.treeWith(ctx, func(n *erofs.Node) error {
		done, err := inline(n)
		if err != nil || done {
			return err
		}
		n.Digest, err = verityOf(image.Digest(n.Digest))
		text := hex.EncodeToString(n.Digest)
		if err == nil {
			n.Target = text[:2] + "/" + text[2:]
		}
		return err
	})
	if err == nil && oci {
		err = ociTree(root)
	}
	if err != nil {
		return nil, err
	}
	h := how.hash()
	if err := erofs.Write(h, root, imageFormat); err != nil {
		return nil, err
	}
	return h.Sum(), nil
}

// ociInline is how large a file may be that composefs-rs keeps in the image.
const ociInline = 64

// inlineSmall puts a small file's bytes in the place of its content digest.
func inlineSmall(n *erofs.Node, contents string) (bool, error) {
	if n.Size > ociInline {
		return false, nil
	}
	d := image.Digest(n.Digest)
	data, err := os.ReadFile(filepath.Join(contents, d.Path()))
	if err != nil {
		return false, err
	}
	if uint64(len(data)) != n.Size || sha256.Sum256(data) != d {
		return false, fmt.Errorf("content %s is damaged", d)
	}
	n.Content, n.Target, n.Digest = data, "", nil
	return true, nil
}

// ociTree changes a tree as composefs-rs makes one of an OCI image (format
// document 4): the root's metadata are those of /usr, /run is empty and has
// /usr's mtime, and of xattrs only capabilities stay.
func ociTree(root *erofs.Node) error {
	var usr, run *erofs.Node
	for _, c := range root.Children {
		switch {
		case c.Link != nil || c.Mode&0o170000 != 0o040000:
		case c.Name == "usr":
			usr = c
		case c.Name == "run":
			run = c
		}
	}
	eachNode(root, func(n *erofs.Node) {
		n.Xattrs = slices.DeleteFunc(n.Xattrs, func(x erofs.Xattr) bool { return x.Name != "security.capability" })
	})
	if usr != nil {
		root.Mode, root.UID, root.GID, root.Xattrs = usr.Mode, usr.UID, usr.GID, usr.Xattrs
		root.MtimeSec, root.MtimeNsec = usr.MtimeSec, usr.MtimeNsec
	}
	if run == nil {
		return nil
	}
	inRun := map[*erofs.Node]bool{}
	for _, c := range run.Children {
		eachNode(c, func(n *erofs.Node) { inRun[n] = true })
	}
	linked := false
	eachNode(root, func(n *erofs.Node) {
		linked = linked || n.Link != nil && inRun[n] != inRun[n.Link]
	})
	if linked {
		return errors.New("a hard link leads into /run, which composefs-rs empties")
	}
	run.Children = nil
	if usr != nil {
		run.MtimeSec, run.MtimeNsec = usr.MtimeSec, usr.MtimeNsec
	}
	return nil
}

func eachNode(n *erofs.Node, f func(*erofs.Node)) {
	f(n)
	for _, c := range n.Children {
		eachNode(c, f)
	}
}

// claims compares what the manifest's sealing annotations say with what the
// tree and the contents make. The digest that was sealed here is got; digests
// are those of all contents, nil if some are absent.
func (v *verifier) claims(ctx context.Context, parent *Link, got hexDigest, digests map[image.Digest]digestSet) error {
	all, err := sealings(v.manifest)
	if err != nil {
		return err
	}
	for _, s := range all {
		switch {
		case s.sig:
			parent.add(s.where(), Unproven, "signatures are not checked")
		case s.err != nil:
			parent.add(s.where(), Wrong, "%v", s.err)
		case s.scope == "layer":
			parent.add(s.where(), Unproven, "what an image of one layer holds of its whiteouts is not settled; only merged ones are made here")
		case s.scope != "merged" || s.layer >= 0:
			parent.add(s.where(), Unproven, "what is left out of such an image is not settled; only merged ones are made here")
		case s.how == sealedHashing && slices.Equal(s.digest, got[:]):
			parent.add(s.where(), Proven, "the manifest's author sealed the same image")
		case digests == nil:
			parent.add(s.where(), Unproven, "to make the image needs all contents")
		default:
			if err := v.claim(ctx, parent, s, digests); err != nil {
				return err
			}
		}
	}
	return nil
}

// claim makes an author's image in both forms.
func (v *verifier) claim(ctx context.Context, parent *Link, s sealing, digests map[image.Digest]digestSet) error {
	verityOf := func(d image.Digest) ([]byte, error) {
		sum := digests[d][s.how]
		if sum == nil {
			return nil, fmt.Errorf("content %s: not among the contents", d)
		}
		return sum, nil
	}
	var made []string
	for _, oci := range []bool{false, true} {
		sum, err := v.m.image.otherForm(ctx, s.how, oci, verityOf, v.m.store.ContentsDir())
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch {
		case err != nil:
			made = append(made, oneLine(err.Error()))
		case slices.Equal(sum, s.digest) && oci:
			parent.add(s.where(), Proven, "made from the tree and the contents, as composefs-rs makes a tree of an OCI image")
			return nil
		case slices.Equal(sum, s.digest):
			parent.add(s.where(), Proven, "made from the tree and the contents, bit for bit")
			return nil
		default:
			made = append(made, hex.EncodeToString(sum))
		}
	}
	parent.add(s.where(), Wrong, "it is %s; as composefs-rs makes it: %s", made[0], made[1])
	return nil
}

// neededHashings are those besides the usual one that annotations need.
func (v *verifier) neededHashings() (more []hashing) {
	all, err := sealings(v.manifest)
	if err != nil {
		return nil // claims says so
	}
	for _, s := range all {
		if s.scope == "merged" && s.layer < 0 && s.digest != nil && s.how != sealedHashing && !slices.Contains(more, s.how) {
			more = append(more, s.how)
		}
	}
	return more
}
