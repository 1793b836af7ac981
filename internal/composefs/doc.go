// Package composefs does what the composefs tools do, apart from their command
// lines: it reads a directory into a tree, fills a store of objects, lists what
// an image refers to, and measures files. The image format itself is package
// erofs's, fs-verity package verity's, and mounting package mount's business.
// Section numbers in comments are those of the project's composefs format
// document.
//
// A store of objects, as `mkcomposefs --digest-store` fills it:
//
//	ab/cdef…     a whole file, named by its fs-verity digest (SHA-256, or
//	             SHA-512 if asked for) in hexadecimal; mode 0644, fs-verity
//	             enabled where the filesystem can
//	.tmp…        an object being written, or litter of a crash
//
// Objects get their names before they are synced; Store.Sync syncs them all at
// once. A power cut in between can leave an object that is shorter than it
// should be, never one that is whole and wrong, so Store.Add takes an object
// for present only if it has the size it should have. Whoever writes an image
// after Sync returned has an image whose objects survive.
package composefs
