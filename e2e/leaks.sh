#!/bin/sh
# Runs a command, and fails if it fails or if mounts, loop devices or processes
# of ours are there afterwards that were not there before.
set -u
snapshot() {
	awk '{ print "mount " $5 }' /proc/self/mountinfo
	losetup -a | sed 's/^/loop device /'
	for p in /proc/[0-9]*; do
		# By the program's file: what is started through /proc/self/exe is called exe.
		exe=$(readlink "$p/exe" 2>/dev/null) && exe=${exe##*/}
		case ${exe% (deleted)} in
		cfs-fuse* | docker-registry | nginx | fusermount* | qemu-system* | *.test) echo "process ${p#/proc/} $exe" ;;
		esac
	done
}
before=$(mktemp) after=$(mktemp)
trap 'rm -f "$before" "$after"' EXIT
snapshot | sort >"$before"
"$@"
code=$?
snapshot | sort >"$after"
left=$(comm -13 "$before" "$after")
if [ -n "$left" ]; then
	echo "left behind by: $*"
	echo "$left"
	exit 1
fi
exit $code
