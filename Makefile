# What a person runs here. Each target says what it needs; 'deps' installs it.

GO        ?= go
BIN       := bin/cfs-fuse
STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
FUZZTIME  ?= 30s
# Packages of Debian that the tests use: real registries, real unpackers, real
# images, the kernel's own checkers.
APT       := btrfs-progs \
	chromium \
	containerd \
	cpio \
	debian-archive-keyring \
	debootstrap \
	docker-registry \
	e2fsprogs \
	erofs-utils \
	fsverity \
	fuse3 \
	libarchive-tools \
	man-db \
	mandoc \
	nginx-light \
	prometheus \
	qemu-system-x86 \
	runc \
	skopeo \
	systemd \
	umoci \
	util-linux \
	xfsprogs \
	xz-utils \
	zstd

# Where 'install' puts things, and the names of the composefs tools that it
# links to the command (mount(8) looks for its helpers in sbin).
DESTDIR   ?=
PREFIX    ?= /usr/local
SBINDIR   ?= /usr/sbin
UNITDIR   ?= $(PREFIX)/lib/systemd/system
TOOLS     ?= mkcomposefs composefs-info composefs-dump composefs-fuse

# What a release is. The same source gives the same bytes, wherever and whenever
# it is built: no paths, no time, no C compiler, and the version from here.
DIST      ?= dist
ARCH      ?= $(shell $(GO) env GOARCH)
REVISION  ?= $(shell git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
VERSION   ?= $(shell git describe --tags --match 'v[0-9]*' 2>/dev/null | sed 's/^v//; s/-/+/' | grep . || echo 0.0.0+git$(REVISION))
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
VERSIONPKG := github.com/cfs-fuse/cfs-fuse/internal/version
GOBUILD   := CGO_ENABLED=0 GOOS=linux GOARCH=$(ARCH) $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X $(VERSIONPKG).version=$(VERSION) -X $(VERSIONPKG).revision=$(REVISION)'
# The last version whose own dependencies the module proxy has.
NFPM      := github.com/goreleaser/nfpm/v2/cmd/nfpm@v2.43.4

.PHONY: all
all: build

.PHONY: help
help:
	@sed -n 's/^## //p' Makefile

## build   the command, as bin/cfs-fuse
.PHONY: build
build:
	$(GOBUILD) -o $(BIN) ./cmd/cfs-fuse

## man     manual pages and completions, made from the commands, in dist/
.PHONY: man
man:
	rm -rf $(DIST)/man $(DIST)/completions
	$(GO) run -tags docs -ldflags '-X $(VERSIONPKG).version=$(VERSION)' ./cmd/cfs-fuse docs man $(DIST)/man
	mkdir -p $(DIST)/completions
	for s in bash zsh fish; do $(GO) run ./cmd/cfs-fuse completion $$s >$(DIST)/completions/$$s || exit 1; done

## install the command, links to it under the names of the composefs tools and of mount(8)'s helpers, manual, completions, units
.PHONY: install
install: build man
	install -D -m 0755 $(BIN) $(DESTDIR)$(PREFIX)/bin/cfs-fuse
	for t in $(TOOLS); do ln -sf cfs-fuse $(DESTDIR)$(PREFIX)/bin/$$t; done
	install -d $(DESTDIR)$(SBINDIR) $(DESTDIR)$(UNITDIR)
	ln -sf $(PREFIX)/bin/cfs-fuse $(DESTDIR)$(SBINDIR)/mount.cfs-fuse
	[ -z "$(TOOLS)" ] || ln -sf $(PREFIX)/bin/cfs-fuse $(DESTDIR)$(SBINDIR)/mount.composefs
	for p in $(DIST)/man/*; do install -D -m 0644 $$p $(DESTDIR)$(PREFIX)/share/man/man$${p##*.}/$${p##*/}; done
	install -D -m 0644 $(DIST)/completions/bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/cfs-fuse
	install -D -m 0644 $(DIST)/completions/zsh $(DESTDIR)$(PREFIX)/share/zsh/vendor-completions/_cfs-fuse
	install -D -m 0644 $(DIST)/completions/fish $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/cfs-fuse.fish
	for u in deploy/systemd/*.service; do sed 's|/usr/bin/cfs-fuse|$(PREFIX)/bin/cfs-fuse|' $$u >$(DESTDIR)$(UNITDIR)/$${u##*/} || exit 1; done

