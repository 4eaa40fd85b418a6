"""MLPerf's load generator."""
