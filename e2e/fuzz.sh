#!/bin/sh
# Runs every fuzz target of the module for $FUZZTIME, one after the other.
#
# Go before 1.27 can end a target that found nothing with "context deadline
# exceeded": its coordinator races with its own deadline (go.dev/issue/75804).
# Such a run, at its full time and with no failing input, proves nothing either
# way, so it is run again, twice at most. Everything else that fails is a
# finding.
set -eu
: "${GO:=go}" "${FUZZTIME:=30s}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# deadline_race tells whether the run in $log failed by that race alone.
deadline_race() {
	grep -q '^    context deadline exceeded$' "$log" &&
		! grep -q -e 'Failing input written' -e '^panic:' -e 'fuzzing process' -e 'DATA RACE' "$log" &&
		[ "$(grep -c '^ *--- FAIL' "$log")" = 1 ] &&
		! sed -n '/^--- FAIL/,/^FAIL/p' "$log" | grep -qv -e '^--- FAIL: Fuzz' -e '^    context deadline exceeded$' -e '^FAIL'
}

fuzz() { # DIR TARGET
	for try in 1 2 3; do
		code=0
		$GO test -run '^$' -fuzz "^$2\$" -fuzztime "$FUZZTIME" -fuzzminimizetime 10x "$1" >"$log" 2>&1 || code=$?
		grep -v -e '^fuzz: elapsed: .*[0-9]s, execs' "$log" || :
		grep '^fuzz: elapsed' "$log" | tail -n 1
		[ $code != 0 ] || return 0
		[ $try != 3 ] && deadline_race || return $code
		echo "fuzz: Go's own deadline race (go.dev/issue/75804), no finding: again"
	done
}

for dir in $($GO list -f '{{if .TestGoFiles}}{{.Dir}}{{end}}{{if .XTestGoFiles}}{{if not .TestGoFiles}}{{.Dir}}{{end}}{{end}}' ./...); do
	for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*/\1/p' "$dir"/*_test.go | sort -u); do
		echo "fuzz: $target in ${dir#"$PWD"/}, $FUZZTIME"
		fuzz "$dir" "$target"
	done
done
