"""Programs that make files: `python -m vla_infer.tools.<name> --help`."""
