package main

import (
	"slices"
	"testing"
)

// What restricts a mount is not only taken.
func TestFuseOptions(t *testing.T) {
	image, objects, words, err := parseFuseOptions(`nosuid,source=a\,b.cfs,ro,basedir=x:y,nodev,noacl,allow_other,default_permissions`)
	if err != nil || image != "a,b.cfs" || !slices.Equal(objects, []string{"x", "y"}) || !slices.Equal(words, []string{"nosuid", "nodev", "allow_other"}) {
		t.Errorf("%q %q %q, %v", image, objects, words, err)
	}
	for _, s := range []string{"source=a,basedir=b,suid", "source=a", "basedir=b", ""} {
		if _, _, _, err := parseFuseOptions(s); err == nil {
			t.Errorf("%q was taken", s)
		}
	}
}