## deb     a Debian package in dist/, for ARCH (amd64, arm64); without the composefs tools, which Debian has a package of
.PHONY: deb
deb:
	rm -rf $(DIST)/root-$(ARCH)
	$(MAKE) --no-print-directory install BIN=$(DIST)/bin-$(ARCH)/cfs-fuse ARCH=$(ARCH) TOOLS= DESTDIR=$(DIST)/root-$(ARCH) PREFIX=/usr
	gzip -9 -n -r $(DIST)/root-$(ARCH)/usr/share/man
	DIST=$(DIST) ARCH=$(ARCH) VERSION=$(VERSION) $(GO) run $(NFPM) package -p deb -f deploy/package/nfpm.yaml -t $(DIST)/cfs-fuse_$(VERSION)_$(ARCH).deb

## docs    what is generated of docs/ from the code
.PHONY: docs
docs:
	$(GO) generate ./metrics

## demo    the whole story on this machine, with no network: mount, run, fill, seal, swap
.PHONY: demo
demo: build
	$(GO) run ./e2e/demo -bin $(BIN)

## test    everything that decides whether a change is good (installs what is missing; root)
.PHONY: test
test: deps
	sh e2e/leaks.sh $(MAKE) --no-print-directory check race e2e test-vm fuzz

## check   formatting, vet, staticcheck
.PHONY: check
check:
	@bad=$$(gofmt -l $$(git ls-files '*.go')); if [ -n "$$bad" ]; then echo "not gofmt'ed: $$bad"; exit 1; fi
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...

## unit    unit tests, without the race detector and the end-to-end tests
.PHONY: unit
unit:
	$(GO) test $$($(GO) list ./... | grep -v /e2e)

## race    unit tests with the race detector
.PHONY: race
race:
	$(GO) test -race -timeout 15m $$($(GO) list ./... | grep -v -e '/e2e$$' -e '/e2e/store' -e '/e2e/truth' -e '/e2e/vm' -e '/e2e/containerd' -e '/e2e/deploy')

## e2e     the binary against real registries, images and mounts (root)
.PHONY: e2e
e2e: build
	CFS_FUSE_BIN=$(CURDIR)/$(BIN) $(GO) test -p 1 -timeout 20m -count 1 ./e2e ./e2e/store
	CFS_FUSE_BIN=$(CURDIR)/$(BIN) $(GO) test -timeout 10m -count 1 -short ./e2e/truth
	CFS_FUSE_BIN=$(CURDIR)/$(BIN) $(GO) test -p 1 -timeout 15m -count 1 ./e2e/containerd ./e2e/deploy

## truth   what is shown against what umoci and overlayfs show, large images too (6 minutes); writes docs/truth.md (root)
.PHONY: truth
truth: build
	CFS_FUSE_BIN=$(CURDIR)/$(BIN) $(GO) test -timeout 30m -count 1 ./e2e/truth -write

## test-vm fs-verity enforced, power cuts: in a machine with a Debian kernel (qemu, without KVM; no root needed)
.PHONY: test-vm
test-vm:
	$(GO) test -timeout 15m -count 1 ./e2e/vm

## fuzz    each fuzz target for FUZZTIME (30s)
.PHONY: fuzz
fuzz:
	GO=$(GO) FUZZTIME=$(FUZZTIME) sh e2e/fuzz.sh

## soak-faults  each wrong answer to each kind of request, 20 seeds (SEEDS), some ten minutes
SEEDS     ?= 20
.PHONY: soak-faults
soak-faults:
	CFS_FUSE_FAULT_SEEDS=$(SEEDS) $(GO) test -timeout 60m -count 1 -v -run 'TestFaultMatrix$$' ./fetcher

## deps    install the Debian packages that the tests need
.PHONY: deps
deps:
	APT="$(APT)" sh e2e/deps.sh

