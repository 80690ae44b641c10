"""The night: noticing what no card fits, learning it from a teacher, and publishing it once a test allows it."""
