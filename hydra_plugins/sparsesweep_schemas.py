import stages.config  # noqa: F401  DVC composes conf/ against the dataclasses registered there
