// Command buildimage makes the images of the end-to-end tests ahead of time,
// and says which Debian packages that takes. The tests make them too when they
// are missing; this only moves the minutes elsewhere.
//
//	go run ./e2e/buildimage [-cache DIR] [-web]
//	go run ./e2e/buildimage -packages
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/cfs-fuse/cfs-fuse/e2e/images"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "buildimage:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	cache := flag.String("cache", "", "folder to keep the images in (default $CFS_FUSE_E2E_CACHE, else cfs-fuse-e2e in the user's cache folder)")
	web := flag.Bool("web", false, "make the image that starts are measured on (make bench-start) instead")
	packages := flag.Bool("packages", false, "print the Debian packages that the build and the tests need, and do nothing else")
	flag.Parse()
	if *packages {
		fmt.Println(strings.Join(images.Packages, " "))
		return nil
	}
	if *cache == "" {
		var err error
		if *cache, err = images.DefaultCache(); err != nil {
			return err
		}
	}
	ensure, made := images.Ensure, [][2]string{{images.Plain, images.Debian}, {images.EStargz, images.Debian}, {images.ZstdChunked, images.Debian},
		{images.ZstdStargz, images.Debian}, {images.Plain, images.Odd}, {images.ZstdChunked, images.Odd},
		{images.EStargz, images.Small}, {images.ZstdChunked, images.Small}}
	if *web {
		ensure, made = images.EnsureWeb, [][2]string{{images.Plain, images.Web}, {images.EStargz, images.Web}, {images.ZstdChunked, images.Web}}
	}
	set, err := ensure(ctx, *cache, os.Stderr)
	if err != nil {
		return err
	}
	for _, i := range made {
		m, _, err := set.Manifest(i[0], i[1])
		if err != nil {
			return err
		}
		size, err := set.CompressedSize(i[0], i[1])
		if err != nil {
			return err
		}
		fmt.Printf("%-12s %-8s %d layers, %6.1f MB\n", i[0], i[1], len(m.Layers), float64(size)/1e6)
	}
	fmt.Println(set.Dir)
	return nil
}
