package toc

// MaxChunk is the largest chunk, in bytes, that is not a hole. Whoever gets a
// chunk may hold it in memory.
const MaxChunk = 1 << 30

// What one layer may ask of us. stargz-snapshotter spends some 600 bytes of
// JSON on a small file, so that 400,000 of them fit.
const (
	maxCompressedTOC = 128 << 20 // bytes of the blob
	maxTOC           = 256 << 20 // bytes of JSON
	maxEntries       = 2 << 20
	maxChunks        = 4 << 20
	maxFile          = 1 << 50 // bytes of one file; with maxChunks, sums stay within int64
	maxInner         = 1 << 40 // decompressed bytes of a span before a chunk
	maxDepth         = 32      // of JSON values inside a field that is skipped
	maxWindow        = 128 << 20
)

// The first read is the tail of the blob: a 128th of it, for the TOC of a
// layer of programs takes some 0.6 % (small files more: they cost a second
// request), but not less than a request is worth and not more than a slow link
// gives in a blink.
const (
	minTail = 64 << 10
	maxTail = 4 << 20
)

func tailSize(size int64) int64 {
	return min(size, max(minTail, min(size/128, maxTail)))
}

// Limits of Linux: XATTR_NAME_MAX, XATTR_SIZE_MAX (linux/limits.h), and the 12
// and 20 bits that its device numbers have (linux/kdev_t.h).
const (
	maxXattrName  = 255
	maxXattrValue = 64 << 10
	maxMajor      = 1<<12 - 1
	maxMinor      = 1<<20 - 1
)
