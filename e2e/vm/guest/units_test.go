package guest

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
)

// The unit tests that ask the kernel about fs-verity, on a kernel that has it.
func TestUnits(t *testing.T) {
	for _, c := range []struct{ binary, run string }{
		{"verity.test", "^(TestVectors|TestKernel)"},
		{"kmount.test", "."},
		{"cache.test", "^(TestReopen|TestTwoImages|TestTwoProcesses)$"},
		{"mount.test", "^(TestKernelMount|TestComposefs|TestFirstObject|TestLoopDevice|TestFillSealSwap|TestPinnedDigest|TestVerityRequire|TestSealTogether|TestTryHybrid|TestIDMap|TestUpper|TestContext|TestSwapTakesAlong)"},
	} {
		t.Run(c.binary, func(t *testing.T) {
			dir, err := os.MkdirTemp(disk, "unit")
			check(t, err)
			cmd := exec.Command("/"+c.binary, "-test.v", "-test.run", c.run)
			cmd.Dir, cmd.Env = dir, append(os.Environ(), "TMPDIR="+dir)
			out, err := cmd.CombinedOutput()
			text := string(out)
			passed := len(regexp.MustCompile(`(?m)^--- PASS`).FindAllString(text, -1))
			if err != nil || passed < 3 || strings.Contains(text, "--- SKIP") {
				t.Errorf("%v, %d tests passed:\n%s", err, passed, text)
			}
			t.Logf("%d tests passed", passed)
		})
	}
}
