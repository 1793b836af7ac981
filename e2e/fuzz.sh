#!/bin/sh
# Runs every fuzz target of the module for $FUZZTIME, one after the other.
set -eu
for dir in $(${GO:-go} list -f '{{if .TestGoFiles}}{{.Dir}}{{end}}{{if .XTestGoFiles}}{{if not .TestGoFiles}}{{.Dir}}{{end}}{{end}}' ./...); do
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*/\1/p' "$dir"/*_test.go | sort -u); do
		echo "fuzz: $target in ${dir#"$PWD"/}, ${FUZZTIME:-30s}"
		${GO:-go} test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-30s}" -fuzzminimizetime 10x "$dir"
	done
done
