package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"

	"github.com/cfs-fuse/cfs-fuse/image/toc"
)

// Limits of a profile: what a start reads of even a large image is far less.
const (
	MaxAccesses    = 1 << 14 // in one profile
	MaxProfileSize = 4 << 20 // of its JSON, in bytes
	maxRepository  = 4096    // bytes
)

// A Profile is what programs read first of an image, in the order of their
// first reads. As it names contents by digest, it also serves other images that
// have some of them. In JSON, which is how it is kept and exported:
//
//	{
//	 "version": 1,
//	 "image": "sha256:…",                      of the manifest it was recorded with
//	 "repository": "docker://host/name",       the source without tag and digest
//	 "accesses": [
//	  {"content": "sha256:…", "offset": 0, "length": 4096},
//	  …
//	 ]
//	}
type Profile struct {
	Image      Digest
	Repository string
	Accesses   []Access
}

// An Access is a part of a content that was read. Off and N are bytes of the
// file; N is at least 1.
type Access struct {
	Content Digest
	Off, N  int64
}

const profileVersion = 1

type profileJSON struct {
	Version    int          `json:"version"`
	Image      string       `json:"image"`
	Repository string       `json:"repository"`
	Accesses   []accessJSON `json:"accesses"`
}

type accessJSON struct {
	Content string `json:"content"`
	Offset  int64  `json:"offset"`
	Length  int64  `json:"length"`
}

// Encode returns the profile as JSON, one access a line. It leaves out what is
// above the limits.
func (p *Profile) Encode() ([]byte, error) {
	var b bytes.Buffer
	repository, err := json.Marshal(p.Repository)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(&b, "{\n \"version\": %d,\n \"image\": %q,\n \"repository\": %s,\n \"accesses\": [", profileVersion, p.Image, repository)
	for i, a := range p.Accesses {
		if i == MaxAccesses {
			break
		}
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "\n  {\"content\": %q, \"offset\": %d, \"length\": %d}", a.Content, a.Off, a.N)
	}
	b.WriteString("\n ]\n}\n")
	return b.Bytes(), nil
}

// ParseProfile reads the JSON of a profile. A nil error promises that its
// digests are SHA-256 digests, and that each access ends before 2⁶³.
func ParseProfile(raw []byte) (*Profile, error) {
	p, err := parseProfile(raw)
	if err != nil {
		return nil, fmt.Errorf("access profile: %w", err)
	}
	return p, nil
}

func parseProfile(raw []byte) (*Profile, error) {
	if len(raw) > MaxProfileSize {
		return nil, fmt.Errorf("more than %d bytes", MaxProfileSize)
	}
	var j profileJSON
	dec := json.NewDecoder(bytes.NewReader(raw))
	if err := dec.Decode(&j); err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, errors.New("something follows it")
	}
	if j.Version != profileVersion {
		return nil, fmt.Errorf("version %d, want %d", j.Version, profileVersion)
	}
	if len(j.Repository) > maxRepository {
		return nil, fmt.Errorf("repository of %d bytes", len(j.Repository))
	}
	if len(j.Accesses) > MaxAccesses {
		return nil, fmt.Errorf("%d accesses, the limit is %d", len(j.Accesses), MaxAccesses)
	}
	p := &Profile{Repository: j.Repository, Accesses: make([]Access, len(j.Accesses))}
	var err error
	if p.Image, err = toc.ParseDigest(j.Image); err != nil {
		return nil, fmt.Errorf("image: %w", err)
	}
	for i, a := range j.Accesses {
		d, err := toc.ParseDigest(a.Content)
		if err == nil && (a.Offset < 0 || a.Length < 1 || a.Offset > math.MaxInt64-a.Length) {
			err = fmt.Errorf("%d bytes at %d", a.Length, a.Offset)
		}
		if err != nil {
			return nil, fmt.Errorf("access %d: %w", i, err)
		}
		p.Accesses[i] = Access{d, a.Offset, a.Length}
	}
	return p, nil
}
