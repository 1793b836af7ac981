package toc

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
)

// A Digest is a SHA-256 digest.
type Digest [sha256.Size]byte

// String returns the digest as OCI writes it: "sha256:" and 64 lower-case
// hexadecimal digits (OCI image-spec, descriptor, "Digests").
func (d Digest) String() string { return "sha256:" + hex.EncodeToString(d[:]) }

// Path returns the digest's place below a folder of objects: its first byte
// as a folder, the rest as a name, in lower-case hexadecimal ("ab/cdef…").
func (d Digest) Path() string {
	s := hex.EncodeToString(d[:])
	return s[:2] + "/" + s[2:]
}

// IsZero reports whether d is all zero bytes, which stands for "no digest".
func (d Digest) IsZero() bool { return d == Digest{} }

// ParseDigest reads what String writes. Any other algorithm, length or letter
// case is an error.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	h, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(h) != hex.EncodedLen(len(d)) || strings.ToLower(h) != h {
		return d, fmt.Errorf("digest %.100q: want sha256: and 64 lower-case hexadecimal digits", s)
	}
	if _, err := hex.Decode(d[:], []byte(h)); err != nil {
		return Digest{}, fmt.Errorf("digest %q: %w", s, err)
	}
	return d, nil
}
