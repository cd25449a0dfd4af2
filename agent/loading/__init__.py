"""How one replica comes to hold a snapshot: the bucket, its disk, its stages."""

__all__ = ["bucket", "checkpoint_files", "disk", "loader"]
