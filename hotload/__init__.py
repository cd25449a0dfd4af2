"""hotload: values, decisions and bytes of a hot-load cycle, without any I/O."""
