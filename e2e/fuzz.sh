#!/bin/sh
# Runs every fuzz target of the module for $FUZZTIME, one on each core at a
# time; with DIR and TARGET, that one alone.
#
# Go before 1.27 can end a target that found nothing with "context deadline
# exceeded": its coordinator races with its own deadline (go.dev/issue/75804).
# Such a run, at its full time and with no failing input, proves nothing either
# way, so it is run again, twice at most. Everything else that fails is a
# finding.
set -eu
: "${GO:=go}" "${FUZZTIME:=30s}"
export GO FUZZTIME

# deadline_race tells whether the run in $log failed by that race alone.
deadline_race() {
	grep -q '^    context deadline exceeded$' "$log" &&
		! grep -q -e 'Failing input written' -e '^panic:' -e 'fuzzing process' -e 'DATA RACE' "$log" &&
		! sed -n '/^ *--- FAIL/,/^FAIL/p' "$log" | grep -qv -e '^--- FAIL: Fuzz' -e '^    context deadline exceeded$' -e '^FAIL'
}

fuzz() { # DIR TARGET
	for try in 1 2 3; do
		code=0
		$GO test -run '^$' -fuzz "^$2\$" -fuzztime "$FUZZTIME" -fuzzminimizetime 10x -parallel 1 "$1" >"$log" 2>&1 || code=$?
		{
			echo "fuzz: $2 in ${1#"$PWD"/}, $FUZZTIME"
			grep -v '^fuzz: elapsed' "$log" || :
			grep '^fuzz: elapsed' "$log" | tail -n 1
		} >"$log.short"
		cat "$log.short" # at once: others print too
		[ $code != 0 ] || return 0
		[ $try != 3 ] && deadline_race || return $code
		echo "fuzz: $2: Go's own deadline race (go.dev/issue/75804), no finding: again"
	done
}

if [ $# = 2 ]; then
	log=$(mktemp)
	trap 'rm -f "$log" "$log.short"' EXIT
	fuzz "$1" "$2"
	exit
fi
dirs=$($GO list -f '{{if .TestGoFiles}}{{.Dir}}{{end}}{{if .XTestGoFiles}}{{if not .TestGoFiles}}{{.Dir}}{{end}}{{end}}' ./...)
for dir in $dirs; do
	sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(f \*testing\.F).*/\1/p' "$dir"/*_test.go | sort -u | while read -r target; do
		printf '%s\n%s\n' "$dir" "$target"
	done
done | xargs -r -d '\n' -n 2 -P "$(nproc)" sh "$0"
