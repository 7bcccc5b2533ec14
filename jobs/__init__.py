"""The pack's longer works: what nodes, benchmarks and reports all run, with progress and interruption passed in."""
