#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Sourced: Debian packages of any suite and architecture, through an apt whose state is its own, so
# that nothing of this machine's changes. The mirror and the keys are those of this machine's apt.

cache=${XDG_CACHE_HOME:-$HOME/.cache}/dnstrace

say() {
	echo "${0##*/}: $*" >&2
}

fail() {
	echo "${0##*/}: $1" >&2
	echo "${0##*/}: remedy: $2" >&2
	exit 1
}

# The URI of this machine's Debian mirror.
mirror() {
	# shellcheck disable=SC2016 # apt fills these in
	apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Created-By: Packages' |
		awk '$2 !~ /security|updates|backports/ && $1 ~ /debian\/?$/ && !seen++ { print $1 }'
}

# archive SUITE ARCHITECTURE: sets `apt`, a directory, and `options` for apt's commands.
archive() {
	local suite=$1 architecture=$2 site keys=/usr/share/keyrings/debian-archive-keyring.gpg
	apt=$cache/apt/$suite-$architecture
	mkdir -p "$apt/lists/partial" "$apt/cache/archives/partial"
	site=$(mirror)
	[[ -n $site ]] || fail "this machine's apt knows no Debian mirror" \
		"name one in /etc/apt/sources.list.d"
	[[ -e $keys ]] || fail "$keys is missing" "apt-get install debian-archive-keyring"
	echo "deb [signed-by=$keys] $site $suite main" >"$apt/sources.list"
	if [[ $suite != sid ]]; then
		echo "deb [signed-by=$keys] ${site%/}-security $suite-security main" >>"$apt/sources.list"
	fi
	: >"$apt/status"
	options=(
		-qq
		-o "APT::Architecture=$architecture"
		-o "APT::Architectures=$architecture"
		-o APT::Default-Release=
		-o APT::Install-Recommends=false
		-o APT::Sandbox::User=root
		-o Acquire::Languages=none
		-o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false
		-o Acquire::Retries=3
		-o Debug::NoLocking=true
		-o "Dir::Cache=$apt/cache"
		-o "Dir::Etc::SourceList=$apt/sources.list"
		-o Dir::Etc::SourceParts=/dev/null
		-o Dir::Etc::Preferences=/dev/null
		-o Dir::Etc::PreferencesParts=/dev/null
		-o "Dir::State=$apt"
		-o "Dir::State::Lists=$apt/lists"
		-o "Dir::State::status=$apt/status"
		-o "Dir::State::extended_states=$apt/extended_states"
	)
	# Without it, indexes that cannot be had are no failure.
	apt-get "${options[@]}" -o APT::Update::Error-Mode=any update >&2 ||
		fail "apt-get update of $suite ($architecture) failed" "check the network"
}

# Downloads packages and all that they depend on into $apt/cache/archives.
download() {
	rm -f "$apt"/cache/archives/*.deb
	apt-get "${options[@]}" -y --download-only -o Dpkg::Use-Pty=false \
		-o Binary::apt-get::APT::Keep-Downloaded-Packages=true \
		-o APT::Keep-Downloaded-Packages=true install "$@" >&2 ||
		fail "these packages cannot be had: $*" "check the network, and the name of the suite"
}
