"""The paper's tables beside what a machine measures."""
