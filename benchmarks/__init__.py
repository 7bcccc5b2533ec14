"""What the edits do and cost, measured. `make bench` runs all of it and writes output/bench/."""
