package image

import (
	"bytes"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

func TestProfile(t *testing.T) {
	p := &Profile{Image: Digest{1}, Repository: `docker://host/"name"`, Accesses: []Access{
		{Digest{2}, 0, 1}, {Digest{3}, 1 << 40, 1<<63 - 1 - 1<<40}, {Digest{2}, 4096, 10},
	}}
	raw, err := p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseProfile(raw)
	if err != nil || !reflect.DeepEqual(got, p) {
		t.Fatalf("%+v, %v from %s", got, err, raw)
	}
	// The longest there may be fits, and no more is written.
	p.Accesses = make([]Access, MaxAccesses+1)
	for i := range p.Accesses {
		p.Accesses[i] = Access{Digest{255, byte(i)}, 1 << 61, 1 << 61}
	}
	raw, err = p.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseProfile(raw); err != nil || len(got.Accesses) != MaxAccesses {
		t.Fatalf("%d accesses, %v in %d bytes", len(got.Accesses), err, len(raw))
	}
	empty, err := (&Profile{Image: Digest{1}}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseProfile(empty); err != nil || len(got.Accesses) != 0 {
		t.Fatal(got, err)
	}
}

func TestProfileRefused(t *testing.T) {
	d := Digest{1}.String()
	access := func(s string) string {
		return fmt.Sprintf(`{"version":1,"image":%q,"accesses":[%s]}`, d, s)
	}
	for in, want := range map[string]string{
		``:                               "EOF",
		`[]`:                             "cannot unmarshal",
		`{"version":2,"image":"` + d:     "EOF",
		`{"version":2}`:                  "version 2",
		`{"version":1}`:                  "image",
		access(``) + `x`:                 "follows",
		access(`{"content":"sha256:x"}`): "access 0",
		access(fmt.Sprintf(`{"content":%q,"length":0}`, d)):                              "0 bytes at 0",
		access(fmt.Sprintf(`{"content":%q,"offset":-1,"length":1}`, d)):                  "1 bytes at -1",
		access(fmt.Sprintf(`{"content":%q,"offset":1,"length":9223372036854775807}`, d)): "at 1",
		access(strings.TrimSuffix(strings.Repeat(`{},`, MaxAccesses+1), ",")):            "the limit",
		strings.Repeat(" ", MaxProfileSize+1):                                            "more than",
	} {
		if p, err := ParseProfile([]byte(in)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.100s: %+v, %v; want %q", in, p, err, want)
		}
	}
}

// FuzzProfile reads hostile profiles. What is read, is written and read the same.
func FuzzProfile(f *testing.F) {
	p := &Profile{Image: Digest{1}, Repository: "r", Accesses: []Access{{Digest{2}, 3, 4}}}
	raw, err := p.Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(raw)
	f.Add([]byte(`{"version":1,"image":"sha256:00","accesses":null}`))
	f.Add(bytes.Replace(raw, []byte("4}"), []byte("9e18}"), 1))
	f.Fuzz(func(t *testing.T, raw []byte) {
		p, err := ParseProfile(raw)
		if err != nil {
			return
		}
		again, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		q, err := ParseProfile(again)
		if err != nil || !reflect.DeepEqual(p, q) {
			t.Fatalf("%+v became %+v, %v", p, q, err)
		}
	})
}
