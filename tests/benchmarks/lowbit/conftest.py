"""The files here belong to environments of their own, one for each tool: pytest passes by."""

collect_ignore_glob = ["*.py"]
