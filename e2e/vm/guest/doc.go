// Package guest has the tests that run inside the machine of package vm, on
// its kernel with fs-verity and its ext4 disk. They are started by that
// package's tests (make test-vm) and fail anywhere else.
package guest
