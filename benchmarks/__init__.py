"""Side-by-side benchmarks of saebench and installed peers; see README.md."""
