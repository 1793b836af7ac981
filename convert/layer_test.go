package convert

import (
	"context"
	"errors"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A layer that another image began, and left when it failed, is no reason of
// its own: who shares it gives the other's.
func TestSharedLayer(t *testing.T) {
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: "sha256:00"}
	j := &layerJob{done: make(chan struct{}), err: context.Canceled}
	close(j.done)
	c := &converter{layers: map[layerKey]*layerJob{{d.Digest, nil}: j}}
	reason := errors.New("the other's")
	ctx, cancel := context.WithCancelCause(t.Context())
	result := make(chan error)
	go func() {
		_, err := c.layer(ctx, d, "", nil)
		result <- err
	}()
	select {
	case err := <-result:
		t.Fatalf("before the other has said why: %v", err)
	default:
	}
	cancel(reason)
	if err := <-result; err != reason {
		t.Error(err)
	}
}
