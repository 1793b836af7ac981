// Package fetcher gets the blobs of an image by ranges, from a registry or
// from files, and brings chunks into a store, each checked against its digest
// before the store sees it. It knows nothing of trees, of FUSE or of what the
// store does with a chunk, and keeps nothing on disk.
//
// It has two halves. A Source finds the manifest and gives Blobs:
//
//	OpenSource ─► Source ─► Resolve: reference ─► (index ─►) manifest
//	                └─────► Blob: ReadRange(offset, length)
//
// What a registry does wrong is dealt with there: hosts are asked in the order
// of hosts.toml, an answer that is cut, stalls or lies about its range goes on
// at the next host from the byte where it stopped, and what fails for
// ReadTimeout on all of them is an error. Digests of chunks are not its matter.
//
// A Fetcher serves one mounted image. Each chunk is brought once, by one of
// three classes of work:
//
//	demand    Need: a reader waits. Goes first. Fetches ahead what one more
//	          round trip would cost more than.
//	prefetch  Fill: what its caller knows will be wanted, in that order, or in
//	          long ranges where that is faster (Plan); then the layers'
//	          prioritized files, one range each
//	fill      Fill: all the rest in order, in long ranges, several at once
//
// While a demand request is under way, only the oldest of the other requests
// goes on receiving, and those for what is known to be wanted.
//
//	Need, Fill ─► job: one range, its spans in order ─► body ─► decompress ─► SHA-256 ─► Sink.Put
//
// A span is what decompresses by itself: the bytes [BlobOffset, BlobEnd) of a
// chunk (package image/toc). Several chunks may share one.
//
// Errors: *StatusError (a host refused), *DigestError and *DecodeError (wrong
// bytes, from two requests), *StoreError (the disk), ErrClosed; anything else
// is the network's or the context's.
package fetcher
