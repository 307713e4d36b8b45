//! Kernel tests: everything for real, in network namespaces. They need root; see `tests/`.