## bench   the composefs tools beside mkfs.erofs and fsverity: medians and ratios (needs erofs-utils, fsverity)
.PHONY: bench
bench: build
	APT="erofs-utils fsverity" sh e2e/deps.sh
	$(GO) run ./e2e/bench -bin $(BIN)

## bench-store  a store of a million objects; filling beside 'tar x' (root, ext4 on a loop device)
.PHONY: bench-store
bench-store:
	$(GO) run ./e2e/benchstore
	$(GO) test ./cache -run '^$$' -bench 'Fill' -benchtime 5x

## soak-kill    1,000 processes that fill and read are killed (root; some minutes)
.PHONY: soak-kill
soak-kill:
	CFS_FUSE_SOAK_KILLS=1000 $(GO) test ./e2e/store -count 1 -timeout 2h -v -run TestKillSoak

## soak-containerd  20 containers of 5 images, the snapshotter killed every 2 s for a minute (root)
.PHONY: soak-containerd
soak-containerd: build
	APT="$(APT)" sh e2e/deps.sh
	CFS_FUSE_BIN=$(CURDIR)/$(BIN) CFS_FUSE_SOAK=1m $(GO) test -timeout 30m -count 1 -v -run TestKillSoak ./e2e/containerd

## soak-budget  fill, evict and mount again under half the budget, for an hour (root)
.PHONY: soak-budget
soak-budget:
	CFS_FUSE_SOAK=1h $(GO) test ./e2e/store -count 1 -timeout 2h -v -run TestBudgetSoak

## soak-power   the power of a virtual machine that fills a store is cut 50 times (some minutes)
.PHONY: soak-power
soak-power:
	$(GO) test -tags soakpower ./e2e/power -count 1 -timeout 2h -v

## bench-start first answer and every byte local, against a full pull, on four links (an hour, root; BENCH_ARGS=-help)
.PHONY: bench-start
bench-start: build
	APT="$(APT)" sh e2e/deps.sh
	$(GO) build -trimpath -o bin/benchstart ./e2e/benchstart
	unshare --mount --propagation private bin/benchstart -bin $(BIN) $(BENCH_ARGS)

## bench-containerd  ctr pull and run to the first output, beside overlayfs and any other snapshotter (root; BENCH_ARGS=-help)
.PHONY: bench-containerd
bench-containerd: build
	APT="$(APT)" sh e2e/deps.sh
	$(GO) run ./e2e/benchcontainerd -bin $(BIN) $(BENCH_ARGS)

## bench-fs mounts beside ext4, overlayfs and passthrough: medians, ratios, FUSE requests (root, a quiet machine)
.PHONY: bench-fs
bench-fs: build
	$(GO) run ./e2e/benchfs -bin $(BIN)

## soak-hybrid 100 images filled under eight readers, on live hybrid mounts (root)
.PHONY: soak-hybrid
soak-hybrid:
	CFS_FUSE_FILLS=100 $(GO) test -timeout 30m -count 1 -v -run TestHybridFillsUnderReaders ./mount

## soak-restart  1,000 servers killed under eight readers, with each backend (root, 15 minutes)
.PHONY: soak-restart
soak-restart: build
	CFS_FUSE_BIN=$(CURDIR)/$(BIN) CFS_FUSE_E2E_RESTARTS=1000 $(GO) test -timeout 40m -count 1 -v -run TestKilledUnderReaders ./e2e

## soak-swap   1,000 swaps under eight workers, 200 servers killed while they swap (root; SWAPS, SWAP_KILLS; the pause says something on a quiet machine)
SWAPS     ?= 1000
SWAP_KILLS ?= 200
.PHONY: soak-swap
soak-swap: build
	CFS_FUSE_BIN=$(CURDIR)/$(BIN) CFS_FUSE_E2E_SWAPS=$(SWAPS) CFS_FUSE_E2E_SWAP_KILLS=$(SWAP_KILLS) \
		$(GO) test -timeout 60m -count 1 -v -run 'TestSwapSoak$$|TestSwapKilled$$' ./e2e

## clean   remove what was built here
.PHONY: clean
clean:
	rm -rf bin $(DIST)
