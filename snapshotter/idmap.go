package snapshotter

import (
	"fmt"
	"strconv"
	"strings"
)

// mappedRoot returns the host's ID that ID 0 of a container is mapped to, by
// the mapping that a label of containerd has: "container:host:size", more of
// them after commas (LabelSnapshotUIDMapping in its core/snapshots). An empty
// mapping maps every ID to itself.
func mappedRoot(label string) (int, error) {
	if label == "" {
		return 0, nil
	}
	for part := range strings.SplitSeq(label, ",") {
		fields := strings.Split(part, ":")
		if len(fields) != 3 {
			return 0, fmt.Errorf("ID mapping %.100q: want container:host:size", part)
		}
		var n [3]uint64
		for i, f := range fields {
			var err error
			if n[i], err = strconv.ParseUint(f, 10, 32); err != nil {
				return 0, fmt.Errorf("ID mapping %.100q: %w", part, err)
			}
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, fmt.Errorf("ID mapping %.100q: it does not map root", label)
}
