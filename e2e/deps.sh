#!/bin/sh
# Installs the Debian packages named in $APT that are missing, and says so.
set -eu
missing=
for p in $APT; do
	dpkg-query -W -f '${Status}' "$p" 2>/dev/null | grep -q 'install ok installed' || missing="$missing $p"
done
[ -n "$missing" ] || exit 0
echo "deps: installing$missing (apt)"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# A registry that starts by itself would take a port that nobody asked for.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d.cfs-fuse
chmod +x /usr/sbin/policy-rc.d.cfs-fuse
kept=
if [ ! -e /usr/sbin/policy-rc.d ]; then
	mv /usr/sbin/policy-rc.d.cfs-fuse /usr/sbin/policy-rc.d
	kept=/usr/sbin/policy-rc.d
else
	rm /usr/sbin/policy-rc.d.cfs-fuse
fi
trap '[ -z "$kept" ] || rm -f "$kept"' EXIT
# shellcheck disable=SC2086
apt-get install -y -qq --no-install-recommends $missing >/dev/null
